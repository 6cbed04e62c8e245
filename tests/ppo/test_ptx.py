"""What the pretraining mix is drawn from."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from helpers.chains import Chain, Outcome
from helpers.jobs import user
from helpers.ppo import ppo_job, ppo_stage
from rlhf.config import ConfigError
from rlhf.data.schema import SftRow

OWN = [SftRow(user(f"Say {n}"), f"It is {n}.") for n in range(8)]
GENERAL = [SftRow([], f"Water boils at {n} degrees.") for n in range(8)]
RULE = (
    "ppo.reward=vader", "ppo.critic.init=sft", "ppo.score.normalize=running", "ppo.ptx.coef=0.5",
    "ppo.steps=1",
)  # fmt: skip


@pytest.mark.parametrize(("data", "rows"), [("null", OWN), ("samples:retention_sentences", GENERAL)])
def test_the_mix_draws_from_its_own_source_where_there_is_one(
    tmp_path: Path, tiny_model: Path, data: str, rows: list[SftRow]
) -> None:
    stage, job = ppo_stage("ppo.ptx.coef=0.5", f"ppo.ptx.data={data}"), ppo_job(tmp_path / "job", tiny_model)
    job.data.write("sft", "train", OWN)
    job.data.write("ptx", "train", GENERAL)
    torch.manual_seed(0)
    trainer = stage.trainer(job)
    assert trainer.mix is not None
    answers = [row.answer for row in trainer.mix.draw()]
    drawn = {trainer.policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in answers}
    assert drawn == {row.completion for row in rows}


def test_a_mix_of_which_nothing_fits_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    stage, job = ppo_stage("ppo.ptx.coef=0.5"), ppo_job(tmp_path / "job", tiny_model)
    long = user("word " * 300)
    job.data.write("sft", "train", [SftRow(long, "an answer")])
    with pytest.raises(ConfigError, match=r"^ppo\.ptx\.coef=0\.5: .* sft\.data .* context of 1024 tokens"):
        stage.trainer(job)


def test_its_content_is_in_the_key_and_its_place_is_not(finished_chain: tuple[Chain, Outcome]) -> None:
    chain, _ = finished_chain
    general = chain.write("general.jsonl", [{"text": f"Ice melts at {n} degrees."} for n in range(24)])
    shutil.copy(chain.directory / general, chain.directory / "moved.jsonl")
    chain.write("other.jsonl", [{"text": f"Iron melts at {n} degrees."} for n in range(24)])
    mixed, moved, other = (
        chain.run("stage=ppo", *RULE, f"ppo.ptx.data={data}")
        for data in (general, "moved.jsonl", "other.jsonl")
    )
    assert mixed.code == moved.code == other.code == 0, mixed.err
    assert mixed.statuses == {"prepare": "ran", "sft": "reused", "ppo": "ran"}
    assert moved.statuses["ppo"] == "reused"
    assert other.statuses["ppo"] == "ran"
