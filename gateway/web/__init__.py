"""The gateway's own HTTP endpoint: status page, status document, metrics, health, and a client for it."""
