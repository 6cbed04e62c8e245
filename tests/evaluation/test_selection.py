"""Which candidate to ship: the split, the rungs, and the judgement on sealed questions."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from rlhf.evaluation.selection import (
    Decision,
    Outcome,
    Rung,
    best_untrained,
    claims,
    holm,
    judge,
    over_limits,
    questions_needed,
    rung,
    split_questions,
)

QUESTIONS = [f"question {number}" for number in range(300)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def after(score_CB: Tensor, max_kept: int = 99, cost: tuple[float, ...] = (), **options: object) -> Rung:
    cost_C = torch.tensor(cost or [1.0] * score_CB.shape[-2])
    return rung(score_CB, max_kept=max_kept, cost_C=cost_C, **{"score_range": None, **options})  # type: ignore[arg-type]  # the tests' own options


def test_a_third_is_sealed_whatever_the_order_and_the_others() -> None:
    choosing, sealed = split_questions(QUESTIONS)
    assert sorted(choosing + sealed) == list(range(300))
    assert 80 <= len(sealed) <= 120
    names = {QUESTIONS[index] for index in sealed}
    others = [*reversed(QUESTIONS), *QUESTIONS[:50], *(f"more {number}" for number in range(40))]
    assert {others[index] for index in split_questions(others)[1]} & set(QUESTIONS) == names


@pytest.mark.parametrize("questions", [[], QUESTIONS[:1]])
def test_a_part_without_questions_is_refused(questions: list[str]) -> None:
    with pytest.raises(ValueError, match="Add questions"):
        split_questions(questions)


def test_a_rung_by_hand() -> None:
    """The second leads the first by 0.1 on each question, and the third by 1, 1, 1 and 1.4: by 1.1, with
    error 0.1. Student's t with 3 degrees of freedom and a tail of 0.05 / 3 is 3.74. The fourth one varies."""
    best_B = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    lead_CB = torch.tensor([[-0.1] * 4, [0.0] * 4, [-1.0, -1.0, -1.0, -1.4], [3.5, -4.5, 3.5, -4.5]])
    found = after(best_B + lead_CB)
    assert found.worse.tolist() == [True, False, True, False]
    assert found.kept.tolist() == [False, True, False, True]
    assert not bool(found.cut.any())
    assert float(found.upper[1]) == math.inf
    assert float(found.upper[2]) == pytest.approx(-1.1 + 0.1 * 3.74, abs=0.02)


def test_more_candidates_and_rungs_make_it_harder_to_be_clearly_worse() -> None:
    best_B = normal(20)
    one = after(torch.stack([best_B, best_B - 1 + normal(20, seed=1)])).upper[1]
    rungs = after(torch.stack([best_B, best_B - 1 + normal(20, seed=1)]), num_rungs=3).upper[1]
    many = after(torch.stack([best_B, best_B - 1 + normal(20, seed=1), best_B - 9, best_B - 9])).upper[1]
    assert float(one) < float(many) == pytest.approx(float(rungs))


def test_the_best_is_rarely_dropped() -> None:
    """Eight equal candidates: whoever seems best drops each other one in 5% of cases at most."""
    found = after(normal(2000, 8, 40) + normal(2000, 1, 40, seed=1))
    assert float(found.worse[:, 0].double().mean()) <= 0.05


def test_order_does_not_matter() -> None:
    score_CB = normal(6, 30) + torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0, 2.0])[:, None]
    score_CB[1, 3] = score_CB[4, 7] = math.nan
    slow_C, cost = torch.tensor([True, False, False, False, False, False]), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
    found = after(score_CB, 2, cost, slow_C=slow_C)
    assert found.worse.any() and found.cut.any()
    order_C, order_B = torch.randperm(6), torch.randperm(30)
    moved = after(
        score_CB[order_C][:, order_B], 2, tuple(cost[i] for i in order_C.tolist()), slow_C=slow_C[order_C]
    )
    for one, other in zip(found, moved, strict=True):
        assert one[order_C].tolist() == pytest.approx(other.tolist())


