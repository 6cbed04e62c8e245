"""Every metric that a small chain logs is defined on its stage's page, and no other is."""

from __future__ import annotations

import json
import re
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import rlhf.costs.hardware
from helpers.chains import Chain, Outcome
from helpers.experiments import build
from rlhf.pipeline.metrics import INTERVAL, summary_names

DOCS = Path(__file__).parents[2] / "docs"
STAGES = (
    "prepare", "sft", "reward", "generate", "ppo", "grpo", "dpo", "merge", "evaluate", "compare", "plan",
    "label",
)  # fmt: skip
PLACES = {
    "POLICY": r".+",
    "CANDIDATE": r".+",
    "K": r"\d+",
    "METHOD": r"\w+",
    "SET": r"\w+",
    "TASK": r"\w+",
    "METRIC": r"\w+",
}
ALSO_ON = {
    "grpo": "algorithms/ppo.md", "compare": "stages/evaluate.md", "evaluate": "stages/compare.md",
}  # fmt: skip
"""Stage -> the page that defines what it has in common with another one."""
GROUPS = ("grpo.steps=1", "grpo.batch_episodes=8", "grpo.minibatch_episodes=8", "grpo.max_resamples=1")
OF_PARTS = ["score_mean/NAME", "score_deviation/NAME"]
ELSEWHERE = ["seconds_sync", *OF_PARTS, *(f"held_out_{name}" for name in OF_PARTS)]
"""Logged in no small chain, and no summary metric: vLLM's, and those of several rewards
(tests/rewards/test_chain.py)."""


def defined(stage: str) -> list[str]:
    """The names in the first column of the tables under "What it logs"."""
    pages = [DOCS / "stages" / f"{stage}.md", *(DOCS / "algorithms").glob(f"{stage}.md")]
    return [name for page in pages for name in defined_on(page)]


def defined_on(page: Path) -> list[str]:
    """Those of one page."""
    names = []
    (section,) = re.findall(r"^## What it logs\n(.*?)(?=^## |\Z)", page.read_text(), re.MULTILINE | re.DOTALL)
    cells = re.findall(r"^\| (`.*?`) \|", section, re.MULTILINE)
    names += [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]
    return names


def stands_for(name: str, metric: str) -> bool:
    """Whether `gold_mean/POLICY` defines gold_mean/ppo, also its interval."""
    pattern = re.sub("|".join(PLACES), lambda place: PLACES[place[0]], name)
    return any(re.fullmatch(pattern, each) for each in (metric, INTERVAL.sub("", metric)))


@pytest.fixture(scope="module")
def logged(finished_chain: tuple[Chain, Outcome]) -> dict[str, set[str]]:
    """Stage -> what its lines in metrics.jsonl hold, steps and summary."""
    chain, first = finished_chain
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rlhf.costs.hardware, "CALIBRATION_SECONDS", 0.1)
        beside = chain.run(
            "stage=[merge,compare,plan,grpo,dpo,label]", *GROUPS, "label.annotator=rule",
            "label.reward=vader", "compare.num_questions=2",
            "compare.max_new_tokens=4", "dpo.loss=kto", "dpo.batch_rows=8",
        )  # fmt: skip
    assert beside.code == 0, beside.err
    found: dict[str, set[str]] = {}
    for outcome in (first, beside):
        for line in map(json.loads, (outcome.directory / "metrics.jsonl").read_text().splitlines()):
            names = {name for name in line if name.startswith(f"{line['stage']}/")}
            found.setdefault(line["stage"], set()).update(name.partition("/")[2] for name in names)
    return found


@pytest.fixture(scope="module")
def declared() -> dict[str, tuple[str, ...]]:
    """Stage -> the summary metrics that it may publish, with every option on."""
    stages = build().stages
    asking = stages["evaluate"].model_copy(update={"lm_eval": ["arc_easy"]})
    return {name: tuple(summary_names(stage)) for name, stage in {**stages, "evaluate": asking}.items()}


@pytest.mark.parametrize("stage", STAGES)
def test_what_a_stage_logs_is_what_its_page_defines(
    stage: str, logged: dict[str, set[str]], declared: dict[str, tuple[str, ...]]
) -> None:
    names, metrics = defined(stage), logged[stage]
    assert len(set(names)) > 1
    known = names + (defined_on(DOCS / ALSO_ON[stage]) if stage in ALSO_ON else [])
    missing = [metric for metric in sorted(metrics) if not any(stands_for(name, metric) for name in known)]
    assert missing == []
    invented = [
        name
        for name in names
        if not any(stands_for(name, metric) for metric in metrics)
        and not any(
            fnmatchcase(re.sub("POLICY|CANDIDATE", "ppo", name), pattern) for pattern in declared[stage]
        )
    ]
    assert [name for name in invented if name not in ELSEWHERE] == []
