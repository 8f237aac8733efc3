"""One decoder for each payload format. Pure."""
