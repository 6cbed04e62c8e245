"""No rank may end before the checkpoint stands: launchers then end the others, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ONE_RANK = """
import json, os, sys, time
from pathlib import Path
from rlhf.training.checkpoint import CheckpointConfig, Checkpointer
from rlhf.distributed.compute import make_compute
from rlhf.training.engine import PlainEngine
from rlhf.distributed.signals import StopSignals
from rlhf.tracking.tracker import Tracker
from rlhf.training.optimizer import OptimConfig
from torch import nn

directory = Path(sys.argv[1])
compute, _ = make_compute("cpu", "fp32", timeout=60)
config = CheckpointConfig(every_steps=1, every_minutes=None, background=False, keep=1, resume=True)
tracker = Tracker(None, [])
tracker.begin(directory)
checkpoints = Checkpointer(directory / "checkpoints", config, compute, tracker, StopSignals(), print, "sft")
finish = checkpoints._finish

def finish_late(*arguments):
    deadline = time.monotonic() + 2
    while time.monotonic() < deadline and not (directory / "left").exists():
        pass  # rank 1 has its chance to leave
    finish(*arguments)

checkpoints._finish = finish_late
model = nn.Linear(1, 1)
optim = OptimConfig(
    lr=0.1, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1.0
)
checkpoints.save(1, PlainEngine(model, [(model.parameters(), optim)], compute), {})
stands = (directory / "checkpoints" / "step-00000001").exists()
if compute.rank == 1:
    (directory / "left").write_text(json.dumps(stands))
os._exit(0)  # the process group's threads may abort a process that winds down
"""


def test_a_rank_leaves_a_save_when_the_checkpoint_stands(tmp_path: Path) -> None:
    (tmp_path / "one_rank.py").write_text(ONE_RANK)
    run = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "one_rank.py", str(tmp_path)]
    subprocess.run(
        [sys.executable, "-m", *run], cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True
    )
    assert (tmp_path / "left").read_text() == "true"
