"""The layer between the routes and the database. It serves any table."""
