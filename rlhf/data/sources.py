"""Where rows come from: a packaged sample set, a file, or a Hub data set."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, AnyStr, NamedTuple

from pydantic import (
    BeforeValidator,
    Field,
    PositiveInt,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from rlhf.config import ConfigError, Strict, did_you_mean
from rlhf.data.formats import CONVERSATION_COLUMNS, PROMPT_COLUMNS, likely_fields, quoted
from rlhf.data.mount import Mount
from rlhf.data.roles import ROLES
from rlhf.data.schema import RowError
from rlhf.digests import MANIFEST, digest_of, file_digest
from rlhf.disk import content_of

SAMPLES_PACKAGE = "rlhf.samples"
ROW_COLUMNS = {*CONVERSATION_COLUMNS, *PROMPT_COLUMNS, "chosen", "text"}
"""Every row has at least one of these columns, unless `fields` names others."""
MAX_ROW_BYTES, MAX_JSON_BYTES = 4 << 20, 1 << 30
"""Largest row in bytes (in characters for other encodings than UTF-8): about a million tokens; and largest
.json file in bytes, because it is read at once."""
SEPARATORS = re.compile(r"[\s,]*")
"""Characters between the rows of an array."""
FORMATS = (".jsonl", ".json", ".parquet", ".csv", ".txt")


class Located(NamedTuple):
    """A row with its place, or the reason why there is no row."""

    where: str
    """Such as `train.jsonl line 412`."""
    row: dict[str, Any] | RowError


class Unread(NamedTuple):
    """The content from which `SourceConfig.read` makes a row."""

    where: str
    content: bytes | dict[str, Any] | RowError
    """A line of JSON; or a parsed row or its error, from readers that parse several rows at once."""


class SourceConfig(Strict):
    """Where a data set comes from: `samples:NAME`, a path, `hub:ID`, or a mapping with more detail."""

    path: str | None = None
    """A .jsonl, .json, .csv or .txt file (each also .gz), or .parquet; relative to the current directory."""
    samples: str | None = None
    """A sample set that comes with this package."""
    stage: str | None = None
    """A stage of this run that makes the rows, such as generate. docs/data.md says which of its files is
    read."""
    hub: str | None = None
    """A data set on the Hugging Face Hub, such as HuggingFaceH4/ultrafeedback_binarized."""
    subset: str | None = None
    """hub: the data set's configuration, if it has several."""
    split: str | None = None
    """hub: the split to read; `train` if null."""
    revision: str | None = None
    """hub: a commit. Without one, later changes of the data set are not noticed."""
    limit: PositiveInt | None = None
    """Use only this many rows, drawn by the hash of their prompts. Every split keeps some."""
    encoding: str | None = None
    """path: the file's encoding if it is not UTF-8, such as cp1252. UTF-16 with a byte order mark is
    detected."""
    fields: dict[str, str] = Field(default_factory=dict)
    """Our name -> the source's column, such as {completion: best_answer}."""

    @model_validator(mode="before")
    @classmethod
    def _parse_text(cls, value: Any) -> Any:
        if isinstance(value, (SourceConfig, dict)):
            return value
        if not isinstance(value, str):
            raise ValueError(
                "a source is samples:NAME, a path, hub:ID, stage:NAME, or a mapping with one of these"
            )
        for kind in ("samples", "hub", "stage"):
            if value.startswith(f"{kind}:"):
                return {kind: value.removeprefix(f"{kind}:")}
        return {"path": value}

    @model_validator(mode="after")
    def _check_one_place(self) -> SourceConfig:
        named = [kind for kind in ("path", "samples", "hub", "stage") if getattr(self, kind)]
        if len(named) != 1:
            names = ", ".join(named) or "none"
            raise ValueError(f"name exactly one of path, samples, hub, stage (found: {names})")
        if self.encoding is not None:
            if self.path is None:
                raise ValueError("encoding has a meaning for path only")
            try:
                codecs.lookup(self.encoding)
            except LookupError:
                raise ValueError(f"encoding={self.encoding}: there is none of this name") from None
        if self.hub is None:
            unused = [name for name in ("subset", "split", "revision") if getattr(self, name)]
            if unused:
                raise ValueError(f"{unused[0]} has a meaning for hub only, not for {named[0]}")
        return self

    def __str__(self) -> str:
        if self.path is not None:
            return self.path
        kind = next(kind for kind in ("samples", "hub", "stage") if getattr(self, kind))
        return f"{kind}:{getattr(self, kind)}"

    @property
    def name(self) -> str:
        """The name used in metrics: a file's name up to its first dot, or the data set's name."""
        return Path(str(self).removeprefix("samples:")).name.partition(".")[0]

    @property
    def written_by(self) -> str | None:
        """The stage that wrote the source, if it is a file of an artifact."""
        try:
            manifest = Path(self.path or "").resolve().with_name(MANIFEST)
            return str(json.loads(content_of(manifest))["stage"])
        except (OSError, ValueError, KeyError, TypeError):  # other files may have the name of a manifest
            return None

    def fingerprint(self, key: str) -> str:
        """Digest of the source's content: a file's bytes and format, or a Hub data set's name, revision,
        subset and split. The same file in two places has the same digest."""
        if self.hub is not None:
            return digest_of(["hub", self.hub, self.revision, self.subset, self.split or "train"])
        path = self._file(key)
        try:
            return digest_of(["file", _suffixes(path), file_digest(path)])
        except OSError as error:
            raise ConfigError(f"{key}: {path} cannot be read ({error.strerror}). {READ_ADVICE}") from None

    def reading_digest(self, key: str) -> str:
        """Digest of the rows that this source gives: of its content, `limit`, `fields` and `encoding`."""
        return digest_of([self.fingerprint(key), self.limit, self.fields, self.encoding])

    def with_fields(self, key: str, columns: Sequence[str], raw: Mapping[str, Any]) -> str:
        """A shell argument with guessed `fields`: `sft.data='{path: FILE, fields: {prompt: question, ...}}'`.

        Args:
            columns: columns that a row needs, by our names.
            raw: a row without some of them.
        """
        place = {"path": self.path} if self.path is not None else {"hub": self.hub}
        kind, name = next(iter(place.items()))
        mapping = f"{{{kind}: {quoted(str(name))}, fields: {likely_fields(raw, columns)}}}"
        return f"{key}={shlex.quote(mapping)}"

    def rows(self, key: str) -> Iterator[Located]:
        """Every row with its place. `limit` is not applied.

        Args:
            key: the config key that names this source, for errors.

        Raises:
            ConfigError: the source cannot be read at all, or is empty.
        """
        for where, content in self.unread(key):
            yield Located(where, self.read(content))

    def unread(self, key: str) -> Iterator[Unread]:
        """Like `rows`, but unparsed: `read` makes the row, also in another process."""
        if self.hub is not None:
            contents = _hub_rows(self, key)
        else:
            path = self._file(key)
            contents = READERS[_suffixes(path)[0]](path, key, self.encoding)
        is_empty = True
        for each in contents:
            is_empty = False
            yield each
        if is_empty:
            raise ConfigError(f"{key}={self}: it holds no rows. Add rows, or name another source.")

    def read(self, content: bytes | dict[str, Any] | RowError) -> dict[str, Any] | RowError:
        """The row that a content of this source holds, with the columns that `fields` names."""
        row = _json_row(content) if isinstance(content, bytes) else content
        if isinstance(row, RowError) or not self.fields:
            return row
        for ours, theirs in self.fields.items():
            if theirs not in row:
                return RowError(
                    "missing field",
                    f'"{theirs}" is missing; `fields` reads "{ours}" from it (found: {", ".join(row)}).',
                )
        # If `fields` names columns, a conversation column next to them is not meant.
        used_columns = {*self.fields.values(), *CONVERSATION_COLUMNS}
        other_columns = {column: value for column, value in row.items() if column not in used_columns}
        return other_columns | {ours: row[theirs] for ours, theirs in self.fields.items()}

    def _file(self, key: str) -> Path:
        if self.samples is not None:
            return _sample_file(self.samples, key)
        assert self.path is not None
        path = Path(self.path).expanduser()
        if path.is_dir():
            readable = sorted(
                child.name for child in path.iterdir() if child.is_file() and _is_readable(child)
            )
            raise ConfigError(
                f"{key}={self.path}: a directory. Name a file in it "
                f"({', '.join(readable[:5]) or 'it has none that can be read'})."
            )
        if not path.exists():
            raise ConfigError(
                f"{key}={self.path}: there is no such file (looked in {path.absolute().parent}). "
                "Check its name."
            )
        if not _is_readable(path):
            raise ConfigError(
                f"{key}={self.path}: cannot read this kind of file. Convert it to one of "
                f"{', '.join(FORMATS)}; all but .parquet also with .gz."
            )
        return path


