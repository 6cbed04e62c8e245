"""Secrets planted wherever a run reads something; then every byte that it wrote is searched for them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from helpers.chains import SETTINGS, Chain, Outcome
from rlhf.models.base import _write_tiny
from rlhf.pipeline.job import Job
from rlhf.pipeline.run import Run
from rlhf.report.summary import write_report
from rlhf.tracking.tracker import Tracker

SECRETS = {
    "HF_TOKEN": "hf_PlantedToken0123456789",
    "WANDB_API_KEY": "planted0" * 5,
    "OPENAI_API_KEY": "sk-planted/with+odd=characters",
    "DB_PASSWORD": "planted pass'word",
}
ENVIRONMENT = {**SECRETS, "DATA_URL": "https://planted-user:planted-pass@host/data?token=planted-query"}
"""The name of the last one says nothing; its value does."""
NOTES = "notes.txt"
PLANTED = [*SECRETS.values(), "planted-user", "planted-pass", "planted-query"]
SOURCES = (
    "sft.data='${oc.env:HF_TOKEN}/sft.jsonl'", "reward.pairs=pairs.jsonl", "ppo.prompts=prompts.jsonl",
    "evaluate.prompts=evaluation.jsonl", "evaluate.retention=[sentences.jsonl,questions.jsonl]",
)  # fmt: skip
BY_RULE = ("ppo.reward=python:indiscreet:score", "ppo.critic.init=sft", "ppo.score.normalize=running")
INDISCREET = '''
"""A reward that tells everything it knows, and fails when it is told to."""
import logging
import os
import sys
import warnings

secret, calls = os.environ["DB_PASSWORD"], []


class CrashError(BaseException):
    """No mistake of a reward's."""


def score(prompts, responses):
    print("stdout", secret)
    print("stderr", repr(secret), os.environ["DATA_URL"], file=sys.stderr)
    logging.warning("log %s", secret)
    warnings.warn(f"warning {secret}")
    calls.append(len(responses))
    if len(calls) == int(os.environ["FAILS"]):
        kind = {"crash": CrashError, "mistake": RuntimeError}[os.environ["HOW"]]
        raise kind(f"cannot connect with {secret} to {os.environ['DATA_URL']}")
    return [float(len(response)) for response in responses]
