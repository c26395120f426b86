"""Make `python -m app` the same as the command `heroes`."""

from app.cli import main

main()
