"""The engine's sleep between rollouts. A CPU keeps its memory, but vLLM goes the same way: it notes what
sleeps, runs nothing before all is awake, and forgets its requests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from helpers.jobs import TINY
from helpers.models import sharper
from helpers.vllm import (
    NEW,
    Engines,
    asleep,
    assert_same,
    lists,
    locally,
    needs_vllm,
    sample,
    shake,
    uniform,
)
from rlhf.config import ConfigError
from rlhf.generation.vllm import Vllm
from rlhf.models.load import load_causal_lm

pytestmark = [needs_vllm, pytest.mark.slow]
BOTH = {"weights", "kv_cache"}


@pytest.fixture
def engine(engines: Engines) -> Iterator[Vllm]:
    """One that sleeps, as on a GPU; whatever a test before left."""
    found = engines.get()
    found._sleeps = True
    yield found


def test_it_wakes_for_weights_then_for_answers_and_sleeps_again(
    engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
) -> None:
    states: list[set[str]] = []

    @contextmanager
    def gathered(modules: Sequence[nn.Module]) -> Iterator[None]:
        states.append(asleep(engine))
        yield

    def note(rows: int) -> None:
        states.append(asleep(engine))

    answers = []
    for seed in range(3):
        shake(model, seed)
        states.clear()
        engine.hand_over(model, gathered)
        assert {*map(frozenset, states)} == {frozenset() if seed == 0 else frozenset({"kv_cache"})}
        states.clear()
        rollout = engine.generate(
            prompts, max_new_tokens=NEW, temperature=0.0, stop_ids=[], uniform_BR=uniform(len(prompts), NEW),
            on_rows=note,
        )  # fmt: skip
        assert states and not any(states)
        assert asleep(engine) == BOTH
        assert_same(rollout, locally(model, prompts))
        answers.append(lists(rollout))
    assert answers[0] != answers[1] != answers[2]


def test_what_fails_in_the_middle_leaves_it_asleep_and_without_requests(
    engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
) -> None:
    def stop(rows: int) -> None:
        raise KeyboardInterrupt  # as a signal does

    stops = [lists(locally(model, prompts))[0][3]]  # one answer is shorter than the others
    with pytest.raises(KeyboardInterrupt):
        sample(engine, model, prompts, stop_ids=stops, on_rows=stop)
    assert asleep(engine) == BOTH
    assert not engine._llm.llm_engine.has_unfinished_requests()
    assert_same(sample(engine, model, prompts), locally(model, prompts))
    assert asleep(engine) == BOTH


def test_a_rollout_that_is_refused_leaves_it_asleep(
    engines: Engines, model: PreTrainedModel, prompts: list[Tensor]
) -> None:
    short = engines.get(max_model_len=32)
    short._sleeps = True
    with pytest.raises(ConfigError, match=r"vllm\.max_model_len=32"):
        sample(short, model, prompts)
    assert asleep(short) == BOTH
    assert_same(sample(short, model, prompts[:2]), locally(model, prompts[:2]))


def test_policies_take_turns_and_one_that_is_not_sampled_from_is_replaced(
    engine: Vllm, model: PreTrainedModel, directory: Path, prompts: list[Tensor]
) -> None:
    other = sharper(directory)
    shake(other, 9)
    for each in (model, other, model):
        assert_same(sample(engine, each, prompts), locally(each, prompts))
    engine.hand_over(other)
    assert asleep(engine) == {"kv_cache"}
    assert engine.holds(other)
    assert_same(sample(engine, model, prompts), locally(model, prompts))


def test_refused_weights_do_not_hinder_the_next(
    engine: Vllm, model: PreTrainedModel, directory: Path, prompts: list[Tensor]
) -> None:
    broken = load_causal_lm(directory, TINY, torch.float32)
    delattr(broken.model, "norm")
    with pytest.raises(ConfigError, match=r"1 weights, such as model\.norm\.weight"):
        engine.hand_over(broken)
    assert_same(sample(engine, model, prompts), locally(model, prompts))


def test_it_is_closed_asleep_or_before_it_was_built(
    engines: Engines, engine: Vllm, model: PreTrainedModel, prompts: list[Tensor]
) -> None:
    before = sample(engine, model, prompts)
    assert asleep(engine) == BOTH
    engines.close()
    engines.get()
    engines.close()
    again = engines.get()
    again._sleeps = True
    assert_same(sample(again, model, prompts), before)
