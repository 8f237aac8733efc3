"""The demonstration: every tier on this machine, an outage and a kill, and a count at the end."""
