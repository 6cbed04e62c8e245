"""A stage continues from a checkpoint only with the same inputs, and not with `force=`."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.chains import Chain
from rlhf.digests import file_digest
from rlhf.pipeline import store as artifacts
from rlhf.pipeline.store import read_manifest, write_manifest

STOPPED = (
    "stage=ppo", f"ppo.reward=python:{__name__}:length", "ppo.critic.init=sft", "ppo.score.normalize=running",
    "ppo.steps=3", "ppo.optim.lr=0.05", "ppo.max_kl=0.01",
)  # fmt: skip
GOES_ON = (*STOPPED[:-1], "ppo.max_kl=null")


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


@pytest.fixture(scope="module")
def stopped(as_finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A chain whose PPO has left a checkpoint behind its first step."""
    directory = tmp_path_factory.mktemp("stopped") / "chain"
    shutil.copytree(as_finished, directory, symlinks=True)
    chain = Chain(directory)
    outcome = chain.run(*STOPPED)
    assert outcome.code == 2 and "ppo: step 2: " in outcome.err
    return chain


@pytest.fixture
def chain(stopped: Chain, tmp_path: Path) -> Chain:
    shutil.copytree(stopped.directory, tmp_path / "copy", symlinks=True)
    return Chain(tmp_path / "copy")


def change_weights(directory: Path) -> None:
    """Change the weights of a saved model."""
    path = directory / "model.safetensors"
    weights = load_file(path)
    for weight in weights.values():
        weight.add_(0.01 * torch.ones_like(weight))
    save_file(weights, path, {"format": "pt"})


def test_it_goes_on_with_the_same_inputs(chain: Chain) -> None:
    """The SFT model is rebuilt, but it is the same, bit for bit."""
    assert chain.run("stage=sft", "force=[sft]").statuses["sft"] == "ran"
    assert "ppo: continues from step 1 (" in chain.run(*GOES_ON).out


def test_another_sft_model_under_the_same_key_starts_ppo_anew(chain: Chain) -> None:
    (path,) = (chain.directory / "store" / "sft").glob("[!.]*")
    change_weights(path)
    manifest = read_manifest(path)
    manifest.files["model.safetensors"] = file_digest(path / "model.safetensors")
    write_manifest(path, manifest)  # as if it had been rebuilt on another machine
    outcome = chain.run(*GOES_ON)
    (key,) = (chain.directory / "store" / "ppo").glob(f"{outcome.key('ppo')}")
    assert (
        "ppo: starts again, because sft was rebuilt with another result; the checkpoints in "
        f"store/ppo/.{key.name}.checkpoints are removed\n"
    ) in outcome.out
    assert "continues from" not in outcome.out
    assert outcome.statuses == {"prepare": "reused", "sft": "reused", "ppo": "ran"}


def test_another_base_model_starts_ppo_anew(chain: Chain, tiny_model: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    local = ("model=local", f"model.path={model}", "gates=warn", "precision=fp32")
    before = chain.run(*STOPPED, *local)
    assert before.code == 2
    change_weights(model)
    outcome = chain.run(*GOES_ON, *local)
    assert outcome.code == 0
    keys = f"made from another sft ({before.key('sft')} -> {outcome.key('sft')})"
    told = f"ppo: starts again; the checkpoints in store/ppo/.{before.key('ppo')}.checkpoints are of other "
    assert f"{told}inputs ({keys})\n" in outcome.out
    assert "continues from" not in outcome.out


def test_force_forgets_the_checkpoint(chain: Chain) -> None:
    outcome = chain.run(*GOES_ON, "force=[ppo]")
    assert outcome.statuses == {"prepare": "reused", "sft": "reused", "ppo": "ran"}
    assert "continues from" not in outcome.out and "starts again" not in outcome.out
    assert not list((chain.directory / "store" / "ppo").glob(".*.checkpoints"))


def test_other_knobs_are_not_other_inputs(chain: Chain) -> None:
    outcome = chain.run(*STOPPED, "ppo.gamma=0.9")
    assert outcome.code == 2
    assert "starts again" not in outcome.out
    assert artifacts.Store(chain.directory / "store").stale_checkpoints("ppo", {"stage": "ppo"}) is None
