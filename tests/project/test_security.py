"""No foreign code is run, whatever a model, a data set or a checkpoint holds."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from helpers.chains import Chain, Outcome
from helpers.store import sign
from rlhf.config import ConfigError
from rlhf.data.sources import SourceConfig
from rlhf.digests import MANIFEST, file_digest
from rlhf.models.base import _write_tiny
from rlhf.pipeline.longer import Course


class Bomb:
    """Whoever unpickles it makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "somebody-ran-foreign-code"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory to poison."""
    directory = tmp_path / "model"
    directory.mkdir()
    _write_tiny(directory)
    return directory


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def run_model(directory: Path, model: Path, *overrides: str) -> Outcome:
    return Chain(directory).run(
        "stage=sft",
        "model=local",
        f"model.path={model}",
        "precision=fp32",
        "sft.gates.prompt_gain=null",
        *overrides,
    )


def test_a_bomb_is_live(tmp_path: Path, marker: Path) -> None:
    torch.save(Bomb(marker), tmp_path / "bomb.pt")
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert marker.exists()


def test_a_model_without_safetensors_is_refused(tmp_path: Path, model: Path, marker: Path) -> None:
    (model / "model.safetensors").unlink()
    torch.save(Bomb(marker), model / "pytorch_model.bin")
    outcome = run_model(tmp_path, model)
    assert outcome.code == 2
    assert f"model.path={model}: no *.safetensors there; other weight formats are not read" in outcome.err
    assert not marker.exists()


def test_a_decoy_does_not_let_the_pickle_through(tmp_path: Path, model: Path, marker: Path) -> None:
    (model / "model.safetensors").rename(model / "decoy.safetensors")
    torch.save(Bomb(marker), model / "pytorch_model.bin")
    outcome = run_model(tmp_path, model)
    assert outcome.code == 2
    assert "Only safetensors are read" in outcome.err
    assert not marker.exists()


def test_a_pickle_beside_the_weights_is_never_read(tmp_path: Path, model: Path, marker: Path) -> None:
    names = (
        "pytorch_model.bin",
        "adapter_model.bin",
        "training_args.bin",
        "vocab.pkl",
        "tokenizer.pkl",
        "optimizer.pt",
    )
    for name in names:
        torch.save(Bomb(marker), model / name)
    assert run_model(tmp_path, model).code == 0
    assert not marker.exists()


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer.json", "vocab.json", "spiece.model"])
def test_a_pickle_instead_of_the_tokenizer(tmp_path: Path, model: Path, marker: Path, name: str) -> None:
    (model / "tokenizer.json").unlink()
    (model / name).write_bytes(pickle.dumps(Bomb(marker)))
    assert run_model(tmp_path, model).code in (1, 2)
    assert not marker.exists()


@pytest.mark.parametrize("weights", ["only a pickle", "a pickle beside"])
def test_a_reward_model(tmp_path: Path, model: Path, marker: Path, weights: str) -> None:
    scorer = tmp_path / "scorer"
    shutil.copytree(model, scorer)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(scorer)
    torch.save(Bomb(marker), scorer / "pytorch_model.bin")
    if weights == "only a pickle":
        (scorer / "model.safetensors").unlink()
    outcome = Chain(tmp_path).run("stage=generate", f"generate.reward=model:{scorer}")
    assert outcome.code == (2 if weights == "only a pickle" else 0), outcome.err
    assert ("Only safetensors are read" in outcome.err) == (weights == "only a pickle")
    assert not marker.exists()


def test_an_adapter_would_load_the_base_that_it_names(tmp_path: Path, model: Path, marker: Path) -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "/elsewhere", "target_modules": ["q_proj"]}
    (model / "adapter_config.json").write_text(json.dumps(adapter))
    torch.save(Bomb(marker), model / "adapter_model.bin")
    outcome = run_model(tmp_path, model)
    assert outcome.code == 2
    assert "an adapter (adapter_config.json). Merge it into its base first" in outcome.err
    assert not marker.exists()


@pytest.fixture
def model_with_code(model: Path, marker: Path) -> Path:
    """Its own classes are named for everything; merely importing them leaves a mark."""
    (model / "own.py").write_text(
        f"open({str(marker)!r}, 'w')\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class C(LlamaConfig): pass\n"
        "class M(LlamaForCausalLM): config_class = C\n"
    )
    edit_json(model / "config.json", auto_map={"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"})
    edit_json(model / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "own.T"]})
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(f"open({str(marker)!r}, 'w')\n")
    return model


def test_a_models_own_code_is_not_run(tmp_path: Path, model_with_code: Path, marker: Path) -> None:
    """transformers knows the architecture, so it goes without."""
    assert run_model(tmp_path, model_with_code).code == 0
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_a_model_that_needs_its_own_code(
    tmp_path: Path, model_with_code: Path, marker: Path, file: str
) -> None:
    changed = {"model_type": "own"} if file == "config.json" else {"tokenizer_class": "OwnTokenizer"}
    edit_json(model_with_code / file, **changed)
    outcome = run_model(tmp_path, model_with_code)
    if outcome.code == 0:  # a tokenizer.json reads without the class
        assert file == "tokenizer_config.json"
    else:
        assert outcome.code == 2
        assert "model.trust_remote_code=true" in outcome.err
    assert not marker.exists()


def test_it_is_run_when_it_is_trusted(tmp_path: Path, model_with_code: Path, marker: Path) -> None:
    """So that the tests above could fail."""
    edit_json(model_with_code / "tokenizer_config.json", auto_map={})
    run_model(tmp_path, model_with_code, "model.trust_remote_code=true")
    assert marker.exists()


def test_a_chat_template_is_a_sandbox(tmp_path: Path, model: Path, marker: Path) -> None:
    attack = "{{ cycler.__init__.__globals__.os.system('touch " + str(marker) + "') }}"
    (tmp_path / "evil.jinja").write_text(attack)
    outcome = run_model(tmp_path, model, f"model.chat_template={tmp_path / 'evil.jinja'}")
    assert outcome.code == 2
    assert "(SecurityError: access to attribute '__init__' of 'type' object is unsafe.)" in outcome.err
    assert not marker.exists()


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A directory as the Hub has them; `datasets` reads it in the same way."""
    directory = tmp_path / "set"
    directory.mkdir()
    (directory / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    return directory


def rows_of(data_set: Path) -> list[Any]:
    source = SourceConfig.model_validate(f"hub:{data_set}")
    return [row for _, row in source.rows("sft.data")]


@pytest.mark.parametrize("files", ["../outside.jsonl", "{absolute}", "sub/../../outside.jsonl", "link.jsonl"])
def test_a_data_set_cannot_name_files_of_this_machine(tmp_path: Path, data_set: Path, files: str) -> None:
    (tmp_path / "outside.jsonl").write_text('{"prompt": "private"}\n')
    (data_set / "sub").mkdir()
    (data_set / "link.jsonl").symlink_to(tmp_path / "outside.jsonl")
    named = files.replace("{absolute}", str(tmp_path / "outside.jsonl"))
    card = f"---\nconfigs:\n- config_name: default\n  data_files: {named}\n---\n"
    (data_set / "README.md").write_text(card)
    with pytest.raises(ConfigError, match=r"its card names .*, which is outside the set"):
        rows_of(data_set)


def test_a_data_sets_script_is_not_run(data_set: Path, marker: Path) -> None:
    (data_set / "set.py").write_text(f"open({str(marker)!r}, 'w')\n")
    with pytest.raises(ConfigError, match="scripts are no longer supported"):
        rows_of(data_set)
    assert not marker.exists()


def test_a_data_sets_pickles_are_not_read(data_set: Path, marker: Path) -> None:
    for name in ("train.pkl", "train.pickle", "dataset.pt"):
        (data_set / name).write_bytes(pickle.dumps(Bomb(marker)))
    assert rows_of(data_set) == [{"prompt": "a", "completion": "b"}]
    assert not marker.exists()


@pytest.mark.parametrize("suffix", ["pkl", "pt", "bin", "pickle", "py", "npy", "tar", "zip"])
def test_no_other_kind_of_file_is_read(tmp_path: Path, marker: Path, suffix: str) -> None:
    path = tmp_path / f"rows.{suffix}"
    path.write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ConfigError, match="cannot read this kind of file"):
        list(SourceConfig(path=str(path)).rows("sft.data"))
    assert not marker.exists()


