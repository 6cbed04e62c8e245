"""vLLM on a tiny model, and what its answers are compared with."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.jobs import on_cpu
from helpers.models import sharper
from rlhf.distributed.compute import Compute
from rlhf.generation.sampler import generate
from rlhf.generation.vllm import Vllm, VllmConfig
from rlhf.models import base
from rlhf.rl.rollout import Rollout

LENGTHS = (5, 17, 1, 9, 30, 9)
NEW = 12
SMALL = VllmConfig(
    tensor_parallel=1, kv_cache_gib=0.03, max_num_seqs=64, max_model_len=None, enforce_eager=True
)
CHAIN = ("generation=vllm", "vllm.kv_cache_gib=0.03")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def written(directory: Path, **changes: int) -> Path:
    """The tiny model with changes; its own heads are too small for vLLM's kernels."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changes.items():
            patch.setitem(base.TINY, name, value)
        base._write_tiny(directory)
    return directory


@torch.no_grad()
def shake(model: PreTrainedModel, seed: int) -> None:
    """Change every weight in place, as an optimizer does."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


class Engines:
    """One at a time: closing one ends what another would need."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = device
        self.current: Vllm | None = None
        self.made: tuple[Any, ...] = ()

    def get(self, dtype: torch.dtype = torch.float32, **changes: Any) -> Vllm:
        """The one that is there where it is as wanted."""
        wanted = (dtype, changes)
        if self.current is None or self.made != wanted:
            self.close()
            compute = replace(on_cpu(dtype=dtype), device_name=str(self.device))
            self.current = Vllm(SMALL.model_copy(update=changes), compute)
            self.made = wanted
        return self.current

    def close(self) -> None:
        if self.current is not None:
            self.current.close()
            self.current = None


def asleep(engine: Vllm) -> set[str]:
    """What vLLM says that it has put to sleep."""
    return set(engine._llm.llm_engine.engine_core.engine_core.model_executor.sleeping_tags)


def uniform(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def locally(model: PreTrainedModel, prompts: Sequence[Tensor], **changes: Any) -> Rollout:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW, "temperature": 0.0, "stop_ids": [], "pad_id": 0, "batch_rows": 64,
        "uniform_BR": uniform(len(prompts), NEW),
    }  # fmt: skip
    return generate(model, prompts, **(settings | changes))


def sample(engine: Vllm, model: PreTrainedModel, prompts: Sequence[Tensor], **changes: Any) -> Rollout:
    settings: dict[str, Any] = {
        "max_new_tokens": NEW, "temperature": 0.0, "stop_ids": [], "uniform_BR": uniform(len(prompts), NEW)
    }  # fmt: skip
    engine.hand_over(model)
    return engine.generate(prompts, **(settings | changes))


def lists(rollout: Rollout) -> list[list[int]]:
    return [ids.tolist() for ids in rollout.response_ids]


@torch.no_grad()
def own_logp(model: PreTrainedModel, rollout: Rollout, temperature: float) -> list[Tensor]:
    """The model's log-probabilities of each response, row by row."""
    found = []
    for prompt, response in zip(rollout.prompt_ids, rollout.response_ids, strict=True):
        ids = torch.cat([prompt, response]).to(model.device)
        logits = model(ids[None]).logits[0, len(prompt) - 1 : -1].cpu()
        found.append((logits / temperature).log_softmax(-1).gather(-1, response[:, None]).squeeze(-1))
    return found


def assert_same(first: Rollout, second: Rollout) -> None:
    assert lists(first) == lists(second)
    assert first.stopped.tolist() == second.stopped.tolist()
    assert first.sampled_logp is not None
    assert second.sampled_logp is not None
    torch.testing.assert_close(
        torch.cat(first.sampled_logp), torch.cat(second.sampled_logp), atol=1e-4, rtol=0
    )


ROLLOUTS = ((20, 1.0), (20, 0.0), (3, 1.0), (1, 1.0), (0, 1.0))
"""Prompts and temperature of the rollouts that ranks make together."""


def some_prompts(count: int) -> list[Tensor]:
    """Prompts of 1 to 60 tokens."""
    generator = torch.Generator().manual_seed(count)
    return [torch.randint(0, 259, (1 + 7 * row % 60,), generator=generator) for row in range(count)]


class Answers(NamedTuple):
    """A rollout without tensors, which another process could not read once this one has ended."""

    ids: list[list[int]]
    stopped: list[bool]
    logps: list[float]
    told: int
    """Answers that were told while they came."""


def roll_out(engine: Vllm, model: PreTrainedModel) -> dict[tuple[int, float], Answers]:
    """Each of `ROLLOUTS`."""
    found = {}
    for count, temperature in ROLLOUTS:
        told: list[int] = []
        rollout = sample(
            engine, model, some_prompts(count), temperature=temperature, stop_ids=range(3, 23),
            on_rows=told.append, uniform_BR=uniform(count, NEW),
        )  # fmt: skip
        logps = torch.cat([torch.zeros(0), *(rollout.sampled_logp or [])]).tolist()
        found[count, temperature] = Answers(lists(rollout), rollout.stopped.tolist(), logps, sum(told))
    return found


def held(engine: Vllm) -> dict[str, int]:
    """Elements of each matrix that this rank's part of the engine multiplies by. A CPU's kernels keep them in
    a form of their own, so the parameters themselves are empty."""

    def sizes(worker: Any) -> dict[str, int]:
        modules = dict(worker.model_runner.get_model().named_modules())
        linear = {
            name: module.input_size_per_partition * module.output_size_per_partition
            for name, module in modules.items()
            if hasattr(module, "output_size_per_partition")
        }
        embedding = {
            name: module.num_embeddings_per_partition * module.embedding_dim
            for name, module in modules.items()
            if hasattr(module, "num_embeddings_per_partition")
        }
        return linear | embedding

    (found,) = engine._llm.collective_rpc(sizes)
    return dict(found)


def together(
    compute: Compute, directory: Path, tensor_parallel: int
) -> tuple[dict[tuple[int, float], Answers], dict[str, int]]:
    """What one of several ranks gets, and holds."""
    config = SMALL.model_copy(update={"tensor_parallel": tensor_parallel, "max_num_seqs": 3})
    engine = Vllm(config, compute)
    return roll_out(engine, sharper(directory)), held(engine)


START_TRIES, SECONDS = 600, 1.0


@contextmanager
def served(directory: Path, *options: str) -> Iterator[str]:
    """Base URL of a vLLM that serves a model, as a user would start it; it ends with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(directory),
        "--host", "127.0.0.1", "--port", str(port), "--enforce-eager", "--dtype", "float32", *options,
    ]  # fmt: skip
    log = directory.with_name("server.log")
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    with (
        log.open("w") as file,
        subprocess.Popen(command, stdout=file, stderr=file, env=os.environ | settings) as server,
    ):
        try:
            _wait_until_ready(server, port, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def _wait_until_ready(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    for _ in range(START_TRIES):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=SECONDS):
                return
        except OSError:  # it is not there yet
            try:
                server.wait(SECONDS)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(log.read_text()[-3000:])
    pytest.fail(f"vLLM was not ready: {log.read_text()[-3000:]}")
