"""What is typed wrong is told in our words, and what may be typed beside Hydra's own grammar."""

from __future__ import annotations

import os
import platform
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers.chains import Chain, Outcome, run_main
from rlhf.cli.execute import OPENMP_SPINS
from rlhf.config import ConfigError
from rlhf.pipeline.experiment import build_experiment
from rlhf.pipeline.metrics import check_metric

MINE = "# @package _global_\nsft:\n  epochs: 3\nppo:\n  kl:\n    coef: 0.7\n"


def composed(directory: Path, *arguments: str) -> Outcome:
    return run_main(directory, ["--cfg", "job", *arguments], directory)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["ppo.kl.cof=1"], ["ppo.kl.cof: there is no such key", "Did you mean ppo.kl.coef"]),
        (
            ["decide.limits.latency.max=1"],
            ["such key. decide.limits has seconds_p50, "],
        ),
        (["ppo.kl,coef=1"], ["ppo.kl,coef: there is no such key", "Did you mean ppo.kl.coef"]),
        (["modle=tiny"], ["Did you mean model"]),
        (["ppo.frozen=sharded"], ["Did you mean ppo.frozen_placement?"]),
        (["model=tinny"], ["model=tinny: there is no such choice", "Did you mean tiny?", "hub, local, tiny"]),
        (["tracker=wandbb"], ["Did you mean wandb?"]),
        (["model.path=x"], ["model.path: this key belongs to model=local"]),
        (["+experiment=quik"], ["Did you mean quick?", "ends in .yaml"]),
        (["experiment=quick"], ["+experiment=quick"]),
        (["sft.optim=[1,2]"], ["sft.optim=[1,2]: a mapping, not a list", "sft.optim.lr"]),
        (["generate.splits={a:1}"], ["a list, not a mapping", "generate.splits=[A,B]"]),
        (["model = tiny"], ["'model = tiny': spaces stand around the sign. Write model=tiny."]),
        (["stage=sft", "seed"], ["Error: seed: it has no value. Write seed=VALUE."]),
        (["sft.data=my", "data/x.jsonl"], ["data/x.jsonl: not KEY=VALUE", "'sft.data=my data/x.jsonl'"]),
        (["sft.data={path:", "a.jsonl}"], ["the bracket is not closed"]),
        (["sft.data={path: a=b.jsonl}"], ["sft.data={path: a=b.jsonl}: not a list or a mapping"]),
        (["sft.data=a=b.jsonl"], ["Put quotes around the value: \"sft.data='a=b.jsonl'\""]),
        (["sft.data=a,b.jsonl"], ["\"sft.data='a,b.jsonl'\"", "sft.data=[a,b.jsonl]"]),
        (["ppo.reward=python:m:f(x)"], ["\"ppo.reward='python:m:f(x)'\""]),
        (["--sft.epochs=3"], ["--sft.epochs=3: a key has no dashes before it: sft.epochs=3."]),
        (["--model", "tiny"], ["--model tiny: a key has no dashes before it: model=tiny."]),
        (["--model", "--stage=sft"], ["--model: a key has no dashes before it: model=VALUE."]),
        (["+experiment=nowhere.yaml"], ["nowhere.yaml cannot be read (No such file"]),
        (["+experiment=[quik]"], ["experiment/quik: there is no such file. Did you mean quick?"]),
    ],
)
def test_a_slip_is_told_with_what_was_meant(tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    outcome = composed(tmp_path, *arguments)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: ") and "hydra" not in outcome.err.lower().replace("to hydra", "")
    for word in words:
        assert word in outcome.err


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["verfy", "store_dir=store"], " Did you mean verify?"),
        (["sft", "model=tiny"], " Did you mean stage=sft?"),
        (["x.jsonl"], ""),
    ],
)
def test_a_first_word_without_an_equals_sign_is_a_command(
    tmp_path: Path, arguments: list[str], meant: str
) -> None:
    outcome = run_main(tmp_path, arguments, tmp_path)
    assert outcome.code == 2
    grammar = "The form is `python -m rlhf [COMMAND] [key=value ...]`, and COMMAND may be "
    assert outcome.err.startswith(f"Error: {arguments[0]}: there is no such command.{meant} {grammar}")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["stage=sft", "status"], "status: a command is the first word: `python -m rlhf status ...`.\n"),
        (["--config-dir", "mine", "keys", "toy"], "`python -m rlhf keys ...`. It knows the packaged stages"),
        (["+stages@toy=toy", "keys", "toy"], "It knows the packaged stages, not your own."),
    ],
)
def test_a_command_that_is_not_the_first_word_is_told(
    tmp_path: Path, arguments: list[str], told: str
) -> None:
    (tmp_path / "mine").mkdir()
    outcome = run_main(tmp_path, arguments, tmp_path)
    assert outcome.code == 2 and told in outcome.err, outcome.err


