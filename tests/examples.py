"""The tutorial's heroes, as clients send them."""

DEADPOND = {"name": "Deadpond", "secret_name": "Dive Wilson"}
RUSTY_MAN = {"name": "Rusty-Man", "secret_name": "Tommy Sharp", "age": 48}
