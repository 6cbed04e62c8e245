"""Held-out evaluations while PPO runs: each is made once, whatever stops the run in between."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from helpers.experiments import build
from helpers.ppo import best_weights, equal, length, ppo_job, ppo_stage, prompts, resumed_learner
from helpers.trained import write_trained
from rlhf.config import ConfigError
from rlhf.evaluation.held_out import FILE
from rlhf.pipeline.checks import check
from rlhf.pipeline.stage import View
from rlhf.ppo.metrics import Evaluation
from rlhf.ppo.trainer import PolicyTrainer
from rlhf.rewards.reward import Prompts, Reward, RewardError
from rlhf.training.checkpoint import verify_checkpoint

SMALL = (
    "ppo.steps=4", "ppo.batch_episodes=8", "ppo.minibatch_episodes=4", "ppo.max_new_tokens=6",
    "ppo.evaluate_every=2", "ppo.score.normalize=running",
)  # fmt: skip
TRAIN, HELD_OUT = prompts(range(100, 140)), prompts(range(700, 704))


class Faulty:
    """The response's length, but in chosen calls: of rollouts (8 rows), counted from 1, or of evaluations (4
    rows), counted from 0."""

    def __init__(self, *, bad_rollout: int = 0, away_since: int = 99, unscored: int = 0) -> None:
        self.bad_rollout, self.away_since, self.unscored = bad_rollout, away_since, unscored
        self.rollouts, self.evaluations = 0, 0
        self.responses: list[str] = []

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        scores = length(prompts, completions)
        self.responses = list(completions)
        if len(completions) == len(HELD_OUT):
            if self.evaluations >= self.away_since:
                raise RewardError("the reward server does not answer")
            self.evaluations += 1
            scores[: self.unscored] = math.nan
        else:
            self.rollouts += 1
            if self.rollouts == self.bad_rollout:
                scores[3] = math.inf
        return scores


def letters(prompts: Prompts, completions: Sequence[str]) -> Tensor:
    """What a policy learns within three steps."""
    return torch.tensor([float(sum(map(str.isascii, each))) for each in completions])


def learner_in(directory: Path, model: Path, reward: Reward, *overrides: str) -> PolicyTrainer:
    return resumed_learner(directory, model, reward, *SMALL, *overrides)


def train(trainer: PolicyTrainer) -> dict[str, float]:
    return trainer.train(TRAIN, HELD_OUT)


def published_answers(trainer: PolicyTrainer) -> str:
    trainer.publish_answers()
    return (trainer.job.directory / FILE).read_text()


def evaluated_steps(trainer: PolicyTrainer) -> list[int]:
    lines = [json.loads(line) for line in (trainer.job.directory / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "ppo/held_out_score" in line]


@pytest.mark.parametrize("evaluation", [1, 2])
def test_a_reward_that_is_gone_during_an_evaluation_costs_nothing(
    tmp_path: Path, tiny_model: Path, evaluation: int
) -> None:
    through = learner_in(tmp_path / "through" / "job", tiny_model, Faulty())
    expected = train(through)
    first = learner_in(tmp_path / "first", tiny_model, Faulty(away_since=evaluation))
    with pytest.raises(RewardError):
        train(first)
    asked = Faulty()
    second = learner_in(tmp_path / "second", tiny_model, asked)
    assert train(second) == expected
    assert asked.rollouts == 4 - 2 * evaluation
    assert evaluated_steps(second) == evaluated_steps(through) == [0, 2, 4]
    assert equal(best_weights(second), best_weights(through))


def test_what_a_bad_last_step_left_is_evaluated_by_the_next_run(tmp_path: Path, tiny_model: Path) -> None:
    first = learner_in(tmp_path / "first", tiny_model, Faulty(bad_rollout=4), "ppo.max_bad_steps=0")
    with pytest.raises(ConfigError, match="ppo: step 4: 1 steps were skipped"):
        train(first)
    assert evaluated_steps(first) == [0, 2]
    asked = Faulty()
    second = learner_in(tmp_path / "second", tiny_model, asked, "ppo.max_bad_steps=1")
    summary = train(second)
    assert evaluated_steps(second) == [0, 2, 4]
    assert asked.rollouts == 0
    assert summary["held_out_score_last"] == second.evaluations.last.score


def test_held_out_responses_without_a_score_are_left_out_and_told(tmp_path: Path, tiny_model: Path) -> None:
    reward = Faulty(unscored=1)
    trainer = learner_in(tmp_path / "job", tiny_model, reward)
    trainer.job.progress.console = console = Console(file=StringIO(), width=200)
    result = trainer.evaluate(HELD_OUT)
    lengths = [float(len(text.encode())) for text in reward.responses]
    assert result.unscored == 1
    assert (result.choice_score, result.score) == (lengths[2], (lengths[1] + lengths[3]) / 2)
    assert isinstance(console.file, StringIO)
    assert "1 of 4 held-out responses got no finite score after step 0" in console.file.getvalue()
    reward.unscored = 3  # one half is left with none
    with pytest.raises(RewardError, match="no finite score for any of 2 responses"):
        trainer.evaluate(HELD_OUT)


def evaluation(scores: list[float]) -> Evaluation:
    zeros_B = torch.zeros(len(scores))
    return Evaluation(torch.tensor(scores), zeros_B, zeros_B, zeros_B.bool())


def test_a_gain_is_of_the_judged_prompts_that_have_both_scores() -> None:
    """Every second prompt judges: of these the second has no score later, and the fourth had none before."""
    before = evaluation([0.0, 1.0, 0.0, 2.0, 0.0, 3.0, 0.0, math.nan])
    after = evaluation([9.0, 1.5, 9.0, math.nan, 9.0, 4.5, 9.0, 7.0])
    gain = after.gain_over(before)
    assert (gain.value, gain.rows) == (1.0, 2)
    assert after.choice_score == 9.0


def test_weights_that_only_the_judged_prompts_like_are_not_kept(tmp_path: Path, tiny_model: Path) -> None:
    def better_each_time(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        if len(completions) != len(HELD_OUT):
            return length(prompts, completions)
        calls.append(len(completions))
        judged = 10.0 * len(calls)
        return torch.tensor([-judged, judged, -judged, judged])

    calls: list[int] = []
    trainer = learner_in(tmp_path / "job", tiny_model, better_each_time)
    summary = train(trainer)
    assert len(calls) == 3
    assert (summary["best_step"], summary["held_out_score_gain"]) == (0, 0.0)
    assert (summary["held_out_score"], summary["held_out_score_last"]) == (10.0, 30.0)


def test_one_held_out_prompt_cannot_choose_and_judge(tmp_path: Path, tiny_model: Path) -> None:
    stage, job = ppo_stage(*SMALL), ppo_job(tmp_path / "job", tiny_model)
    job.data.write("ppo", "held_out", HELD_OUT[:1])
    view = View(build().stages, data=job.data, base=job.base)
    with pytest.raises(ConfigError, match="1 held-out prompt, but at least 2 are needed"):
        check(stage, view)
    job.data.write("ppo", "held_out", HELD_OUT[:2])
    check(stage, view)


def test_a_response_that_looks_like_markup_is_quoted_as_it_is(tmp_path: Path, tiny_model: Path) -> None:
    trainer = learner_in(tmp_path / "job", tiny_model, Faulty())
    trainer.job.progress.console = console = Console(file=StringIO(), width=200)
    trainer.learner.begin(1, 4)
    trainer.learner.count_bad("the reward of 'no [/INST] [red]' is nan.")
    assert isinstance(console.file, StringIO)
    assert "step 1 skipped: the reward of 'no [/INST] [red]' is nan." in console.file.getvalue()


@pytest.mark.parametrize("after", ["save_trained", "keep_best", "log"])
def test_killed_between_the_best_weights_and_the_checkpoint_it_ends_the_same(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, after: str
) -> None:
    """What lies beside the checkpoint is half written then, or of a later step."""
    overrides = ("ppo.evaluate_every=1", "ppo.steps=3", "ppo.optim.lr=3e-2")
    through = learner_in(tmp_path / "through" / "job", tiny_model, letters, *overrides)
    expected, moment = train(through), through.evaluations.best_step
    assert moment > 1
    first = learner_in(tmp_path / "first", tiny_model, letters, *overrides)
    checkpoints = first.job.checkpoints
    checkpoints.config = checkpoints.config.model_copy(update={"every_steps": 1})
    owners: dict[str, Any] = {"save_trained": first.engine, "keep_best": checkpoints, "log": first.job}
    work = getattr(owners[after], after)

    def then_killed(*arguments: Any) -> None:
        work(*arguments)
        if first.learner.done == moment:
            raise KeyboardInterrupt

    monkeypatch.setattr(owners[after], after, then_killed)
    with pytest.raises(KeyboardInterrupt):
        train(first)
    second = learner_in(tmp_path / "second", tiny_model, letters, *overrides)
    assert second.job.checkpoints.newest is not None
    assert second.job.checkpoints.newest["step"] == moment - 1
    assert not (tmp_path / "checkpoints" / ".best.part").exists()
    assert train(second) == expected
    assert equal(best_weights(second), best_weights(through))
    assert published_answers(second) == published_answers(through)


def test_every_answer_of_each_evaluation_is_published(tmp_path: Path, tiny_model: Path) -> None:
    reward = Faulty(unscored=1)
    trainer = learner_in(tmp_path / "job", tiny_model, reward, "ppo.steps=3")  # evaluated at 0, 2 and 3
    train(trainer)
    answers = [json.loads(line) for line in published_answers(trainer).splitlines()]
    assert [answer["step"] for answer in answers] == [0] * 4 + [2] * 4 + [3] * 4
    assert [answer["prompt"] for answer in answers] == 3 * [row.prompt for row in HELD_OUT]
    assert [answer["response"] for answer in answers[-4:]] == reward.responses
    assert [answer["score"] for answer in answers[::4]] == [None] * 3
    last = trainer.evaluations.last
    assert sum(answer["score"] for answer in answers[-4:][1::2]) / 2 == last.score
    assert [answer["kl"] for answer in answers[-4:]] == last.kl_B.tolist()
    assert [len(answer["token_ids"]) for answer in answers[-4:]] == last.length_B.tolist()


def test_answers_that_were_damaged_on_the_disk_are_told_and_left_out(
    tmp_path: Path, tiny_model: Path
) -> None:
    trainer = learner_in(tmp_path / "job", tiny_model, Faulty())
    train(trainer)
    (damaged,) = (tmp_path / "checkpoints").glob("kept-*-2.held_out_answers.jsonl")
    damaged.write_text("half a li")
    trainer.job.progress.console = console = Console(file=StringIO(), width=200)
    lines = published_answers(trainer).splitlines()
    assert {json.loads(line)["step"] for line in lines} == {0, 4}
    assert isinstance(console.file, StringIO) and "of steps [2] were kept, and are" in console.file.getvalue()


def test_the_best_weights_come_from_the_checkpoint_whatever_lies_beside_it(
    tmp_path: Path, tiny_model: Path
) -> None:
    """And on the disk they are there once."""
    first = learner_in(tmp_path / "first", tiny_model, Faulty(), "ppo.steps=3")
    checkpoints = first.job.checkpoints
    checkpoints.config = checkpoints.config.model_copy(update={"every_steps": 1})
    train(first)
    best, directory = best_weights(first), tmp_path / "checkpoints"
    names = {path.name for path in (directory / "best").iterdir()}
    for name in names:
        files = {path.stat().st_ino for path in directory.rglob(name)}
        assert (
            len(list(directory.rglob(name))) == 3 and len(files) == 1
        )  # of two checkpoints, and beside them
    shutil.rmtree(directory / "best")
    write_trained(directory / "best", {"other": torch.zeros(1)})
    second = learner_in(tmp_path / "second", tiny_model, Faulty(), "ppo.steps=3")
    assert equal(best_weights(second), best)
    (directory / "step-00000003" / "best" / min(names)).write_bytes(b"")
    assert "is not what was written" in verify_checkpoint(directory / "step-00000003")[1]
