"""What the operator and the service manager see."""
