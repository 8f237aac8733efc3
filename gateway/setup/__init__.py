"""Setting a machine up: a plan of steps that can be shown before any of it is done."""
