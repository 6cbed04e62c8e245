"""`python -m rlhf init`: inspect the user's files and write an experiment that uses them. Needs no torch."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.cli.command import read_words
from rlhf.config import ConfigError
from rlhf.data.chat_template import CHATML, render_template
from rlhf.data.formats import (
    CONVERSATION_COLUMNS,
    PROMPT_COLUMNS,
    Raw,
    column_mapping,
    pair_row,
    preference_row,
    prompt_row,
    retention_row,
    sft_row,
    similar_columns,
)
from rlhf.data.schema import QuestionRow, Row, RowError, ThumbRow, text_of
from rlhf.data.sources import SourceConfig
from rlhf.exit_codes import DONE
from rlhf.printable import printable

COLUMNS = ("prompt", "completion", "chosen", "rejected", "label", "text")
HELP = f"""python -m rlhf init FILE... [to=experiment.yaml] [prompt=COLUMN completion=COLUMN ...]

Look at your files (JSONL, JSON, CSV, Parquet or text) and write an experiment file that uses them, with
comments, and with no data of the demo. It says what each file is used for and why, shows two rows of it as
the model will see them, and says what to check, and the command to run it. A file that is there already is
not overwritten. Where columns have other names, say which is which: {", ".join(COLUMNS)}.
"""
SHOWN_ROWS, MAX_SHOWN_CHARACTERS = 2, 600
"""Rows of a file to print, and characters of each row."""
INSPECTED_ROWS = 1000
"""Rows of each file to inspect. `prepare` checks all rows."""
UNQUOTED_PATH = re.compile(r"[\w ./-]+")
"""Matches a path that Hydra reads without quotes."""
MAX_BAD_SHARE = 0.5
"""Share of rows that do not fit, from which a file is not of a kind."""


@dataclass(frozen=True)
class Kind:
    """A kind of rows that a file may hold."""

    words: str
    key: str
    """The config key for such a file."""
    columns: tuple[str, ...]
    """The columns that its rows need, by our names."""
    parse: Callable[[Raw], Row]
    """Parses a row; raises RowError for another kind of row."""


def _only(kind: type[Row], parse: Callable[[Raw], Row]) -> Callable[[Raw], Row]:
    def checked(raw: Raw) -> Row:
        row = parse(raw)
        if not isinstance(row, kind):
            raise RowError("other kind", "it is of another kind.")
        return row

    return checked


def _answer(raw: Raw) -> Row:
    row = sft_row(raw)
    if not row.prompt:
        raise RowError("other kind", "it is plain text.")
    return row


def _prompt(raw: Raw) -> Row:
    if all(raw.get(column) is None for column in (*CONVERSATION_COLUMNS, *PROMPT_COLUMNS)):
        raise RowError("other kind", "it has no prompt.")
    return prompt_row(raw)


KINDS = {
    "pairs": Kind(
        "pairs of a better and a worse answer", "reward.pairs", ("prompt", "chosen", "rejected"), pair_row
    ),
    "thumbs": Kind(
        "answers with a thumb up or down", "dpo.data", ("prompt", "completion", "label"),
        _only(ThumbRow, preference_row),
    ),
    "questions": Kind(
        "questions with choices", "evaluate.retention", ("question", "choices", "answer"),
        _only(QuestionRow, retention_row),
    ),
    "answers": Kind("prompts with the answers to learn", "sft.data", ("prompt", "completion"), _answer),
    "prompts": Kind("prompts", "ppo.prompts", ("prompt",), _prompt),
    "texts": Kind("plain texts", "sft.data", ("text",), sft_row),
}  # fmt: skip
"""In the order in which they are tried. The order matters: a row of pairs would also parse as a prompt."""


@dataclass(frozen=True)
class FileContent:
    """What a file holds, and how it is read."""

    path: str
    """As the user wrote it."""
    kind: str
    source: SourceConfig
    rows: int
    """Number of inspected rows."""
    bad: list[str]
    """A complaint per row that is not of the kind."""
    columns: str
    """How its columns are read, in words."""
    names: list[str]
    """Names of its columns."""
    first: list[Row]
    """Rows to show."""

    @property
    def yaml(self) -> str:
        """The value of its config key, as YAML."""
        fields = self.source.fields
        quoted = json.dumps(self.path, ensure_ascii=False)
        return json.dumps({"path": self.path, "fields": fields}, ensure_ascii=False) if fields else quoted


def init(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Write an experiment file for the user's own files."""
    known = {"to": "experiment.yaml", **dict.fromkeys(COLUMNS, "")}
    given = read_words("init", arguments, known, HELP)
    if given is None:
        return DONE
    words, keys = given
    if not words:
        raise ConfigError("init: name your files, as in `python -m rlhf init answers.csv pairs.parquet`.")
    target = Path(keys["to"])
    if target.suffix != ".yaml":
        raise ConfigError(f"init to={target}: an experiment's file ends in .yaml.")
    if not UNQUOTED_PATH.fullmatch(str(target)):
        raise ConfigError(
            f"init to={target}: name it with letters, digits, spaces and ._-/ only: a command must name it."
        )
    if target.exists():
        raise ConfigError(f"{target} is there already. Remove it, or name another: to=FILE.yaml.")
    named = {name: keys[name] for name in COLUMNS if keys[name]}
    files = by_kind([inspect_file(word, named) for word in words])
    if named and not any(each.source.fields == named for each in files.values()):
        pairs = " ".join(f"{ours}={theirs}" for ours, theirs in named.items())
        columns = (f"{each.path} has {', '.join(map(repr, each.names))}." for each in files.values())
        raise ConfigError(f"init {pairs}: no file has these columns. {' '.join(columns)}")
    text = "\n".join(experiment_lines(files, target)) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"init to={target}: it cannot be written ({error.strerror}). Name another: to=FILE.yaml."
        ) from None
    for line in printed_lines(files, target):
        print(printable(line))
    return DONE


