"""Quality and cost, against numbers worked out by hand."""

from __future__ import annotations

import io
import math
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

from helpers.experiments import build_stage
from helpers.stages import ANIMALS, compare_stage, run_compare
from helpers.store import manifest
from rlhf.compare.artifacts import training_seconds, tuned_artifact
from rlhf.compare.candidate import label
from rlhf.compare.figures import best_untrained, break_even_metrics
from rlhf.config import ConfigError
from rlhf.costs.price import break_even, cost_of
from rlhf.digests import directory_digest
from rlhf.evaluation.answers import Answers, paired_gain
from rlhf.evaluation.intervals import mean
from rlhf.evaluation.references import answer_found, exact_match, rouge_l
from rlhf.evaluation.retention import Retained
from rlhf.pipeline.checks import check
from rlhf.pipeline.stage import View
from rlhf.pipeline.store import Artifact, Store
from rlhf.rl.rollout import Rollout
from rlhf.stages.reward import RewardStage


@pytest.mark.parametrize(
    ("answer", "reference", "exact", "found", "rouge"),
    [
        ("The Grey Heron.", "grey heron", 1, 1, 0.8),  # 2 of 3 words and 2 of 2: articles count in ROUGE only
        ("It is Grey Heron, I think", "Grey Heron", 0, 1, 4 / 8),
        ("Greyish heron", "Grey Heron", 0, 0, 0.5),
        ("room C55", "room C5", 0, 0, 0.5),  # a part of a word is no match
        ("the police killed the gunman", "police kill the gunman", 0, 0, 6 / 9),
        ("the gunman police", "police the gunman", 0, 0, 4 / 6),  # the order counts
        ("", "grey", 0, 0, 0.0),
        ("anything", "the", 0, 0, 0.0),
    ],
)
def test_an_answer_beside_its_reference(
    answer: str, reference: str, exact: float, found: float, rouge: float
) -> None:
    assert exact_match(answer, reference) == exact
    assert answer_found(answer, reference) == found
    assert rouge_l(answer, reference) == pytest.approx(rouge)


def test_cost_is_price_times_hours() -> None:
    assert cost_of(1800, 3.0) == 1.5


@pytest.mark.parametrize(
    ("setup", "per_request", "other_setup", "other_per_request", "requests"),
    [
        (100, 1.0, 0, 1.5, 200),  # 100 + 200 = 200 * 1.5
        (100, 1.0, 20, 1.5, 160),
        (100, 1.5, 0, 1.5, math.inf),
        (100, 2.0, 0, 1.5, math.inf),
        (0, 1.0, 0, 1.5, 0),
        (0, 1.5, 0, 1.5, 0),
        (0, 2.0, 10, 1.5, math.inf),  # ahead at first, but not for good
    ],
)
def test_when_training_has_paid_off(
    setup: float, per_request: float, other_setup: float, other_per_request: float, requests: float
) -> None:
    found = break_even(setup, other_setup, other_per_request - per_request)
    assert found == pytest.approx(requests)


def answers(quality: list[float], *, cost: list[float] | None = None, setup: float | None = 0.0) -> Answers:
    """Of as many questions; each request costs what `cost` says."""
    count, nothing = len(quality), torch.zeros(0)
    rollout = Rollout(
        [torch.ones(1).long()] * count, [torch.ones(1).long()] * count, torch.ones(count).bool()
    )
    given = Answers(
        rollout, ["a"] * count, nothing, nothing, nothing, Retained([], nothing, nothing, nothing), {}
    )
    given.scores["rouge_l"] = torch.tensor(quality, dtype=torch.float64)
    given.cost_B = torch.tensor(cost or [], dtype=torch.float64)
    given.figures |= {} if setup is None else {"setup_cost": setup}
    return given


def test_the_best_untrained_option_is_that_with_the_highest_mean() -> None:
    found = {"base": answers([0.1, 0.2]), "few": answers([0.4, math.nan]), "sft": answers([1.0, 1.0])}
    assert best_untrained(found, ["base", "few"], "rouge_l") == "few"
    assert best_untrained(found, ["base"], "rouge_l") == "base"
    assert best_untrained(found, [], "rouge_l") is None
    found["equal"] = answers([0.4, 0.4])
    assert best_untrained(found, ["few", "equal"], "rouge_l") == "few"  # the first


def test_a_gain_is_paired_by_question() -> None:
    own, other = answers([0.9, 0.5, 0.7, math.nan]), answers([0.7, 0.3, 0.5, 0.9])
    gain = paired_gain(own, other, "rouge_l")
    assert gain.value == pytest.approx(0.2) and gain.rows == 3
    assert gain.high - gain.low < 2.0
    assert gain.low < 0.2 < gain.high  # three equal differences are not certainty
    own.scores["gold"], other.scores["gold"] = torch.tensor([5.0, 1.0, 3.0]), torch.tensor([4.0, 0.0, 2.0])
    assert paired_gain(own, other, "gold")[:3] == pytest.approx((1.0, 1.0, 1.0))  # the same for each question


