"""From sources to prepared rows: reads, checks, measures and splits each role, and counts removed rows."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from heapq import nsmallest
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rich.console import Console
from rich.table import Table

from rlhf.config import ConfigError
from rlhf.data.chat_template import tokenizer_digest
from rlhf.data.formats import column_mapping
from rlhf.data.near import near_duplicates
from rlhf.data.prepared import (
    BEYOND_LIMIT,
    CONTRADICTION,
    COPIED,
    DUPLICATE,
    FAULTS,
    FOR_JUDGE,
    IN_EVALUATION,
    LEAK,
    LEFT_FOR_TRAINING,
    NEAR_DUPLICATE,
    NO_PROMPT,
    OUTVOTED,
    REPORT,
    SAME_PROMPT,
    TOO_LONG,
    PreparedData,
    Removed,
    RoleData,
    RowStore,
    quantiles,
)
from rlhf.data.roles import JUDGE, TRAINING, Roles, training_roles
from rlhf.data.schema import PairRow, Split, draw_at_most, drawn
from rlhf.data.sources import SourceConfig
from rlhf.data.tokens import TEMPLATE_WITHOUT_TOOLS, BadRow, Examiner, Fault
from rlhf.digests import digest_of
from rlhf.tracking.progress import Progress
from rlhf.tracking.redaction import redacted_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADVICE = {
    LEAK: "What is evaluated is trained on, so it cannot judge. Name prompts in evaluate.prompts that no "
    "stage trains on, or the key of a training set: then prepare sets a share of it aside.",
    NEAR_DUPLICATE: "What is evaluated is trained on, so it cannot judge. Name prompts in evaluate.prompts "
    "that no stage trains on.",
    CONTRADICTION: "It is unknown which of two such rows is right. Were columns exchanged, or labels joined "
    "to the wrong rows?",
    COPIED: "Are the prompts made from whole transcripts? End them before the answer. If the answers are "
    "meant to quote their prompts, set prepare.on_copied_answer=keep.",
}
"""Advice for a reason that removed more rows than are kept."""
RUN_ROWS_NOTE = (
    " A prompt is in the same split in every run: answers to training prompts are for training alone, and "
    "those to prompts of the evaluation for nothing else. Add rows with other prompts; held-out rows also "
    "come from generate.splits=[train,held_out]."
)
MAX_JUDGE_TESTS = 1000
"""Most pairs on which the judge is tested. They give its accuracy to 0.03."""


class NoRowsError(ConfigError):
    """A source, or a split of it, has no rows."""


@dataclass(frozen=True)
class Sources:
    """The data sources that a config names for its roles."""

    roles: Roles
    named: Mapping[str, SourceConfig | Sequence[SourceConfig] | str | None]
    """Role -> one or more sources, the key of a role whose prompts it uses, or None."""

    def own(self, role: str) -> list[SourceConfig]:
        """The role's own sources. A role that uses the prompts of another role has none."""
        named = self.named[role]
        if named is None or isinstance(named, str):
            return []
        return [named] if isinstance(named, SourceConfig) else [*named]

    def lender(self, role: str) -> str | None:
        """The role whose prompts this role uses, or None."""
        return next((name for name, each in self.roles.items() if each.key == self.named[role]), None)

    def content_digest(self, role: str) -> str:
        """Digest of what the role's own sources hold, or the role whose prompts it uses."""
        contents = [source.reading_digest(self.roles[role].key) for source in self.own(role)]
        return self.lender(role) or digest_of(contents)

    def makers(self) -> dict[str, str]:
        """Role -> the stage that makes its rows."""
        return {
            role: source.stage
            for role, source in self.named.items()
            if isinstance(source, SourceConfig) and source.stage is not None
        }

    def check_lenders(self) -> None:
        """Refuse a key that names itself, or the key of a role without rows.

        Raises:
            ConfigError: there is such a key.
        """
        for role, entry in self.roles.items():
            other = self.lender(role)
            if other is not None and (other == role or not self.named[other]):
                raise ConfigError(f"{entry.key}={self.roles[other].key}: there are no rows. Name a source.")


