"""`init`: what it makes of files of every kind, and that what it writes runs."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from helpers.chains import SETTINGS, Outcome, run_main

NUMBERS = range(40)
ANSWERS = [{"prompt": f"Say {n}", "completion": f"It is {n}."} for n in NUMBERS]
PAIRS = [{"prompt": f"Rate {n}", "chosen": "I love it!", "rejected": "No."} for n in NUMBERS]
THUMBS = [{**row, "label": n % 2 == 0} for n, row in enumerate(ANSWERS)]
HH = [
    {
        "chosen": f"\n\nHuman: Rate {n}\n\nAssistant: I love it!",
        "rejected": f"\n\nHuman: Rate {n}\n\nAssistant: No.",
    }
    for n in NUMBERS
]
QUESTIONS = [{"question": f"{n}+1?", "choices": ["1", "7"], "answer": 0} for n in NUMBERS]
TALKS = [
    {"messages": [{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "Well."}]}
    for n in NUMBERS
]


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    """In the format of its suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            table = csv.DictWriter(file, rows[0])
            table.writeheader()
            table.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def init(directory: Path, *words: str) -> Outcome:
    return run_main(directory, ("init", *words), directory)


def written(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((directory / "experiment.yaml").read_text())
    return found


def test_answers_and_pairs_become_the_whole_chain(tmp_path: Path) -> None:
    write(tmp_path / "answers.csv", ANSWERS)
    write(tmp_path / "pairs.parquet", PAIRS)
    told = init(tmp_path, "answers.csv", "pairs.parquet")
    assert told.code == 0, told.err
    assert written(tmp_path) == {
        "sft": {"data": "answers.csv"}, "reward": {"pairs": "pairs.parquet"}, "ppo": {"prompts": "sft.data"},
        "evaluate": {"gold": None},
    }  # fmt: skip
    assert (
        "answers.csv -> sft.data: prompts with the answers to learn. Its 40 rows are read as {prompt: prompt"
        in told.out
    )
    assert "pairs.parquet -> reward.pairs: pairs of a better and a worse answer." in told.out
    assert "python -m rlhf +experiment=experiment.yaml run_name=experiment model=tiny" in told.out
    assert (tmp_path / "experiment.yaml").read_text().startswith("# @package _global_\n# ")


@pytest.mark.parametrize(
    ("rows", "key"),
    [
        (ANSWERS, "sft.data"), (TALKS, "sft.data"), (PAIRS, "reward.pairs"), (HH, "reward.pairs"),
        (THUMBS, "dpo.data"), ([{"text": f"Part {n} is in room {n}."} for n in NUMBERS], "sft.data"),
        ([{"instruction": f"Say {n}", "output": f"It is {n}."} for n in NUMBERS], "sft.data"),
    ],
)  # fmt: skip
def test_each_kind_gets_its_key(tmp_path: Path, rows: list[dict[str, Any]], key: str) -> None:
    write(tmp_path / "mine.jsonl", rows)
    told = init(tmp_path, "mine.jsonl", "to=sub/mine.yaml")
    assert told.code == 0 and told.out.startswith(f"mine.jsonl -> {key}: "), told.err
    stage, name = key.split(".")
    content = yaml.safe_load((tmp_path / "sub" / "mine.yaml").read_text())
    assert content[stage][name] == "mine.jsonl"
    assert "samples:" not in (tmp_path / "sub" / "mine.yaml").read_text()


def test_the_command_of_a_path_with_a_space_can_be_typed(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ANSWERS)
    told = init(tmp_path, "a.jsonl", "to=my own/first try.yaml")
    assert told.code == 0, told.err
    command = next(line for line in told.out.splitlines() if "model=tiny" in line).partition("  #")[0]
    assert shlex.split(command)[3:5] == ["+experiment=my own/first try.yaml", "run_name=first-try"]
    run = run_main(tmp_path, (*shlex.split(command)[3:], "stage=prepare", "device=cpu"), tmp_path)
    assert run.code == 0, run.err


def test_prompts_and_questions_go_where_they_belong(tmp_path: Path) -> None:
    write(tmp_path / "pairs.jsonl", PAIRS)
    write(tmp_path / "questions.jsonl", QUESTIONS)
    write(tmp_path / "prompts.csv", [{"prompt": f"Tell {n}"} for n in NUMBERS])
    assert init(tmp_path, "pairs.jsonl", "questions.jsonl", "prompts.csv").code == 0
    content = written(tmp_path)
    assert content["ppo"] == {"prompts": "prompts.csv", "init": "base"}
    gates = {"retention_perplexity_ratio": None}
    assert content["evaluate"] == {"retention": "questions.jsonl", "gold": None, "gates": gates}


def test_columns_with_other_names_are_mapped_and_said(tmp_path: Path) -> None:
    write(tmp_path / "mine.csv", [{"query": f"Say {n}", "reply": f"It is {n}.", "id": n} for n in NUMBERS])
    told = init(tmp_path, "mine.csv")
    assert told.code == 0, told.err
    assert written(tmp_path)["sft"]["data"] == {
        "path": "mine.csv", "fields": {"prompt": "query", "completion": "reply"},
    }  # fmt: skip
    assert "Its columns have other names: check that these are meant." in told.out


FOREIGN = [
    {"Nr.": n, "Question (EN)": f"Say {n}", " Answer ": f"It is {n}.", "Better [A]": "Yes!", "worse": "No."}
    for n in NUMBERS
]


def test_headers_are_compared_without_blanks_and_brackets_and_numbers_are_no_text(tmp_path: Path) -> None:
    names = ["Nr.", "Question (EN)", " Answer "]
    write(tmp_path / "mine.csv", [{name: row[name] for name in names} for row in FOREIGN])
    told = init(tmp_path, "mine.csv")
    assert told.code == 0, told.err
    fields = {"prompt": "Question (EN)", "completion": " Answer "}
    assert written(tmp_path)["sft"]["data"] == {"path": "mine.csv", "fields": fields}
    assert 'read as {prompt: "Question (EN)", completion: " Answer "}' in told.out
    assert "  Row 2, as the packaged model sees it (template chatml):\n    | <|im_start|>user\n" in told.out
    assert "    | Say 1<|im_end|>\n    | <|im_start|>assistant\n    | It is 1.<|im_end|>\n" in told.out


def test_an_answer_may_be_a_number_where_its_header_says_so(tmp_path: Path) -> None:
    """But what is called only much like a text is none."""
    rows = [{"Question No": n, "Question": f"{n} + 1?", " Answer ": n + 1} for n in NUMBERS]
    write(tmp_path / "mine.csv", rows)
    told = init(tmp_path, "mine.csv")
    assert told.code == 0, told.err
    fields = {"prompt": "Question", "completion": " Answer "}
    assert written(tmp_path)["sft"]["data"] == {"path": "mine.csv", "fields": fields}


def test_pairs_may_be_called_better_and_worse(tmp_path: Path) -> None:
    names = ["Nr.", "Question (EN)", "Better [A]", "worse"]
    write(tmp_path / "mine.csv", [{name: row[name] for name in names} for row in FOREIGN])
    assert init(tmp_path, "mine.csv").code == 0
    fields = {"prompt": "Question (EN)", "chosen": "Better [A]", "rejected": "worse"}
    assert written(tmp_path)["reward"]["pairs"] == {"path": "mine.csv", "fields": fields}


def test_the_user_says_which_column_is_which(tmp_path: Path) -> None:
    write(tmp_path / "mine.csv", [{"colour": f"Say {n}", "size": f"It is {n}."} for n in NUMBERS])
    told = init(tmp_path, "mine.csv", "prompt=colour", "completion=size")
    assert told.code == 0, told.err
    fields = {"prompt": "colour", "completion": "size"}
    assert written(tmp_path)["sft"]["data"] == {"path": "mine.csv", "fields": fields}
    (tmp_path / "experiment.yaml").unlink()
    write(tmp_path / "a.jsonl", ANSWERS)
    told = init(tmp_path, "a.jsonl", "prompt=colour", "completion=size")
    assert told.code == 2 and "init prompt=colour completion=size: no file has these columns." in told.err


def test_rows_that_cannot_be_used_are_said(tmp_path: Path) -> None:
    write(tmp_path / "mine.jsonl", [*ANSWERS, {"prompt": "Say", "completion": ""}])
    told = init(tmp_path, "mine.jsonl")
    assert (
        '1 of them cannot be used, and the run would end there: mine.jsonl line 41: "completion" is empty'
        in told.out
    )


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.jsonl", b"", "init=empty.jsonl: it holds no rows"),
        ("empty.csv", b"", "it holds no rows"),
        ("mine.bin", bytes(range(256)), "cannot read this kind of file. Convert it to one of .jsonl"),
        ("mine.jsonl", bytes(range(128, 256)) * 8, "no row can be read (mine.jsonl line 1: "),
        ("mine.parquet", bytes(range(128, 256)) * 8, "mine.parquet"),
        ("mine.csv", b"colour,size\nred,4\n", "its columns are colour, size, and that does not say what"),
        ("mine.jsonl", b'{"prompt": "a"}\n', "there are no answers to learn from"),
        ("mine.jsonl", b"\x1b[31m{}\n", "no row can be read (mine.jsonl line 1"),
        (
            "mine.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": ' + b"7" * 5000,
            "by its columns it holds prompts with the answers to learn, but 1 of its first 2 rows cannot be",
        ),
    ],
)  # fmt: skip
def test_a_hostile_file_is_one_clear_line(tmp_path: Path, name: str, content: bytes, complaint: str) -> None:
    (tmp_path / name).write_bytes(content)
    told = init(tmp_path, name)
    assert (told.code, complaint in told.err) == (2, True), told.err
    assert told.err.count("\n") == 1 and "\x1b" not in told.err
    assert not (tmp_path / "experiment.yaml").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ((), "init: name your files"),
        (("missing.csv",), "there is no such file"),
        (("a.jsonl", "b.jsonl"), "a.jsonl and b.jsonl both hold prompts with the answers to learn, and"),
        (("a.jsonl", "to=mine.txt"), "an experiment's file ends in .yaml"),
        (("a.jsonl", "to=my, own.yaml"), "init to=my, own.yaml: name it with letters, digits"),
        (("a.jsonl", "out=mine.yaml"), "init out=mine.yaml: it takes to=VALUE"),
    ],
)  # fmt: skip
def test_a_slip_is_said(tmp_path: Path, words: tuple[str, ...], complaint: str) -> None:
    write(tmp_path / "a.jsonl", ANSWERS)
    write(tmp_path / "b.jsonl", ANSWERS)
    told = init(tmp_path, *words)
    assert (told.code, complaint in told.err) == (2, True), told.err


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    told = init(tmp_path, "pipe.jsonl")
    assert (told.code, told.err) == (2, "Error: pipe.jsonl: it is no regular file. Name a file.\n")