def test_break_even_has_the_interval_of_the_saving() -> None:
    own, other = (
        answers([1.0] * 3, cost=[1.0, 1.0, 1.0], setup=100.0),
        answers([1.0] * 3, cost=[3.0, 2.0, 4.0]),
    )
    found = break_even_metrics("pays", own, other)
    saving = mean(torch.tensor([2.0, 1.0, 3.0]))
    assert found["pays"] == pytest.approx(50.0)
    assert found["pays_low"] == pytest.approx(100 / saving.high)
    assert found["pays_high"] == math.inf  # the saving may be nothing: its interval holds 0
    assert break_even_metrics("pays", answers([1.0], cost=[1.0], setup=None), other) == {}
    assert break_even_metrics("pays", answers([1.0]), other) == {}  # not timed


def publish(store: Store, stage: str, key: str, seconds: float, **inputs: str) -> Artifact:
    (store.root / stage).mkdir(exist_ok=True)
    made = manifest(stage, key, recipe={"inputs": inputs}, seconds=seconds)
    return store.publish(store.scratch(stage, key), made)


def test_training_is_the_whole_lineage_and_each_stage_counts_once(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    publish(store, "sft", "a", 100)
    publish(store, "reward", "b", 10, sft="a")
    publish(store, "generate", "c", 1, sft="a", reward="b")
    ppo = publish(store, "ppo", "d", 1000, sft="a", reward="b", generate="c")
    assert training_seconds([ppo]) == 1111
    link = tmp_path / "runs" / "mine" / "artifacts" / "ppo"
    link.parent.mkdir(parents=True)
    link.symlink_to(ppo.path)
    assert training_seconds([tuned_artifact(str(link), "compare"), ppo]) == 1111  # each stage counts once
    assert label(str(link)) == "mine/ppo"
    assert label(str(ppo.path)) == "ppo/d"


def test_a_lineage_with_a_gap_has_no_known_cost(tmp_path: Path) -> None:
    ppo = publish(Store(tmp_path / "store"), "ppo", "d", 1000, sft="gone")
    with pytest.raises(ConfigError, match=r"made from sft/gone, which is no longer in the store"):
        training_seconds([ppo])


def test_only_a_finished_policy_can_be_compared(tmp_path: Path) -> None:
    for directory in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(ConfigError, match=r"compare: .*no finished artifact there"):
            tuned_artifact(str(directory), "compare")
    reward = publish(Store(tmp_path / "store"), "reward", "b", 1)
    chain = {"reward": build_stage(RewardStage)}
    with pytest.raises(ConfigError, match=r"compare: .*reward makes no policy"):
        check(compare_stage(artifacts=[str(reward.path)]), View(chain))


def test_a_plain_directory_can_be_compared_and_its_training_is_not_priced(
    tmp_path: Path, tiny_model: Path
) -> None:
    found = tuned_artifact(str(tiny_model), "compare")
    assert found == tiny_model.resolve()
    assert training_seconds([found]) is None
    stage = compare_stage(artifacts=[str(tiny_model)], methods=["zero_shot"])
    check(stage, View({}))
    before = stage.external_digests(directory_digest, {})[str(tiny_model)]
    metrics = run_compare(stage, tiny_model, tmp_path / "out").summary
    assert metrics is not None
    name = label(str(tiny_model))
    assert metrics[f"rouge_l/{name}"] == metrics["rouge_l/base"]  # the same model
    assert f"setup_seconds/{name}" not in metrics and f"break_even_zero_shot/{name}" not in metrics
    assert metrics["setup_seconds/base"] == 0.0
    assert before == stage.external_digests(directory_digest, {})[str(tiny_model)]


def test_a_plain_directory_without_whole_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    cut = Path(shutil.copytree(tiny_model, tmp_path / "cut"))
    (cut / "model.safetensors").write_bytes((tiny_model / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        tuned_artifact(str(cut), "compare")
    (cut / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no \*\.safetensors there"):
        tuned_artifact(str(cut), "compare")


def test_passages_that_do_not_fit_are_told_loudly(tmp_path: Path, tiny_model: Path) -> None:
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("".join(f"{' '.join(ANIMALS)} {number} {'far ' * 180}\n" for number in range(4)))
    stage = compare_stage(methods=["retrieval"], corpus=str(corpus))
    printed = io.StringIO()
    run_compare(stage, tiny_model, tmp_path / "out", Console(file=printed, width=300))
    assert "CUT: base+retrieval lost " in printed.getvalue()
    assert "compare.retrieval.passages" in printed.getvalue()