'''


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chain:
    """Small data, of which one source lies in a directory that is called like a secret."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    chain = Chain(tmp_path)
    (tmp_path / SECRETS["HF_TOKEN"]).mkdir()
    shutil.copy(tmp_path / "sft.jsonl", tmp_path / SECRETS["HF_TOKEN"])
    (tmp_path / "indiscreet.py").write_text(INDISCREET)
    return chain


def leaks(directory: Path, *texts: str) -> list[str]:
    """Which files below a directory, and which of these texts, hold a planted secret."""
    contents = {
        str(path): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and ".git" not in path.parts and path.name != NOTES
    }
    contents |= {f"text {number}": text.encode() for number, text in enumerate(texts)}
    return [
        f"{secret!r} in {name}"
        for name, content in contents.items()
        for secret in PLANTED
        if secret.encode() in content
    ]


def put_under_git(directory: Path) -> None:
    """A remote with credentials, and a secret that is not committed yet: trackers like to record both."""
    for command in (
        ["init", "--quiet"],
        ["remote", "add", "origin", ENVIRONMENT["DATA_URL"]],
        ["add", NOTES],
        ["-c", "user.name=x", "-c", "user.email=x@y", "commit", "--quiet", "--message", "notes"],
    ):
        (directory / NOTES).touch()
        subprocess.run(["git", *command], cwd=directory, check=True)
    (directory / NOTES).write_text(SECRETS["HF_TOKEN"] + "\n")


def run_process(directory: Path, *overrides: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m rlhf` in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "rlhf", *SETTINGS, *SOURCES, *overrides],
        cwd=directory, capture_output=True, text=True, check=False,
        env={**os.environ, **environment, "PYTHONPATH": str(directory)},
    )  # fmt: skip


def test_the_search_finds_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep" / "er" / "file").write_bytes(b"\0" + SECRETS["HF_TOKEN"].encode() + b"\xff")
    assert len(leaks(tmp_path, "planted-pass", "nothing")) == 2


@pytest.mark.slow
def test_a_run_with_wandb_and_all_that_its_config_names(chain: Chain) -> None:
    """Model, data, reward model and project are called like secrets; one stands on the command line; the
    reward prints and logs them."""
    directory, model = chain.directory, chain.directory / SECRETS["OPENAI_API_KEY"]
    model.mkdir(parents=True)
    _write_tiny(model)
    put_under_git(directory)
    AutoModelForSequenceClassification.from_pretrained(model, num_labels=1).save_pretrained(
        directory / "scorer"
    )
    AutoTokenizer.from_pretrained(model).save_pretrained(directory / "scorer")
    scorer = directory / SECRETS["DB_PASSWORD"]
    (directory / "scorer").rename(scorer)
    done = run_process(
        directory, "model=local", "model.path=${oc.env:OPENAI_API_KEY}", "gates=warn", "precision=fp32",
        "stage=[generate,ppo]", "generate.reward='model:${oc.env:DB_PASSWORD}'", *BY_RULE, "why=true",
        "tracker=wandb", "tracker.project=${oc.env:WANDB_API_KEY}", "run_name=w", "checkpoint.every_steps=1",
        f"+model.revision={SECRETS['HF_TOKEN']}",
        FAILS="0", WANDB_CONSOLE="wrap",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert leaks(directory, done.stdout, done.stderr) == []
    assert list(directory.glob("runs/w/wandb/offline-run-*/*.wandb"))  # it was searched
    for said in ("stdout <redacted>", 'stderr "<redacted>"', "log <redacted>", "warning <redacted>"):
        assert said in done.stdout + done.stderr
    assert "https://<redacted>@host/data?token=<redacted>" in done.stderr
    assert "path: <redacted>" in (directory / "runs/w/config.yaml").read_text()
    (manifest,) = directory.glob("store/generate/*/manifest.json")
    assert '"reward":"model:<redacted>"' in manifest.read_text().replace(" ", "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "code", "words"),
    [
        ("crash", 1, "indiscreet.CrashError: cannot connect with <redacted> to"),
        (
            "mistake",
            2,
            "Error: ppo.reward=python:indiscreet:score: RuntimeError: cannot connect with <redacted>",
        ),
    ],
)
def test_two_ranks_that_fail(chain: Chain, how: str, code: int, words: str) -> None:
    """In step 2: a rank is asked before anything trains, for the held-out prompts, then in each step."""
    done = run_process(
        chain.directory, *BY_RULE, "stage=ppo", "run_name=r", "tracker=tensorboard", "launch.processes=2",
        "checkpoint.every_steps=1", FAILS="4", HOW=how,
    )  # fmt: skip
    assert done.returncode == code
    assert ("Traceback" in done.stderr) == (how == "crash") and words in done.stderr
    assert leaks(chain.directory, done.stdout, done.stderr) == []
    ranks = chain.directory / "runs" / "r" / "ranks"
    assert words in (ranks / "rank1.err").read_text()  # it was searched
    assert not (ranks / "config.json").exists()
    assert list(chain.directory.glob("runs/r/tensorboard/events*"))
    assert list(chain.directory.glob("store/ppo/.*.checkpoints/step-*/loop.pt"))


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sft.data='${oc.env:HF_TOKEN}/no.jsonl'", "sft.data=<redacted>/no.jsonl: there is no such file"),
        ("ppo.reward='ask ${oc.env:DATA_URL}'", "ppo.reward='ask https://<redacted>@host/data?token=<redacted>'"),
        ("ppo.reward='model:${oc.env:DB_PASSWORD}'", "model:<redacted>: no config.json there"),
        ("precision=${oc.env:HF_TOKEN}", "precision='<redacted>'"),
        (f"sft.data=[{SECRETS['HF_TOKEN']}", "sft.data=[<redacted>"),
        (f"colour={SECRETS['HF_TOKEN']}", "colour: there is no such key"),
        (f"+password={SECRETS['HF_TOKEN']}", "password: there is no such key"),
        (f"{SECRETS['HF_TOKEN']}=1", "<redacted>: there is no such key"),
        (f"stage={SECRETS['HF_TOKEN']}", "stage=<redacted>: there is no such stage"),
        ("run_name=${oc.env:HF_TOKEN}", "run_name: there is a secret in it"),
        ("store_dir=at/${oc.env:HF_TOKEN}", "store_dir: there is a secret in it"),
    ],
)  # fmt: skip
def test_a_complaint(chain: Chain, override: str, said: str) -> None:
    outcome = chain.run(override)
    assert outcome.code == 2
    assert said in outcome.err
    assert leaks(chain.directory, outcome.out, outcome.err) == []


def test_showing_the_config(chain: Chain) -> None:
    outcome = chain.run(
        "--cfg=job", "--resolve", "ppo.reward='${oc.env:DATA_URL}'", "model.chat_template=${oc.env:HF_TOKEN}"
    )
    assert "chat_template: <redacted>" in outcome.out
    assert leaks(chain.directory, outcome.out, outcome.err) == []


def test_a_sweep(chain: Chain) -> None:
    url = ENVIRONMENT["DATA_URL"].replace("=", "\\=")
    outcome = chain.run(
        "-m", "seed=0,1", "stage=[]", f"generate.reward='{url}'", f"model.chat_template={SECRETS['HF_TOKEN']}"
    )
    assert outcome.code == 2
    assert leaks(chain.directory, outcome.out, outcome.err) == []
    assert not list(chain.directory.rglob("multirun.yaml"))  # Hydra's sweeper would write one


def test_submitit_gets_no_secret_to_pickle(chain: Chain) -> None:
    outcome = chain.run("-m", "hydra/launcher=submitit_local", f"model.chat_template={SECRETS['HF_TOKEN']}")
    assert outcome.code == 2
    assert "chat_template=<redacted>: submitit would write this secret to a file" in outcome.err
    assert "${oc.env:NAME}" in outcome.err


def test_samples_and_dumps(chain: Chain) -> None:
    """A prompt may quote one."""
    where = chain.directory / "runs"
    where.mkdir()
    Tracker(where, []).sample("generate", {"prompt": [{"content": SECRETS["HF_TOKEN"]}], "score": 1.5})
    job = SimpleNamespace(run_directory=where, stage="ppo", compute=SimpleNamespace(is_main=True))
    path = Job.dump(cast(Any, job), "step1", [{"response": f"it is {SECRETS['DB_PASSWORD']}"}])
    assert json.loads((where / "samples.jsonl").read_text())["prompt"] == [{"content": "<redacted>"}]
    assert json.loads(path.read_text()) == {"response": "it is <redacted>"}


def test_summary_and_report(chain: Chain) -> None:
    """A directory may be called like one, if it was there before."""
    where = chain.directory / SECRETS["HF_TOKEN"]
    run = Run(where)
    run.stages["sft"] = {"status": "ran", "seconds": 1.0, "artifact": str(where), "metrics": {}}
    run.write()
    write_report(run)
    assert leaks(where) == []
    assert run.stages["sft"]["artifact"] == str(where)  # what goes on working with it is not redacted


def artifact_key(outcome: Outcome) -> str:
    assert outcome.code == 0, outcome.err
    return outcome.key("generate")


def test_a_secret_decides_no_key(chain: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same scorer at another secret place is the same; at a place that is no secret it is another."""
    scorer, keys = chain.directory / SECRETS["HF_TOKEN"], []
    tiny = chain.directory / "tiny"
    tiny.mkdir()
    _write_tiny(tiny)
    AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).save_pretrained(scorer)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(scorer)
    for name in (SECRETS["HF_TOKEN"], "hf_AnotherSecret"):
        if not (chain.directory / name).exists():
            (chain.directory / name).symlink_to(scorer)
        monkeypatch.setenv("HF_TOKEN", name)
        keys.append(artifact_key(chain.run("stage=generate", f"generate.reward=model:{name}")))
    monkeypatch.delenv("HF_TOKEN")
    keys.append(artifact_key(chain.run("stage=generate", "generate.reward=model:hf_AnotherSecret")))
    assert keys[0] == keys[1] != keys[2]
