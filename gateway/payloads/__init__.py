"""Payloads to measurements: rules, topics, field maps."""
