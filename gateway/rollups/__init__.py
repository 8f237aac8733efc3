"""Rollups: windows of event time and their summaries."""
