"""Authentication of devices: identities, passwords, TLS."""