@pytest.mark.parametrize(
    ("content", "arguments", "words"),
    [
        (
            "sft:\n  epochs: 3\n",
            (),
            "experiment: its keys stand below `experiment`, and not at the top. Write",
        ),
        ("defaults:\n  - mine\n", (), "files name each other in their `defaults`, in a circle"),
        (
            "# @package _global_\nsft: 5\n",
            (),
            "sft=5: sft is a section of keys. Set them one by one",
        ),
        (
            "# @package _global_\n",
            ("sft=5",),
            "sft=5: sft is a section of keys. Set them one by one",
        ),
    ],
)
def test_an_own_file_that_says_otherwise_than_meant_is_told(
    tmp_path: Path, content: str, arguments: tuple[str, ...], words: str
) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(content)
    outcome = run_main(tmp_path, ["--config-dir=conf", "+experiment=mine", *arguments], tmp_path)
    assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1, outcome.err


def test_what_is_advised_is_read_as_it_was_meant(tmp_path: Path) -> None:
    outcome = composed(tmp_path, "sft.data='a=b.jsonl'", "reward.pairs=my pairs.jsonl")
    assert yaml.safe_load(outcome.out)["sft"]["data"] == "a=b.jsonl"
    assert yaml.safe_load(outcome.out)["reward"]["pairs"] == "my pairs.jsonl"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ppo.kl.coef=${sft.epoch}", "ppo.kl.coef: ${sft.epoch} names no key. Did you mean sft.epochs"),
        ("sft.optim.lr=${oc.env:NOT_THERE}", "the environment has no variable NOT_THERE"),
        ("seed=???", "seed: a value is required"),
    ],
)
def test_a_value_that_leads_nowhere_is_told(tmp_path: Path, override: str, words: str) -> None:
    outcome = run_main(tmp_path, [override], tmp_path)
    assert outcome.code == 2
    assert outcome.err.startswith("Error: ") and words in outcome.err


@pytest.mark.parametrize("name", ["mine.yaml", "in a folder/my own.yml"])
def test_an_experiment_is_taken_by_its_path(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(MINE)
    outcome = composed(tmp_path, f"+experiment={name}", "sft.epochs=5")
    assert outcome.code == 0, outcome.err
    found = yaml.safe_load(outcome.out)
    assert found["sft"]["epochs"] == 5  # the command line has the last word
    assert found["ppo"]["kl"]["coef"] == 0.7


@pytest.mark.parametrize(
    ("line", "advised", "chosen"),
    [
        ("model: tiny", "defaults:\n  - override /model: tiny", {"kind": "tiny"}),
        (
            "model: Qwen/Qwen3-0.6B", "defaults:\n  - override /model: hub\nmodel:\n  id: Qwen/Qwen3-0.6B",
            {"kind": "hub", "id": "Qwen/Qwen3-0.6B"},
        ),
        (
            "model: my_model", "defaults:\n  - override /model: local\nmodel:\n  path: my_model",
            {"kind": "local", "path": "my_model"},
        ),
        ("tracker: wandb", "defaults:\n  - override /tracker: wandb", {"kind": "wandb"}),
    ],
)  # fmt: skip
def test_a_choice_that_a_file_writes_as_a_value_is_told_with_the_lines_to_paste(
    tmp_path: Path, line: str, advised: str, chosen: dict[str, str]
) -> None:
    (tmp_path / "my_model").mkdir()
    (tmp_path / "mine.yaml").write_text(f"{line}\nppo:\n  steps: 7\n")
    outcome = composed(tmp_path, "+experiment=mine.yaml")
    assert outcome.code == 2
    assert outcome.err.startswith(f"Error: mine.yaml: `{line}` does not choose a ")
    assert outcome.err.endswith(f"Write instead:\n\n{advised}\n")
    (tmp_path / "mine.yaml").write_text(f"{advised}\nppo:\n  steps: 7\n")
    outcome = composed(tmp_path, "+experiment=mine.yaml")
    found = yaml.safe_load(outcome.out)
    assert found["ppo"]["steps"] == 7
    assert chosen.items() <= found[line.partition(":")[0]].items()


def test_so_is_one_in_a_file_of_a_config_directory(tmp_path: Path) -> None:
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "team.yaml").write_text("# @package _global_\nmodel: tinny\n")
    outcome = run_main(tmp_path, ["--config-dir", "conf", "+experiment=team"], tmp_path)
    assert outcome.code == 2
    assert "`model: tinny` does not choose a model in a file." in outcome.err
    assert outcome.err.endswith("Write instead:\n\ndefaults:\n  - override /model: tiny\n")


