"""What was stored, read from every kind of store, and compared with the ground truth."""
