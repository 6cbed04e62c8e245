"""A decision in words, from judgements of made-up scores."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from rlhf.config import validated
from rlhf.decide.candidate import Candidate, Result, State
from rlhf.decide.words import Judgement, Told, off_limit
from rlhf.evaluation.intervals import mean
from rlhf.evaluation.sampled import Sampled
from rlhf.evaluation.selection import Outcome, judge, over_limits
from rlhf.pipeline.settings import CandidateConfig, DecideConfig
from rlhf.report.decision import decision_page

CONF = Path(__file__).parents[2] / "conf"
COSTS = {"seconds_p50": 0.82, "seconds_p95": 1.31, "cost_per_thousand": 0.05}
FINE = {"retention_perplexity_ratio": 1.012, "stop_rate": 1.0}
"""Figures within the limits."""
TRAINED = ("sft", "dpo", "ppo")


def scores(mean: float, deviation: float = 0.1, questions: int = 40) -> Tensor:
    """[S=1, B], half of them above the mean and half below."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(questions // 2)
    return (mean + deviation * signs)[None]


def alternating(mean: float, deviation: float, questions: int = 40) -> Tensor:
    """Other signs than those of `scores`, so that differences vary."""
    signs = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64).repeat(questions // 4)
    return (mean + deviation * signs)[None]


@pytest.fixture(scope="module")
def config() -> DecideConfig:
    values = yaml.safe_load((CONF / "config.yaml").read_text())["decide"]
    values["limits"] |= {"retention_perplexity_ratio": {"max": 1.15}, "stop_rate": {"min": 0.9}}
    return validated(DecideConfig, values, "decide")


class Made:
    """A decision on made-up scores, with the candidates as the command would leave them."""

    def __init__(
        self, config: DecideConfig, gains: Mapping[str, Tensor], untrained: str = "few_shot"
    ) -> None:
        self.config, self.gains = config, gains
        titles = {"base": "base model", "few_shot": "few-shot", "sft": "SFT", "dpo": "DPO", "ppo": "PPO"}
        asks = {"few_shot": "base+few_shot"}
        self.candidates = {
            name: Candidate(
                name,
                CandidateConfig(title=title, asks=asks.get(name, name)),
                name in TRAINED,
                State.RUNNING if name in TRAINED else State.COMPARED,
                share=1.0,
                chosen=Result("ab", {"a": 0.5, "b": 0.25}, {}, f"demo-{name}", ()),
                train_seconds=360.0 if name in TRAINED else 0.0,
            )
            for name, title in titles.items()
        }
        self.untrained = self.candidates[untrained]
        self.model: Path | None = Path("runs/demo-sft-100-sealed/artifacts/sft")

    def measured(self, name: str, **metrics: float) -> Made:
        """Each of 8 timed answers costs the same, 1,000 of them `cost_per_thousand`."""
        cost = metrics.get("cost_per_thousand")
        costs = {} if cost is None else dict.fromkeys("abcdefgh", cost / 1000)
        self.candidates[name].sealed = [Result((), {}, metrics, f"demo-{name}-sealed", (), costs)]
        return self

    def told(self, looks: int = 1, cost: Mapping[str, float] | None = None, **options: Any) -> Told:
        """What is told after the judgement, whose states are set as the command sets them. Without `cost` all
        cost the same."""
        figures = {name: self.candidates[name].figures for name in self.gains}
        refused = over_limits(figures, self.config.limits.ranges)
        options = {"smallest_gain": self.config.smallest_gain, "score_range": None} | options
        costs = cost or dict.fromkeys(self.gains, 1.0)
        found = judge(self.gains, scores(0.5), cost=costs, refused=refused, **options)
        for name in self.gains:
            each = self.candidates[name]
            each.state = State.FINALIST
            if name in refused:
                each.state, each.limits_over = State.REFUSED, refused[name]
            elif name == found.winner:
                each.state = State.WINNER
            each.gain = found.finalists[name].gain if name in found.finalists else None
            each.gain_over_base = Sampled(0.375, 0.25, 0.5, 40)
        winner = None if found.winner is None else self.candidates[found.winner]
        return Told(
            self.config, self.candidates, self.untrained, winner, Judgement(found, looks, 40), "gold", 2.0,
            None if winner is None else "python -m rlhf stage=sft", None if winner is None else self.model,
        )  # fmt: skip


def outcome(told: Told) -> Outcome:
    assert told.judgement is not None
    return told.judgement.found.outcome


def page_of(told: Told) -> str:
    """The page of its decision.json, which is valid JSON."""
    rest = {
        "name": "demo", "questions": {"choosing": 80, "sealed": 40}, "pilots": [],
        "budget": {"seconds": 1800.0, "spent": 1500.0}, "ended": "",
    }  # fmt: skip
    content = json.loads(json.dumps(told.as_json() | rest, allow_nan=False))
    return decision_page(content)


def sure(made: Made, *names: str) -> Made:
    for name in names:
        made.measured(name, **FINE)
    return made


def test_a_winner_is_shipped_and_the_others_are_compared(config: DecideConfig) -> None:
    made = Made(config, {"sft": scores(0.75), "dpo": alternating(0.7, 0.2), "ppo": scores(0.9)})
    made.measured("few_shot", cost_per_thousand=0.07).measured("ppo", retention_perplexity_ratio=1.5)
    made.measured("sft", **FINE, **COSTS, question_accuracy_change=-0.004).measured("dpo", **FINE)
    told = made.told()
    assert outcome(told) is Outcome.SHIP
    lines = told.sentences()
    assert lines[0] == (
        "Ship SFT: its gold score is +0.250 (+0.250 to +0.250, 40 sealed questions) over few-shot, the best "
        "option without training."
    )
    assert lines[1:6] == [
        "Over the base model: +0.375 (+0.250 to +0.500, 40 sealed questions).",
        "Perplexity on evaluate.retention: 1.012 times the base model's (above 1 it forgets).",
        "Its share of right answers to evaluate.retention changes by -0.004.",
        "An answer takes 0.82 s (p95: 1.3 s).",
        # 360 s at 2 per hour cost 0.2; an answer saves (0.07 - 0.05) / 1000
        "Training took 6:00, 1,000 answers cost 0.05 at evaluate.price_per_hour=2: it pays off after 10,000 "
        "answers (10,000 to 10,000).",
    ]
    assert lines[6].startswith("DPO: +0.200 (+0.1") and lines[6].endswith("sealed questions) over few-shot.")
    assert lines[7:] == [
        "PPO is refused: retention_perplexity_ratio is 1.5, at most 1.15; stop_rate was not measured."
    ]
    assert [*told.commands()] == [
        f"The model that was judged: {made.model}",
        "Made by: python -m rlhf stage=sft",
    ]
    assert "Ship SFT" in page_of(told) and "pays off" in page_of(told)


def test_training_that_saves_nothing_never_pays_off(config: DecideConfig) -> None:
    made = Made(config, {"sft": scores(0.75)}).measured("few_shot", cost_per_thousand=0.05)
    told = made.measured("sft", **FINE, **COSTS).told()
    found = told.pays_off(told.candidates["sft"])
    assert found is not None and found[:3] == (math.inf, math.inf, math.inf)
    assert "they are no cheaper than those of few-shot, so it only pays in quality." in "\n".join(
        told.sentences()
    )
    (entry,) = [each for each in told.as_json()["candidates"] if each["name"] == "sft"]
    assert entry["break_even"] == {"value": "never", "low": "never", "high": "never", "rows": 8}
    assert ">never<" in page_of(told)


def costing(made: Made, name: str, *costs: float) -> None:
    """Money that each answer costs, for one seed."""
    (before,) = made.candidates[name].sealed
    made.candidates[name].sealed = [before._replace(costs=dict(zip("abcdefgh", costs, strict=False)))]


def test_a_break_even_has_the_interval_of_the_saving_per_answer(config: DecideConfig) -> None:
    """0.2 of training, question by question; a question that only one was timed with does not count."""
    made = sure(Made(config, {"sft": scores(0.75)}).measured("few_shot"), "sft")
    costing(made, "few_shot", 5e-4, 3e-4, 4e-4, 9.0)
    costing(made, "sft", 3e-4, 0.5e-4, 2e-4)
    told = made.told()
    found = told.pays_off(told.candidates["sft"])
    saving = mean(torch.tensor([2e-4, 2.5e-4, 2e-4], dtype=torch.float64))
    assert found is not None and found.value == pytest.approx(0.2 / saving.value)
    assert (found.low, found.high) == pytest.approx((0.2 / saving.high, 0.2 / saving.low))
    assert found.rows == 3


def test_the_saving_over_base_is_that_of_answers_that_were_timed_together(config: DecideConfig) -> None:
    """Base alone was timed under another load."""
    made = sure(Made(config, {"sft": scores(0.75)}, untrained="base").measured("base"), "sft")
    costing(made, "base", 9.0, 9.0)
    costing(made, "sft", 3e-4, 1e-4)
    (own,) = made.candidates["sft"].sealed
    made.candidates["sft"].sealed = [own._replace(base_costs={"a": 5e-4, "b": 3e-4})]
    told = made.told()
    found = told.pays_off(told.candidates["sft"])
    assert found is not None and found.value == pytest.approx(0.2 / 2e-4) and found.rows == 2


def test_a_best_option_that_is_not_shown_to_be_better_than_base_is_told(config: DecideConfig) -> None:
    made = sure(Made(config, {"sft": scores(0.5)}), "sft")
    for low, is_shown in ((-0.125, False), (0.125, True)):
        made.candidates["few_shot"].gain_over_base = Sampled(0.25, low, 0.5, 40)
        lines = made.told().sentences()
        (line,) = [each for each in lines if each.startswith("few-shot over the base model: ")]
        assert line.endswith("not shown to be better than that.") is not is_shown


def test_a_saving_that_is_not_sure_may_never_pay_off(config: DecideConfig) -> None:
    made = Made(config, {"sft": scores(0.75)}).measured("few_shot", cost_per_thousand=0.3)
    made.measured("sft", **FINE, **COSTS)
    costing(made, "sft", 1e-4, 2e-4, 4e-4)
    told = made.told()
    (line,) = [each for each in told.sentences() if each.startswith("Training took")]
    assert line.endswith(" to never).")
    assert re.search(r">[0-9,]+ \([0-9,]+ to never\)<", page_of(told))
    costing(made, "sft", 2e-4, 3e-4, 5e-4)  # dearer as measured
    assert "whether they are cheaper than those of few-shot cannot be told" in "\n".join(told.sentences())


def test_with_several_seeds_an_answer_costs_their_mean(config: DecideConfig) -> None:
    made = sure(Made(config, {"sft": scores(0.75)}).measured("few_shot"), "sft")
    costing(made, "few_shot", 5e-4, 5e-4)
    costing(made, "sft", 3e-4, 3e-4)
    made.candidates["sft"].sealed = [
        *made.candidates["sft"].sealed, made.candidates["sft"].sealed[0]._replace(costs={"a": 1e-4})
    ]  # fmt: skip
    told = made.told()
    found = told.pays_off(told.candidates["sft"])
    assert found is not None and found.value == pytest.approx(0.2 / 3e-4) and found.rows == 1


def test_costs_that_are_not_known_are_not_told(config: DecideConfig) -> None:
    told = sure(Made(config, {"sft": scores(0.75)}, untrained="base"), "sft", "base").told()
    assert told.pays_off(told.candidates["sft"]) is None
    assert told.pays_off(told.candidates["base"]) is None
    text = "\n".join(told.sentences())
    assert "over base model" in text and "(above 1 it forgets)" in text
    for word in ("Over the base model", "Training took", "An answer takes", "share of right"):
        assert word not in text
    assert page_of(told)


def test_without_a_gain_worth_having_nothing_is_trained(config: DecideConfig) -> None:
    made = sure(Made(config, {"sft": scores(0.5), "dpo": scores(0.375)}), "sft", "dpo")
    told = made.told()
    assert outcome(told) is Outcome.NO_TRAINING
    assert told.sentences() == [
        "Do not train: few-shot is as good. No finalist gains more than +0 in gold score, and "
        "decide.smallest_gain=0.02.",
        "DPO: -0.125 (-0.125 to -0.125, 40 sealed questions) over few-shot.",
        "SFT: +0.000 (+0.000 to +0.000, 40 sealed questions) over few-shot.",
    ]
    assert [*told.commands()] == [] and told.as_json()["winner"] is None
    assert "Do not train" in page_of(told)


def test_why_a_larger_gain_is_not_shipped_is_told(config: DecideConfig) -> None:
    gains = {"sft": alternating(0.75, 0.3), "dpo": scores(0.78, 0.3), "ppo": scores(0.7, 0.3)}
    told = sure(Made(config, gains), *gains).told(cost={"sft": 1.0, "dpo": 2.0, "ppo": 3.0})
    lines = told.sentences()
    assert lines[0].startswith("Ship SFT: its gold score is +0.250")
    why = " It is not shown to be better than SFT, which costs less: training and decide.requests=10000"
    why += " answers."
    assert [line.endswith(why) for line in lines if line.startswith(("DPO: +", "PPO: +"))] == [True, False]
    dearer = sure(Made(config, gains), *gains).told(cost={"sft": 2.0, "dpo": 1.0, "ppo": 3.0})
    assert why.partition(" SFT")[0] not in "\n".join(dearer.sentences())


def test_only_the_best_one_was_compared_with_the_winner(config: DecideConfig) -> None:
    """PPO is cheaper than the winner and has a larger gain, but is shown to be behind DPO."""
    best = scores(0.85)
    gains = {"sft": alternating(0.8, 0.3), "dpo": best, "ppo": best - 0.02 + scores(0.0, 0.01)}
    told = sure(Made(config, gains), *gains).told(cost={"sft": 2.0, "dpo": 3.0, "ppo": 1.0})
    lines = told.sentences()
    assert lines[0].startswith("Ship SFT: ")
    ends = {line[:3]: line.endswith("answers.") for line in lines if line.startswith(("DPO: +", "PPO: +"))}
    assert ends == {"DPO": True, "PPO": False}


def test_an_option_without_training_that_is_better_is_not_called_as_good(config: DecideConfig) -> None:
    told = sure(Made(config, {"sft": scores(0.25)}), "sft").told()
    assert told.sentences()[0] == "Do not train: few-shot is better, by at least 0.25 in gold score."


def test_a_gain_that_is_shown_is_not_put_in_doubt(config: DecideConfig) -> None:
    """What cannot be told is whether it is large enough."""
    made = Made(config, {"sft": alternating(0.55, 0.02)})
    made.config = config.model_copy(update={"smallest_gain": 0.06})
    told = sure(made, "sft").told()
    first, second = told.sentences()
    assert second.startswith("SFT: +0.050 (+0.0")
    assert first.startswith(
        "It cannot be told whether the gain over few-shot reaches decide.smallest_gain=0.06: "
    )


def test_where_nothing_trains_the_headline_does_not_judge_training(config: DecideConfig) -> None:
    made = Made(config, {})
    for name in made.candidates:
        if made.candidates[name].is_trained:
            made.candidates[name].state, made.candidates[name].why = (
                State.IMPOSSIBLE,
                "a=x: no number. See b.",
            )
    first, *others = made.told().sentences()
    best = "few-shot is the best one on the choosing questions."
    assert first == f"Nothing was trained: no candidate that trains can run. {best}"
    assert others == ["SFT; DPO; PPO cannot run: a=x: no number."]
    made.candidates = {name: each for name, each in made.candidates.items() if not each.is_trained}
    none = f"Nothing was trained: no candidate of this decision trains. {best}"
    assert made.told().sentences() == [none]


def test_when_all_are_refused_nothing_is_trained(config: DecideConfig) -> None:
    made = Made(config, {"sft": scores(0.9), "dpo": scores(0.9)})
    made.measured("sft", retention_perplexity_ratio=1.2, stop_rate=1.0)
    made.measured("dpo", retention_perplexity_ratio=1.0, stop_rate=0.8)
    told = made.told()
    assert told.sentences() == [
        "Do not train: every finalist is outside a limit. Use few-shot.",
        "SFT is refused: retention_perplexity_ratio is 1.2, at most 1.15.",
        "DPO is refused: stop_rate is 0.8, at least 0.9.",
    ]
    content = told.as_json()
    assert {each["state"] for each in content["candidates"] if each["trained"]} == {"refused", "running"}
    assert page_of(told)


def test_a_figure_that_was_not_measured_is_not_outside_its_limit(config: DecideConfig) -> None:
    """It refuses all the same. NaN is no value either."""
    made = Made(config, {"sft": scores(0.9), "dpo": scores(0.9)})
    made.measured("sft", stop_rate=0.95)
    told = made.measured("dpo", stop_rate=0.8, retention_perplexity_ratio=math.nan).told()
    assert told.sentences() == [
        "Do not train: no finalist is known to be within its limits. Use few-shot.",
        "SFT is refused: retention_perplexity_ratio was not measured.",
        "DPO is refused: retention_perplexity_ratio was not measured; stop_rate is 0.8, at least 0.9.",
    ]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (1.3128, "f is 1.31, at most 1.15"),
        (1.15049, "f is 1.1505, at most 1.15"),
        (0.2, "f is 0.2, at least 0.5"),
        (math.nan, "f was not measured"),
        (None, "f was not measured"),
    ],
)
def test_what_exceeds_a_limit_in_words(value: float | None, words: str) -> None:
    """With the digits that show it."""
    assert off_limit("f", value, (0.5, 1.15)) == words


