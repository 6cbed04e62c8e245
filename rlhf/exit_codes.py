"""How `python -m rlhf` ends."""

DONE = 0
CRASH = 1
CONFIG_ERROR = 2
"""Configuration or data."""
GATE_FAILED = 3
"""A gate failed; of `verify`: something is damaged."""
STOPPED = 75
"""By a scheduler's signal: the same command continues."""
INTERRUPTED = 130
"""By Ctrl-C: the same command continues."""
PIPE = 141
"""Nobody reads the output any more."""
