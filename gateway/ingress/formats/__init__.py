"""Payload shapes, one pure function each."""