@pytest.mark.parametrize(
    ("gain", "advice"),
    [
        (0.06, r"about [0-9,]+ more questions would tell \(a third of them is sealed\)"),
        (0.0199, r"no number of questions that anybody writes would tell"),
    ],
)
def test_what_cannot_be_told(config: DecideConfig, gain: float, advice: str) -> None:
    """A gain that is almost `smallest_gain` needs too many questions."""
    told = sure(Made(config, {"sft": alternating(0.5 + gain, 0.4)}), "sft").told()
    assert outcome(told) is Outcome.UNTOLD
    first, second = told.sentences()
    assert first.endswith(". Until then, use few-shot.")
    assert re.match(rf"It cannot be told whether training gains over few-shot: {advice}\.", first)
    assert second.startswith(f"SFT: +{gain:.3f} (-0.")
    assert page_of(told)


def test_an_option_without_training_that_is_itself_outside_a_limit_is_told(config: DecideConfig) -> None:
    """What is not measured for it is no reason: it forgets nothing."""
    made = Made(config, {"sft": scores(0.9)}).measured("sft", retention_perplexity_ratio=1.2, stop_rate=1.0)
    told = made.measured("few_shot", stop_rate=0.5).told()
    assert told.sentences()[-1] == "few-shot is itself outside: stop_rate is 0.5, at least 0.9."
    assert "itself" not in " ".join(made.measured("few_shot", stop_rate=0.95).told().sentences())


