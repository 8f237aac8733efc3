"""What an unknown device publishes: guesses and proposed rules."""