AsList = BeforeValidator(lambda value: value if isinstance(value, list) else [value])
SourceList = Annotated[list[SourceConfig], Field(min_length=1), AsList]
"""One source, or several that are read one after the other."""


def _prompts(value: Any, _: ValidatorFunctionWrapHandler, info: ValidationInfo) -> SourceConfig | str:
    roles = info.context.roles if isinstance(info.context, Mount) else ROLES
    is_key = value in [role.key for role in roles.values() if role.lends_prompts]
    return str(value) if is_key else SourceConfig.model_validate(value)


PromptSource = Annotated[SourceConfig | str, WrapValidator(_prompts)]
"""A source of prompts, or the key of the rows whose prompts are used."""


def _sample_file(name: str, key: str) -> Path:
    folder = Path(str(resources.files(SAMPLES_PACKAGE)))
    path = folder / f"{name}.jsonl"
    if not path.is_file():
        names = sorted(file.stem for file in folder.glob("*.jsonl"))
        raise ConfigError(
            f"{key}=samples:{name}: there is no such sample set.{did_you_mean(name, names)} "
            f"There are: {', '.join(names)}."
        )
    return path


def _suffixes(path: Path) -> tuple[str, bool]:
    """The format's suffix, and whether the file is compressed."""
    compressed = path.suffix.lower() == ".gz"
    return (path.with_suffix("") if compressed else path).suffix.lower(), compressed


