"""What publishing takes of each rank's private memory: about a file of weights, not a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sharded_memory import PrivateMemory, write_models
from transformers import AutoTokenizer

from helpers.spawned import start_ranks
from rlhf.distributed.compute import Compute, Zero
from rlhf.models.base import ModelConfig
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.models.peft.attach import attach
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.merge import publish_policy
from rlhf.training import trained
from rlhf.training.config import OptimConfig
from rlhf.training.make_engine import make_engine

MODEL = ModelConfig(kind="local", attention="sdpa")
OPTIM = OptimConfig(
    lr=1e-5, weight_decay=0.0, eps=1e-8, schedule="linear", warmup_fraction=0.0, max_grad_norm=1.0
)
FILE = 20 * 2**20
"""Of the 111 MiB of weights; the largest one has 1.5."""
BOUND = 40.0
"""MiB: a file, and a few weights as they are gathered and merged."""


def publish(compute: Compute, start: Path, directory: Path) -> dict[tuple[str, str, str], float]:
    """By engine, method and precision: MiB of private memory at most, above what the engine holds. The files
    are in fp32."""
    trained.FILE_BYTES = FILE
    found: dict[tuple[str, str, str], float] = {}
    engines = []
    zeros: tuple[Zero, ...] = ("none", "fsdp2")
    cases = [(zero, method, "float32") for zero in zeros for method in ("none", "lora", "dora")]
    for zero, method, dtype in [*cases, ("none", "lora", "bfloat16"), ("fsdp2", "none", "bfloat16")]:
        here = replace(compute, zero=zero, dtype_name=dtype)
        policy = load_causal_lm(start, MODEL, here.dtype, here.loads_on, here)
        attach(policy, PeftConfig(method=method))
        engine = make_engine(ResponseModel(policy), [(policy.parameters(), OPTIM)], here)
        engines.append(engine)  # else freed memory would be used again, unnoticed
        artifact = directory / f"{zero}-{method}-{dtype}"
        compute.main_only(artifact.mkdir)

        def write(here: Compute = here, method: str = method, artifact: Path = artifact) -> None:
            publish_policy(
                artifact, artifact.with_suffix(".trained"), AutoTokenizer.from_pretrained(start),
                start=start, key="", settings=MODEL, dtype=here.dtype, peft=PeftConfig(method=method),
            )  # fmt: skip

        memory = PrivateMemory()
        with memory.phase("publishing"):
            engine.save_trained(policy, artifact.with_suffix(".trained"))
            compute.main_only(write)
        found[zero, method, dtype] = memory.peaks["publishing"]
    return found


@pytest.mark.slow
def test_publishing_takes_about_a_file_not_a_model(tmp_path: Path) -> None:
    write_models(tmp_path, "small")
    directory = tmp_path / "store" / "sft"
    directory.mkdir(parents=True)
    found = start_ranks(publish, 2, tmp_path / "model", directory, timeout=300, seconds=600)()
    for rank, peaks in found.items():
        assert isinstance(peaks, dict), f"rank {rank}: {peaks}"
        for case, peak in peaks.items():
            assert peak <= BOUND, (rank, case)
    for artifact in directory.glob("*[!d]"):
        assert all(file.stat().st_size <= FILE + 2**20 for file in artifact.glob("*.safetensors"))
        assert len(list(artifact.glob("*.safetensors"))) > (5 if artifact.name.endswith("float32") else 2)
