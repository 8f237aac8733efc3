"""A simulated device: sensors, firmware, payloads, radio."""
