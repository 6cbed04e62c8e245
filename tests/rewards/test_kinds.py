"""What decides a score is in the key: a function's code, what it imports, a scorer's version, a whole URL."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import Chain
from helpers.jobs import TINY, on_cpu
from rlhf.config import ConfigError
from rlhf.data.schema import PromptRow
from rlhf.models.base import ModelConfig, base_identity
from rlhf.rewards.code import has_changed
from rlhf.rewards.function import CALL_FORMS as HOW
from rlhf.rewards.function import function_reward
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.kinds import REWARD_KINDS, RewardKind, RewardPart, reward_digest
from rlhf.rewards.model import make_reward
from rlhf.rewards.reward import RewardError

SOURCE = "python:their_reward:score"
FUNCTION = "def score(prompts, responses):\n    return [{value} for _ in responses]\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """On Python's path, with modules that no other test has imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def anew(source: str = SOURCE) -> dict[str, str]:
    """As a new process finds it."""
    forget()
    return reward_digest(source)


def forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0].startswith("their_")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("module", "edited"),
    [
        ("from their_words import SCORE", "their_words.py"),
        ("def score(p, r):\n    import their_words as words", "their_words.py"),
        ("from their_package.parts import more", "their_package/parts.py"),
        ("import their_package", "their_package/deep/inside.py"),
    ],
)
def test_what_a_module_imports_counts(folder: Path, module: str, edited: str) -> None:
    for name in ("their_words.py", "their_package/__init__.py", "their_package/deep/inside.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("SCORE = 1\n")
    (folder / "their_package" / "parts.py").write_text("more = 1\n")
    (folder / "their_reward.py").write_text(f"{module}\n{FUNCTION.format(value=1)}")
    before = anew()
    assert before == anew()
    (folder / edited).write_text("SCORE = more = 2\n")
    assert anew() != before


def test_modules_of_its_package_count(folder: Path) -> None:
    package = folder / "their_package"
    package.mkdir()
    (package / "__init__.py").write_text("from .inner import score\n")
    (package / "inner.py").write_text(FUNCTION.format(value=1))
    (package / "plugin.py").write_text("found by its name only\n")
    source = "python:their_package:score"
    found = {str(anew(source))}
    (package / "inner.py").write_text(FUNCTION.format(value=2))
    found.add(str(anew(source)))
    (package / "plugin.py").write_text("found by its name alone\n")
    found.add(str(anew(source)))
    assert len(found) == 3


def test_the_place_and_what_is_not_imported_do_not_count(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "their_reward.py").write_text(f"import os, json\n{FUNCTION.format(value=1)}")
    before = anew()
    (folder / "their_other.py").write_text("x = 1\n")
    assert anew() == before
    shutil.copytree(folder, folder.parent / "moved")
    (folder / "their_reward.py").unlink()
    monkeypatch.syspath_prepend(str(folder.parent / "moved"))
    assert anew() == before


def test_versions_of_what_is_installed_count(folder: Path) -> None:
    """But not of what the chain stands on: those are in every manifest."""
    code = "import torch\nfrom vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer\n"
    (folder / "their_reward.py").write_text(code + FUNCTION.format(value=1))
    version = importlib.metadata.version("vaderSentiment")
    found = anew()
    assert found == {SOURCE: found[SOURCE], "vaderSentiment": version}
    assert reward_digest("vader") == {"vaderSentiment": version}


def test_the_code_that_was_imported_counts_not_what_the_file_holds_later(folder: Path) -> None:
    (folder / "their_reward.py").write_text(FUNCTION.format(value=1))
    before = anew()
    assert not has_changed(SOURCE)
    (folder / "their_reward.py").write_text(FUNCTION.format(value=2))
    assert reward_digest(SOURCE) == before
    assert has_changed(SOURCE)
    assert anew() != before
    assert not has_changed(SOURCE)


def test_the_script_that_was_started_is_refused() -> None:
    with pytest.raises(ConfigError, match="python:__main__:score: it is in the script that was started"):
        reward_digest("python:__main__:score")


def test_code_that_changes_while_it_is_imported_is_refused(folder: Path) -> None:
    code = "from pathlib import Path\nPath(__file__).write_text('def score(p, r): ...')\n"
    (folder / "their_reward.py").write_text(code + FUNCTION.format(value=1))
    with pytest.raises(ConfigError, match="their_reward:score: its code changed while it was imported"):
        anew()


@pytest.mark.parametrize("source", ["python:their_absent:score", "python:their_reward:absent"])
def test_what_cannot_be_imported_is_told(folder: Path, source: str) -> None:
    (folder / "their_reward.py").write_text(FUNCTION.format(value=1))
    with pytest.raises(ConfigError, match=source):
        anew(source)


WANTED = HOW.format(name="score")


@pytest.mark.parametrize(
    ("definition", "said"),
    [
        ("def score(text):", "its arguments are (text) (FILE, line 3)."),
        (
            "def score(prompts, responses, tokenizer):",
            "its arguments are (prompts, responses, tokenizer) (FILE",
        ),
        ("def score(*, prompts, responses):", "its arguments are (*, prompts, responses) (FILE, line 3)."),
        ("score = 3 #", "score is not a function."),
    ],
)
def test_a_function_with_other_arguments_is_told_before_anything_runs(
    folder: Path, definition: str, said: str
) -> None:
    file = folder / "their_reward.py"
    file.write_text(f"import math\n\n{definition}\n    return 0.0\n".replace("#\n   ", "#"))
    with pytest.raises(ConfigError) as caught:
        anew()
    assert str(caught.value).startswith(f"{SOURCE}: {said.replace('FILE', str(file))}")
    assert str(caught.value).endswith(f" {WANTED}")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (
            "return len(responses.split())",
            "AttributeError: 'list' object has no attribute 'split' (FILE, line 4",
        ),
        ("return textwrap.dedent(responses)", "(FILE, line 4, in score)"),  # which fails in textwrap.py
        ("return 0.5", "returned shape () for 2 responses (FILE, line 3)."),
        ("return None", "returned nothing (None) (FILE, line 3)."),
        ("raise KeyError('x')", "KeyError: 'x' (FILE, line 4, in score)."),
    ],
)
def test_a_function_that_fails_is_told_by_its_own_line(folder: Path, body: str, said: str) -> None:
    file = folder / "their_reward.py"
    file.write_text(f"import textwrap\n\ndef score(prompts, responses):\n    {body}\n")
    forget()
    with pytest.raises(ConfigError) as caught:
        function_reward(SOURCE)([PromptRow([]), PromptRow([])], ["a b", "c"])
    assert said.replace("FILE", str(file)) in str(caught.value)
    assert str(caught.value).endswith(f" {WANTED}")


