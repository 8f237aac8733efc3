"""Records as bytes: the columnar block, the wire batch, line protocol, Parquet."""
