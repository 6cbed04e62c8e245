"""A policy improved only by a score that no policy learned from, and by so much that it is worth having."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.experiments import build
from helpers.verdicts import DOWN, GOOD, NONE, UNKNOWN, UP, OwnStage, chain_of, run_of, verdict
from rlhf.config import Bound
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.graph import in_order
from rlhf.pipeline.run import GateResult, Run
from rlhf.pipeline.stage import Stage
from rlhf.report.verdict import UNTRAINED_VERDICT, outcome

OWN_SCORE_WORDS = {name: figure for name, figure in GOOD.items() if name != "gold"}
JUDGE = (
    "++instances.reward-at-judge.pairs=samples:pairs",
    "evaluate.gold=null",
    "evaluate.judge=learned@judge",
)


def add(run: Run, stage: str, metric: str, figure: tuple[float, float, float], rows: int = 30) -> None:
    """A figure with its interval."""
    metrics = run.stages.setdefault(stage, {"metrics": {}})["metrics"]
    metrics |= {f"{stage}/{key}": value for key, value in Sampled(*figure, rows).metrics(metric).items()}


def stages_of(*overrides: str) -> dict[str, Stage]:
    """As `chain_of`, without stages from outside."""
    return in_order(build("model=tiny", *overrides).stages)


@pytest.mark.parametrize("gold", ["null", "learned", "{source: learned, weight: 2}"])
def test_the_score_that_was_learned_from_does_not_judge(tmp_path: Path, gold: str) -> None:
    """However much it rose, and under whatever name."""
    run = run_of(tmp_path, stages_of(f"evaluate.gold={gold}"), **GOOD if gold != "null" else OWN_SCORE_WORDS)
    assert outcome(run) == "cannot be told"
    said = verdict(run)
    assert "Improved" not in said and "Learned: SFT's loss" in said
    if gold == "null":
        assert said.startswith("The only score is the one that was trained on, which rises whether or not")
        assert "the reward's score of the PPO model on new prompts +0.2 (+0.1 to +0.3)" in said
    else:
        assert said.startswith("evaluate.gold: policies learned from learned, so it cannot judge them.")
    assert "Name a judge that nothing learned from: evaluate.gold (a function" in said


def test_a_function_that_was_learned_from_does_not_judge_and_a_verifier_does(tmp_path: Path) -> None:
    """A verifier checks answers to new prompts against their rows."""
    for source, is_told in (("vader", False), ("verify:number", True), ("verify:regex", True)):
        reward = f"{{source: {source}, args: {{pattern: yes}}}}" if source == "verify:regex" else source
        chain = stages_of(f"ppo.reward={reward}", "ppo.score.normalize=none", f"evaluate.gold={reward}")
        run = run_of(tmp_path, chain, **GOOD)
        assert outcome(run) == ("worked" if is_told else "cannot be told")


COLUMN = """
def by_column(prompts, completions, {column}, **columns):
    return [0.0] * len(prompts)
