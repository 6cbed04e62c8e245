"""`trl:FUNCTION`: TRL's own reward functions, with their arguments, and without TRL."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest
import torch

from helpers.jobs import user
from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.rewards import trl_functions
from rlhf.rewards.kinds import RewardPart, reward_digest, reward_kind
from rlhf.rewards.reward import with_token_ids
from rlhf.rewards.trl_functions import trl_reward

ROWS = [
    PromptRow(user("1/3?"), columns={"solution": solution}, is_text=True)
    for solution in (r"$\frac{1}{3}$", r"$\frac{1}{3}$", "")
]
SAID = [r"My answer is $\boxed{\frac{1}{3}}$", r"My answer is $\boxed{\frac{1}{2}}$", "?"]


def test_accuracy_is_trls() -> None:
    scores = trl_reward("trl:accuracy_reward", {})(ROWS, SAID)
    assert scores[:2].tolist() == [1.0, 0.0] and scores[2].isnan()
    (part,) = [RewardPart(source="trl:accuracy_reward")]
    assert reward_kind(part.source).needs(part) == {"solution"}
    versions = {name: importlib.metadata.version(name) for name in ("trl", "math-verify")}
    assert reward_digest(part.source) == versions


def test_functions_that_make_a_reward_take_arguments() -> None:
    rows = with_token_ids(ROWS[:2], [torch.arange(90), torch.arange(10)])
    args = {"max_completion_len": 100, "soft_punish_cache": 20}
    assert trl_reward("trl:get_soft_overlong_punishment", args)(rows, SAID[:2]).tolist() == [-0.5, 0.0]
    more = {"reasoning_delimiters": ["so"]}
    scores = trl_reward("trl:reasoning_accuracy_reward", more)(ROWS[:1], [rf"hm so {SAID[0]}"])
    assert scores.tolist() == [1.0]


@pytest.mark.parametrize(("source", "args", "said"), [
    ("trl:acuracy_reward", {}, "Did you mean accuracy_reward?"),
    ("trl:get_soft_overlong_punishment", {}, "missing 2 required positional arguments"),
    ("trl:get_soft_overlong_punishment", {"max": 1}, "got an unexpected keyword argument 'max'"),
])  # fmt: skip
def test_what_trl_does_not_have_is_told(source: str, args: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        trl_reward(source, args)
    assert said in str(caught.value)


def test_without_trl_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trl_functions, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError,
        match=r"^trl:accuracy_reward: it needs trl and math-verify \(pip install -e '\.\[trl\]'\)\.$",
    ):
        reward_digest("trl:accuracy_reward")