def _is_readable(path: Path) -> bool:
    suffix, compressed = _suffixes(path)
    return suffix in FORMATS and not (compressed and suffix == ".parquet")


def _lines(
    path: Path, key: str, encoding: str | None, max_length: int = MAX_ROW_BYTES
) -> Iterator[tuple[int, bytes | RowError]]:
    """Numbered lines of a file, uncompressed, as UTF-8. A line longer than `max_length` gives a RowError and
    is not held in memory: a small compressed file may hold gigabytes.

    Raises:
        ConfigError: the file is damaged or cannot be read.
    """
    number = 0
    try:
        with _open_file(path) as file:
            begin = file.read(BEGIN_BYTES)
        encoding = encoding or _detect_encoding(begin, f"{key}: {path.name}")
        with _open_file(path) as file:
            if encoding is None:
                lines: Iterator[bytes | None] = _bounded_lines(file.readline, max_length)
            else:
                text = io.TextIOWrapper(file, encoding=encoding, newline="\n")
                rows = _bounded_lines(text.readline, max_length)
                lines = (None if row is None else row.encode() for row in rows)
            for number, line in enumerate(lines, 1):
                if line is None:
                    yield number, RowError("too long", f"a row of more than {max_length >> 20} MiB.")
                else:
                    yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{key}: {path.name}: not {encoding} ({error.reason}). Save the file as "
            "UTF-8, or name its encoding: {path: FILE, encoding: NAME}."
        ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ConfigError(
            f"{key}: {path.name}: the gzip data are damaged after line {number} ({error}). "
            "The file was cut off, or is not a gzip file; fetch it again."
        ) from None
    except OSError as error:
        raise ConfigError(f"{key}: {path} cannot be read ({error.strerror}). {READ_ADVICE}") from None


def _bounded_lines(readline: Callable[[int], AnyStr], max_length: int) -> Iterator[AnyStr | None]:
    """Lines; None for each line longer than `max_length`."""
    while line := readline(max_length + 1):
        is_long = len(line) > max_length and line[-1:] not in (b"\n", "\n")
        yield None if is_long else line
        while is_long:
            line = readline(max_length + 1)
            is_long = len(line) > max_length and line[-1:] not in (b"\n", "\n")


READ_ADVICE = "Check that you may read it, and that its disk is sound."


BEGIN_BYTES = 200
"""First bytes of a file, from which its encoding is detected."""


def _open_file(path: Path) -> gzip.GzipFile | io.BufferedReader:
    return gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb")


def _detect_encoding(begin: bytes, where: str) -> str | None:
    """The encoding that a file's byte order mark shows; None for UTF-8.

    Raises:
        ConfigError: the file is UTF-16 or UTF-32 without a mark.
    """
    if begin.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    if begin.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    if b"\0" in begin:
        order = "le" if begin[1::2].count(0) >= begin[::2].count(0) else "be"
        raise ConfigError(
            f"{where}: not UTF-8, but UTF-16 without its mark. Save the file as UTF-8, or name its encoding: "
            f"{{path: FILE, encoding: utf-16-{order}}}."
        )
    return None


