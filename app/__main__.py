"""`python -m app` is the command `heroes`."""

from app.cli import main

main()