def inspect_file(path: str, named: Mapping[str, str]) -> FileContent:
    """Find out what kind of rows a file holds.

    Args:
        named: our column name -> the user's, from the command line.

    Raises:
        ConfigError: the file cannot be read, or is of no known kind.
    """
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ConfigError(f"{path}: it is no regular file. Name a file.")
    source = SourceConfig(path=path)
    rows = list(islice(source.rows("init"), INSPECTED_ROWS))
    readable = [each.row for each in rows if not isinstance(each.row, RowError)]
    names = [str(column) for column in dict.fromkeys(column for row in readable[:10] for column in row)]
    has_named_columns = bool(named) and {*named.values()} <= {*names}
    for name, kind in KINDS.items():
        if has_named_columns and not {*named} <= {*kind.columns}:
            continue
        fields = dict(named) if has_named_columns else guessed_fields(readable, kind)
        renamed = source.model_copy(update={"fields": fields})
        bad = list(complaints(renamed, kind))
        if len(bad) < MAX_BAD_SHARE * len(rows):
            first = next(renamed.read(dict(row)) for row in readable)
            assert not isinstance(first, RowError)
            columns = column_mapping(first, kind.columns, fields)
            return FileContent(path, name, renamed, len(rows), bad, columns, names, parsed(renamed, kind))
    for kind in KINDS.values():
        if rows and {*kind.columns} <= {*names}:
            bad = list(complaints(source.model_copy(update={"fields": dict(named)}), kind))
            raise ConfigError(
                f"{path}: by its columns it holds {kind.words}, but {len(bad)} of its first {len(rows)} rows "
                f"cannot be used: {bad[0]} Fix them."
            )
    columns = ", ".join(names)
    broken = next((f"{each.where}: {each.row}" for each in rows if isinstance(each.row, RowError)), None)
    why = f"its columns are {columns}" if columns else f"no row can be read ({broken})"
    raise ConfigError(
        f"{path}: {why}, and that does not say what the rows are for. Rename the columns: answers to learn "
        "need prompt and completion (or messages); preferences need prompt, chosen and rejected; prompts "
        "need prompt. Or write the experiment yourself and name the columns there: docs/data.md."
    )


def guessed_fields(rows: Sequence[Raw], kind: Kind) -> dict[str, str]:
    """`fields` for columns with similar names; empty if the rows can be read without them."""
    if not rows or any(_can_parse(kind, row) for row in rows):
        return {}
    fields = similar_columns(rows[0], kind.columns)
    return fields if fields.keys() >= {*kind.columns} - {"label"} and kind.key != "ppo.prompts" else {}


def _can_parse(kind: Kind, row: Raw) -> bool:
    try:
        kind.parse(row)
    except RowError:
        return False
    return True


def parsed(source: SourceConfig, kind: Kind) -> list[Row]:
    """The first rows of this kind, parsed."""
    parsed_rows: list[Row] = []
    for _, row in islice(source.rows("init"), INSPECTED_ROWS):
        if len(parsed_rows) < SHOWN_ROWS and not isinstance(row, RowError) and _can_parse(kind, row):
            parsed_rows.append(kind.parse(row))
    return parsed_rows


def as_model_sees(row: Row) -> str:
    """A row as the model sees it, in the packaged model's chat template."""
    prompt, answer = row.exchanges()[0]
    if not prompt:
        return text_of(answer or "")
    if answer is None:
        return render_template(CHATML, prompt, opens_answer=True)
    turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    return render_template(CHATML, [*prompt, turn])


def complaints(source: SourceConfig, kind: Kind) -> Iterator[str]:
    """A complaint for each row that is not of the kind."""
    for where, row in islice(source.rows("init"), INSPECTED_ROWS):
        try:
            if isinstance(row, RowError):
                raise row
            kind.parse(row)
        except RowError as error:
            yield f"{where}: {error}"


