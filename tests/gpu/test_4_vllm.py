"""vLLM beside a trainer on one device: with CUDA graphs on a GPU; a CPU has none, and no sleep either."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from helpers.encoded import answers_of
from helpers.gpu import OPTIM, ROWS, Reaches
from helpers.jobs import TINY
from helpers.models import scale
from helpers.vllm import LENGTHS, Engines, asleep, lists, needs_vllm, own_logp, sample, written
from rlhf.config import ConfigError
from rlhf.generation.vllm import Vllm
from rlhf.models.base import load_tokenizer
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel
from rlhf.supervised.answers import answer_step
from rlhf.training.make_engine import make_engine

pytestmark = [pytest.mark.gpu, pytest.mark.slow, needs_vllm]
GIB = 2**30
CACHE = 2.0
"""GiB for keys and values, of which sleep must give most back."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("tiny64"), head_dim=64)


@pytest.fixture(scope="module")
def dtype(on_gpu: bool) -> torch.dtype:
    """vLLM's kernels of GPUs want 16 bits."""
    return torch.bfloat16 if on_gpu else torch.float32


@pytest.fixture
def engines(device: torch.device) -> Iterator[Engines]:
    found = Engines(device)
    yield found
    found.close()


@pytest.fixture
def model(directory: Path, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    found = load_causal_lm(directory, TINY, dtype, device)
    scale(found, 6.0)
    return found


@pytest.fixture
def prompts() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(0, 259, (length,), generator=generator) for length in LENGTHS]


def away(engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]) -> float:
    """Nats a token between what vLLM says of its answers and what the model does."""
    rollout = sample(engine, model, prompts, temperature=1.0)
    assert rollout.sampled_logp is not None
    wanted = torch.cat(own_logp(model, rollout, 1.0)).float()
    return float((torch.cat(rollout.sampled_logp) - wanted).abs().mean())


def test_what_a_trainer_learns_arrives_twice(
    engines: Engines, model: PreTrainedModel, directory: Path, prompts: list[Tensor], dtype: torch.dtype,
    device: torch.device, on_gpu: bool, reaches: Reaches,
) -> None:  # fmt: skip
    vllm = engines.get(dtype, enforce_eager=False)
    compute = vllm._compute
    optim = OPTIM.model_copy(update={"lr": 0.02})
    trainer = make_engine(ResponseModel(model), [(model.parameters(), optim)], compute)
    rows = answers_of(load_tokenizer(directory, TINY), ROWS)
    answers = [lists(sample(vllm, model, prompts))]
    for step in range(2):
        trainer.set_rates(step, 10)
        answer_step(trainer, rows, 1000, compute)
        bound = 0.05 if dtype == torch.bfloat16 else 1e-4
        reaches(f"nats a token, hand-over {step + 1}", away(vllm, model, prompts), at_most=bound)
        answers.append(lists(sample(vllm, model, prompts)))
    assert answers[0] != answers[1] != answers[2]
    assert vllm._llm.llm_engine.model_config.enforce_eager == (not on_gpu)


def test_asleep_it_gives_its_memory_back_and_awake_it_answers_as_before(
    engines: Engines, model: PreTrainedModel, prompts: list[Tensor], dtype: torch.dtype, on_gpu: bool,
    reaches: Reaches,
) -> None:  # fmt: skip
    """As between rollouts, by its own state. A CPU goes the same way and keeps its memory."""
    engine = engines.get(dtype, enforce_eager=False, kv_cache_gib=CACHE if on_gpu else 0.03)
    assert engine._sleeps == on_gpu
    engine._sleeps = True
    found, awake = [], [0]

    def note(rows: int) -> None:
        awake[0] = free(on_gpu)

    for _ in range(3):
        found.append(lists(sample(engine, model, prompts, on_rows=note)))
        assert asleep(engine) == {"weights", "kv_cache"}
        if on_gpu:
            given_back = (free(on_gpu) - awake[0]) / (CACHE * GIB)
            reaches("share of its cache that it gives back", given_back, at_least=0.9)
    assert found[0] == found[1] == found[2]
    engines.close()  # while it sleeps, and another takes its place
    assert lists(sample(engines.get(dtype, enforce_eager=False), model, prompts)) == found[0]


def free(on_gpu: bool) -> int:
    """Bytes that the device has left; a CPU is not asked."""
    return torch.cuda.mem_get_info()[0] if on_gpu else 0


def test_memory_that_ran_out_is_not_the_users_mistake(
    engines: Engines, model: PreTrainedModel, dtype: torch.dtype, on_gpu: bool
) -> None:
    """A GPU that something else fills; on a CPU a limit for this process, which vLLM does not look at."""
    held = torch.empty(0)
    with ExitStack() as stack:
        if on_gpu:
            held = torch.empty(max(0, free(on_gpu) - GIB), dtype=torch.uint8, device=model.device)
        else:
            stack.enter_context(limited(GIB))
        with pytest.raises((RuntimeError, MemoryError)) as raised:
            engines.get(dtype, kv_cache_gib=4.0 if on_gpu else 2.0).hand_over(model)
    assert not isinstance(raised.value, ConfigError), raised.value
    assert "memory" in str(raised.value).lower()
    del held


@contextmanager
def limited(more: int) -> Iterator[None]:
    """While open, this process gets only so many bytes of addresses more, beside vLLM's libraries."""
    import vllm  # noqa: F401

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
