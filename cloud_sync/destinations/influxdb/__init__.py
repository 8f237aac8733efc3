"""Destination `influxdb`: the v1 and v2 write paths over HTTP."""
