"""Alerts: rules, state, and the messages and channels that notify people."""
