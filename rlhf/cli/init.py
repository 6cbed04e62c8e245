"""`python -m rlhf init`: looks at files and writes an experiment that uses them. Needs no torch."""

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
from rlhf.data.chat_template import CHATML, rendered
from rlhf.data.formats import (
    CONVERSATION_COLUMNS,
    PROMPT_COLUMNS,
    Raw,
    named_alike,
    pair_row,
    preference_row,
    prompt_row,
    read_as,
    retention_row,
    sft_row,
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
SHOWN, MOST_SHOWN = 2, 600
"""Rows of a file, and characters of each."""
LOOKED_AT = 1000
"""Rows of each file that are looked at. `prepare` checks all of them."""
TYPED = re.compile(r"[\w ./-]+")
"""A path that Hydra reads as it stands."""
MOST = 0.5
"""Share of those that must be of a kind."""


@dataclass(frozen=True)
class Kind:
    """What a file may hold."""

    words: str
    key: str
    """The key that names such files."""
    columns: tuple[str, ...]
    """What it needs, by our names."""
    parse: Callable[[Raw], Row]
    """Raises RowError for a row of another kind."""


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
"""In the order in which they are tried: a row of pairs would also do as a prompt."""


@dataclass(frozen=True)
class Found:
    """What a file holds."""

    path: str
    """As the user wrote it."""
    kind: str
    source: SourceConfig
    rows: int
    """That were looked at."""
    bad: list[str]
    """What is wrong with those that are not of the kind."""
    columns: str
    """How its columns are read."""
    names: list[str]
    """What its columns are called."""
    first: list[Row]
    """Rows to show."""

    @property
    def yaml(self) -> str:
        """The value of its key."""
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
    if not TYPED.fullmatch(str(target)):
        raise ConfigError(
            f"init to={target}: name it with letters, digits, spaces and ._-/ only: a command must name it."
        )
    if target.exists():
        raise ConfigError(f"{target} is there already. Remove it, or name another: to=FILE.yaml.")
    named = {name: keys[name] for name in COLUMNS if keys[name]}
    found = by_kind([look(word, named) for word in words])
    if named and not any(each.source.fields == named for each in found.values()):
        said = " ".join(f"{ours}={theirs}" for ours, theirs in named.items())
        there = (f"{each.path} has {', '.join(map(repr, each.names))}." for each in found.values())
        raise ConfigError(f"init {said}: no file has these columns. {' '.join(there)}")
    text = "\n".join(experiment(found, target)) + "\n"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"init to={target}: it cannot be written ({error.strerror}). Name another: to=FILE.yaml."
        ) from None
    for line in told(found, target):
        print(printable(line))
    return DONE


def look(path: str, named: Mapping[str, str]) -> Found:
    """Find out what a file holds.

    Args:
        named: our names -> the user's columns, where he has said them.

    Raises:
        ConfigError: it cannot be read, or is of no known kind.
    """
    if Path(path).exists() and not Path(path).is_file() and not Path(path).is_dir():
        raise ConfigError(f"{path}: it is no regular file. Name a file.")
    source = SourceConfig(path=path)
    rows = list(islice(source.rows("init"), LOOKED_AT))
    readable = [each.row for each in rows if not isinstance(each.row, RowError)]
    names = [str(column) for column in dict.fromkeys(column for row in readable[:10] for column in row)]
    is_told = bool(named) and {*named.values()} <= {*names}
    for name, kind in KINDS.items():
        if is_told and not {*named} <= {*kind.columns}:
            continue
        fields = dict(named) if is_told else renamed(readable, kind)
        chosen = source.model_copy(update={"fields": fields})
        bad = list(complaints(chosen, kind))
        if len(bad) < MOST * len(rows):
            first = next(chosen.read(dict(row)) for row in readable)
            assert not isinstance(first, RowError)
            columns = read_as(first, kind.columns, fields)
            return Found(path, name, chosen, len(rows), bad, columns, names, parsed(chosen, kind))
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


def renamed(rows: Sequence[Raw], kind: Kind) -> dict[str, str]:
    """`fields`, where columns are called otherwise, but much the same."""
    if not rows or any(_is_read(kind, row) for row in rows):
        return {}
    found = named_alike(rows[0], kind.columns)
    return found if found.keys() >= {*kind.columns} - {"label"} and kind.key != "ppo.prompts" else {}


def _is_read(kind: Kind, row: Raw) -> bool:
    try:
        kind.parse(row)
    except RowError:
        return False
    return True


def parsed(source: SourceConfig, kind: Kind) -> list[Row]:
    """The first rows that are of the kind."""
    found: list[Row] = []
    for _, row in islice(source.rows("init"), LOOKED_AT):
        if len(found) < SHOWN and not isinstance(row, RowError) and _is_read(kind, row):
            found.append(kind.parse(row))
    return found


def seen(row: Row) -> str:
    """What the model sees of a row, or is to answer, in the packaged model's template."""
    prompt, answer = row.exchanges()[0]
    if not prompt:
        return text_of(answer or "")
    if answer is None:
        return rendered(CHATML, prompt, opens_answer=True)
    turn = {"role": "assistant", "content": answer} if isinstance(answer, str) else answer
    return rendered(CHATML, [*prompt, turn])


def complaints(source: SourceConfig, kind: Kind) -> Iterator[str]:
    """What is wrong with each row that is not of the kind."""
    for where, row in islice(source.rows("init"), LOOKED_AT):
        try:
            if isinstance(row, RowError):
                raise row
            kind.parse(row)
        except RowError as error:
            yield f"{where}: {error}"


