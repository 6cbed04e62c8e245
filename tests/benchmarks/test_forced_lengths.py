"""Answers of the lengths that were drawn, from both samplers, and what happens with others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import run_rlhf
import torch
from forced_lengths import force, force_transformers
from ppo_step import check_tokens, main
from workloads import draw_lengths

from rlhf.generation import policy_model, sampler
from rlhf.models.base import ModelConfig
from rlhf.models.load import load_causal_lm

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "ppo_step.py"
STOP, PAD = 2, 0
LENGTHS = [[3, 1, 6, 2], [6, 6, 1, 4]]
PROMPTS = [torch.arange(5, 5 + length) for length in (2, 7, 4, 7)]


@pytest.fixture
def model(tiny_model: Path) -> Any:
    return load_causal_lm(tiny_model, ModelConfig(kind="tiny"), torch.float32).eval()


@pytest.fixture
def own_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What runners change in their process is here changed back."""
    monkeypatch.setattr(sampler, "_sample", sampler._sample)
    monkeypatch.setitem(vars(policy_model), "generate", sampler.generate)


def sample(model: Any) -> Any:
    """As `PolicyModel.sample` calls the local engine."""
    return vars(policy_model)["generate"](
        model, PROMPTS, max_new_tokens=6, temperature=1.0, stop_ids=[STOP], pad_id=PAD,
        uniform_BR=torch.rand(4, 6, generator=torch.Generator().manual_seed(1)), batch_rows=4,
    )  # fmt: skip


def test_the_end_is_the_only_choice_where_it_is_due_and_none_before() -> None:
    forced_BV = force(torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2), torch.tensor([1, 2]), STOP, [PAD, STOP])
    probability_BV = forced_BV.softmax(-1)
    assert probability_BV[0].tolist() == [0.0, 0.0, 1.0, 0.0]
    assert (probability_BV[1] > 0).tolist() == [False, True, False, True]


@pytest.mark.usefixtures("own_sampler")
def test_our_answers_have_the_forced_lengths_row_by_row(model: Any) -> None:
    run_rlhf.force_lengths(LENGTHS, STOP, [PAD, STOP])
    for lengths in LENGTHS:
        rollout = sample(model)
        assert rollout.response_lengths.tolist() == lengths
        assert [row[-1].item() for row in rollout.response_ids] == [STOP] * 4
        assert all(STOP not in row[:-1] and PAD not in row for row in rollout.response_ids)


@pytest.mark.usefixtures("own_sampler")
def test_the_end_has_the_policys_log_probability_not_that_of_what_was_forced(model: Any) -> None:
    run_rlhf.force_lengths(LENGTHS, STOP, [PAD, STOP])
    rollout = sample(model)
    ids = torch.cat([PROMPTS[0], rollout.response_ids[0]])
    logits = model(ids[None]).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, rollout.response_ids[0][:, None]).squeeze(-1)
    assert expected[-1] < -1.0
    torch.testing.assert_close(rollout.sampled_logp[0][-1], expected[-1], atol=1e-4, rtol=0.0)
    torch.testing.assert_close(rollout.sampled_logp[0], expected, atol=0.05, rtol=0.0)


@pytest.mark.usefixtures("own_sampler")
def test_an_answer_that_cannot_have_its_length_ends_the_run(model: Any) -> None:
    run_rlhf.force_lengths([[7, 1, 1, 1]], STOP, [PAD, STOP])  # max_new_tokens is 6
    with pytest.raises(RuntimeError, match=r"answers of \[6, 1, 1, 1\] tokens, asked for \[7, 1, 1, 1\]"):
        sample(model)


def test_transformers_answers_have_the_forced_lengths_row_by_row(model: Any) -> None:
    force_transformers(model, LENGTHS, STOP, [PAD, STOP])
    for lengths in LENGTHS:
        found = model.generate(
            input_ids=torch.arange(5, 17).view(4, 3), attention_mask=torch.ones(4, 3, dtype=torch.long),
            max_new_tokens=6, do_sample=True, eos_token_id=STOP, pad_token_id=PAD,
        )  # fmt: skip
        rows = found[:, 3:].tolist()
        assert [row.index(STOP) + 1 for row in rows] == lengths
        assert all(set(row[length:]) <= {PAD} for row, length in zip(rows, lengths, strict=True))


def test_transformers_must_answer_each_prompt_in_its_length(model: Any) -> None:
    force_transformers(model, [[2, 9]], STOP, [PAD, STOP])
    with pytest.raises(RuntimeError, match=r"answers of \[2, 4\] tokens, asked for \[2, 9\]"):
        model.generate(
            input_ids=torch.arange(5, 11).view(2, 3), attention_mask=torch.ones(2, 3, dtype=torch.long),
            max_new_tokens=4, do_sample=True, eos_token_id=STOP, pad_token_id=PAD,
        )  # fmt: skip


def test_lengths_are_drawn_once_and_skewed() -> None:
    drawn = draw_lengths(50, 16, 256)
    assert drawn == draw_lengths(50, 16, 256)
    every = sorted(length for step in drawn for length in step)
    assert every[0] >= 1
    assert 100 < sum(every) / len(every) < 120  # as the tuned model answers: 103 to 115
    assert every.count(256) > len(every) / 10
    assert every[len(every) // 4] < 50


def test_a_side_with_other_lengths_ends_the_benchmark() -> None:
    work = {"lengths": [[2, 3], [4, 1]]}
    check_tokens(work, {"new_tokens": [5.0, 5.0]})
    with pytest.raises(SystemExit, match=r"\[5, 6\] tokens in the steps, where \[5, 5\] were forced"):
        check_tokens(work, {"new_tokens": [5, 6]})
    check_tokens({"lengths": None}, {"new_tokens": [5, 6]})


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--workload", "skewed", "--peer", "torchtune"], "ends no answer where it is told"),
        (["--algorithm", "grpo", "--peer", "torchtune"], "has no grpo: use --peer trl"),
    ],
)
def test_what_a_peer_cannot_do_is_refused(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([*arguments, "--peer-python", "python"])
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    "algorithm",
    [pytest.param("grpo", marks=pytest.mark.slow), pytest.param("rloo", marks=pytest.mark.nightly)],
)
def test_the_tiny_model_runs_against_trl(algorithm: str, tmp_path: Path) -> None:
    command = [
        sys.executable, str(SCRIPT), "--model", "tiny", "--algorithm", algorithm, "--workload",
        "skewed-packaged", "--new-tokens", "12", "--steps", "2", "--pairs", "1", "--peer", "trl",
        "--clock", "cpu", "--directory", str(tmp_path),
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    tokens = sum(draw_lengths(2, 16, 12)[1])
    assert f"sampled tokens per step (median, mean): {tokens}, {tokens}" in result.stdout
    assert "times the episodes/s of trl" in result.stdout