def test_questions_without_a_score_are_told(config: DecideConfig) -> None:
    partly = alternating(0.75, 0.2)
    partly[:, :30] = math.nan
    told = sure(Made(config, {"sft": partly}), "sft").told()
    assert told.sentences()[-1] == (
        "30 of the 40 sealed questions do not count for SFT: its answer or that of few-shot has no score. If "
        "it is bad answers that have none, the gain is wrong."
    )
    assert "do not count" not in " ".join(sure(Made(config, {"sft": scores(0.75)}), "sft").told().sentences())


def test_few_sealed_questions_are_told(config: DecideConfig) -> None:
    told = sure(Made(config, {"sft": scores(0.75)}), "sft").told()
    assert told.judgement is not None
    few = replace(told, judgement=told.judgement._replace(questions=6))
    said = "Only 6 sealed questions judged: few to stand for all others."
    assert said in few.sentences() and "Only" not in " ".join(told.sentences())


def test_a_further_look_is_told(config: DecideConfig) -> None:
    made = sure(Made(config, {"sft": scores(0.75)}), "sft")
    assert "have judged" not in "\n".join(made.told().sentences())
    assert made.told(looks=3).sentences()[-1] == (
        "These sealed questions have judged 3 times. Each time the intervals are wider, because their error "
        "is halved."
    )