def poison(checkpoint: Path, marker: Path, pattern: str) -> list[str]:
    """What an attacker who can write to the store would do: swap files, and make the manifest fit."""
    poisoned = [path for path in checkpoint.rglob(pattern) if path.is_file()]
    for path in poisoned:
        torch.save({"done": Bomb(marker)}, path)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"] = {name: file_digest(checkpoint / name) for name in manifest["files"]}
    sign(checkpoint, manifest)
    return [path.name for path in poisoned]


Checkpoints = Callable[..., Path]


@pytest.fixture
def checkpointed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Chain, Checkpoints]:
    """A chain, and a function that trains in it and gives the newest checkpoint.

    It is left as by a run that ended before it published: checkpoints stay, and the artifact is not there.
    """
    chain = Chain(tmp_path)
    monkeypatch.setattr(Course, "end", lambda self: None)

    def train(*overrides: str) -> Path:
        outcome = chain.run("stage=sft", "checkpoint.every_steps=1", *overrides)
        assert outcome.code == 0, outcome.err
        shutil.rmtree(outcome.artifact("sft"))
        return max(tmp_path.glob("store/sft/.*.checkpoints/step-*"))

    return chain, train


def test_a_checkpoint_that_is_its_own_is_read(checkpointed: tuple[Chain, Checkpoints]) -> None:
    chain, train = checkpointed
    train()
    outcome = chain.run("stage=sft")
    assert outcome.code == 0
    assert "sft: continues from step" in outcome.out


