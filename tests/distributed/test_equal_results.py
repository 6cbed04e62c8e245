"""The result does not depend on the number of ranks, on sharding, or on the size of the micro-batches."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from helpers.chains import GROUPS, RealChain

TOLERANCE = 1e-3
"""Relative, over six optimizer steps of fp32 training; a first step agrees to about 1e-6."""
ONE_PASS = "ppo.minibatch_episodes=8"
"""A rollout is one minibatch, which is learned from by the pass that scored it."""
CHECKPOINTED = tuple(f"{stage}.activation_checkpointing=true" for stage in ("sft", "reward", "ppo"))
VARIANTS = {
    "two_ranks": ("launch.processes=2",),
    "fsdp2": ("launch.processes=2", "zero=fsdp2", "ppo.frozen_placement=sharded"),
    "accumulation": (
        "sft.micro_batch_tokens=40",
        "reward.micro_batch_tokens=90",
        "ppo.micro_batch_tokens=60",
    ),
    "zero3": ("launch.processes=2", "zero=zero3", "ppo.frozen_placement=sharded"),
    "checkpointed_one_pass_zero2": ("launch.processes=2", "zero=zero2", *CHECKPOINTED, ONE_PASS),
    "checkpointed_one_pass_zero3": ("launch.processes=2", "zero=zero3", *CHECKPOINTED, ONE_PASS),
    "checkpointed_one_pass_fsdp2": ("launch.processes=2", "zero=fsdp2", *CHECKPOINTED, ONE_PASS),
    "one_pass": ("launch.processes=2", ONE_PASS),
    "zero2": ("launch.processes=2", "zero=zero2"),
    "four_ranks": ("launch.processes=4",),
    "mix_zero3_offload": ("launch.processes=2", "zero=zero3_offload", "ppo.ptx.coef=0.5"),
    "zero1": ("launch.processes=2", "zero=zero1"),
    "fsdp2_lora": ("launch.processes=2", "zero=fsdp2", "sft.peft=lora", "reward.peft=lora", "ppo.peft=lora"),
    "zero3_lora": ("launch.processes=2", "zero=zero3", "sft.peft=lora", "reward.peft=lora", "ppo.peft=lora"),
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> RealChain:
    return RealChain(tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.parametrize("name", VARIANTS)
def test_losses_gradients_and_scores_are_those_of_one_rank(chain: RealChain, name: str) -> None:
    overrides = VARIANTS[name]
    same_for_all = (".peft=", ".ptx.", ONE_PASS)
    reference = chain.run_once(
        *(override for override in overrides if any(part in override for part in same_for_all))
    )
    chain.run(name, *overrides, "stage=reward")
    compare(chain, reference, name, ("sft", "reward"))
    shutil.rmtree(chain.store(name))
    # PPO starts from the reference's models, so that its own first step can be held to rounding too
    shutil.copytree(chain.store(reference), chain.store(name))
    chain.run(name, *overrides, "force=[ppo]")
    compare(chain, reference, name, ("ppo",))


@pytest.mark.slow
def test_groups_without_a_critic_are_those_of_one_rank(chain: RealChain) -> None:
    """tests/distributed/test_every_sharding.py has every zero=."""
    names = ("groups_of_one_rank", "groups_of_two")
    for each, settings in zip(names, ((), ("launch.processes=2",)), strict=True):
        shutil.copytree(chain.store(chain.run_once()), chain.store(each))
        chain.run(each, *GROUPS, *settings)
    compare(chain, names[0], names[1], ("grpo",))
    assert len({step for stage, step, _ in chain.curve(names[1]) if stage == "grpo"}) > 4


def compare(chain: RealChain, reference: str, name: str, stages: tuple[str, ...]) -> None:
    expected, found = (
        {key: value for key, value in chain.curve(run).items() if key[0] in stages}
        for run in (reference, name)
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        is_first = key[1] == 1 and key[2].endswith(("loss", "grad_norm"))
        tolerance = 1e-5 if is_first else TOLERANCE
        assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key


THUMBS = (
    "stage=dpo", "dpo.init=base", "dpo.loss=kto", "dpo.peft=none", "dpo.optim.lr=1e-3", "dpo.batch_rows=8",
    "dpo.data=thumbs.jsonl",
)  # fmt: skip


@pytest.mark.parametrize(
    "overrides",
    [
        ("launch.processes=2",),
        ("launch.processes=2", "zero=fsdp2"),
        ("launch.processes=2", "zero=zero3"),
    ],
    ids=lambda overrides: overrides[-1].partition("=")[2],
)
@pytest.mark.slow
def test_thumbs_teach_the_same_on_ranks_without_rows(chain: RealChain, overrides: tuple[str, ...]) -> None:
    """The last batch has one row: one rank has none. KTO's reference point is of all ranks."""
    rows = [{"prompt": f"Say {n}", "completion": "No" * (n % 5 + 1), "label": n % 3 > 0} for n in range(27)]
    (chain.directory / "thumbs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reference, name = chain.run_once(*THUMBS), "-".join(overrides[-1].split("="))
    chain.run(name, *THUMBS, *overrides)
    compare(chain, reference, name, ("dpo",))
    lasts = [
        {key: value for key, value in chain.metrics(each)[-1].items() if key.startswith("dpo/")}
        for each in (reference, name)
    ]
    assert lasts[0]["dpo/train_rows"] % 8 == 1 and lasts[0]["dpo/steps"] > 1
    assert lasts[1] == pytest.approx(lasts[0], rel=1e-3, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["fsdp2", "zero3"])
def test_a_model_trained_by_sharded_ranks_is_a_plain_directory(chain: RealChain, sharded: str) -> None:
    from transformers import AutoModelForCausalLM

    if not (chain.directory / "runs" / sharded).exists():
        chain.run(sharded, *VARIANTS[sharded])
    models = [
        AutoModelForCausalLM.from_pretrained(chain.directory / "runs" / name / "artifacts" / "ppo")
        for name in (chain.run_once(), sharded)
    ]
    states = [model.state_dict() for model in models]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.allclose(states[1][name], value, rtol=0, atol=1e-4), name


@pytest.mark.slow
def test_a_batch_that_the_ranks_cannot_share_is_refused(chain: RealChain) -> None:
    _, err = chain.run("uneven", "launch.processes=2", "ppo.batch_episodes=9", code=2)
    assert err.count("Error:") == 1
    assert "ppo.batch_episodes=9 cannot be divided equally over 2 ranks. Use 8 or 10." in err


@pytest.mark.slow
def test_one_ranks_exception_ends_the_others_and_is_shown_once(chain: RealChain) -> None:
    (chain.directory / "reward_of_rank0.py").write_text(
        "import os\n\nclass CrashError(BaseException):\n    pass\n\ndef score(prompts, responses):\n"
        "    if os.environ['RANK'] != '0':\n        raise CrashError('only here')\n"
        "    return [0.0] * len(responses)\n"
    )
    overrides = (
        "ppo.reward=python:reward_of_rank0:score", "ppo.critic.init=sft", "ppo.score.normalize=none"
    )  # fmt: skip
    _, err = chain.run("one_fails", *overrides, "launch.processes=2", code=1)
    assert err.count("CrashError: only here") == 1 and err.count("Traceback") == 1
    assert "Rank 1 failed first" in err