def test_a_sweep_may_be_asked_for_between_keys(tmp_path: Path) -> None:
    outcome = run_main(tmp_path, ["model=tiny", "-m", "stage=sft", "ppo.clip=0.1,-1", "device=cpu"], tmp_path)
    assert outcome.code == 2
    assert "ppo.clip=-1" in outcome.err and "usage" not in outcome.err


AT_AN_IMPORT = """
import signal, sys
from rlhf.__main__ import main

class Library:
    \"\"\"Does to an exception what compiled code does that is building a class.\"\"\"

    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException as error:
                raise ValueError("cannot build the class") from error

sys.meta_path.insert(0, Library())
sys.argv[1:] = ["model=tiny", "stage=prepare", "device=cpu"]
main()
"""


@pytest.mark.parametrize(
    "module", ["rlhf.distributed.compute", "rlhf.pipeline.runner", "rlhf.stages.ppo", "torch"]
)
def test_ctrl_c_while_libraries_are_loaded_is_no_crash(tmp_path: Path, module: str) -> None:
    code = AT_AN_IMPORT.format(module=module)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130, done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "runs").exists() == (module == "torch")  # which is loaded for what has to run


def test_a_mapping_replaces_the_experiments_own_and_a_section_keeps_its_other_keys(tmp_path: Path) -> None:
    typed = ["+experiment=hh", "sft.data={path: mine.jsonl}", "sft.optim={lr: 0.5}"]
    found = yaml.safe_load(composed(tmp_path, *typed).out)
    assert found["sft"]["data"] == {"path": "mine.jsonl"}
    assert found["sft"]["optim"]["lr"] == 0.5 and "max_grad_norm" in found["sft"]["optim"]


@pytest.mark.parametrize("named", ["quick", "/experiment/quick"])
def test_a_file_builds_on_a_packaged_experiment(named: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"defaults:\n  - {named}\nsft:\n  epochs: 0.25\n")
    found = yaml.safe_load(composed(tmp_path, "+experiment=mine.yaml").out)
    assert found["sft"]["epochs"] == 0.25
    assert found["model"]["kind"] == "tiny" and found["generate"]["num_prompts"] == 40


def test_an_experiment_by_path_may_choose_a_model_and_needs_no_header(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("defaults:\n  - override /model: tiny\nseed: 4\n")
    found = yaml.safe_load(composed(tmp_path, f"+experiment={tmp_path}/mine.yaml").out)
    assert (found["model"]["kind"], found["seed"]) == ("tiny", 4)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("sft: [1\n", "mine.yaml line 2, column 1: not valid YAML"),
        ("- a\n", "mine.yaml holds no mapping of keys"),
        ("sft:\n  optim: [1, 2]\n", "sft.optim is a list, and must be a mapping with the keys lr"),
        ("generate:\n  splits: {a: 1}\n", "generate.splits is a mapping, and must be a list"),
    ],
)
def test_an_experiment_that_is_written_wrong_is_told(tmp_path: Path, content: str, words: str) -> None:
    (tmp_path / "mine.yaml").write_text(content)
    outcome = composed(tmp_path, "+experiment=mine.yaml")
    assert outcome.code == 2
    assert words in outcome.err


def test_malformed_yaml_in_a_config_directory_is_told(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "bad.yaml").write_text("sft: [1\n")
    outcome = composed(tmp_path, "--config-dir", str(tmp_path), "+experiment=bad")
    assert outcome.code == 2
    assert "bad.yaml line 2, column 1: not valid YAML" in outcome.err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"stage": "rewards"}, "stage=rewards: there is no such stage. Did you mean reward?"),
        ({"gates": "enforced"}, "Did you mean enforce?"),
        ({"sft": {"epochz": 1}}, "sft.epochz: there is no such key. Did you mean epochs?"),
        ({"sft": {"peft": "dorra"}}, "Did you mean dora"),
        ({"sft": {"optim": 3}}, "sft.optim=3: it must be a mapping with the keys lr, "),
        ({"sft": {"data": "samples:instruction"}}, None),
        ({"evaluate": {"policies": "sft"}}, "it must be a list, such as evaluate.policies=[A,B]"),
        ({"plan": {"gpu_memory": 80}}, "plan.gpu_memory=80: a number without a unit. Write 80GiB"),
        ({"plan": {"gpu_memory": "80"}}, "Write 80GiB"),
        ({"plan": {"gpu_bandwidth": 3.35}}, "Write 3.35TB"),
        ({"ppo": {"gates": {"kll": {"max": 1, "advice": "x"}}}}, "has no metric kll. Did you mean kl?"),
        ({"evaluate": {"gates": {"win_rates": {"max": 1, "advice": "x"}}}}, "Did you mean win_rate"),
    ],
)  # fmt: skip
def test_a_checked_value_is_told_with_what_was_meant(
    tmp_path: Path, change: dict[str, object], words: str | None
) -> None:
    resolved = yaml.safe_load(composed(tmp_path, "--resolve", "model=tiny").out)
    for name, value in change.items():
        resolved[name] = resolved[name] | value if isinstance(value, dict) else value
    if words is None:
        build_experiment(resolved)
        return
    with pytest.raises(ConfigError) as error:
        build_experiment(resolved)
    assert words in str(error.value)


