"""What is delivered: records in columns, batches, ranges, errors."""