@dataclass
class Preparation:
    """The work of `prepare` on the rows of every role, and its results."""

    sources: Sources
    held_out_fraction: float
    evaluation_fraction: float
    judge_fraction: float
    on_bad_row: Literal["error", "drop"]
    on_copied_answer: Literal["drop", "keep"]
    response_tokens: int
    tokenizer: PreTrainedTokenizerBase
    """The base model's tokenizer. Its chat template decides the tokens of a row."""
    context: int
    """Context length of the base model, in tokens."""
    scratch: Path
    """A directory for the rows that were read. It must exist until `write` has returned."""
    digest: str = field(init=False)
    """`tokenizer_digest` of the tokenizer."""
    data: dict[str, RoleData] = field(default_factory=dict)
    """Role -> its rows, in the order of the roles table."""

    def __post_init__(self) -> None:
        self.digest = tokenizer_digest(self.tokenizer)

    @property
    def roles(self) -> Roles:
        """The roles of the config."""
        return self.sources.roles

    def prepare(self, progress: Progress) -> None:
        """Read and check every role, set the evaluation prompts aside, and split the rest.

        Raises:
            ConfigError: a source or a row cannot be used, or a split has no rows.
        """
        for role in self.roles:
            self._read(role, progress)
        self.data = {role: self.data[role] for role in self.roles}
        self._measure()
        self._choose_evaluation()
        self._reserve_judge_prompts()
        self._split()
        self._remove_faults()
        self._check_not_empty()

    def write(self, directory: Path) -> None:
        """Write the rows of each split, and the report."""
        prepared = PreparedData(directory, roles=self.roles)
        report = {}
        for role in self.data.values():
            role.write(prepared)
            if not self.sources.named[role.role]:
                continue
            source, digest = ", ".join(self._names(role.role)), prepared.digest(role.role)
            made = {"made_by_runs": self._run_rows_note(role.role)}
            report[role.role] = {"source": source, "digest": digest, **made, **role.report()}
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (directory / REPORT).write_text(redacted_text(text), encoding="utf-8")

    def metrics(self) -> dict[str, float]:
        """Counts of rows and of removed rows. Shares are of the role that lost the largest share."""
        counts = {
            name: self.data[role].num_of(row_type)
            for role, entry_of_role in self.roles.items()
            if entry_of_role.metrics
            for name, row_type in zip(entry_of_role.metrics, entry_of_role.row_types, strict=True)
        }
        dropped = sum(role.num_dropped for role in self.data.values())
        bad_share = max(role.bad_share for role in self.data.values())
        faults: dict[str, float] = {}
        for reason in FAULTS:
            faults[f"{reason}s"] = sum(role.count(reason) for role in self.data.values())
            others = (
                training_roles(self.roles) if reason == NEAR_DUPLICATE else ()
            )  # their rows evaluate no policy
            shares = [role.share(reason) for name, role in self.data.items() if name not in others]
            faults[f"{reason}_share"] = max(shares)
        return counts | faults | {"dropped": dropped, "bad_share": bad_share, "leaks": self.num_leaks}

    @property
    def num_leaks(self) -> int:
        """Training rows with a prompt of an evaluation set that has sources of its own."""
        return sum(self.data[role].count(LEAK) for role in training_roles(self.roles))

    def show(self, console: Console, makers: Mapping[str, str]) -> None:
        """Print how many rows were read, kept and removed, and why. `makers`: role -> the stage that made its
        rows."""
        table = Table("data", "source", box=None, pad_edge=False, header_style="dim")
        splits = ("train", "held out", "evaluation", "set aside", "dropped")
        for heading in ("read", *splits, "tokens p50", "p95", "max"):
            table.add_column(heading, justify="right")
        for role in self.data.values():
            if self.sources.named[role.role]:
                table.add_row(*self._table_cells(role, makers.get(role.role)))
        console.print(table, highlight=False)
        for role in self.data.values():
            for name, columns in role.columns.items():
                text = f"  {role.key}: {Path(name).name} {columns}"
                console.print(text, style="dim", markup=False, highlight=False)
            cut = [f"{role.cut.count} to be cut ({role.cut.places()})"] if role.cut.count else []
            if role.removed or cut:
                text = f"  {role.key}: {'; '.join([*role.reasons(), *cut])}"
                style = "yellow" if role.num_dropped or cut else "dim"
                console.print(text, style=style, markup=False, highlight=False)
        if any(role.count(TOO_LONG) + role.cut.count for role in self.data.values()):
            console.print(f"  {self._length_note()}", style="yellow", highlight=False)
        if self.num_leaks:
            places = "; ".join(
                f"{role.count(LEAK)} in {role.key} ({role.removed[LEAK].places()})"
                for role in self.data.values()
                if LEAK in role.removed
            )
            evaluated = " or ".join(each.key for each in self.roles.values() if "train" not in each.splits)
            text = (
                f"LEAK: {self.num_leaks} training rows ask what {evaluated} asks; "
                f"they are left out: {places}.{self._run_rows_note()}"
            )
            console.print(text, style="bold red", markup=False, highlight=False)

    def _read(self, role: str, progress: Progress) -> None:
        """Read a role, after the role whose prompts it uses."""
        if role in self.data:
            return
        lender = self.sources.lender(role)
        if lender is not None:
            self._read(lender, progress)
            self._take_prompts(role, self.data[lender])
            return
        sources = self.sources.own(role)
        same_data = next((data for data in self.data.values() if self._reads_the_same(data, role)), None)
        if same_data is not None:  # the same rows are read and encoded only once
            self.data[role] = replace(
                same_data,
                role=role,
                definition=self.roles[role],
                rows=same_data.rows[:],
                removed=deepcopy(same_data.removed),
                cut=Removed(),
            )
            return
        definition = self.roles[role]
        store = RowStore(
            directory=self.scratch, name=role, tokenizer=self.digest, row_types=definition.row_types
        )
        data = self.data[role] = RoleData(role, definition, store)
        seen: set[bytes] = set()
        with store, progress.task(f"reading {data.key}", None) as task:
            for source in sources:
                for num_rows in self._read_source(source, data, seen):
                    task.advance(num_rows)

    def _reads_the_same(self, data: RoleData, role: str) -> bool:
        """Whether the role would read the same rows as `data`."""
        one, other = self.roles[data.role], self.roles[role]
        same_sources = self.sources.own(data.role) == self.sources.own(role)
        has_prompts = self._is_lent(data.role) or not self._is_lent(role)
        return not data.prompts_only and one.parse is other.parse and same_sources and has_prompts

    def _is_lent(self, role: str) -> bool:
        return any(self.sources.lender(other) == role for other in self.roles)

    def _take_prompts(self, role: str, lends: RoleData) -> None:
        """Use the prompts of another role's rows, each once."""
        data = self.data[role] = RoleData(role, self.roles[role], lends.store, prompts_only=True)
        seen: set[bytes] = set()
        for number in lends.rows:
            data.num_read += 1
            identity = data.store.identity[number]
            if not data.store.has_prompt[number]:
                data.remove_row(NO_PROMPT, number)
            elif identity in seen:
                data.remove_row(SAME_PROMPT, number)
            else:
                seen.add(identity)
                data.rows.append(number)

    def _read_source(self, source: SourceConfig, data: RoleData, seen: set[bytes]) -> Iterator[int]:
        """Read a source. Yields the number of rows of each piece that was read."""
        fingerprint, beyond = source.fingerprint(data.key), Removed()
        examiner = Examiner(data.definition, source, self.tokenizer, self._is_lent(data.role))
        if source.limit is not None:
            examiner = replace(examiner, chosen=self._within_limit(examiner, source.limit, seen))
        for piece in examiner.all():
            data.num_read += len(piece.results)
            yield len(piece.results)
            if piece.first is not None and str(source) not in data.columns and source.samples is None:
                columns = dict.fromkeys(source.fields.get(column, column) for column in piece.first)
                mapping = column_mapping(piece.first, data.definition.columns, source.fields)
                data.columns[str(source)] = f"has {', '.join(columns)}; read as {mapping}"
            first, place = data.store.add_piece(piece, fingerprint), 0
            for result in piece.results:
                if isinstance(result, BadRow):
                    self._refuse_row(
                        data, result.where, result.complaint, self._columns_advice(source, data, result)
                    )
                    continue
                if result in seen:
                    data.remove(DUPLICATE, piece.where(place))
                else:
                    seen.add(result)
                    if examiner.chosen is None or result in examiner.chosen:
                        data.rows.append(first + place)
                    else:
                        beyond.add(piece.where(place))
                place += 1
        if beyond.count:
            data.removed.setdefault(BEYOND_LIMIT, Removed()).extend(beyond)

    def _within_limit(self, examiner: Examiner, limit: int, seen: Collection[bytes]) -> set[bytes]:
        """Digests of the rows that stay within a source's limit."""
        identities: dict[bytes, str] = {}
        for piece in replace(examiner, chosen=()).all():
            usable = (result for result in piece.results if isinstance(result, bytes))
            for digest, identity in zip(usable, piece.numbers.identity, strict=True):
                if digest not in seen:
                    identities.setdefault(digest, identity.hex())
        return {
            *draw_at_most(
                [*identities],
                limit,
                identities.__getitem__,
                lambda row: self._possible_split(identities[row]),
            )
        }

    def _possible_split(self, identity: str) -> Split:
        """The split of a row if evaluation also read its source."""
        is_evaluated = drawn(identity, self.evaluation_fraction, "evaluation")
        return "evaluation" if is_evaluated else self._training_split(identity)

    def _training_split(self, identity: str) -> Split:
        return "held_out" if drawn(identity, self.held_out_fraction, "held_out") else "train"

    def _columns_advice(self, source: SourceConfig, data: RoleData, bad: BadRow) -> str:
        """Advice to name columns, for a row without some of the needed ones."""
        lacks = bad.complaint.reason in ("missing field", "no answer")
        if not lacks or bad.raw is None or source.fields:
            return ""
        return (
            f" Are they in other columns? {source.with_fields(data.key, data.definition.columns, bad.raw)}."
        )

    def _refuse_row(self, data: RoleData, where: str, complaint: Fault, advice: str = "") -> None:
        # only for sources of its own: a user does not promise that rows of another role have prompts
        is_own = self.sources.lender(data.role) is None
        if self.on_bad_row == "error" and is_own:
            fix = "Fix the row"
            if complaint.reason == TEMPLATE_WITHOUT_TOOLS:
                fix = "Take a model whose chat template shows tools, or name one (model.chat_template=FILE)"
            raise ConfigError(
                f"{data.key}: {where}: {complaint.text.removesuffix('.')}.{advice} "
                f"{fix}, or set prepare.on_bad_row=drop to leave out such rows."
            )
        data.remove(complaint.reason, where)

    def _measure(self) -> None:
        """Remove and count the rows that do not fit the context. A row whose answer can be cut stays:
        training cuts it, as `sft.max_tokens` says."""
        if self.response_tokens >= self.context:
            raise ConfigError(
                f"ppo.max_new_tokens={self.response_tokens} leaves no room for a prompt "
                f"in the model's context of {self.context} tokens. Lower it."
            )
        for role in self.data.values():
            kept = array("i")
            for number in role.rows:
                refused = role.store.refused.get(number)
                if refused is not None:
                    self._refuse_row(role, role.store.where(number), refused)
                    continue
                if role.tokens(number) > self._max_tokens(role, number):
                    if not self._can_be_cut(role, number):
                        role.remove_row(TOO_LONG, number)
                        continue
                    role.cut.add(role.store.where(number))
                kept.append(number)
            role.rows = kept
            role.measure_shared_prefix()

    def _max_tokens(self, role: RoleData, number: int) -> int:
        """Most tokens that a row may have. A prompt leaves `response_tokens` for its answer."""
        waits = role.prompts_only or role.store.awaits_answer[number]
        return self.context - (self.response_tokens if waits else 0)

    def _can_be_cut(self, role: RoleData, number: int) -> bool:
        """Whether a part of the answer fits the context."""
        store = role.store
        return (
            not role.prompts_only
            and bool(store.can_be_cut[number])
            and store.prompt_tokens[number] < self.context
        )

    def _length_note(self) -> str:
        """A note for the user: which rows are too long, and what happens to them."""
        return (
            f"Rows that exceed the model's context of {self.context} tokens are too long; so are prompts of "
            f"more than {self.context - self.response_tokens}, which leave no room for an answer of "
            f"ppo.max_new_tokens={self.response_tokens}. "
            "Answers of sft.data are cut there, as at sft.max_tokens; other rows are left out."
        )

    def _choose_evaluation(self) -> None:
        """Choose the evaluation prompts and retention rows, and remove them from every training role.

        From a source that a training role also reads, a share is drawn. Other sources must be separate from
        training, and a training row with one of their prompts is a leak.
        """
        names = training_roles(self.roles)
        training = [self.data[role] for role in names]
        trained = {fingerprint for role in training for fingerprint in role.fingerprints()}
        shared: set[bytes] = set()
        separate: set[bytes] = set()
        for role in self.data.values():
            if role.role not in names:
                role.keep(partial(self._is_evaluated, role, trained), LEFT_FOR_TRAINING)
                for number in role.rows:
                    is_shared = role.store.fingerprint[number] in trained
                    (shared if is_shared else separate).add(role.store.identity[number])
        for role in training:
            role.keep(partial(role.asks_none_of, shared), IN_EVALUATION)
            role.keep(partial(role.asks_none_of, separate), LEAK)

    def _is_evaluated(self, role: RoleData, trained: Collection[str], number: int) -> bool:
        """Whether an evaluation role keeps a row. `trained` has the fingerprints of training sources."""
        is_shared = role.store.fingerprint[number] in trained
        return not is_shared or drawn(role.identity(number), self.evaluation_fraction, "evaluation")

    def _reserve_judge_prompts(self) -> None:
        """Remove from all other preferences the prompts that the judge learns from."""
        if JUDGE not in self.data:
            return
        judge = self.data[JUDGE]
        taught = {number for number in judge.rows if self._teaches_judge(judge.identity(number))}
        prompts = {judge.store.identity[number] for number in taught}
        for role in self.data.values():
            if role is not judge and PairRow in role.definition.row_types:
                role.keep(partial(role.asks_none_of, prompts), FOR_JUDGE)

    def _teaches_judge(self, identity: str) -> bool:
        return drawn(identity, self.judge_fraction, "judge")

    def _split(self) -> None:
        for role in self.data.values():
            splits = role.definition.splits
            role.splits = {split: array("i") for split in splits}
            for number in role.rows:
                split = self._split_of(role, number) if "train" in splits else "evaluation"
                role.splits[split].append(number)
        if JUDGE in self.data:  # its tests are pairs that others learn from; some are enough
            judge = self.data[JUDGE]
            tests = {*nsmallest(MAX_JUDGE_TESTS, judge.splits["held_out"], key=judge.identity)}  # random
            judge.splits["held_out"] = array("i", filter(tests.__contains__, judge.splits["held_out"]))

    def _split_of(self, role: RoleData, number: int) -> Split:
        identity = role.identity(number)
        if role.role == JUDGE:
            return "train" if self._teaches_judge(identity) else "held_out"
        return self._training_split(identity)

    def _remove_faults(self) -> None:
        """Remove contradictory rows, copied answers, and rows of other splits that are near duplicates of
        training rows."""
        names = {*training_roles(self.roles)}
        for role in (self.data[name] for name in names if not self.data[name].prompts_only):
            judgement, is_copy = role.store.judgement, role.store.is_copy
            row_of = {judgement[number]: number for number in reversed(role.rows) if judgement[number]}
            times = Counter(judgement)  # counts all rows that were read, because duplicates are votes too
            opposite = {number: row_of.get(-judgement[number]) for number in role.rows}
            faulty = {number: (role, other) for number, other in opposite.items() if other is not None}
            margin = {number: times[judgement[number]] - times[-judgement[number]] for number in faulty}
            role.leave_out(OUTVOTED, {number: faulty[number] for number in faulty if margin[number] < 0})
            role.leave_out(
                CONTRADICTION, {number: faulty[number] for number in faulty if margin[number] == 0}
            )
            if self.on_copied_answer == "drop":
                role.leave_out(COPIED, {number: None for number in role.rows if is_copy[number]})
        self._remove_near_duplicates({*self.roles}, "evaluation", TRAINING)
        for roles in (names - {JUDGE}, names & {JUDGE}):  # a judge is tested on pairs that others learn from
            self._remove_near_duplicates(roles, "held_out", ("train",))

    def _remove_near_duplicates(self, roles: Collection[str], split: Split, trained: Sequence[Split]) -> None:
        """Remove the rows of a split whose prompt is a near duplicate of one in the splits `trained`."""
        asked = [*self._rows(roles, [split])]
        asked_words = {*map(self._words_hash, asked)}
        first: dict[int, tuple[str, int]] = {}
        for place in self._rows(roles, trained):
            if self._words_hash(place) in asked_words:
                first.setdefault(self._words_hash(place), place)
        near = {place: first[self._words_hash(place)] for place in asked if self._words_hash(place) in first}
        long = [place for place in asked if place not in near and self._is_long(place)]
        if long:
            others = {
                self._words_hash(place): place for place in self._rows(roles, trained) if self._is_long(place)
            }
            near |= near_duplicates(long, others.values(), self._prompt_text)
        for name in roles:
            faulty = {
                number: (self.data[other], n) for (role, number), (other, n) in near.items() if role == name
            }
            self.data[name].leave_out(NEAR_DUPLICATE, faulty)

    def _rows(self, roles: Collection[str], splits: Sequence[Split]) -> Iterator[tuple[str, int]]:
        """Role and number of the rows in these splits."""
        for role in self.data.values():
            for split in splits if role.role in roles else ():
                yield from ((role.role, number) for number in role.splits.get(split, ()))

    def _words_hash(self, place: tuple[str, int]) -> int:
        return self.data[place[0]].store.words[place[1]]

    def _is_long(self, place: tuple[str, int]) -> bool:
        return bool(self.data[place[0]].store.is_long[place[1]])

    def _prompt_text(self, place: tuple[str, int]) -> str:
        return self.data[place[0]].store.row(place[1]).asked()

    def _check_not_empty(self) -> None:
        for role in self.data.values():
            for split, rows in role.splits.items():
                if not rows and self.sources.own(role.role):
                    raise NoRowsError(
                        f"{role.key}: no rows are left for {split}: "
                        f"{'; '.join([f'{role.num_read} read', f'{len(role.rows)} kept', *role.reasons()])}. "
                        f"{self._empty_split_advice(role, split)}"
                        f"{f' {self._length_note()}' if role.count(TOO_LONG) else ''}"
                    )

    def _empty_split_advice(self, role: RoleData, split: Split) -> str:
        """Advice to get rows into an empty split."""
        advice = "".join(each for reason, each in ADVICE.items() if role.count(reason) > len(role.rows))
        advice += self._run_rows_note(role.role)
        if advice:
            return advice.strip()
        if split == "held_out" and len({role.identity(number) for number in role.rows}) == 1:
            return "Rows with the same prompt stay together: give rows with other prompts."
        if split == "train" or role.num_read == 1:  # with one row, no other share helps
            return "Give more rows."
        share = self.held_out_fraction if split == "held_out" else self.evaluation_fraction
        return f"Give more rows or raise prepare.{split}_fraction={share:g}."

    def _run_rows_note(self, *roles: str) -> str:
        """A note about the sources of these roles and of the evaluation that a run wrote; empty if there are
        none."""
        evaluated = {*self.roles} - {*training_roles(self.roles)}
        names = {self.sources.lender(role) or role for role in roles} | evaluated
        made = [
            f" {self.roles[role].key}={source} was written by the stage {source.written_by} of a run."
            for role in self.data
            for source in self.sources.own(role)
            if role in names and source.written_by
        ]
        return "".join([*made, RUN_ROWS_NOTE] if made else [])

    def _names(self, role: str) -> list[str]:
        """A role's sources, as the user wrote them."""
        other = self.sources.lender(role)
        return [self.roles[other].key] if other else [*map(str, self.sources.own(role))]

    def _table_cells(self, role: RoleData, maker: str | None) -> Iterator[str]:
        yield role.key
        names = [f"stage:{maker}"] if maker else self._names(role.role)
        yield ", ".join(source.rsplit("/", 1)[-1] for source in names)
        yield str(role.num_read)
        for split in ("train", "held_out", "evaluation"):
            yield str(len(role.splits[split])) if split in role.splits else "-"
        yield str(role.num_set_aside)
        yield str(role.num_dropped)
        lengths = quantiles(map(role.tokens, role.rows))
        for name in ("p50", "p95", "max"):
            yield str(lengths[name])