def by_kind(files: Sequence[FileContent]) -> dict[str, FileContent]:
    """Kind -> its file.

    Raises:
        ConfigError: two files are for one key, or the files have nothing to learn from.
    """
    by_key: dict[str, FileContent] = {}
    for each in files:
        key = KINDS[each.kind].key
        if key in by_key:
            raise ConfigError(
                f"{by_key[key].path} and {each.path} both hold {KINDS[each.kind].words}, and {key} is one "
                "file. Join them, or leave one out."
            )
        by_key[key] = each
    kinds = {each.kind: each for each in files}
    if not kinds.keys() & {"pairs", "thumbs", "answers", "texts"}:
        names = ", ".join(each.path for each in files)
        raise ConfigError(
            f"{names}: there are no answers to learn from. Add a file with answers, pairs or thumbs; or, if "
            "a function of yours scores answers, see docs/rewards.md."
        )
    if "pairs" in kinds and "thumbs" in kinds:
        raise ConfigError(
            f"{kinds['pairs'].path} and {kinds['thumbs'].path}: pairs and thumbs train in different ways. "
            "Take one of them."
        )
    return kinds


def experiment_lines(files: Mapping[str, FileContent], target: Path) -> Iterator[str]:
    """Lines of the experiment file."""
    has_answers = bool(files.keys() & {"answers", "texts"})
    yield "# @package _global_"
    yield f"# Written by `python -m rlhf init`. To run it: {command(target)}"
    yield "# Every key: `python -m rlhf keys`. Paths are relative to the directory where the command starts."
    if "thumbs" in files or "pairs" not in files:
        yield (
            "defaults:"
            if "thumbs" in files
            else "stage: sft # there are no preferences, so nothing is learned from them"
        )
    if "thumbs" in files:
        yield "  - override /recipe: dpo # thumbs need no reward model"
    yield "# model: give it on the command line, such as model=hub model.id=OWNER/NAME; see docs/models.md"
    if has_answers:
        yield from section("sft", "data", files.get("answers") or files["texts"])
    if "pairs" in files:
        yield from section("reward", "pairs", files["pairs"])
        if not has_answers:
            yield "  init: base # there are no answers to learn first: take an instruction-tuned model"
    if "thumbs" in files:
        yield from section("dpo", "data", files["thumbs"])
        yield "  loss: kto"
        if not has_answers:
            yield "  init: base # there are no answers to learn first: take an instruction-tuned model"
    if "prompts" in files:
        yield from section("ppo", "prompts", files["prompts"])
        if "pairs" in files and not has_answers:
            yield "  init: base"
    elif "pairs" in files:
        yield "ppo:"
        yield f"  prompts: {'sft.data' if 'answers' in files else 'reward.pairs'} # its prompts"
        if not has_answers:
            yield "  init: base"
    yield from evaluate_section(files)


def evaluate_section(files: Mapping[str, FileContent]) -> Iterator[str]:
    """Lines of the section `evaluate`."""
    lines, gates = [], []
    if "questions" in files:
        lines += [*section("evaluate", "retention", files["questions"])][1:]
        gates += ["    retention_perplexity_ratio: null # it needs texts"]
    if "thumbs" in files:
        lines += ["  prompts: dpo.data # a share is set aside, which nothing trains on"]
        lines += ["  reward: null # there is no reward model"]
        gates += ["    win_rate: null # it needs a judge: a reward or evaluate.gold"]
    elif "pairs" in files:
        lines += ["  gold: null # the true reward, if you know it: docs/rewards.md"]
    if lines:
        yield from ("evaluate:", *lines, *(["  gates:", *gates] if gates else []))


def section(stage: str, key: str, file: FileContent) -> Iterator[str]:
    """Lines of a stage's section with the file that it reads."""
    yield f"{stage}:"
    yield f"  # {KINDS[file.kind].words}, read as {file.columns}"
    yield f"  {key}: {file.yaml}"


def printed_lines(files: Mapping[str, FileContent], target: Path) -> Iterator[str]:
    """Lines to print: how each file is used, and the next commands."""
    for each in files.values():
        kind = KINDS[each.kind]
        first = "first " if each.rows == INSPECTED_ROWS else ""
        rows = "Its row is" if each.rows == 1 else f"Its {first}{each.rows} rows are"
        yield f"{each.path} -> {kind.key}: {kind.words}. {rows} read as {each.columns}."
        if each.source.fields:
            yield "  Its columns have other names: check that these are meant."
        if each.bad:
            yield (
                f"  {len(each.bad)} of them cannot be used, and the run would end there: {each.bad[0]} Fix "
                "them, or set prepare.on_bad_row=drop."
            )
        for number, row in enumerate(each.first, 1):
            yield f"  Row {number}, as the packaged model sees it (template chatml):"
            yield from (f"    | {line}" for line in as_model_sees(row)[:MAX_SHOWN_CHARACTERS].splitlines())
    yield f"Wrote {target}. Check what it says, then run:"
    yield f"  {command(target)} model=tiny  # every stage once, on a random model"
    yield f"  {command(target)}  # on SmolLM2-135M-Instruct; or model=hub model.id=OWNER/NAME"
    if "pairs" not in files and "thumbs" not in files:
        yield "There are no preferences, so it trains SFT alone. With pairs the whole chain runs."


def command(target: Path) -> str:
    """The command that runs the experiment."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", target.stem).lstrip("-.") or "own"
    return f"python -m rlhf +experiment={shlex.quote(str(target))} run_name={name}"
