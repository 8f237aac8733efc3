"""MQTT: the server that devices publish to, and the subscriber of an existing broker."""