def test_the_budget_cuts_the_lowest_upper_ends_and_says_so() -> None:
    """None is clearly worse. The second varies most, so it may still be the best."""
    best_B = normal(10)
    score_CB = torch.stack([best_B, best_B - 0.5 + 4 * normal(10, seed=1), best_B - 0.2 + normal(10, seed=2)])
    found = after(score_CB, max_kept=2)
    assert not bool(found.worse.any())
    assert found.kept.tolist() == [True, True, False] and found.cut.tolist() == [False, False, True]
    assert after(score_CB, max_kept=1).kept.tolist() == [True, False, False]


def test_slow_starters_keep_a_place_until_the_last_rung() -> None:
    score_CB = normal(4, 30) - torch.tensor([0.0, 0.7, 0.7, 9.0])[:, None]
    slow_C = torch.tensor([False, False, False, True])
    assert after(score_CB, max_kept=2, slow_C=slow_C).kept.tolist() == [True, False, False, True]
    assert after(score_CB, max_kept=1, slow_C=slow_C).cut.tolist() == [False, True, True, True]
    last = after(score_CB, max_kept=2, slow_C=slow_C, is_last=True)
    assert last.worse.tolist() == [False, False, False, True]
    assert after(score_CB, max_kept=2).worse.tolist() == [False, False, False, True]


def test_ties_go_to_the_cheaper() -> None:
    score_CB = normal(30).expand(3, 30)
    assert after(score_CB, 1, (3.0, 1.0, 2.0)).kept.tolist() == [False, True, False]
    assert after(score_CB, 2, (3.0, 1.0, 2.0)).cut.tolist() == [True, False, False]
    close = torch.stack([*score_CB[:2], score_CB[0] - 1 + normal(30, seed=1)])
    close[1] += torch.tensor([1.0, -1.0] * 15)  # equal mean, other questions
    assert after(close).upper.tolist() == pytest.approx(after(close[[1, 0, 2]]).upper[[1, 0, 2]].tolist())


def test_unscored_and_stopped_candidates() -> None:
    alone = after(normal(1, 5))
    assert alone.kept.tolist() == [True]
    score_CB = torch.stack([normal(20), torch.full((20,), math.nan, dtype=torch.float64), normal(20) - 9])
    assert after(score_CB).kept.tolist() == [True, True, False]
    stopped = after(score_CB, running_C=torch.tensor([False, True, True]))
    assert stopped.kept.tolist() == [False, True, True] and not bool(stopped.worse.any() | stopped.cut.any())


def test_several_problems_at_once_are_as_one_by_one() -> None:
    score_NCB, slow_NC = normal(5, 4, 20) + normal(5, 4, 1, seed=1), normal(5, 4, seed=2) > 1
    together = after(score_NCB, 2, slow_C=slow_NC)
    for number in range(5):
        alone = after(score_NCB[number], 2, slow_C=slow_NC[number])
        for one, each in zip(alone, together, strict=True):
            assert one.tolist() == pytest.approx(each[number].tolist())


def test_the_best_untrained_option_is_that_of_common_questions() -> None:
    nan = math.nan
    score = {"base": torch.tensor([1.0, 0.0, 1.0, nan]), "few-shot": torch.tensor([1.0, 1.0, nan, 0.0])}
    assert best_untrained(score, {"base": 1.0, "few-shot": 2.0}) == "few-shot"
    equal = {"few-shot": torch.tensor([0.1, 0.2, 0.3]), "base": torch.tensor([0.3, 0.2, 0.1])}
    assert best_untrained(equal, {"base": 1.0, "few-shot": 2.0}) == "base"
    with pytest.raises(ValueError, match="base model"):
        best_untrained({}, {})