def by_kind(files: Sequence[Found]) -> dict[str, Found]:
    """Kind -> its file.

    Raises:
        ConfigError: two files are for one key, or nothing can be learned from these.
    """
    keys: dict[str, Found] = {}
    for each in files:
        key = KINDS[each.kind].key
        if key in keys:
            raise ConfigError(
                f"{keys[key].path} and {each.path} both hold {KINDS[each.kind].words}, and {key} is one "
                "file. Join them, or leave one out."
            )
        keys[key] = each
    found = {each.kind: each for each in files}
    if not found.keys() & {"pairs", "thumbs", "answers", "texts"}:
        names = ", ".join(each.path for each in files)
        raise ConfigError(
            f"{names}: there are no answers to learn from. Add a file with answers, pairs or thumbs; or, if "
            "a function of yours scores answers, see docs/rewards.md."
        )
    if "pairs" in found and "thumbs" in found:
        raise ConfigError(
            f"{found['pairs'].path} and {found['thumbs'].path}: pairs and thumbs train in different ways. "
            "Take one of them."
        )
    return found


def experiment(found: Mapping[str, Found], target: Path) -> Iterator[str]:
    """The lines of the experiment's file."""
    has_answers = bool(found.keys() & {"answers", "texts"})
    yield "# @package _global_"
    yield f"# Written by `python -m rlhf init`. To run it: {command(target)}"
    yield "# Every key: `python -m rlhf keys`. Paths are relative to the directory where the command starts."
    if "thumbs" in found or "pairs" not in found:
        yield (
            "defaults:"
            if "thumbs" in found
            else "stage: sft # there are no preferences, so nothing is learned from them"
        )
    if "thumbs" in found:
        yield "  - override /recipe: dpo # thumbs need no reward model"
    yield "# model: give it on the command line, such as model=hub model.id=OWNER/NAME; see docs/models.md"
    if has_answers:
        yield from section("sft", "data", found.get("answers") or found["texts"])
    if "pairs" in found:
        yield from section("reward", "pairs", found["pairs"])
        if not has_answers:
            yield "  init: base # there are no answers to learn first: take an instruction-tuned model"
    if "thumbs" in found:
        yield from section("dpo", "data", found["thumbs"])
        yield "  loss: kto"
        if not has_answers:
            yield "  init: base # there are no answers to learn first: take an instruction-tuned model"
    if "prompts" in found:
        yield from section("ppo", "prompts", found["prompts"])
        if "pairs" in found and not has_answers:
            yield "  init: base"
    elif "pairs" in found:
        yield "ppo:"
        yield f"  prompts: {'sft.data' if 'answers' in found else 'reward.pairs'} # its prompts"
        if not has_answers:
            yield "  init: base"
    yield from judged(found)


def judged(found: Mapping[str, Found]) -> Iterator[str]:
    """The lines of `evaluate`."""
    lines, gates = [], []
    if "questions" in found:
        lines += [*section("evaluate", "retention", found["questions"])][1:]
        gates += ["    retention_perplexity_ratio: null # it needs texts"]
    if "thumbs" in found:
        lines += ["  prompts: dpo.data # a share is set aside, which nothing trains on"]
        lines += ["  reward: null # there is no reward model"]
        gates += ["    win_rate: null # it needs a judge: a reward or evaluate.gold"]
    elif "pairs" in found:
        lines += ["  gold: null # the true reward, if you know it: docs/rewards.md"]
    if lines:
        yield from ("evaluate:", *lines, *(["  gates:", *gates] if gates else []))


def section(stage: str, key: str, file: Found) -> Iterator[str]:
    """A stage with the file that it reads."""
    yield f"{stage}:"
    yield f"  # {KINDS[file.kind].words}, read as {file.columns}"
    yield f"  {key}: {file.yaml}"


def told(found: Mapping[str, Found], target: Path) -> Iterator[str]:
    """What the user is told."""
    for each in found.values():
        kind = KINDS[each.kind]
        first = "first " if each.rows == LOOKED_AT else ""
        rows = "Its row is" if each.rows == 1 else f"Its {first}{each.rows} rows are"
        yield f"{each.path} -> {kind.key}: {kind.words}. {rows} read as {each.columns}."
        if each.source.fields:
            yield "  Its columns have other names: check that these are meant."
        if each.bad:
            yield (
                f"  {len(each.bad)} of them cannot be used, and the run would end there: {each.bad[0]} Mend "
                "them, or set prepare.on_bad_row=drop."
            )
        for number, row in enumerate(each.first, 1):
            yield f"  Row {number}, as the packaged model sees it (template chatml):"
            yield from (f"    | {line}" for line in seen(row)[:MOST_SHOWN].splitlines())
    yield f"Wrote {target}. Check what it says, then run:"
    yield f"  {command(target)} model=tiny  # every stage once, on a random model"
    yield f"  {command(target)}  # on SmolLM2-135M-Instruct; or model=hub model.id=OWNER/NAME"
    if "pairs" not in found and "thumbs" not in found:
        yield "There are no preferences, so it trains SFT alone. With pairs the whole chain runs."


def command(target: Path) -> str:
    """What runs the experiment."""
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", target.stem).lstrip("-.") or "own"
    return f"python -m rlhf +experiment={shlex.quote(str(target))} run_name={name}"
