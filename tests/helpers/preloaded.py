"""What the process that tests fork theirs from has imported: the slow libraries, and what a chain imports."""

from __future__ import annotations

import gc
from importlib import import_module
from pkgutil import iter_modules

from rlhf.cli.execute import set_up_libraries

set_up_libraries()  # before they are imported
gc.disable()
for _name in (
    "deepspeed", "pandas", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "transformers.models.llama.modeling_llama", "rlhf.__main__", "rlhf.cli.app", "rlhf.cli.worker",
    "rlhf.models.peft.attach", "rlhf.pipeline.runner",
):  # fmt: skip
    import_module(_name)
for _module in iter_modules(import_module("rlhf.stages").__path__):
    import_module(f"rlhf.stages.{_module.name}")
gc.enable()
gc.freeze()  # as in a run (rlhf/models/libraries.py): no search for garbage looks through them