def test_limits_are_named_and_a_missing_value_is_over() -> None:
    measured = {
        "a": {"latency": 1.0, "forgotten": 0.02},
        "b": {"latency": 3.0, "forgotten": 0.03},
        "c": {"latency": 1.0, "forgotten": math.nan},
        "d": {"forgotten": 0.0},
    }
    limits = {"latency": (-math.inf, 2.0), "forgotten": (0.0, 0.02)}
    assert over_limits(measured, limits) == {
        "b": ("latency", "forgotten"), "c": ("forgotten",), "d": ("latency",)
    }  # fmt: skip
    assert over_limits(measured, {}) == {}


@pytest.mark.parametrize(("value", "is_over"), [(-0.2, True), (-0.1, False), (0.3, False), (0.4, True)])
def test_the_ends_of_a_limit_are_allowed(value: float, is_over: bool) -> None:
    found = over_limits({"a": {"change": value}}, {"change": (-0.1, 0.3)})
    assert found == ({"a": ("change",)} if is_over else {})


def test_holm_by_hand() -> None:
    """3 x 0.01, then 2 x 0.02, then 0.03, which is not below 0.04."""
    p_K = torch.tensor([0.03, 0.01, 0.9, 0.02])
    plays_K = torch.tensor([True, True, False, True])
    assert holm(p_K, plays_K).tolist() == pytest.approx([0.04, 0.03, 1.0, 0.04])
    assert holm(torch.tensor([0.3, 0.6]), torch.tensor([True, True])).tolist() == pytest.approx([0.6, 0.6])


def test_intervals_and_claims_agree() -> None:
    score_NKSB = normal(500, 3, 1, 30) + 0.5 * normal(500, 3, 1, 1, seed=1)
    found = claims(score_NKSB, torch.zeros(500, 1, 30), cost_K=torch.ones(3), score_range=None)
    assert bool((found.claimed == (found.low >= 0)).all())
    only_holm = found.claimed & (found.low == 0)
    assert bool(only_holm.any()) and bool((found.claimed & (found.low > 0)).any())
    some = ~found.claimed
    assert found.low[some].tolist() == pytest.approx(found.gain.bound(0.05 / 4 / 3, -1)[some].tolist())
    assert found.high.flatten().tolist() == pytest.approx(
        found.gain.bound(0.05 / 4 / 3, 1).flatten().tolist()
    )
    alone = claims(score_NKSB[:, :1], torch.zeros(500, 1, 30), cost_K=torch.ones(1), score_range=None)
    assert alone.low[:, 0].tolist() == pytest.approx(alone.gain.bound(0.025, -1)[:, 0].tolist())
    plays = torch.tensor([True, False, False])
    left = claims(
        score_NKSB, torch.zeros(500, 1, 30), cost_K=torch.ones(3), in_play_K=plays, score_range=None
    )
    assert left.low[:, 0].tolist() == pytest.approx(alone.low[:, 0].tolist())
    assert left.at_most.tolist() == pytest.approx(alone.at_most.tolist())


def test_error_rates_without_a_gain() -> None:
    """Four finalists as good as the untrained option, which all compare with."""
    untrained = normal(4000, 1, 60, seed=2)
    found = claims(normal(4000, 4, 1, 60), untrained, cost_K=torch.ones(4), score_range=None)
    assert 0.01 <= float(found.claimed.any(-1).double().mean()) <= 0.03
    held = ((found.low <= 0) & (found.high >= 0) & ~found.claimed).all(-1)
    assert 0.95 <= float(held.double().mean()) <= 0.985
    assert float((found.at_most < 0).double().mean()) <= 0.025


UNTRAINED = normal(1, 200)
COST = {"full": 3.0, "lora": 2.0, "dpo": 1.0}


def finalists(**gain: float) -> dict[str, Tensor]:
    """Finalists with exactly these gains."""
    found = {}
    for number, (name, value) in enumerate(gain.items()):
        noise = normal(1, 200, seed=number + 1)
        found[name] = UNTRAINED + value + noise - noise.mean()
    return found