def test_every_figure_that_a_chain_publishes_may_have_a_gate(finished_chain: tuple[Chain, Outcome]) -> None:
    _, outcome = finished_chain
    resolved = yaml.safe_load((outcome.directory / "config.yaml").read_text())
    experiment = build_experiment(resolved)
    for name, stage in outcome.summary["stages"].items():
        for metric in stage["metrics"]:
            check_metric(experiment.stages[name], metric.removeprefix(f"{name}/"), metric)


def rlhf(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlhf", *arguments]


def test_the_version_is_ours(tmp_path: Path) -> None:
    done = subprocess.run(rlhf("--version"), cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("rlhf ")


@pytest.mark.parametrize("arguments", [["--help"], ["--cfg", "job"], ["--cfg", "job", "--resolve"]])
def test_a_reader_that_leaves_ends_it_quietly(tmp_path: Path, arguments: list[str]) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(rlhf(*arguments), cwd=tmp_path, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_run_whose_reader_leaves_ends_quietly(tmp_path: Path) -> None:
    reads, writes = os.pipe()
    os.close(reads)
    done = subprocess.run(
        rlhf("model=tiny", "stage=prepare", "device=cpu"),
        cwd=tmp_path, stdout=writes, stderr=subprocess.PIPE, check=False,
        env={**os.environ, "PYTHONWARNINGS": "ignore"},
    )  # fmt: skip
    os.close(writes)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.skipif(platform.system() != "Linux", reason="another OpenMP than GNU's")
@pytest.mark.parametrize(
    ("users", "spins", "is_run"),
    [
        ({}, OPENMP_SPINS, True),
        ({"GOMP_SPINCOUNT": "5"}, 5, False),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, 0, False),
    ],
)
def test_threads_wait_briefly_unless_the_user_says_how_long(
    tmp_path: Path, users: dict[str, str], spins: int, is_run: bool
) -> None:
    """As OpenMP itself says when torch loads it, which is too early for who sets it later."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("GOMP_", "OMP_"))}
    alone = "from rlhf.cli.execute import set_up_libraries; set_up_libraries(); import torch"
    done = subprocess.run(
        rlhf("model=tiny", "stage=prepare", "device=cpu") if is_run else [sys.executable, "-c", alone],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**ours, **users, "OMP_DISPLAY_ENV": "verbose"},
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{spins}'" in done.stderr


def test_a_terminal_is_told_before_the_libraries_are_loaded(tmp_path: Path) -> None:
    mine, theirs = pty.openpty()
    run = subprocess.Popen(
        rlhf("model=tiny", "device=cpu", "stage=prepare"), cwd=tmp_path, stdout=theirs, stderr=theirs
    )
    os.close(theirs)
    said = b""
    try:
        while more := os.read(mine, 1000):
            said += more
    except OSError:  # the other side is closed
        pass
    os.close(mine)
    assert run.wait() == 0
    assert 0 < said.index(b"loading torch") < said.index(b" runs (")


def test_the_experiment_that_the_docs_show_composes(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (shown,) = (part.partition("```")[0] for part in page.split("```yaml\n")[1:])
    (tmp_path / "shown.yaml").write_text(shown)
    outcome = composed(tmp_path, "--resolve", "+experiment=shown.yaml", "sft.data=other.jsonl")
    assert outcome.code == 0, outcome.err
    found = build_experiment(yaml.safe_load(outcome.out)).resolved
    assert (found["model"]["kind"], found["model"]["id"]) == ("hub", "OWNER/NAME")
    assert (found["reward"]["pairs"], found["sft"]["data"]) == ("pairs.parquet", "other.jsonl")
