"""How readings enter: decoded, gathered into groups, committed, acknowledged."""
