"""Import and export of many rows, for the API and the command."""