def decide(scores: Mapping[str, Tensor], smallest_gain: float = 0.1, **options: object) -> Decision:
    return judge(scores, UNTRAINED, cost=COST, smallest_gain=smallest_gain, score_range=None, **options)  # type: ignore[arg-type]  # the tests' own options


def test_the_best_is_shipped_with_its_gain() -> None:
    found = decide(finalists(full=1.0, lora=0.4, dpo=-0.2))
    assert (found.outcome, found.winner, found.is_method) == (Outcome.SHIP, "full", False)
    gain = found.finalists["full"].gain
    assert gain.value == pytest.approx(1.0) and gain.rows == 200
    assert 0.7 < gain.low < 1.0 < gain.high < 1.3
    assert [found.finalists[name].claimed for name in ("full", "lora", "dpo")] == [True, True, False]
    assert found.more_questions is None


def test_of_equal_ones_the_cheaper_is_shipped() -> None:
    assert decide(finalists(full=1.0, lora=0.95, dpo=0.3)).winner == "lora"
    assert decide(finalists(full=1.0, lora=0.95, dpo=0.95)).winner == "dpo"
    assert decide(finalists(dpo=1.0, full=1.05)).winner == "dpo"


def test_neither_the_order_of_finalists_nor_of_questions_matters() -> None:
    scores = finalists(full=1.0, lora=0.95, dpo=0.3)
    order = torch.randperm(200)
    other = {name: scores[name][:, order] for name in reversed(scores)}
    one = judge(scores, UNTRAINED, cost=COST, score_range=None)
    moved = judge(other, UNTRAINED[:, order], cost=COST, score_range=None)
    assert one.winner == moved.winner
    twins = {"b": scores["full"], "a": scores["full"]}
    for each in (twins, dict(reversed(twins.items()))):
        assert judge(each, UNTRAINED, cost={"a": 1.0, "b": 1.0}, score_range=None).winner == "a"
    for name in scores:
        assert one.finalists[name].gain == pytest.approx(moved.finalists[name].gain)


def test_a_refused_finalist_is_not_compared() -> None:
    scores, refused = finalists(full=1.0, lora=0.4), {"full": ("forgotten",), "elsewhere": ("latency",)}
    found = decide(scores, refused=refused)
    assert (found.winner, found.refused) == ("lora", {"full": ("forgotten",)})
    assert found.finalists == decide({"lora": scores["lora"]}).finalists
    none = decide(scores, refused={"full": ("forgotten",), "lora": ("latency",)})
    assert (none.outcome, none.winner, none.finalists) == (Outcome.NO_TRAINING, None, {})


def test_no_training_is_worth_it_where_no_finalist_reaches_the_smallest_gain() -> None:
    """Errors are 1 / sqrt(200) = 0.07: the upper ends are 0.14 and 0.15."""
    scores = finalists(full=0.0, lora=0.01)
    found = decide(scores, smallest_gain=0.2)
    assert (found.outcome, found.winner, found.more_questions) == (Outcome.NO_TRAINING, None, None)
    assert found.at_most == pytest.approx(0.15, abs=0.01)
    assert decide(scores, smallest_gain=0.1).outcome == Outcome.UNTOLD
    assert decide(finalists(full=-1.0), smallest_gain=0.0).outcome == Outcome.NO_TRAINING


def test_a_gain_that_is_too_small_is_not_shipped() -> None:
    """0.3 is surely above 0. Whether it reaches 0.35 cannot be told; it does not reach 0.5."""
    scores = finalists(full=0.3)
    assert decide(scores, smallest_gain=0.25).outcome == Outcome.SHIP
    assert decide(scores, smallest_gain=0.35).outcome == Outcome.UNTOLD
    assert decide(scores, smallest_gain=0.5).outcome == Outcome.NO_TRAINING


