"""What is made of readings on the spot."""
