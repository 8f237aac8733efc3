"""The regional database: its schema, the form in which rows enter it, and its directory of series."""
