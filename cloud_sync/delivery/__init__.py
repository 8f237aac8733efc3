"""The shipper: lanes, batches, limits, and what becomes of failures."""