def test_a_winner_below_its_full_length_is_no_final_model(config: DecideConfig) -> None:
    made = sure(Made(config, {"sft": scores(0.75)}), "sft")
    each = made.candidates["sft"]
    each.share, each.step_seconds, each.ask_seconds = 0.25, 100.0, 5.0
    told = made.told()
    assert told.sentences()[-1] == (
        "It was trained to 25% of its length. The command makes it at full length; that model has not been "
        "judged."
    )
    assert told.more() == ["SFT was judged at 25% of its length. About 1:20 more would train it to the end."]


def test_several_seeds_judge_a_method(config: DecideConfig) -> None:
    seeds = torch.cat([scores(0.75), scores(0.8), scores(0.7)])
    made = sure(Made(config.model_copy(update={"seeds": 3}), {"sft": seeds}), "sft")
    made.model = None
    told = made.told()
    assert outcome(told) is Outcome.SHIP and told.judgement is not None and told.judgement.found.is_method
    assert told.sentences()[-1] == "The method was judged over 3 seeds, and not one model."
    assert [*told.commands()] == ["Made by: python -m rlhf stage=sft"]
    assert told.as_json()["seeds"] == 3 and told.as_json()["artifact"] is None
    assert page_of(told)


def test_what_more_budget_could_change(config: DecideConfig) -> None:
    made = sure(Made(config, {"sft": scores(0.75)}), "sft")
    nothing = "Nothing was cut, so a larger budget changes nothing. More questions or training rows may."
    assert made.told().more() == [nothing]
    cut = made.candidates["ppo"]
    cut.state, cut.why = State.CUT, "50% would take about 9:00, and 1:00 are left"
    assert made.told().more() == [
        "PPO was dropped for lack of budget: 50% would take about 9:00, and 1:00 are left."
    ]
    made.candidates["dpo"].state, made.candidates["dpo"].share = State.WORSE, 0.25  # no budget helps it
    assert len(made.told().more()) == 1