def _jsonl_rows(path: Path, key: str, encoding: str | None) -> Iterator[Unread]:
    for number, line in _lines(path, key, encoding):
        if isinstance(line, RowError) or line.strip():
            yield Unread(f"{path.name} line {number}", line)


def _json_row(line: bytes) -> dict[str, Any] | RowError:
    try:
        return _as_row(json.loads(line.decode()))
    except UnicodeDecodeError as error:
        return _not_utf8(error)
    except json.JSONDecodeError as error:
        cut = "" if line.endswith(b"\n") else " The file seems to be cut off here."
        return RowError("broken JSON", f"not valid JSON ({error.msg}, column {error.colno}).{cut}")
    except (RecursionError, ValueError) as error:
        return _unreadable_json(error)


def _unreadable_json(error: Exception) -> RowError:
    """The error for valid JSON that Python cannot read."""
    what = "nested too deeply" if isinstance(error, RecursionError) else "it has a number of too many digits"
    return RowError("broken JSON", f"{what} to be a row.")


def _as_row(value: Any) -> dict[str, Any] | RowError:
    if isinstance(value, dict):
        return value
    if isinstance(value, str):  # a list of prompts, one JSON text per line
        return {"text": value}
    return RowError("wrong type", f"a row is an object or a text, found {type(value).__name__}.")


def _not_utf8(error: UnicodeDecodeError) -> RowError:
    place = f"byte 0x{error.object[error.start]:02x} at position {error.start + 1}"
    return RowError(
        "bad encoding",
        f"not UTF-8 ({place}). Windows' programs write cp1252 (Windows-1252): name it, "
        "{path: FILE, encoding: cp1252}, or save the file as UTF-8.",
    )


def _json_rows(path: Path, key: str, encoding: str | None) -> Iterator[Unread]:
    """The rows of a JSON array. Other .json files are read as JSON lines, which many of them are.

    Raises:
        ConfigError: the file is too large, not valid JSON, or one object that contains the rows or spans
            several lines.
    """
    content = bytearray()
    for _, line in _lines(path, key, encoding, MAX_JSON_BYTES):
        if isinstance(line, RowError) or len(content) + len(line) > MAX_JSON_BYTES:
            raise ConfigError(
                f"{key}: {path.name}: more than {MAX_JSON_BYTES >> 20} MiB, which are read at once. Save it "
                "as JSON lines (.jsonl), which are read row by row."
            )
        content += line
    if not content.lstrip().startswith(b"["):
        _check_is_no_object(content, key, path)
        yield from _jsonl_rows(path, key, encoding)
        return
    try:
        text = content.decode()
        values = json.loads(text)
    except UnicodeDecodeError as error:
        num_lines = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"{key}: {path.name} line {num_lines}: {_not_utf8(error)}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{key}: {path.name} line {error.lineno}: not valid JSON ({error.msg}, column {error.colno}). "
            "The file may be cut off; fix it or fetch it again."
        ) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            f"{key}: {path.name} {_first_unreadable(text)}: {_unreadable_json(error)} Fix it, or save the "
            "file as JSON lines (.jsonl), of which such rows can be left out."
        ) from None
    for number, value in enumerate(values, 1):
        yield Unread(f"{path.name} row {number}", _as_row(value))


def _first_unreadable(text: str) -> str:
    """Row and line of the first value of an array that Python cannot read, in words."""
    decoder, number, end = json.JSONDecoder(), 0, text.index("[") + 1
    with suppress(RecursionError, ValueError):
        while True:
            number += 1
            begin = SEPARATORS.search(text, end).end()  # type: ignore[union-attr]  # finds the empty text too
            _, end = decoder.raw_decode(text, begin)
    line = text.count("\n", 0, begin) + 1
    return f"row {number} (line {line})"


def _check_is_no_object(content: bytes | bytearray, key: str, path: Path) -> None:
    """Refuse an object that spans several lines or contains the rows. One object on one line may be a row."""
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):  # several objects (JSON lines), or reported later with its line
        return
    if not isinstance(document, dict):
        return
    lists = [name for name, value in document.items() if _holds_objects(value)]
    if b"\n" not in content.strip() and (not lists or ROW_COLUMNS & {*document}):
        return
    commands = "; ".join(f"jq '.\"{name}\"' {path.name} > {name}.json" for name in lists)
    raise ConfigError(
        f"{key}: {path.name} is one object (with {', '.join(document)}). Wanted is a list of objects, "
        "[{...}, {...}], or one object a line."
        + (f" If its rows are in a list, write out that alone: {commands}." if commands else "")
    )


