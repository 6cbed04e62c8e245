"""Every stage comes to what it comes to on one rank: on more of them, with every `zero=`, however they share
the weights and the passes. The one place that says so of whole stages; a new `zero=` is one row."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple, get_args

import many_ranks
import pytest
from many_ranks import STAGES, TRAINED, difference, figures, published, weights_apart
from transformers import AutoModelForCausalLM

from helpers.warm import Command
from rlhf.distributed.compute import Zero

REWARD = "[learned, {source: python:letters:num_letters, weight: 2.0}]"
WAYS = {
    "one pass": (
        "ppo.ptx.coef=0.5", "dpo.loss=kto", "dpo.data=thumbs.jsonl",
        # a minibatch of groups is a part of the rollout, and some groups are sampled anew
        "grpo.minibatch_episodes=4", "grpo.samples_per_prompt=4", "grpo.max_resamples=1",
    ),
    "minibatches": (
        "ppo.minibatch_episodes=4", "ppo.epochs=2",
        f"ppo.reward={{of: {REWARD}, combine: minimum, normalize: true}}",
    ),
    "lora": (*(f"{stage}.peft=lora" for stage in TRAINED), "ppo.minibatch_episodes=4"),
}  # fmt: skip
"""What is learned, and compared with one rank that learns it. With many_ranks' settings a PPO rollout is one
minibatch, which is learned from by the pass that scored it."""
RATES = ("sft.optim.lr=1e-2", *(f"{stage}.optim.lr=2e-3" for stage in ("ppo", "dpo", "grpo")))
"""With which the best policy, which is published, is not the one that a stage began with."""
CHECKPOINTED = tuple(f"{stage}.activation_checkpointing=true" for stage in TRAINED)
MOST_APART = 5e-5
"""Of a metric relative to its size or to 1, if that is larger; of a weight. Rounding grows over the steps."""
SMALL = ("sft.micro_batch_tokens=40", "reward.micro_batch_tokens=90", "ppo.micro_batch_tokens=60")


class Row(NamedTuple):
    """How it is spread."""

    way: str
    ranks: int
    zero: Zero
    overrides: tuple[str, ...] = ()


ROWS = [
    Row("one pass", 2, "none"),
    Row("minibatches", 4, "none"),
    Row("minibatches", 1, "none", SMALL),
    Row("minibatches", 2, "zero1"),
    Row("minibatches", 2, "zero2"),
    Row("one pass", 2, "zero2", CHECKPOINTED),
    Row("minibatches", 2, "zero3", ("ppo.frozen_placement=sharded",)),
    Row("one pass", 2, "zero3", CHECKPOINTED),
    Row("lora", 2, "zero3"),
    Row("one pass", 2, "zero3_offload"),
    Row("minibatches", 4, "fsdp2", ("ppo.frozen_placement=sharded",)),
    Row("one pass", 2, "fsdp2", CHECKPOINTED),
    Row("lora", 2, "fsdp2"),
    Row("minibatches", 4, "hsdp"),
]


def name_of(row: Row) -> str:
    return "-".join([row.zero, str(row.ranks), row.way.replace(" ", "_"), *(["small"] * (row.ranks == 1))])


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the data."""
    made = tmp_path_factory.mktemp("ranks")
    many_ranks.write_data(made)
    rows = [
        {"prompt": f"Say {n}", "completion": ("Yes" if n % 3 else "No") * (n % 5 + 1), "label": n % 3 > 0}
        for n in range(34)  # half are held out: the last batch has one row, one rank none
    ]
    (made / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (made / "letters.py").write_text(
        "def num_letters(prompts, responses):\n"
        "    found = [sum(each.isalpha() for each in response) for response in responses]\n"
        "    return [float(count) if count else None for count in found]  # some have no score\n"
    )
    return made


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked; those of torchrun are started cold, as the benchmark starts all."""
    cold = many_ranks.start

    def start(words: list[str], directory: Path, environment: dict[str, str], log: IO[str]) -> Any:
        if words[0] != sys.executable:
            return cold(words, directory, environment, log)
        return Command(words[3:], cwd=directory, environment=environment, log=log)

    monkeypatch.setattr(many_ranks, "start", start)


def one_rank(directory: Path, way: str) -> str:
    """The run of one rank that learns so, made when it is asked for first."""
    name = way.replace(" ", "_")
    if not (directory / "runs" / name).exists():
        many_ranks.run(directory, name, 1, *WAYS[way], *RATES)
        start = published(directory, name, "sft")
        for stage in ("ppo", "dpo", "grpo"):
            weights = published(directory, name, stage)
            assert max(float((weights[each] - start[each]).abs().max()) for each in start) > 1e-3, stage
    return name


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_it_is_what_one_rank_makes(directory: Path, row: Row) -> None:
    one, many, nodes = one_rank(directory, row.way), name_of(row), 2 if row.zero == "hsdp" else 1
    ways = (*WAYS[row.way], *RATES, *row.overrides)
    many_ranks.run(directory, many, row.ranks, f"zero={row.zero}", *ways, nodes=nodes)
    expected, found = figures(directory, one), figures(directory, many)
    for stage in STAGES:
        for each in (expected, found):
            each[stage].pop("dpo/train_accuracy of step 1", None)  # margins of rounding, of either sign
        away, metric = difference(expected[stage], found[stage])
        assert away <= MOST_APART, f"{metric}: {expected[stage][metric]}, {found[stage][metric]}"
    assert row.way != "one pass" or found["dpo"]["dpo/train_rows"] == 17  # one more than two batches
    for stage in TRAINED:
        assert weights_apart(directory, one, many, stage) <= MOST_APART, stage
        AutoModelForCausalLM.from_pretrained(directory / "runs" / many / "artifacts" / stage)


def test_each_zero_has_a_row() -> None:
    assert {row.zero for row in ROWS} == set(get_args(Zero))
