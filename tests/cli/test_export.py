"""`export`: what it writes loads elsewhere, says the same, and tells where it is from."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.chains import Chain, Outcome, run_main
from helpers.hub import TOKEN, hub
from helpers.jobs import TINY
from helpers.models import IDS, logits
from rlhf.models.load import load_causal_lm

SHORT = ("stage=sft", "sft.epochs=1")


def export(chain: Chain, *words: str) -> Outcome:
    return run_main(chain.directory, ("export", *words), chain.directory)


def test_it_is_the_same_model_without_the_run_the_store_and_this_package(
    as_finished: Path, finished_chain: tuple[Chain, Outcome], tmp_path: Path
) -> None:
    chain = Chain(shutil.copytree(as_finished, tmp_path / "chain", symlinks=True))
    expected = logits(load_causal_lm(finished_chain[1].artifact("ppo"), TINY, torch.float32))
    told = export(chain, "run1", "out/mine")
    assert told.code == 0, told.err
    assert told.out.startswith("ppo of runs/run1 is in out/mine")
    written = chain.directory / "out" / "mine"
    assert not [path for path in written.rglob("*") if path.is_symlink() or path.name.endswith(".jsonl")]
    assert [path.name for path in written.parent.iterdir()] == ["mine"]

    with tarfile.open(tmp_path / "mine.tar", "w") as archive:
        archive.add(written, "mine")
    shutil.rmtree(chain.directory)
    with tarfile.open(tmp_path / "mine.tar") as archive:
        archive.extractall(tmp_path / "elsewhere", filter="data")
    moved = tmp_path / "elsewhere" / "mine"
    model = AutoModelForCausalLM.from_pretrained(moved, dtype=torch.float32)
    assert torch.equal(model(input_ids=IDS).logits, expected)
    tokenizer = AutoTokenizer.from_pretrained(moved)
    assert "<|im_start|>user\nHello" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False
    )


def test_the_card_of_a_run_that_was_stopped_says_so(
    finished_chain: tuple[Chain, Outcome], tmp_path: Path
) -> None:
    chain, _ = finished_chain
    run = chain.directory / "runs" / "stopped"
    shutil.copytree(chain.directory / "runs" / "run1", run, symlinks=True)
    summary = json.loads((run / "summary.json").read_text())
    (run / "summary.json").write_text(json.dumps(summary | {"verdict": None, "outcome": None}))
    assert export(chain, str(run), str(tmp_path / "card")).code == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "**The run has not come to its end**" in card and "Verdict of the run" not in card
    shutil.rmtree(run)


def test_the_card_says_what_the_run_found_and_no_private_path(
    finished_chain: tuple[Chain, Outcome], tmp_path: Path
) -> None:
    chain, outcome = finished_chain
    assert export(chain, str(chain.directory / "runs" / "run1"), str(tmp_path / "card")).code == 0
    card = (tmp_path / "card" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front == {
        "library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlhf", "ppo"],
    }  # fmt: skip
    assert "\n- ".join(["", *outcome.summary["verdict"].split("\n")]) in card
    for gate in outcome.summary["gates"]:
        assert f"| {gate['stage']}/{gate['name']} |" in card
    for stage in ("sft", "reward", "generate", "ppo"):
        assert f"| {outcome.key(stage)} |" in card
    assert "| reward.pairs | pairs.jsonl | not known here |" in card
    assert "| sft.data | sft.jsonl |" in card and "evaluation.jsonl" not in card
    assert "| gold_mean |" in card and str(chain.directory) not in card


def test_another_stage_can_be_chosen(finished_chain: tuple[Chain, Outcome], tmp_path: Path) -> None:
    chain, outcome = finished_chain
    assert export(chain, "run1", str(tmp_path / "sft"), "policy=sft").code == 0
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "sft", dtype=torch.float32)
    ours = load_causal_lm(outcome.artifact("sft"), TINY, torch.float32)
    assert torch.equal(theirs(input_ids=IDS).logits, logits(ours))


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("run1",), "name a run and a new directory"),
        (("nowhere", "new"), "run_name=nowhere: there is no such run in runs."),
        (("run1", "new", "policy=pppo"), "policy=pppo: runs/run1 has no such policy. Did you mean ppo?"),
        (("run1", "new", "policy=reward"), "policy=reward: runs/run1 has no such policy. It has sft, ppo."),
        (("run1", "store"), "store is there already"),
        (("run1", "/proc/new"), "/proc/new: no directory can be made there (No such file or directory)"),
        (("run1", "new", "push=mine"), "push=mine: write OWNER/NAME"),
        (("run1", "new", "push=me/mine"), "the environment has no HF_TOKEN"),
        (("run1", "new", "private=no"), "private=no: true or false"),
        (("run1", "new", "polcy=ppo"), "export polcy=ppo: it takes policy=VALUE push=VALUE private=VALUE"),
    ],
)  # fmt: skip
def test_a_slip_is_said_and_nothing_is_written(
    finished_chain: tuple[Chain, Outcome], words: tuple[str, ...], complaint: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.delenv("HF_TOKEN", raising=False)
    found = export(finished_chain[0], *words)
    assert (found.code, complaint in found.err) == (2, True), found.err
    assert not (finished_chain[0].directory / "new").exists()


def test_a_damaged_model_is_not_exported(as_finished: Path, tmp_path: Path) -> None:
    chain = Chain(shutil.copytree(as_finished, tmp_path / "chain", symlinks=True))
    (weights,) = chain.directory.glob("store/ppo/[!.]*/model.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found = export(chain, "run1", "new")
    assert found.code == 2 and "model.safetensors is not what was written" in found.err
    assert not [*chain.directory.glob("*new*"), *chain.directory.glob(".new*")]


def test_what_cannot_be_merged_is_a_directory_for_peft_with_its_base(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    outcome = chain.run(*SHORT, "sft.peft=prefix")
    assert outcome.code == 0, outcome.err
    assert export(chain, "run1", "mine").code == 0
    ours = logits(load_causal_lm(outcome.artifact("sft"), TINY, torch.float32))
    shutil.rmtree(tmp_path / "store")
    moved = (tmp_path / "mine").rename(tmp_path / "moved")
    assert json.loads((moved / "adapter_config.json").read_text())["base_model_name_or_path"] == "base"
    base = AutoModelForCausalLM.from_pretrained(moved / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, moved).eval()
    with torch.no_grad():
        found = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits[:, -IDS.shape[1] :]
    torch.testing.assert_close(found, ours, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(moved).chat_template
    card = (moved / "README.md").read_text()
    assert 'PeftModel.from_pretrained(base, "mine")' in card and '"mine/base"' in card
    assert yaml.safe_load(card.split("---\n")[1])["library_name"] == "peft"


def test_layers_that_nobody_else_knows_are_refused_with_what_to_do(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    assert chain.run(*SHORT, "sft.peft=adapter").code == 0
    found = export(chain, "run1", "mine")
    assert found.code == 2 and "Train with another method (none, lora, dora" in found.err
    assert not (tmp_path / "mine").exists()


def push(chain: Chain, endpoint: str, token: str, *words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its environment when it is imported."""
    settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    return subprocess.run(
        [sys.executable, "-m", "rlhf", "export", "run1", *words], cwd=chain.directory,
        env=os.environ | settings, capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_it_is_uploaded_to_the_hub_as_it_is(finished_chain: tuple[Chain, Outcome], tmp_path: Path) -> None:
    with hub() as there:
        told = push(finished_chain[0], there.endpoint, TOKEN, str(tmp_path / "a"), "push=me/mine")
        assert told.returncode == 0, told.stderr
        files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
        assert there.repositories == {"me/mine": files} and there.private == {"me/mine": True}
        assert f"Uploaded to {there.endpoint}/me/mine" in told.stdout
        public = push(
            finished_chain[0], there.endpoint, TOKEN, str(tmp_path / "b"), "push=me/b", "private=false"
        )
        assert public.returncode == 0 and there.private["me/b"] is False

        wrong = "hf_another_word_that_nobody_may_see"
        refused = push(finished_chain[0], there.endpoint, wrong, str(tmp_path / "c"), "push=me/mine")
        assert refused.returncode == 2 and there.refused
        assert "export push=me/mine: the upload failed" in refused.stderr
        assert wrong not in refused.stdout + refused.stderr
        assert (tmp_path / "c" / "model.safetensors").is_file()
