"""Destination `file`: line protocol or Parquet files in a directory."""