def test_who_had_no_pilot_is_told(config: DecideConfig) -> None:
    made = Made(config, {"sft": alternating(0.0, 0.1)})
    for name in ("dpo", "ppo"):
        made.candidates[name].state = State.CUT
    made.candidates["ppo"].chosen = None  # DPO had one
    made.candidates["dpo"].why = "stopped after 0:40, for lack of budget"
    assert sure(made, "sft").told().sentences()[-2:] == [
        "Not tried at all, for lack of budget: PPO. They may be better.",
        "Not judged, for lack of budget: DPO (stopped after 0:40, for lack of budget). They may be better.",
    ]


def test_nothing_is_told_before_the_judgement(config: DecideConfig) -> None:
    made = Made(config, {})
    told = Told(config, made.candidates, None, None, None, "judge", 1.0, None, None)
    content = told.as_json()
    assert told.sentences() == told.more() == [*told.commands()] == []
    assert (content["outcome"], content["untrained"], content["judge"]) == (None, None, "judge's score")
    assert "Not decided yet." in page_of(told)


@pytest.mark.parametrize(
    ("kind", "words"), [("gold", "gold score"), ("rouge_l", "ROUGE-L"), ("exact_match", "exact match")]
)
def test_the_judge_in_words(config: DecideConfig, kind: str, words: str) -> None:
    assert Told(config, {}, None, None, None, kind, 1.0, None, None).judge == words
