"""The one error a person sees: a sentence on standard error and exit code 2."""

from __future__ import annotations


class SimError(Exception):
    """A command cannot go on. The message says what happened, where, and what to do."""
