"""Exit codes of `python -m rlhf`."""

DONE = 0
CRASH = 1
CONFIG_ERROR = 2
"""An error in the configuration or data."""
GATE_FAILED = 3
"""A gate failed; of `verify`: something is damaged."""
NOT_FOUND = 3
"""Of `bisect`: no cause was found."""
STOPPED = 75
"""Stopped by a scheduler's signal: the same command continues."""
INTERRUPTED = 130
"""Stopped by Ctrl-C: the same command continues."""
PIPE = 141
"""The reader of the output closed it (`| head`)."""
