"""Import the slow libraries once per process."""

from __future__ import annotations

import gc
import sys

from rich.console import Console

from rlhf.distributed.signals import uninterrupted


def load_libraries(console: Console) -> None:
    """Import torch, transformers and peft. A signal waits until the import is done.

    The objects of these libraries live until the process ends. So garbage collection is off during the
    import, and skips these objects afterwards (`gc.freeze`). Otherwise imports and every `gc.collect()` are
    slower.
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