@pytest.mark.parametrize("file", ["loop.pt", "optimizer.pt"])
def test_a_poisoned_checkpoint(checkpointed: tuple[Chain, Checkpoints], marker: Path, file: str) -> None:
    chain, train = checkpointed
    assert poison(train(), marker, file) == [file]
    outcome = chain.run("stage=sft")
    assert not marker.exists()
    assert outcome.code == 2
    assert "refused, because it contains more than tensors and numbers" in outcome.err
    assert "checkpoint.resume=false" in outcome.err


FAILING = """
import os
calls = []
def score(prompts, responses):
    calls.append(len(responses))
    assert len(calls) < int(os.environ["FAILS"]), "the test ends it here"
    return [float(len(response)) for response in responses]
"""


WITH_DEEPSPEED = (
    "stage=ppo", "ppo.reward=python:failing:score", "ppo.critic.init=sft", "ppo.score.normalize=running",
    "checkpoint.every_steps=1", "zero=zero1",
)  # fmt: skip


@pytest.fixture(scope="module")
def deepspeed_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a run ended in the middle of PPO."""
    pytest.importorskip("deepspeed")
    directory = tmp_path_factory.mktemp("deepspeed")
    (directory / "failing.py").write_text(FAILING)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(directory))
        patch.syspath_prepend(directory)
        patch.setenv("FAILS", "4")
        outcome = Chain(directory).run(*WITH_DEEPSPEED)
    assert "the test ends it here" in outcome.err
    return directory


@pytest.mark.slow  # DeepSpeed starts slowly
@pytest.mark.parametrize(
    ("pattern", "world_size"), [("*optim_states.pt", 1), ("*model_states.pt", 1), ("*_states.pt", 2)]
)
def test_a_poisoned_checkpoint_of_deepspeed(
    deepspeed_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, world_size: int
) -> None:
    """Written by another number of ranks, it is read through a universal checkpoint."""
    directory = tmp_path / "chain"
    shutil.copytree(deepspeed_checkpoint, directory, symlinks=True)
    marker = tmp_path / "somebody-ran-foreign-code"
    checkpoint = max(directory.glob("store/ppo/.*.checkpoints/step-*"))
    assert poison(checkpoint, marker, pattern)
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    sign(checkpoint, manifest | {"world_size": world_size})
    monkeypatch.setenv("PYTHONPATH", str(directory))
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setenv("FAILS", "99")
    outcome = Chain(directory).run(*WITH_DEEPSPEED)
    assert not marker.exists()
    assert outcome.code == 2
    assert "refused, because it contains more than tensors and numbers" in outcome.err
