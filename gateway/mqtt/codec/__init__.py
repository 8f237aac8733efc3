"""The MQTT 5 and 3.1.1 packet codec: bytes to packets and back. Pure."""
