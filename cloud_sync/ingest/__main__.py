"""`python -m cloud_sync.ingest`: the same as `tidegate ingest`."""

from cloud_sync.ingest.cli import app

app(prog_name="tidegate ingest")