def _holds_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(each, dict) for each in value)


def _decoded(path: Path, key: str, encoding: str | None) -> Iterator[str]:
    for number, line in _lines(path, key, encoding):
        if isinstance(line, RowError):
            raise ConfigError(f"{key}: {path.name} line {number}: {line}")
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise ConfigError(f"{key}: {path.name} line {number}: {_not_utf8(error)}") from None


def _delimiter(header: str) -> str:
    """The character between columns: a comma, or another one if the header has no comma (in much of Europe,
    Excel writes ;)."""
    counts = {mark: len(next(csv.reader([header], delimiter=mark), [])) for mark in (",", ";", "\t", "|")}
    return max(counts, key=counts.__getitem__) if counts[","] == 1 else ","


def _csv_rows(path: Path, key: str, encoding: str | None) -> Iterator[Unread]:
    csv.field_size_limit(MAX_ROW_BYTES)  # the default refuses cells over 128 KiB
    lines = _decoded(path, key, encoding)
    header = next(lines, "")
    reader = csv.DictReader(chain([header], lines), strict=True, delimiter=_delimiter(header))
    try:
        for row in reader:
            where = f"{path.name} line {reader.line_num}"
            if None in row:
                yield Unread(where, RowError("wrong type", "more cells than the header has columns."))
            else:
                yield Unread(where, {column: cell for column, cell in row.items() if cell is not None})
    except csv.Error as error:
        line = reader.line_num + 1  # where the row begins: an open quote takes in the lines after it
        raise ConfigError(
            f"{key}: {path.name} line {line}: not valid CSV ({error}). Fix the line, or save the file again."
        ) from None


def _txt_rows(path: Path, key: str, encoding: str | None) -> Iterator[Unread]:
    for number, line in _lines(path, key, encoding):
        row: dict[str, Any] | RowError
        try:
            row = line if isinstance(line, RowError) else {"text": line.decode().strip()}
        except UnicodeDecodeError as error:
            row = _not_utf8(error)
        if isinstance(row, RowError) or row["text"]:
            yield Unread(f"{path.name} line {number}", row)


def _parquet_rows(path: Path, key: str, encoding: str | None) -> Iterator[Unread]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            yield from _numbered(path.name, rows)
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(
            f"{key}: {path.name}: not a readable Parquet file ({str(error).splitlines()[0]}). "
            "The file may be cut off; fetch it again."
        ) from None


def _hub_rows(source: SourceConfig, key: str) -> Iterator[Unread]:
    import datasets

    try:
        builder = datasets.load_dataset_builder(source.hub, source.subset, revision=source.revision)
        _check_inside(builder, f"{key}={source}")
        builder.download_and_prepare()
        rows: Iterable[Any] = builder.as_dataset(split=source.split or "train")
    except (OSError, RuntimeError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ConfigError(
            f"{key}={source}: {str(error).splitlines()[0].rstrip('.')}. "
            "Check the name, subset, split and revision, and the network."
        ) from None
    yield from _numbered(str(source), rows)


def _check_inside(builder: Any, where: str) -> None:
    """Refuse a data set whose card names files outside the set: it could name any file of this machine.

    Raises:
        ConfigError: the card names such a file.
    """
    base = str(builder.base_path)
    repository = base.partition("@")[0] + "@" if base.startswith("hf://") else None
    for files in (builder.config.data_files or {}).values():
        for file in files:
            if repository is None:  # a local directory, read like a data set of the Hub
                is_own = Path(file).resolve().is_relative_to(Path(base).resolve())
            else:
                is_own = file.startswith(repository) and ".." not in file.split("/")
            if not is_own:
                raise ConfigError(
                    f"{where}: its card names {file}, which is outside the set. Use another data set."
                )


def _numbered(name: str, rows: Iterable[Any]) -> Iterator[Unread]:
    for number, row in enumerate(rows, 1):
        yield Unread(f"{name} row {number}", _as_row(row))


READERS = {
    ".jsonl": _jsonl_rows,
    ".json": _json_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
    ".txt": _txt_rows,
}
