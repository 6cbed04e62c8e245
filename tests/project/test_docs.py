"""The documents' commands compose and build, and the files and links in them are there."""

from __future__ import annotations

import gzip
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import rlhf.costs.hardware
from helpers.chains import Chain, Outcome, run_main
from helpers.experiments import build
from rlhf.__main__ import is_command
from rlhf.cli.command import KEYED
from rlhf.cli.messages import hydra_arguments
from rlhf.distributed.compute import Compute
from rlhf.pipeline.checks import check
from rlhf.pipeline.stage import View

ROOT = Path(__file__).parents[2]
PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)
READ = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "benchmarks" / "README.md", *PAGES]
DOCUMENTS = [ROOT / "README.md", ROOT / "data" / "README.md", *PAGES, ROOT / "conf" / "config.yaml"]


def commands() -> list[str]:
    """Every `python -m rlhf ...` of the documents, continuation lines joined, comments cut. Without those of
    the toy stage, which tests/outside runs."""
    found = []
    for document in DOCUMENTS:
        text = document.read_text().replace("\\\n", " ")
        found += re.findall(r"^\s*(python -m rlhf(?! \[)(?: [^\n#]*)?)", text, re.MULTILINE)
    unique = {re.split(r"\s{2,}", command.strip())[0] for command in found}
    return sorted(command for command in unique if "+stages@toy" not in command)


def test_there_are_commands_to_check() -> None:
    assert len(commands()) > 80


@pytest.mark.parametrize("command", commands())
def test_a_documented_command_builds(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "word")
    words = shlex.split(command)[3:]
    if words and is_command(words[0]):  # its own tests run it
        shown = run_main(tmp_path, [words[0], "--help"], tmp_path).out
        keys = {word.partition("=")[0] for word in words[1:] if KEYED.match(word)}
        assert [key for key in keys if not re.search(rf"\b{key}\b", shown)] == []
        return
    overrides = [word for word in shlex.split(command)[3:] if "=" in word and not word.startswith("-")]
    if " -m " in command.removeprefix("python -m rlhf") + " ":  # a sweep: its first trial
        swept = [word for word in overrides if "interval(" not in word]
        overrides = [word if "=[" in word else word.partition(",")[0] for word in swept]
    if "recipe=decide" in overrides:  # a candidate may lack data
        overrides.append("stage=prepare")
    build(*hydra_arguments(overrides))


NOT_HERE = re.compile(
    r"generation=vllm|zero=|launch\.processes|submitit|optuna|=qlora|http:|hub:|experiment=hh|REWARD_MODEL"
    r"|experiment=arithmetic|run_name=(?:long|word|fifty|far)|dolly|helpful_base|oasst|wikitext|station"
    r"|recipe=feedback|recipe=decide|label(?:@\w+)?\.annotators|stage:label|stage=report|my_rules"
)
"""What needs a GPU, a cluster, several processes, a server, people, data that are not in the repository, or
many steps; each has tests of its own elsewhere."""


def is_run(command: str) -> bool:
    """Whether the test below can run it here."""
    words = shlex.split(command)[3:]
    return not NOT_HERE.search(command) and not (words and is_command(words[0]))


