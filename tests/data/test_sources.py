"""Every kind of file, and one clear error for each way it can be broken."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.config import ConfigError, Strict, validated
from rlhf.data import sources
from rlhf.data.schema import RowError
from rlhf.data.sources import SourceConfig

KEY = "sft.data"
BOM = b"\xef\xbb\xbf"
ROWS = [{"prompt": "Größe?", "completion": 'He said "no",\nthen left.'}, {"prompt": "b", "completion": "c"}]


def source(value: Any) -> SourceConfig:
    return SourceConfig.model_validate(value)


def read(path: Path, **detail: Any) -> list[tuple[str, Any]]:
    return list(source({"path": str(path), **detail}).rows(KEY))


def jsonl(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8-sig") as file:  # with a byte order mark, as Excel writes
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


WRITERS: dict[str, Callable[[Path], object]] = {
    "x.jsonl": lambda path: path.write_bytes(jsonl(ROWS)),
    "x.jsonl.gz": lambda path: path.write_bytes(gzip.compress(jsonl(ROWS))),
    "blank-lines.jsonl": lambda path: path.write_bytes(BOM + jsonl(ROWS).replace(b"\n", b"\r\n\r\n")),
    "array.json": lambda path: path.write_text(json.dumps(ROWS, indent=1)),
    "lines.json": lambda path: path.write_bytes(jsonl(ROWS)),
    "x.csv": lambda path: write_csv(path, ROWS),
    "x.parquet": lambda path: write_parquet(path, ROWS),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows(name: str, tmp_path: Path) -> None:
    WRITERS[name](tmp_path / name)
    assert [row for _, row in read(tmp_path / name)] == ROWS


def test_rows_know_their_place(tmp_path: Path) -> None:
    for name, places in {
        "x.jsonl.gz": ["x.jsonl.gz line 1", "x.jsonl.gz line 2"],
        "blank-lines.jsonl": ["blank-lines.jsonl line 1", "blank-lines.jsonl line 3"],
        "x.csv": ["x.csv line 3", "x.csv line 4"],  # where the row ends
        "x.parquet": ["x.parquet row 1", "x.parquet row 2"],
    }.items():
        WRITERS[name](tmp_path / name)
        assert [where for where, _ in read(tmp_path / name)] == places


def test_plain_text_and_json_texts_are_one_row_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    (tmp_path / "b.jsonl").write_text('"one"\n"two"\n')
    for name in ("a.txt", "b.jsonl"):
        assert [row for _, row in read(tmp_path / name)] == [{"text": "one"}, {"text": "two"}]


def test_a_string_names_a_source() -> None:
    assert source("samples:prompts") == source({"samples": "prompts"})
    assert source("hub:a/b") == source({"hub": "a/b"})
    assert source("../x.csv") == source({"path": "../x.csv"})
    assert [str(source(text)) for text in ("samples:prompts", "hub:a/b", "../x.csv")] == [
        "samples:prompts", "hub:a/b", "../x.csv",
    ]  # fmt: skip


@pytest.mark.parametrize(("value", "complaint"), [
    (7, "sft.data=7: a source is samples:NAME, a path, hub:ID, stage:NAME, or a mapping with one of these."),
    ({"path": "a", "hub": "b"}, "name exactly one of path, samples, hub, stage (found: path, hub)."),
    ({"limit": 3}, "name exactly one of path, samples, hub, stage (found: none)."),
    ({"path": "a", "revision": "b"}, "revision has a meaning for hub only, not for path."),
    ({"path": "a", "column": "b"}, "sft.data.column: there is no such key."),
])  # fmt: skip
def test_a_wrong_source_is_refused_when_the_config_is_built(value: Any, complaint: str) -> None:
    class Stage(Strict):
        data: SourceConfig

    with pytest.raises(ConfigError) as error:
        validated(Stage, {"data": value}, "sft")
    assert complaint in str(error.value)


def test_packaged_samples_are_found_and_a_wrong_name_lists_them() -> None:
    _, row = next(source("samples:prompts").rows(KEY))
    assert isinstance(row, dict) and row["prompt"]
    with pytest.raises(ConfigError) as error:
        list(source("samples:nonsense").rows(KEY))
    assert str(error.value).startswith("sft.data=samples:nonsense: there is no such sample set. There are: ")
    assert "instructions, " in str(error.value)


def test_fields(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl([{"q": "1", "a": "2", "messages": [], "id": 9}] * 3))
    rows = read(tmp_path / "x.jsonl", fields={"prompt": "q", "completion": "a"})
    assert [row for _, row in rows] == [{"prompt": "1", "completion": "2", "id": 9}] * 3
    (_, missing), *_ = read(tmp_path / "x.jsonl", fields={"prompt": "question"})
    assert isinstance(missing, RowError)
    assert str(missing) == (
        '"question" is missing; `fields` reads "prompt" from it (found: q, a, messages, id).'
    )


@pytest.mark.parametrize(("line", "reason", "complaint"), [
    (b'{"prompt": "a", "compl', "broken JSON",
     "not valid JSON (Unterminated string starting at, column 17). The file seems to be cut off here."),
    (b'{"prompt": }\n', "broken JSON", "not valid JSON (Expecting value, column 12)."),
    (b'{"prompt": "Gr\xf6\xdfe"}\n', "bad encoding",
     "not UTF-8 (byte 0xf6 at position 15). Windows' programs write cp1252 (Windows-1252): name it, "
     "{path: FILE, encoding: cp1252}, or save the file as UTF-8."),
    (b"[1]\n", "wrong type", "a row is an object or a text, found list."),
    (b"[" * 100_000 + b"\n", "broken JSON", "nested too deeply to be a row."),
])  # fmt: skip
def test_a_bad_line_is_a_bad_row_and_the_others_are_read(
    line: bytes, reason: str, complaint: str, tmp_path: Path
) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(ROWS) + line)
    *good, (where, bad) = read(tmp_path / "x.jsonl")
    assert [row for _, row in good] == ROWS
    assert where == "x.jsonl line 3"
    assert isinstance(bad, RowError)
    assert (bad.reason, str(bad)) == (reason, complaint)


def test_a_csv_row_with_too_many_cells_is_bad(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,completion\na,b,c\na\n")
    (_, long), (_, short) = read(tmp_path / "x.csv")
    assert str(long) == "more cells than the header has columns."
    assert short == {"prompt": "a"}


DAMAGED = "sft.data: x.jsonl.gz: the gzip data are damaged"
GZIPPED = gzip.compress(jsonl([{"text": str(number)} for number in range(5000)]))


@pytest.mark.parametrize(("name", "content", "complaint"), [
    ("x.jsonl.gz", GZIPPED[:-2000], f"{DAMAGED} after line "),
    ("x.jsonl.gz", jsonl(ROWS), f"{DAMAGED} after line 0 (Not a gzipped file"),
    ("x.jsonl.gz", GZIPPED[:100] + b"\xff" * 50 + GZIPPED[150:], DAMAGED),
    ("x.jsonl", b"", "/x.jsonl: it holds no rows. Add rows, or name another source."),
    ("x.jsonl", b"\n \n", "/x.jsonl: it holds no rows. Add rows, or name another source."),
    ("x.json", b"[]", "/x.json: it holds no rows. Add rows, or name another source."),
    ("x.csv", b"prompt,completion\n", "/x.csv: it holds no rows. Add rows, or name another source."),
    ("x.json", b'[{"prompt": "a"},\n{"prom', "sft.data: x.json line 2: not valid JSON (Unterminated string"),
    ("x.json", b'[{"prompt":\n"\xf6"}]', "sft.data: x.json line 2: not UTF-8 (byte 0xf6 at position 14)"),
    ("x.json", b'{"version": 1, "rows": [{"prompt": "a"}]}', "sft.data: x.json is one object (with version, "
     "rows). Wanted is a list of objects, [{...}, {...}], or one object a line. If its rows are in a list, "
     "write out that alone: jq '.\"rows\"' x.json > rows.json."),
    ("x.json", b'{\n"prompt": "a"\n}', "x.json is one object (with prompt). Wanted is a list of objects, "),
    ("x.json", b'[{"prompt": "a"},\n{"n": ' + b"1" * 5000 + b"}]", "sft.data: x.json row 2 (line 2): it has "
     "a number of too many digits to be a row. Fix it, or save the file as JSON lines"),
    ("x.json", b'[{"prompt": "a"},\n\n' + b"[" * 100_000, "x.json row 2 (line 3): nested too deeply"),
    ("x.json", b"[" * 100_000, "x.json row 1 (line 1): nested too deeply to be a row."),
    ("x.csv", b"prompt\na\n" + b"a" * (5 << 20), "sft.data: x.csv line 3: a row of more than 4 MiB."),
    ("x.csv", b'prompt\na\n"' + b"a\n" * (3 << 20) + b'"', "x.csv line 3: not valid CSV (field larger than"),
    ("x.csv", b"prompt\na\n\xf6\n", "sft.data: x.csv line 3: not UTF-8 (byte 0xf6 at position 1). Windows"),
    ("x.csv", b'prompt\na\n"open\nb\n', "sft.data: x.csv line 3: not valid CSV (unexpected end of data). Fix "
     "the line, or save the file again."),
    ("x.parquet", b"PAR1 and then nothing", "sft.data: x.parquet: not a readable Parquet file ("),
    ("x.xlsx", b"PK", "x.xlsx: cannot read this kind of file. Convert it to one of .jsonl, .json, "
     ".parquet, .csv, .txt; all but .parquet also with .gz."),
    ("x.parquet.gz", b"PK", "x.parquet.gz: cannot read this kind of file."),
])  # fmt: skip
def test_a_broken_file_gives_one_error(name: str, content: bytes, complaint: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError) as error:
        read(tmp_path / name)
    assert complaint in str(error.value)
    assert str(error.value).startswith(KEY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("encoding", [None, "cp1252"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.txt"])
def test_a_row_that_cannot_be_read_is_one_bad_row(name: str, encoding: str | None, tmp_path: Path) -> None:
    """Whether or not its line ends, and however little of a disk it takes."""
    rows = [
        b'{"text": "a"}',
        b'{"text": "' + b"a" * (9 << 20) + b'"}',
        b'{"text": "b"}',
        b"a" * (4 << 20) + b"a",
    ]
    if name != "x.txt":
        rows[2:2] = [b'{"n": ' + b"1" * 5000 + b"}", b'{"n": ' + b"[" * 100_000]
    content = b"\n".join(rows)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    found = read(tmp_path / name, encoding=encoding)
    assert [where for where, _ in found] == [f"{name} line {number}" for number in range(1, len(rows) + 1)]
    said = [str(row) if isinstance(row, RowError) else "a row" for _, row in found]
    long = "a row of more than 4 MiB."
    number, depth = "it has a number of too many digits to be a row.", "nested too deeply to be a row."
    assert said == ["a row", long, *([] if name == "x.txt" else [number, depth]), "a row", long]


def test_a_json_file_that_is_read_at_once_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_JSON_BYTES", 1 << 20)
    for content in (b" " * (1 << 20) + b"[]", b" \n" * (1 << 20) + b"[]"):
        (tmp_path / "x.json.gz").write_bytes(gzip.compress(content))
        with pytest.raises(ConfigError, match=r"x.json.gz: more than 1 MiB, which .* Save it as JSON lines"):
            read(tmp_path / "x.json.gz")


@pytest.mark.parametrize("row", [
    {"messages": [{"role": "user", "content": "a"}], "tools": [{"name": "f"}]},
    {"prompt": "a", "completion": "b"},
    {"anything": "a"},
])  # fmt: skip
def test_one_row_alone_may_be_a_file(row: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(jsonl([row]))
    assert read(tmp_path / "x.json") == [("x.json line 1", row)]


WITH_ACCENTS = [{"prompt": "Grüße", "completion": "naïve ça €"}]


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_an_encoding_with_a_mark_is_recognised(encoding: str, tmp_path: Path) -> None:
    text = "prompt;completion\nGrüße;naïve ça €\n"
    (tmp_path / "x.csv").write_bytes(text.encode(encoding))
    assert [row for _, row in read(tmp_path / "x.csv")] == WITH_ACCENTS
    for name in ("x.jsonl", "x.json", "x.jsonl.gz"):
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in WITH_ACCENTS).encode(encoding)
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        assert [row for _, row in read(tmp_path / name)] == WITH_ACCENTS
    (tmp_path / "x.txt").write_bytes("Grüße\n".encode(encoding))
    assert [row for _, row in read(tmp_path / "x.txt")] == [{"text": "Grüße"}]


@pytest.mark.parametrize(("encoding", "named"), [("utf-16-le", "utf-16-le"), ("utf-16-be", "utf-16-be")])
def test_utf_16_without_its_mark_is_refused_by_name_and_can_be_named(
    encoding: str, named: str, tmp_path: Path
) -> None:
    (tmp_path / "x.csv").write_bytes("prompt,completion\nGrüße,naïve ça €\n".encode(encoding))
    with pytest.raises(ConfigError, match=f"UTF-16 without its mark.*encoding: {named}"):
        read(tmp_path / "x.csv")
    assert [row for _, row in read(tmp_path / "x.csv", encoding=named)] == WITH_ACCENTS


def test_cp1252_is_refused_by_name_and_can_be_named(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_bytes("prompt;completion\nGrüße;naïve ça €\n".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"x\.csv line 2: not UTF-8 .*encoding: cp1252"):
        read(tmp_path / "x.csv")
    assert [row for _, row in read(tmp_path / "x.csv", encoding="cp1252")] == WITH_ACCENTS
    with pytest.raises(ConfigError, match=r"x\.csv: not ascii"):
        read(tmp_path / "x.csv", encoding="ascii")
    with pytest.raises(ValueError, match="there is none of this name"):
        SourceConfig(path="x.csv", encoding="cp9999")


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_what_separates_the_columns_is_recognised(mark: str, tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text(
        f'prompt{mark}completion\n"a{mark}b"{mark}c, d\n'.replace("c, d", '"c, d"')
    )
    assert [row for _, row in read(tmp_path / "x.csv")] == [{"prompt": f"a{mark}b", "completion": "c, d"}]


def test_a_single_column_needs_no_mark(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt\nWhy; and how?\n")
    assert [row for _, row in read(tmp_path / "x.csv")] == [{"prompt": "Why; and how?"}]


def test_a_missing_file_and_a_directory_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        source(str(tmp_path / "none.jsonl")).fingerprint(KEY)
    expected = (
        f"sft.data={tmp_path}/none.jsonl: there is no such file (looked in {tmp_path}). Check its name."
    )
    assert str(error.value) == expected
    (tmp_path / "train.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "notes.md").write_text("")
    with pytest.raises(ConfigError) as error:
        source(str(tmp_path)).fingerprint(KEY)
    assert str(error.value) == f"sft.data={tmp_path}: a directory. Name a file in it (train.jsonl)."


def test_relative_paths_start_at_the_current_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.jsonl").write_bytes(jsonl(ROWS))
    monkeypatch.chdir(tmp_path)
    assert len(list(source("x.jsonl").rows(KEY))) == 2


def test_the_fingerprint_is_the_contents_not_the_place(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.jsonl").write_bytes(jsonl(ROWS))
    first, second = source(str(tmp_path / "a.jsonl")), source(str(tmp_path / "sub" / "b.jsonl"))
    assert first.fingerprint(KEY) == second.fingerprint(KEY)
    part = first.model_copy(update={"limit": 1})
    assert part.fingerprint(KEY) == first.fingerprint(KEY)
    assert part.reading_digest(KEY) != first.reading_digest(KEY)
    (tmp_path / "sub" / "b.jsonl").write_bytes(jsonl(ROWS[:1]))
    assert first.fingerprint(KEY) != second.fingerprint(KEY)
    assert source("hub:a/b").fingerprint(KEY) != source({"hub": "a/b", "revision": "c"}).fingerprint(KEY)
    splits = [source({"hub": "a/b", "split": split}).fingerprint(KEY) for split in (None, "train", "test")]
    assert splits[0] == splits[1] != splits[2]


def test_hub_sources_go_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()  # load_dataset takes a local directory for a Hub data set
    (tmp_path / "set" / "train.jsonl").write_bytes(jsonl(ROWS))
    (tmp_path / "set" / "test.jsonl").write_bytes(jsonl(ROWS[:1]))
    hub = str(tmp_path / "set")
    assert [row for _, row in source(f"hub:{hub}").rows(KEY)] == ROWS
    [(where, row)] = source({"hub": hub, "split": "test"}).rows(KEY)
    assert (where, row) == (f"hub:{hub} row 1", ROWS[0])
    with pytest.raises(ConfigError) as error:
        list(source({"hub": hub, "split": "validation"}).rows(KEY))
    assert "Check the name, subset, split and revision, and the network." in str(error.value)
