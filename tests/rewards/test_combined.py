"""Several rewards at once: how they are written, combined and normalised. P parts, B responses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from helpers.jobs import user
from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.rewards.combined import CombinedReward, Moments, combine, scored
from rlhf.rewards.kinds import RewardMix, RewardSource, critic_part, keyed_parts, models_of, reward_digest

NAN = math.nan
READ: TypeAdapter[Any] = TypeAdapter(RewardSource)


@pytest.mark.parametrize(("how", "found"), [
    ("sum", [4.0, 1.0, NAN]),
    ("minimum", [1.0, 1.0, NAN]),
    ("mean_minus_deviation", [2.0 - 0.5 * 1.0, 1.0, NAN]),
])  # fmt: skip
def test_combinations_by_hand(how: Any, found: list[float]) -> None:
    score_PB = torch.tensor([[1.0, NAN, NAN], [3.0, 1.0, NAN]], dtype=torch.float64)
    expected = torch.tensor(found, dtype=torch.float64)
    torch.testing.assert_close(combine(score_PB, how, 0.5), expected, equal_nan=True)


def test_an_infinite_score_stays_one() -> None:
    assert combine(torch.tensor([[math.inf], [1.0]]), "sum", 1.0).isinf().all()


def mix(**knobs: Any) -> RewardMix:
    parts = [{"source": "python:my:length", "weight": 2.0}, "vader"]
    found = READ.validate_python({"of": parts, **knobs})
    assert isinstance(found, RewardMix)
    return found


def rewards() -> list[Any]:
    return [
        lambda prompts, completions: torch.tensor([float(len(each)) for each in completions]),
        lambda prompts, completions: torch.tensor([10.0 * len(prompts[0].prompt)] * len(completions)),
    ]


ASKED = [PromptRow(user("?"))] * 2, ["a", "abc"]


def test_weights_multiply_and_each_part_is_told() -> None:
    found = scored(CombinedReward(mix(), rewards(), None), *ASKED)
    assert found.score_B.tolist() == [12.0, 16.0]
    assert found.metrics() == {
        "score_mean/length": 2.0, "score_deviation/length": 1.0, "score_mean/vader": 10.0,
        "score_deviation/vader": 0.0,
    }  # fmt: skip


def test_parts_are_normalised_as_measured_or_as_they_are() -> None:
    moments = {"length": Moments(1.0, 2.0), "vader": Moments(5.0, 10.0)}
    found = CombinedReward(mix(normalize=True), rewards(), moments)(*ASKED)
    assert found.tolist() == [2 * 0.0 + 0.5, 2 * 1.0 + 0.5]
    with pytest.raises(ConfigError, match="vader gives all responses of `generate` the same score"):
        CombinedReward(mix(normalize=True), rewards(), None)(*ASKED)
    one = READ.validate_python({"of": ["python:my:length"], "normalize": True})
    assert CombinedReward(one, rewards()[:1], None)(*ASKED).tolist() == [-1.0, 1.0]


def test_every_way_to_write_them() -> None:
    assert READ.validate_python("vader") == "vader"
    assert READ.validate_python(["vader"]) == READ.validate_python({"source": "vader"}) == RewardMix(
        of=[{"source": "vader"}]
    )  # fmt: skip
    found = READ.validate_python(["learned", "model:a/m", "model:b/m", "http://h:1/score?key=x"])
    assert found.labels == ["learned", "m", "m_2", "h"]
    assert str(found) == "[learned, model:a/m, model:b/m, http://h:1/score?key=x]"
    keys = [key for key, _ in keyed_parts({"ppo.reward": found, "evaluate.gold": "vader"})]
    assert keys == ["ppo.reward[0]", "ppo.reward[1]", "ppo.reward[2]", "ppo.reward[3]", "evaluate.gold"]
    assert READ.validate_python(found.model_dump(mode="json")) == found


@pytest.mark.parametrize(("value", "said"), [
    ("nonsense", "use learned, vader"),
    ([], "of"),
    ([{"source": "vader", "wieght": 2}], "of.0.wieght: there is no such key"),
    ([{"source": "nonsense"}], "use learned, vader"),
    ({"of": ["vader"], "combine": "max"}, "it must be 'sum', 'minimum'"),
    (3, "valid"),
])  # fmt: skip
def test_what_is_wrong_is_told(value: Any, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        READ.validate_python(value)
    assert said in str(caught.value)


def test_all_of_them_are_in_the_key_and_one_model_starts_a_critic() -> None:
    found = READ.validate_python(["learned", {"source": "vader", "weight": 0.1}])
    assert reward_digest(found) == reward_digest("vader")
    part = critic_part(found)
    assert part is not None and part.source == "learned"
    assert critic_part("vader") is None and critic_part("learned") is not None
    for value in (
        {"of": ["learned", "vader"], "combine": "minimum"},
        [{"source": "learned", "weight": -1.0}],
        ["learned", "model:m"],
    ):
        other = READ.validate_python(value)
        assert critic_part(other) is None and models_of(other)
