"""Rows as TRL takes them, what counts as a token, and the comparison of DPO once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from training_step import encode, length, lengths_of

from rlhf.data.chat_template import exchange_ids
from rlhf.models.base import ModelConfig, load_tokenizer

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "training_step.py"
ROW: dict[str, Any] = {
    "prompt": [{"role": "user", "content": "Name a colour."}],
    "chosen": "Red.",
    "rejected": "A horse.",
}


def test_of_a_pair_the_prompt_stands_once_for_dpo_and_counts_with_each_side(tiny_model: Path) -> None:
    tokenizer = load_tokenizer(tiny_model, ModelConfig(kind="tiny"))
    whole = {side: exchange_ids(tokenizer, ROW["prompt"], ROW[side]) for side in ("chosen", "rejected")}
    reward, dpo = encode("reward", ROW, tokenizer), encode("dpo", ROW, tokenizer)
    for side, (ids, prompt) in whole.items():
        assert reward[f"{side}_ids"] == ids
        assert dpo["prompt_ids"] + dpo[f"{side}_ids"] == ids
        assert len(dpo["prompt_ids"]) == prompt
    assert lengths_of(dpo) == lengths_of(reward) == [len(ids) for ids, _ in whole.values()]
    assert length(dpo) == sum(lengths_of(reward))


@pytest.mark.slow
def test_dpo_runs_against_trl(tmp_path: Path) -> None:
    command = [
        sys.executable, str(SCRIPT), "--model", "tiny", "--stages", "dpo", "--steps", "3", "--pairs", "1",
        "--precision", "fp32", "--clock", "cpu", "--directory", str(tmp_path),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "times TRL's tokens/s" in result.stdout
