"""The durable store: one SQLite file of segments, progress, series and quarantine."""
