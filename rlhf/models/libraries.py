"""The slow libraries, loaded once and for good."""

from __future__ import annotations

import gc
import sys

from rich.console import Console

from rlhf.distributed.signals import uninterrupted


def load_libraries(console: Console) -> None:
    """Import torch, transformers and peft here, where a signal can wait.

    What they make stays until the process ends. So nothing looks for garbage among it, now or later: that
    took a fifth of the time to load, and a third of a second of each `gc.collect()`.
    """
    if "rlhf.models.peft.attach" in sys.modules:
        return
    if console.is_terminal and "torch" not in sys.modules:
        console.print("loading torch and transformers ...", highlight=False)
    with uninterrupted():
        gc.disable()
        try:
            import rlhf.models.peft.attach  # noqa: F401
        finally:
            gc.enable()
        gc.freeze()
