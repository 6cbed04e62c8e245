"""The arithmetic set: right answers, made by its script, and no pair of held-out operands in training."""

from __future__ import annotations

import re
import runpy
import shutil
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.sources import SourceConfig

DATA = Path(__file__).parents[2] / "data"
FILES = ("arithmetic", "arithmetic_held_out")


def rows(name: str) -> list[dict[str, str]]:
    return [row for _, row in SourceConfig(samples=name).rows("ppo.prompts") if isinstance(row, dict)]


TRAINING, HELD_OUT = map(rows, FILES)


def problem(row: dict[str, str]) -> str:
    return row["prompt"].removeprefix("What is ").removesuffix("?")


def operands(row: dict[str, str]) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", row["prompt"])]


def pairs(row: dict[str, str]) -> set[tuple[int, int]]:
    return {(min(pair), max(pair)) for pair in combinations(operands(row), 2)}


def value(text: str) -> int:
    """From left to right; no row has a product beside a sum."""
    first, *rest = text.split()
    found = int(first)
    for operator, number in zip(rest[::2], map(int, rest[1::2]), strict=True):
        found = {"+": found + number, "-": found - number, "*": found * number}[operator]
    return found


def test_the_answer_is_right_and_is_what_sft_learns() -> None:
    for row in TRAINING + HELD_OUT:
        assert set(row) == {"prompt", "completion", "answer"}
        assert row["completion"] == row["answer"] == str(value(problem(row)))


def test_no_pair_of_held_out_operands_is_in_training() -> None:
    trained = set().union(*map(pairs, TRAINING))
    assert [row for row in HELD_OUT if pairs(row) & trained] == []


@pytest.mark.parametrize(("found", "least"), [(TRAINING, 50), (HELD_OUT, 9)], ids=FILES)
def test_both_have_every_operator_and_length_once(found: list[dict[str, str]], least: int) -> None:
    assert len({row["prompt"] for row in found}) == len(found)
    kinds = Counter(re.sub(r"\d", "n", problem(row)) for row in found)
    assert set(kinds) == {"nn + n", "nn + nn", "nn - n", "nn - nn", "n * n", "nn + n - n"}
    assert min(kinds.values()) >= least


def test_the_script_makes_the_same_files(tmp_path: Path) -> None:
    shutil.copy(DATA / "arithmetic.py", tmp_path)
    made: dict[str, Any] = runpy.run_path(str(tmp_path / "arithmetic.py"))
    made["main"]()
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (DATA / f"{name}.jsonl").read_bytes()