def test_how_many_more_questions_would_tell_by_hand() -> None:
    """(1.960 + 0.842)^2 / 0.125^2 = 502.3, times the variance; 200 are there, and a third of new ones is
    sealed."""
    scores = finalists(full=0.125)
    variance = float((scores["full"] - UNTRAINED).var())
    found = decide(scores, smallest_gain=0.05)
    assert found.outcome == Outcome.UNTOLD
    assert found.more_questions == pytest.approx(3 * (502.3 * variance - 200), abs=6)
    refuting = decide(finalists(full=0.0), smallest_gain=0.125)
    assert refuting.more_questions == found.more_questions
    assert decide(finalists(full=0.1), smallest_gain=0.225).more_questions == found.more_questions
    assert decide(finalists(full=0.0), smallest_gain=0.0).more_questions is None
    assert decide(finalists(full=0.0), smallest_gain=0.001).more_questions is None
    two = decide(finalists(full=0.125, lora=0.0), smallest_gain=0.05)
    assert two.more_questions is not None and found.more_questions is not None
    assert two.more_questions > found.more_questions
    unscored = torch.cat([UNTRAINED, torch.full_like(UNTRAINED, math.nan)], -1)
    doubled = {name: torch.cat([each, each], -1) for name, each in scores.items()}
    half = judge(doubled, unscored, cost={"full": 2.0}, smallest_gain=0.05).more_questions
    assert half == pytest.approx(2 * found.more_questions, abs=1)  # as many of the new ones have no score


def test_the_advised_questions_tell_in_80_of_100_cases() -> None:
    needed = questions_needed(1.0, 0.0, gap=0.25, tail=0.025)
    assert needed == 126  # 2.802^2 / 0.25^2 = 125.6
    score = 0.25 + normal(3000, 1, 1, needed)
    found = claims(score, torch.zeros(3000, 1, needed), cost_K=torch.ones(1), score_range=None)
    assert 0.78 <= float(found.claimed.double().mean()) <= 0.82


def test_seeds_that_differ_too_much_need_more_seeds() -> None:
    """2.802^2 x 0.01 = 0.0785 is above 0.25^2."""
    assert questions_needed(1.0, 0.01, gap=0.25, tail=0.025) is None
    assert questions_needed(1.0, 0.004, gap=0.25, tail=0.025) == math.ceil(1 / (0.25**2 / 2.8016**2 - 0.004))
    assert questions_needed(math.nan, 0.0, gap=0.25, tail=0.025) is None


def test_a_method_is_judged_over_its_seeds() -> None:
    """Two seeds of three gain much and one nothing: an artifact can be shipped, the method cannot."""
    scores = torch.cat([finalists(full=gain)["full"] for gain in (1.0, 0.0, 1.0)])
    method = decide({"full": scores}, smallest_gain=0.05)
    assert method.is_method and method.outcome == Outcome.UNTOLD and method.more_questions is None
    assert decide({"full": scores[:1]}, smallest_gain=0.05).outcome == Outcome.SHIP
    steady = torch.cat([finalists(full=gain)["full"] for gain in (1.0, 0.9, 1.0)])
    assert decide({"full": steady}, smallest_gain=0.05).outcome == Outcome.SHIP


def test_unscored_questions() -> None:
    scores = finalists(full=1.0, lora=0.4)
    scores["full"][0, :50] = math.nan
    found = decide(scores)
    assert found.winner == "full" and found.finalists["full"].gain.rows == 150
    scores["lora"][:] = math.nan
    assert decide(scores).winner == "full"
    nothing = decide({"lora": scores["lora"]})
    assert (nothing.outcome, nothing.more_questions) == (Outcome.UNTOLD, None)


def test_a_bounded_score_has_bounded_intervals() -> None:
    found = judge({"full": torch.ones(1, 5)}, torch.zeros(1, 5), cost=COST)
    assert found.finalists["full"].gain.high == 1.0 and found.at_most == 1.0
