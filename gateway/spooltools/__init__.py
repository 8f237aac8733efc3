"""Tools over a live or stopped spool: check, read, export, compact, quarantine."""
