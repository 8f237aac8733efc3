"""One command of `tidegate sim` a file: its options, and how its parts are put together."""