def test_a_url_counts_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """`key` may name a reward as well as be a secret, which is why it is never written down."""
    urls = [f"http://h:1/s?{query}" for query in ("key=kindness", "key=brevity", "sig=1", "")]
    found = [reward_digest(url) for url in urls]
    assert len({tuple(each) for each in found}) == 4
    assert "kindness" not in str(found[0])
    monkeypatch.setenv("REWARD_TOKEN", "first-secret")
    first = reward_digest("http://h:1/s?token=first-secret")
    monkeypatch.setenv("REWARD_TOKEN", "second-secret")
    assert reward_digest("http://h:1/s?token=second-secret") == first  # named as one: no new model
    with_user = [reward_digest(f"http://me:{word}@h:1/s?a=1") for word in ("old", "new")]
    assert with_user[0] == with_user[1]
    assert "old" not in str(with_user[0])


def test_code_of_a_model_that_may_run_is_another_model() -> None:
    trusting = ModelConfig(kind="tiny", trust_remote_code=True)
    assert base_identity(trusting) != base_identity(TINY)


MEDDLER = """
from pathlib import Path

def score(prompts, responses):
    if len(responses) == 8:  # a rollout
        {work}
    return [float(len(response)) for response in responses]
"""
MEDDLED = (
    "stage=evaluate", "ppo.reward=python:their_meddler:score", "ppo.critic.init=sft", "evaluate.reward=null",
    "ppo.score.normalize=running", "evaluate.gold=python:their_judge:score", "ppo.steps=1", "gates=warn",
    "precision=fp32",
)  # fmt: skip


def test_a_judge_edited_while_ppo_trains_is_asked_as_it_was(folder: Path) -> None:
    """Its old code is what runs, so the old key is right; the next run has the new code and another key."""
    judge = folder / "their_judge.py"
    judge.write_text(FUNCTION.format(value=1))
    new = FUNCTION.format(value=2)
    work = f"Path({str(judge)!r}).write_text({new!r})"
    (folder / "their_meddler.py").write_text(MEDDLER.format(work=work))
    forget()
    chain = Chain(folder)
    outcome = chain.run(*MEDDLED)
    assert outcome.code == 0, outcome.err
    assert judge.read_text() == new
    line = "evaluate: the code of python:their_judge:score has changed; this run keeps what it imported\n"
    assert line in outcome.out
    metrics = outcome.summary["stages"]["evaluate"]["metrics"]
    assert metrics["evaluate/gold_mean/ppo"] == 1.0
    refused = chain.run(*MEDDLED)  # in the same process, which has the old code
    assert refused.code == 2
    assert "python:their_judge:score: its code has changed since this process imported it" in refused.err
    forget()
    again = chain.run(*MEDDLED)
    assert again.statuses == outcome.statuses | dict.fromkeys(("prepare", "sft", "ppo"), "reused")
    assert again.key("evaluate") != outcome.key("evaluate")
    assert again.summary["stages"]["evaluate"]["metrics"]["evaluate/gold_mean/ppo"] == 2.0


def test_a_base_model_that_is_replaced_while_ppo_trains_is_not_evaluated(
    folder: Path, tiny_model: Path
) -> None:
    model = folder / "model"
    shutil.copytree(tiny_model, model)
    (folder / "their_judge.py").write_text(FUNCTION.format(value=1))
    config = json.loads((model / "config.json").read_text()) | {"rms_norm_eps": 0.1}
    work = f"Path({str(model / 'config.json')!r}).write_text({json.dumps(config)!r})"
    (folder / "their_meddler.py").write_text(MEDDLER.format(work=work))
    forget()
    outcome = Chain(folder).run(*MEDDLED, "model=local", f"model.path={model}")
    assert outcome.code == 2
    assert f"evaluate: model.path={model}: changed since this run began" in outcome.err
    assert list(outcome.statuses) == ["prepare", "sft", "ppo"]


def test_a_kind_of_the_users_may_return_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    def chars(part: RewardPart, server: RewardServerConfig) -> Any:
        return lambda prompts, completions: [len(completion) for completion in completions if completion]

    kind = RewardKind(form="chars:", check=lambda source: True, digest=lambda part, digest: {}, make=chars)
    monkeypatch.setitem(REWARD_KINDS, "chars", kind)
    server = RewardServerConfig(timeout=1.0, retries=0)
    reward = make_reward("chars:", {}, TINY, on_cpu(), 1000, server)
    assert reward([PromptRow([]), PromptRow([])], ["ab", "c"]).tolist() == [2.0, 1.0]
    with pytest.raises(
        RewardError, match=r"chars:: it returned shape \(1,\) for 2 responses .*one number for each"
    ):
        reward([PromptRow([]), PromptRow([])], ["ab", ""])