def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ANSWERS)
    told = init(tmp_path, "a.jsonl", "to=a.jsonl/mine.yaml")
    assert told.code == 2 and "init to=a.jsonl/mine.yaml: it cannot be written (" in told.err, told.err


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ANSWERS)
    assert init(tmp_path, "a.jsonl").code == 0
    before = (tmp_path / "experiment.yaml").read_text()
    told = init(tmp_path, "a.jsonl")
    assert told.code == 2 and "experiment.yaml is there already" in told.err
    assert (tmp_path / "experiment.yaml").read_text() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "ran"),
    [
        ({"answers.csv": ANSWERS, "pairs.parquet": PAIRS}, {"sft", "reward", "generate", "ppo", "evaluate"}),
        ({"hh.jsonl": HH, "questions.jsonl": QUESTIONS}, {"reward", "generate", "ppo", "evaluate"}),
        ({"talks.jsonl": TALKS}, {"sft"}),
        ({"thumbs.jsonl": THUMBS}, {"dpo", "evaluate"}),
        ({"answers.jsonl": ANSWERS, "thumbs.csv": THUMBS}, {"sft", "dpo", "evaluate"}),
    ],
)  # fmt: skip
def test_the_command_that_is_told_runs(
    tmp_path: Path, files: dict[str, list[dict[str, Any]]], ran: set[str]
) -> None:
    for name, rows in files.items():
        write(tmp_path / name, rows)
    told = init(tmp_path, *files)
    assert told.code == 0, told.err
    found = re.search(r"python -m rlhf (.* model=tiny)", told.out)
    assert found is not None
    small = [word for word in SETTINGS if word != "model=tiny"]
    outcome = run_main(tmp_path, [*shlex.split(found[1]), *small], tmp_path / "runs" / "experiment")
    assert outcome.code == 0, outcome.err
    assert set(outcome.statuses) - {"prepare"} == ran
    config = yaml.safe_load((tmp_path / "runs" / "experiment" / "config.yaml").read_text())
    assert "samples:" not in yaml.dump({name: config[name] for name in ran})
