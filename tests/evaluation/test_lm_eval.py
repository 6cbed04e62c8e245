"""lm-eval on task files of this machine: its figures are those of whole logits."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch

from helpers.chains import Chain, RealChain
from helpers.jobs import TINY
from rlhf.config import ConfigError
from rlhf.distributed.compute import make_compute
from rlhf.evaluation import lm_eval as harness
from rlhf.evaluation.lm_eval import Harness
from rlhf.generation.policy_model import PolicyModel

QUESTIONS: list[dict[str, Any]] = [
    {"question": f"{number} and {number}?", "choices": ["twice", "1", "a long answer"], "gold": number % 3}
    for number in range(9)
]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one task, and its data."""
    # so that nothing is found, or left, in the user's own cache
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_target": "{{gold}}",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "sums.yaml").write_text(json.dumps(task))  # JSON is YAML
    return folder


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> PolicyModel:
    compute, _ = make_compute("cpu", "fp32")
    return PolicyModel.load(tiny_model, TINY, compute)


def settings(tasks: Path) -> tuple[str, ...]:
    """To ask the base model and nobody else."""
    return (
        "stage=evaluate", "evaluate.policies=[base]", "evaluate.reward=null", "evaluate.gold=null",
        "evaluate.gates.win_rate=null", "evaluate.lm_eval=[sums]", f"evaluate.lm_eval_tasks={tasks}",
        "precision=fp32",
    )  # fmt: skip


def is_right(policy: PolicyModel, question: str, choices: list[str], gold: int) -> bool:
    scores = []
    for choice in choices:
        given, ids = (
            policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (f"Question: {question}\nAnswer:", f" {choice}")
        )
        with torch.no_grad():
            logp_TV = policy.model(input_ids=torch.tensor([given + ids])).logits[0].log_softmax(-1)
        scores.append(sum(float(logp_TV[len(given) + at - 1, token]) for at, token in enumerate(ids)))
    return scores.index(max(scores)) == gold


def test_its_accuracy_is_that_of_whole_logits(policy: PolicyModel, tasks: Path) -> None:
    asked = Harness(["sums"], tasks, None)
    asked.check()
    asked.fetch()
    right = [is_right(policy, **question) for question in QUESTIONS]
    assert asked.measure(policy) == {"lm_eval/sums/acc": pytest.approx(sum(right) / 9)}
    assert 0 < sum(right) < 9
    first = sum(right[:4]) / 4
    assert Harness(["sums"], tasks, 4).measure(policy) == {"lm_eval/sums/acc": pytest.approx(first)}


def test_what_is_not_there_is_told_before_anything_runs(tasks: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"no task hellaswag in evaluate\.lm_eval_tasks=.*: sums\."):
        Harness(["sums", "hellaswag"], tasks, None).check()
    with pytest.raises(ConfigError, match=r"evaluate\.lm_eval_tasks=.*none: there is no such folder"):
        Harness(["sums"], tasks / "none", None).check()
    (tasks / "rows.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"evaluate\.lm_eval=sums: .* downloads its tasks' data"):
        Harness(["sums"], tasks, None).fetch()
    # as on a machine without it: the tests' own environment has it
    monkeypatch.setattr(harness, "find_spec", lambda name: importlib.util.find_spec("no_such_package"))
    with pytest.raises(ConfigError, match=r"evaluate\.lm_eval needs lm-eval: pip install -e '\.\[lm_eval\]'"):
        Harness(["sums"], tasks, None).check()


def test_the_content_of_the_task_files_is_in_the_key(tasks: Path) -> None:
    before = Harness(["sums"], tasks, None).digest()
    assert before.startswith(f"{Harness(['sums'], None, None).digest()} ")
    (tasks / "sums.yaml").write_text((tasks / "sums.yaml").read_text().replace("Answer", "Reply"))
    assert Harness(["sums"], tasks, None).digest() != before


def test_the_stage_asks_it(policy: PolicyModel, tasks: Path, tmp_path: Path) -> None:
    outcome = Chain(tmp_path).run(*settings(tasks), "evaluate.lm_eval_limit=4")
    assert outcome.code == 0, outcome.err
    right = [is_right(policy, **question) for question in QUESTIONS[:4]]
    measured = outcome.summary["stages"]["evaluate"]["metrics"]
    assert measured["evaluate/lm_eval/sums/acc/base"] == pytest.approx(sum(right) / 4)


def test_data_that_cannot_be_had_are_told_before_anything_is_trained(tasks: Path, tmp_path: Path) -> None:
    (tasks / "rows.jsonl").unlink()
    outcome = Chain(tmp_path).run(*settings(tasks), "evaluate.policies=[base,sft]")
    assert outcome.code == 2
    assert "evaluate.lm_eval=sums: " in outcome.err and "downloads its tasks' data" in outcome.err
    assert outcome.statuses == {"prepare": "ran"}


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["none", "fsdp2"])
def test_the_other_ranks_take_part_in_a_task_that_takes_longer_than_their_patience(
    zero: str, policy: PolicyModel, tasks: Path, tmp_path: Path
) -> None:
    (tasks / "slow.py").write_text(
        "import time\n\n\ndef question(row):\n    time.sleep(2)\n    return row['question']\n"
    )
    task = json.loads((tasks / "sums.yaml").read_text())
    del task["doc_to_text"]
    lines = [f"{key}: {json.dumps(value)}\n" for key, value in task.items()]
    (tasks / "sums.yaml").write_text("".join([*lines, "doc_to_text: !function slow.question\n"]))
    chain = RealChain(tmp_path / "chain")
    environment = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    keys = (*settings(tasks), "launch.processes=2", f"zero={zero}")
    # what comes before the task is made with the usual patience: a slow machine can take longer than this one
    before = chain.start("slow", *keys, "evaluate.lm_eval=[]", environment=environment)
    out, err = before.communicate(timeout=120)
    assert before.returncode == 0, out + err
    process = chain.start("slow", *keys, "distributed.timeout=15", environment=environment)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, out + err
    assert "prepare reused" in out + err
    summary = json.loads((chain.directory / "runs" / "slow" / "summary.json").read_text())
    right = [is_right(policy, **question) for question in QUESTIONS]
    measured = summary["stages"]["evaluate"]["metrics"]
    assert measured["evaluate/lm_eval/sums/acc/base"] == pytest.approx(sum(right) / 9)
