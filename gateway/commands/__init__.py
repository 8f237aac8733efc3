"""The `tidegate` command groups, one thin file each."""