SMALL = (
    "compare.num_questions=2", "compare.max_new_tokens=4", "ppo.steps=4", "ppo.max_new_tokens=16",
    "generate.num_prompts=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def own_files(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    """A directory with the files that a user of the documents would have, and a store that all share."""
    chain = Chain(tmp_path_factory.mktemp("documented"))
    folder = chain.directory
    answers = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in range(24)]
    pairs = [{"prompt": f"Rate {n}", "chosen": "I love it!", "rejected": "No."} for n in range(24)]
    questions = [{"question": f"{n}+1?", "choices": ["1", "7"], "answer": 0} for n in range(6)]
    named: dict[str, list[dict[str, Any]]] = {
        "answers": answers,
        "task": answers,
        "held_out": answers[:6],
        "pairs": pairs,
        "questions": questions,
        "thumbs": [{**row, "label": number % 2 == 0} for number, row in enumerate(answers)],
    }
    for name, rows in named.items():
        chain.write(f"{name}.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(pairs), folder / "pairs.parquet")
    (folder / "answers.jsonl.gz").write_bytes(gzip.compress((folder / "answers.jsonl").read_bytes()))
    (folder / "speeches.txt.gz").write_bytes(gzip.compress(b"Water boils at a hundred degrees.\n" * 4))
    numbers = [str(n) for n in range(24)]
    (folder / "general.txt").write_text("".join(f"Water number {n} boils late.\n" for n in numbers))
    (folder / "manual.txt").write_text("".join(f"Part {n} is in room {n}.\n" for n in numbers))
    (folder / "prompts.csv").write_text("prompt,question\n" + "".join(f"Tell {n},Ask {n}\n" for n in numbers))
    (folder / "my_reward.py").write_text(python_blocks(ROOT / "docs" / "rewards.md")[0])
    return chain


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(command, marks=pytest.mark.nightly if "seed=0,1,2" in command else pytest.mark.slow)
        for command in commands()
        if is_run(command)
    ],
)
def test_a_documented_command_runs(command: str, own_files: Chain, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the tiny model and a few rows; what the command says wins over these settings."""
    monkeypatch.setattr(rlhf.costs.hardware, "CALIBRATION_SECONDS", 0.1)
    monkeypatch.syspath_prepend(str(own_files.directory))
    words = [word for word in shlex.split(command)[3:] if not word.startswith("model.")]
    words = ["model=tiny" if word.startswith("model=") else word for word in words]
    if words and words[0] in ("--cfg", "--help"):
        outcome = run_main(own_files.directory, words, own_files.directory)
    else:
        outcome = own_files.run(*SMALL, *words)
    assert outcome.code == 0, outcome.err


def python_blocks(document: Path) -> list[str]:
    """The Python that a document shows."""
    return re.findall(r"```python\n(.*?)```", document.read_text(), re.DOTALL)


def test_the_result_is_used_as_shown(
    finished_chain: tuple[Chain, Outcome], capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = python_blocks(ROOT / "docs" / "quickstart.md")
    shown = "runs/demo/artifacts/ppo"
    assert code.count(shown) == 2
    exec(code.replace(shown, str(finished_chain[1].artifact("ppo"))), {})
    assert capsys.readouterr().out


def test_the_reward_scores_as_shown() -> None:
    two_lists, with_columns = python_blocks(ROOT / "docs" / "rewards.md")
    space: dict[str, Any] = {}
    exec(two_lists + with_columns, space)
    assert space["score"](["", ""], ["one", " ".join(["word"] * 12)]) == [-11, 0]
    assert space["exact"](prompts=["", ""], completions=["4 ", "5"], answer=["4", None]) == [1.0, None]


def launches() -> list[tuple[int, str]]:
    """(ranks, arguments) of every launch on several nodes that is shown."""
    shown = [ROOT / "README.md", ROOT / "docs" / "cluster.md", *(ROOT / "launch").iterdir()]
    pattern = r"--nodes=(\d+) --gpus-per-node=(\d+)[^\n]*?launch/slurm\w*\.\w+ ([^\n`]*)"
    text = "\n".join(path.read_text().replace("\\\n#", "") for path in shown)
    return [(int(nodes) * int(gpus), arguments) for nodes, gpus, arguments in re.findall(pattern, text)]


@pytest.mark.parametrize(("ranks", "arguments"), launches())
def test_a_documented_launch_shares_its_batches(ranks: int, arguments: str) -> None:
    experiment = build(*[word for word in arguments.split() if not word.startswith("model")])
    compute = Compute("cuda", "bfloat16", experiment.settings.zero, world_size=ranks)
    for name in experiment.needed():
        check(experiment.stages[name], View(experiment.stages, compute=compute))


def test_launches_are_shown_in_all_places() -> None:
    assert len(launches()) == 7


def test_the_pods_share_their_batches() -> None:
    (_, jobs) = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    pod = jobs["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = pod["template"]["spec"]["containers"]
    ranks = pod["parallelism"] * container["resources"]["limits"]["nvidia.com/gpu"]
    test_a_documented_launch_shares_its_batches(ranks, " ".join(container["args"]))


def test_the_files_that_documents_name_are_there() -> None:
    text = "\n".join(path.read_text() for path in READ)
    named = re.findall(r"`((?:rlhf|stages|conf|data|tests)/[\w/.]+)`", text)
    assert len(named) > 50
    assert [name for name in named if "NAME" not in name and not (ROOT / name).exists()] == []


def test_the_pages_that_keys_and_errors_name_are_there() -> None:
    files = [
        *(ROOT / "conf").rglob("*.yaml"),
        *(ROOT / "rlhf").rglob("*.py"),
        *(ROOT / "stages").glob("*.py"),
    ]
    named = {page for path in files for page in re.findall(r"docs/[\w/.-]+\.md", path.read_text())}
    assert len(named) > 15
    assert [page for page in sorted(named) if not (ROOT / page).exists()] == []


def test_the_other_commands_exist() -> None:
    """What no test here runs itself: make's targets, extras, and the benchmarks with their options."""
    text = "\n".join(path.read_text().replace("\\\n", " ") for path in READ)
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {*re.findall(r"(?:^|`)make ([\w-]+)", text, re.MULTILINE)} <= targets
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for group in re.findall(r"-e '\.\[([\w,]+)\]'", text) for name in group.split(",")} - {
        "NAME"
    }
    assert len(named) > 5 and named <= {*extras}
    scripts = "\n".join(path.read_text() for path in (ROOT / "benchmarks").glob("*.py"))
    benchmarks = re.findall(r"python (benchmarks/\w+\.py)([^`\n]*)", text)
    assert len(benchmarks) > 10
    for script, arguments in benchmarks:
        assert (ROOT / script).is_file()
        unknown = [flag for flag in re.findall(r"--[\w-]+", arguments) if f'"{flag}"' not in scripts]
        assert unknown == [], script


def test_links_lead_somewhere() -> None:
    for document in {*READ, *ROOT.glob("*.md")}:
        links = re.findall(r"\]\(([^)#:]+)(?:#[\w-]+)?\)", document.read_text())
        assert [link for link in links if not (document.parent / link).exists()] == [], document


def test_readme_has_every_room_and_is_short() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The tree") :]
    packages = [path.parent for path in (ROOT / "rlhf").glob("*/__init__.py")]
    folders = {f"{package.name}/" for package in packages if not package.is_symlink()}
    folders |= {f"{name}/" for name in ("stages", "conf", "launch", "docs", "benchmarks", "data", "tests")}
    assert [name for name in sorted(folders) if name not in tree] == []
    assert len(readme.splitlines()) <= 160
