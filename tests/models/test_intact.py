"""A model's files are looked at before anything trains."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from rlhf.config import ConfigError
from rlhf.data.chat_template import CHATML
from rlhf.models.base import BaseModelFiles, ModelConfig
from rlhf.models.intact import check_tokenizer, check_weights, uses_other_template
from rlhf.models.on_disk import INDEX

WEIGHTS = "model.safetensors"


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def base(directory: Path, **changes: str) -> BaseModelFiles:
    config = ModelConfig.model_validate({"kind": "local", "path": str(directory), **changes})
    return BaseModelFiles(directory, "x", config)


def complaint(directory: Path) -> str:
    with pytest.raises(ConfigError) as error:
        check_weights(directory, "model.path=here")
    assert str(error.value).startswith(f"model.path=here: {directory}")
    return str(error.value)


def sharded(directory: Path) -> list[Path]:
    """Cut the weights into two files with an index."""
    weights = load_file(directory / WEIGHTS)
    (directory / WEIGHTS).unlink()
    files = [directory / f"model-{number}.safetensors" for number in (1, 2)]
    halves: list[list[str]] = [sorted(weights)[::2], sorted(weights)[1::2]]
    for file, names in zip(files, halves, strict=True):
        save_file({name: weights[name] for name in names}, file)
    places = {name: file.name for file, names in zip(files, halves, strict=True) for name in names}
    (directory / INDEX).write_text(json.dumps({"weight_map": places}))
    return files


def test_whole_files_pass(model: Path) -> None:
    check_weights(model, "model.path=here")
    sharded(model)
    check_weights(model, "model.path=here")
    check_tokenizer(base(model), "model.path=here")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (lambda whole: whole[:-1], "not a whole safetensors file"),
        (lambda whole: whole[:50], "not a whole safetensors file"),
        (lambda whole: b"", "not a whole safetensors file"),
        (lambda whole: b"version https://git-lfs.github.com/spec/v1\nsize 9\n", "git lfs pull"),
    ],
)
def test_weights_that_are_not_whole_are_named(model: Path, content: object, words: str) -> None:
    assert callable(content)
    (model / WEIGHTS).write_bytes(content((model / WEIGHTS).read_bytes()))
    assert words in complaint(model)


def test_a_missing_shard_and_a_mixed_up_one_are_named(model: Path) -> None:
    first, second = sharded(model)
    kept = second.read_bytes()
    second.unlink()
    assert f"{second} is missing" in complaint(model)
    second.write_bytes(first.read_bytes())
    assert f"{second} does not hold" in complaint(model)
    second.write_bytes(kept)
    (model / INDEX).write_text("{")
    assert INDEX in complaint(model)


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", None, "^model.path=here: cannot be read as a model: .*: fetch or save them again"),
        ("tokenizer.json", "{}", "^model.path=here: cannot be read as a model: "),
        ("chat_template.jinja", "{% for", "do not encode"),
        ("chat_template.jinja", "{{ messages[7]['content'] }}", "do not encode"),
    ],
)
def test_a_tokenizer_or_a_template_that_fails_is_told(
    model: Path, file: str, content: str | None, words: str
) -> None:
    if content is None:
        (model / file).unlink()
    else:
        (model / file).write_text(content)
    with pytest.raises(ConfigError, match=words):
        check_tokenizer(base(model), "model.path=here")


def test_a_template_of_the_users_own_is_rendered_too(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ raise_exception('never') }}")
    with pytest.raises(ConfigError, match=r"model\.path=.*never.*model\.chat_template"):
        check_tokenizer(base(model, chat_template=str(template)), "model.path=here")


def test_a_template_that_does_not_show_the_question_is_told(model: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    text = "{{ message['role'] + ': ' + message.get('text', '') }}"
    template.write_text("{% for message in messages %}" + text + "{% endfor %}")
    with pytest.raises(
        ConfigError, match=r"here: model\.chat_template=.*mine\.jinja does not show the question"
    ):
        check_tokenizer(base(model, chat_template=str(template)), "model.path=here")


EACH = "{% for m in messages %}"
OPENED = "m['content'] if m['role'] == 'assistant' else '[' + m['content'] + '] '"


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (CHATML, ""),
        (
            CHATML.partition("{% if add")[0],
            r"writes '<\|im_start\|>assistant' before an.*add_generation_prompt",
        ),
        (f"{EACH}{{{{ '[' + m['role'][0] + '] ' + m['content'] }}}}{{% endfor %}}", r"writes '\[a\]' before"),
        (f"{EACH}{{{{ {OPENED} }}}}{{% endfor %}}", ""),  # the answer follows at once, after a space
    ],
)
def test_a_template_that_opens_no_answer_is_told(
    model: Path, tmp_path: Path, template: str, said: str
) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(template)
    with pytest.raises(ConfigError, match=said) if said else nullcontext():
        check_tokenizer(base(model, chat_template=str(path)), "model.path=here")


def test_ids_that_the_model_has_no_row_for_are_told(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"vocab_size": 40}))
    with pytest.raises(ConfigError, match="the model has only 40 tokens"):
        check_tokenizer(base(model), "model.path=here")


LLAMA = "{% for m in messages %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endfor %}"


@pytest.mark.parametrize(
    ("own", "chosen", "is_foreign"),
    [
        (CHATML, None, False),
        (CHATML, CHATML + "{# the same text #}", False),
        (CHATML, LLAMA, True),
        (None, LLAMA, False),  # it was tuned on none
        ("{{ raise_exception('no') }}", CHATML, True),
    ],
)
def test_a_template_that_is_not_the_tokenizers_own_is_known(
    model: Path, tmp_path: Path, own: str | None, chosen: str | None, is_foreign: bool
) -> None:
    (model / "chat_template.jinja").unlink()
    if own is not None:
        (model / "chat_template.jinja").write_text(own)
    changes = {}
    if chosen is not None:
        (tmp_path / "mine.jinja").write_text(chosen)
        changes["chat_template"] = str(tmp_path / "mine.jinja")
    assert uses_other_template(base(model, **changes)) is is_foreign
