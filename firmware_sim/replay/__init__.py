"""Recorded files as input: columns, values, and the player that sends them."""