"""


@pytest.mark.parametrize(("column", "word"), [("answer", "worked"), ("category", "cannot be told")])
def test_a_column_that_holds_no_answer_makes_no_verifier(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: str, word: str
) -> None:
    name = f"function_of_{column}"
    (tmp_path / f"{name}.py").write_text(COLUMN.format(column=column))
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = f"python:{name}:by_column"
    chain = stages_of(f"ppo.reward={reward}", "ppo.score.normalize=none", f"evaluate.gold={reward}")
    assert outcome(run_of(tmp_path, chain, **GOOD)) == word


def test_a_reward_model_under_another_name_does_not_judge(tmp_path: Path) -> None:
    """By whatever path it is named, through links."""
    run = run_of(tmp_path, stages_of(), **GOOD)
    (tmp_path / "store").mkdir()
    (run.directory / "artifacts").mkdir(exist_ok=True)
    (run.directory / "artifacts" / "reward").symlink_to(tmp_path / "store")
    place = (
        f"model:{run.directory}/artifacts/reward",
        f"model:{run.directory}/../{run.directory.name}/artifacts/reward",
    )
    for learned, gold in ((None, place[0]), place):
        overrides = () if learned is None else (f"ppo.reward={learned}", "ppo.score.normalize=none")
        again = run_of(tmp_path, stages_of(*overrides, f"evaluate.gold={gold}"), **GOOD)
        assert outcome(again) == "cannot be told", gold
        assert f"evaluate.gold: policies learned from {gold}, so it cannot judge" in verdict(again)


@pytest.mark.parametrize(("scale", "word"), [(2.0, "cannot be told"), (None, "worked")])
def test_a_function_that_scores_as_the_learned_one_does_not_judge(
    tmp_path: Path, scale: float | None, word: str
) -> None:
    """Whatever calls whatever."""
    run = run_of(tmp_path, stages_of(), **GOOD)
    (run.directory / "artifacts" / "evaluate").mkdir(parents=True)
    rows = [
        {"policy": "ppo", "response": str(n), "score": n / 7, "gold": n / 7 * scale + 1 if scale else n % 11}
        for n in range(40)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (run.directory / "artifacts" / "evaluate" / "responses.jsonl").write_text(lines)
    assert outcome(run) == word
    assert ("scores exactly as what policies learned from" in verdict(run)) is (word != "worked")


def test_dpo_is_judged_by_no_score_of_its_own(tmp_path: Path) -> None:
    run = run_of(tmp_path, stages_of("recipe=dpo", "evaluate.gold=null"), sft=DOWN)
    add(run, "dpo", "accuracy_over_baseline", UP)
    add(run, "evaluate", "score_gain/dpo", UP)
    assert outcome(run) == "cannot be told" and "reward" not in verdict(run).partition("Learned")[0]
    del run.stages["evaluate"]
    assert outcome(run) == "cannot be told"
    assert verdict(run).startswith("No stage of this run judges the answers. Run evaluate too.")


def test_sft_on_answers_that_a_score_chose_does_not_judge_itself(tmp_path: Path) -> None:
    """Rejection sampling."""
    run = run_of(tmp_path, stages_of("recipe=best_of_n", "evaluate.gold=null"), sft=DOWN, reward=UP)
    add(run, "sft@2", "held_out_loss_change", DOWN)
    assert outcome(run) == "cannot be told"
    add(run, "evaluate", "score_gain/sft@2", UP)
    assert outcome(run) == "cannot be told" and "The only score is the one" in verdict(run)


def test_sft_is_judged_by_answers_that_it_did_not_learn(tmp_path: Path) -> None:
    chain = stages_of("evaluate.gold=null")
    assert outcome(run_of(tmp_path, chain, sft=DOWN)) == "worked"
    assert outcome(run_of(tmp_path, chain, sft=UNKNOWN)) == "cannot be told"
    assert outcome(run_of(tmp_path, chain, sft=DOWN, reward=UP)) == "worked"
    assert outcome(run_of(tmp_path, chain, sft=DOWN, reward=UNKNOWN)) == "cannot be told"


@pytest.mark.parametrize(
    ("ranking", "gain", "word"),
    [
        (UP, UP, "worked"), (UP, UNKNOWN, "cannot be told"), (UNKNOWN, UP, "cannot be told"),
        (NONE, UP, "cannot be told"), (UP, DOWN, "did not work"),
    ],
)  # fmt: skip
def test_a_second_reward_model_judges_where_it_is_shown_to_rank(
    tmp_path: Path, ranking: tuple[float, float, float], gain: tuple[float, float, float], word: str
) -> None:
    run = run_of(tmp_path, stages_of(*JUDGE), **OWN_SCORE_WORDS)
    add(run, "reward@judge", "accuracy_over_baseline", ranking)
    add(run, "reward@judge", "accuracy", (0.74, 0.7, 0.78), 420)
    add(run, "evaluate", "judge_gain/ppo", gain)
    assert outcome(run) == word
    said = verdict(run)
    if ranking == UP:
        assert f"the judge's score of the PPO model on new prompts {gain[0]:+.3g} (" in said
        assert "; the judge is right on 0.74 (0.70 to 0.78) of 420 held-out pairs" in said
    else:
        assert said.startswith("evaluate.judge: reward@judge is not shown to rank better than a rule that")


def test_a_reward_model_of_the_same_pairs_does_not_judge(tmp_path: Path) -> None:
    for pairs, word in (("samples:pairs", "cannot be told"), ("samples:more", "worked")):
        chain = stages_of(f"++instances.reward-at-2.pairs={pairs}", "evaluate.gold=learned@2")
        run = run_of(tmp_path, chain, **GOOD)
        add(run, "reward@2", "accuracy_over_baseline", UP)
        assert outcome(run) == word


def test_nothing_is_told_behind_a_reward_model_that_may_rank_by_chance(tmp_path: Path) -> None:
    """Whatever rose, by whichever score."""
    run = run_of(tmp_path, stages_of(), **GOOD | {"reward": UNKNOWN})
    assert outcome(run) == "cannot be told"
    assert verdict(run).startswith(
        "reward is not shown to rank better than a rule that reads no word (+0.1, -0.1 to +0.3 of 30 "
        "held-out pairs), so nothing that learned from it can be told. Give reward.pairs more or cleaner"
    )
    of_dpo = run_of(tmp_path, stages_of("recipe=dpo"), sft=DOWN, reward=UNKNOWN)  # reads no reward
    add(of_dpo, "evaluate", "gold_gain/dpo", UP)
    assert outcome(of_dpo) == "worked"


@pytest.mark.parametrize(
    ("gain", "word"),
    [
        ((0.003, 0.001, 0.005), "no gain worth having"), ((0.003, -0.001, 0.007), "no gain worth having"),
        ((0.06, 0.04, 0.08), "worked"), ((0.03, 0.001, 0.06), "worked"),
        ((0.03, -0.01, 0.07), "cannot be told"),
        ((-0.003, -0.005, -0.001), "did not work"),
    ],
)  # fmt: skip
def test_a_gain_below_the_smallest_is_not_worth_having(
    tmp_path: Path, gain: tuple[float, float, float], word: str
) -> None:
    """0.1 of a deviation of 0.5 is 0.05."""
    run = run_of(tmp_path, chain_of(), **GOOD | {"gold": gain})
    told = {"gold_mean/sft": 0.1, "gold_deviation/sft": 0.5}
    told |= {"gold_mean/ppo": 0.2, "gold_deviation/ppo": 9.0}
    run.stages["evaluate"]["metrics"] |= {f"evaluate/{name}": value for name, value in told.items()}
    assert outcome(run) == word
    assert ("No gain worth having: the gold score of the PPO model" in verdict(run)) == (word[:2] == "no")
    wanted = run_of(tmp_path, chain_of(OwnStage, "evaluate.smallest_gain=0"), **GOOD | {"gold": gain})
    wanted.stages["evaluate"]["metrics"] |= {f"evaluate/{name}": value for name, value in told.items()}
    assert outcome(wanted) != "no gain worth having"


def test_gains_over_the_start_and_over_base_stand_side_by_side(tmp_path: Path) -> None:
    run = run_of(tmp_path, stages_of(), **GOOD)
    add(run, "evaluate", "gold_over_base/ppo", (0.37, 0.3, 0.44))
    said = "on new prompts +0.2 (+0.1 to +0.3) over SFT, +0.37 over base."
    assert f"Improved: the gold score of the PPO model {said}" in verdict(run)


def test_what_is_not_compared_with_its_start_is_not_judged(tmp_path: Path) -> None:
    """Its own score is all that there is then."""
    chain = stages_of("evaluate.policies=[base,ppo]", "evaluate.gates.win_rate=null")
    run = run_of(tmp_path, chain, sft=DOWN, reward=UP, ppo=UP)
    add(run, "evaluate", "gold_over_base/ppo", UP)
    assert outcome(run) == "cannot be told"
    assert verdict(run).startswith("evaluate.policies has no sft, which the others started from: add it.")


def test_data_that_cannot_be_used_are_told_also_with_a_base_model_that_guesses(tmp_path: Path) -> None:
    run = run_of(tmp_path, stages_of(), sft=DOWN)
    run.stages["prepare"]["metrics"]["prepare/vocabulary_size"] = 259.0
    run.stages["sft"]["metrics"]["sft/held_out_loss_before"] = 5.55
    run.gates.append(GateResult("prepare", "bad_share", 0.9, Bound(max=0.5, advice="look at it"), None))
    assert outcome(run) == "did not work" and "First failed gate: prepare/bad_share" in verdict(run)


def test_a_tiny_model_without_texts_says_nothing_about_quality(tmp_path: Path) -> None:
    chain = stages_of("recipe=grpo", "ppo.init=base", "reward.init=base")
    run = run_of(tmp_path, chain, reward=UP)
    add(run, "evaluate", "gold_gain/grpo", UP)
    run.changed = [{"key": "model.kind", "default": "embedded", "value": "tiny"}]
    assert (outcome(run), verdict(run)) == ("cannot be told", UNTRAINED_VERDICT)
    run.changed = []
    assert outcome(run) == "worked"


def test_a_base_model_that_guesses_says_nothing_about_quality(tmp_path: Path) -> None:
    for loss, is_untrained in ((5.55, True), (4.0, False)):
        run = run_of(tmp_path, stages_of(), **GOOD | {"gold": DOWN})
        run.changed = [{"key": "model.kind", "default": "embedded", "value": "tiny"}]
        run.stages["prepare"]["metrics"]["prepare/vocabulary_size"] = 259.0
        run.stages["sft"]["metrics"]["sft/held_out_loss_before"] = loss
        assert (verdict(run) == UNTRAINED_VERDICT) is is_untrained
        assert outcome(run) == ("cannot be told" if is_untrained else "did not work")
        run.stages["evaluate"]["metrics"]["evaluate/task_loss/base"] = 4.0  # where SFT starts elsewhere
        assert verdict(run) != UNTRAINED_VERDICT


def test_a_trained_model_that_does_not_expect_short_answers_is_not_called_random(tmp_path: Path) -> None:
    """Guessing among 49,152 tokens has a loss of 10.8. A model that expects other answers can have it too."""
    for kind, loss, is_untrained in (
        ("embedded", 10.8, False), ("hub", 12.5, False), ("hub", 10.85, True), ("tiny", 10.8, True)
    ):  # fmt: skip
        run = run_of(tmp_path, stages_of(), **GOOD)
        run.changed = [{"key": "model.kind", "default": "embedded", "value": kind}]
        run.stages["prepare"]["metrics"]["prepare/vocabulary_size"] = 49152.0
        run.stages["sft"]["metrics"]["sft/held_out_loss_before"] = loss
        assert (verdict(run) == UNTRAINED_VERDICT) is is_untrained, kind


PEOPLE = (
    "stage=[evaluate,label@people]",
    *(
        f"++instances.generate-at-{policy}.{key}"
        for policy in ("sft", "ppo")
        for key in (f"policy={policy}", "splits=[held_out]")
    ),
    "++instances.label-at-people.answers=[generate@sft,generate@ppo]",
    "++instances.label-at-people.annotators=[ada]",
    "evaluate.gold=null",
)


@pytest.mark.parametrize(
    ("share", "word"),
    [
        ((0.3, 0.1, 0.5), "worked"), ((0.04, 0.01, 0.07), "no gain worth having"),
        ((-0.3, -0.5, -0.1), "did not work"), ((0.1, -0.1, 0.3), "cannot be told"),
    ],
)  # fmt: skip
def test_people_judge_where_no_score_does(
    tmp_path: Path, share: tuple[float, float, float], word: str
) -> None:
    run = run_of(tmp_path, stages_of(*PEOPLE), **OWN_SCORE_WORDS)
    add(run, "label@people", "preferred/generate@ppo", share)
    add(run, "label@people", "preferred/generate@sft", (0.9, 0.8, 1.0))  # its start did not answer
    assert outcome(run) == word
    figure = f"{share[0]:+.3g} ({share[1]:+.3g} to {share[2]:+.3g}) over SFT"
    assert f"people's votes on answers of the PPO model to new prompts {figure}" in verdict(run)
    assert "trained on" not in verdict(run)
    gold = run_of(tmp_path, stages_of(*PEOPLE[:-1]), **GOOD)
    gold.stages |= {"label@people": run.stages["label@people"]}
    assert outcome(gold) == "worked" and "people" not in verdict(gold)


def test_votes_that_do_not_judge(tmp_path: Path) -> None:
    """A rule's, and those on another policy than the last."""
    share = (0.3, 0.1, 0.5)
    for override in (
        ("++instances.label-at-people.annotator=rule", "++instances.label-at-people.reward=vader"),
        ("++instances.generate-at-ppo.policy=base",),
    ):
        run = run_of(tmp_path, stages_of(*PEOPLE, *override), **OWN_SCORE_WORDS)
        add(run, "label@people", "preferred/generate@ppo", share)
        assert outcome(run) == "cannot be told" and "trained on" in verdict(run)
