"""The configuration: tables, keys, changes."""
