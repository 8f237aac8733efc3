"""The one error that a person sees: a sentence on standard error and exit code 2.

Whatever reads options, files, recordings or stores raises it where they are not as expected.
"""

from __future__ import annotations


class SimError(Exception):
    """A command cannot continue. The message says what happened, where, and what to do."""
