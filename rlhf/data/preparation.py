"""From sources to prepared rows: each role is read, checked, measured and split; what went is counted."""

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
from rlhf.data.formats import read_as
from rlhf.data.near import changed_little
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
    UNLIKE,
    PreparedData,
    Removed,
    RoleData,
    RowStore,
    quantiles,
)
from rlhf.data.roles import JUDGE, TRAINING, Roles, training_roles
from rlhf.data.schema import PairRow, Split, drawn, limited
from rlhf.data.sources import SourceConfig
from rlhf.data.tokens import TEMPLATE_WITHOUT_TOOLS, Bad, Examiner, Fault
from rlhf.data.unlike import unlike
from rlhf.tracking.progress import Progress
from rlhf.tracking.redaction import redacted_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ADVICE = {
    LEAK: "What is evaluated is trained on, so it cannot judge. Name prompts in evaluate.prompts that no "
    "stage trains on, or the key of a training set: then prepare sets a share of it aside.",
    NEAR_DUPLICATE: "What is evaluated is trained on, so it cannot judge. Name prompts in evaluate.prompts "
    "that no stage trains on.",
    CONTRADICTION: "Nobody knows which of two such rows is right. Were columns exchanged, or labels joined "
    "to the wrong rows?",
    COPIED: "Are the prompts made from whole transcripts? End them before the answer. If the answers are "
    "meant to quote their prompts, set prepare.on_copied_answer=keep.",
}
"""What to do where more rows went for a reason than are kept."""
MADE_BY_RUNS = (
    " A prompt is in the same split in every run: answers to training prompts are for training alone, and "
    "those to prompts of the evaluation for nothing else. Add rows with other prompts; held-out rows also "
    "come from generate.splits=[train,held_out]."
)
JUDGE_TESTS = 1000
"""Most pairs on which the judge is tested: its accuracy is then known to 0.03."""


class NoRowsError(ConfigError):
    """A source, or a split of it, has no rows."""


@dataclass(frozen=True)
class Sources:
    """What the keys of all roles of a config name."""

    roles: Roles
    named: Mapping[str, SourceConfig | Sequence[SourceConfig] | str | None]
    """Role -> a source or several, the key of other rows, whose prompts it takes, or none."""

    def own(self, role: str) -> list[SourceConfig]:
        """The role's own; none where its prompts are another's."""
        named = self.named[role]
        if named is None or isinstance(named, str):
            return []
        return [named] if isinstance(named, SourceConfig) else [*named]

    def lender(self, role: str) -> str | None:
        """The role whose rows' prompts it takes."""
        return next((name for name, each in self.roles.items() if each.key == self.named[role]), None)

    def makers(self) -> dict[str, str]:
        """Role -> the stage that makes its rows."""
        return {
            role: source.stage
            for role, source in self.named.items()
            if isinstance(source, SourceConfig) and source.stage is not None
        }

    def check_lenders(self) -> None:
        """Refuse a key that names itself, or one without rows.

        Raises:
            ConfigError: which.
        """
        for role, entry in self.roles.items():
            other = self.lender(role)
            if other is not None and (other == role or not self.named[other]):
                raise ConfigError(f"{entry.key}={self.roles[other].key}: there are no rows. Name a source.")


@dataclass
class Preparation:
    """What `prepare` does to the rows of every role, and what it found."""

    sources: Sources
    held_out_fraction: float
    evaluation_fraction: float
    judge_fraction: float
    on_bad_row: Literal["error", "drop"]
    on_copied_answer: Literal["drop", "keep"]
    response_tokens: int
    tokenizer: PreTrainedTokenizerBase
    """The base model's: its chat template decides what a row's tokens are."""
    context: int
    """Of the base model, tokens."""
    scratch: Path
    """A directory for what was read. It is needed until all is written."""
    digest: str = field(init=False)
    """`tokenizer_digest`."""
    data: dict[str, RoleData] = field(default_factory=dict)
    """Role -> its rows, in the order of the table of roles."""
    differences: list[str] = field(default_factory=list)
    """In what data sets are unlike others; known when they are written."""

    def __post_init__(self) -> None:
        self.digest = tokenizer_digest(self.tokenizer)

    @property
    def roles(self) -> Roles:
        """Those of the config."""
        return self.sources.roles

    def prepare(self, progress: Progress) -> None:
        """Read and check every role, set the evaluation prompts aside, split the rest.

        Raises:
            ConfigError: a source or a row cannot be used, or no row is left for a split.
        """
        for role in self.roles:
            self._read(role, progress)
        self.data = {role: self.data[role] for role in self.roles}
        self._measure()
        self._choose_evaluation()
        self._set_judge_apart()
        self._split()
        self._leave_faults_out()
        self._check_not_empty()

    def write(self, directory: Path) -> None:
        """The rows of each split, and report.json."""
        prepared = PreparedData(directory, roles=self.roles)
        report = {}
        for role in self.data.values():
            role.write(prepared)
            if not self.sources.named[role.role]:
                continue
            source, digest = ", ".join(self._names(role.role)), prepared.digest(role.role)
            made = {"made_by_runs": self._made_by_runs(role.role)}
            report[role.role] = {"source": source, "digest": digest, **made, **role.report()}
        rows = {role: prepared.rows(role, self.roles[role].splits[0]) for role in report}
        self.differences = [*unlike(rows, self.roles)]
        for name, content in {REPORT: report, UNLIKE: self.differences}.items():
            text = json.dumps(content, indent=2, ensure_ascii=False)
            (directory / name).write_text(redacted_text(text), encoding="utf-8")

    def metrics(self) -> dict[str, float]:
        """How many rows there are, and how many were left out; of the role that lost most, which share."""
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
            )  # whose rows judge no policy
            shares = [role.share(reason) for name, role in self.data.items() if name not in others]
            faults[f"{reason}_share"] = max(shares)
        return counts | faults | {"dropped": dropped, "bad_share": bad_share, "leaks": self.num_leaks}

    @property
    def num_leaks(self) -> int:
        """Training rows that ask what an evaluation set asks that was meant to be apart."""
        return sum(self.data[role].count(LEAK) for role in training_roles(self.roles))

    def show(self, console: Console) -> None:
        """What was read, kept and left out, and why."""
        table = Table("data", "source", box=None, pad_edge=False, header_style="dim")
        for heading in ("read", "train", "held out", "evaluation", "dropped", "tokens p50", "p95", "max"):
            table.add_column(heading, justify="right")
        for role in self.data.values():
            if self.sources.named[role.role]:
                table.add_row(*self._table_cells(role))
        console.print(table, highlight=False)
        for role in self.data.values():
            for name, columns in role.columns.items():
                text = f"  {role.key}: {Path(name).name} {columns}"
                console.print(text, style="dim", markup=False, highlight=False)
            cut = [f"{role.cut.count} to be cut ({role.cut.places()})"] if role.cut.count else []
            if role.num_dropped or cut:
                text = f"  {role.key}: {'; '.join([*role.why(), *cut])}"
                console.print(text, style="yellow", markup=False, highlight=False)
        for said in self.differences:
            console.print(f"  {said}", style="yellow", markup=False, highlight=False)
        if any(role.count(TOO_LONG) + role.cut.count for role in self.data.values()):
            console.print(f"  {self._too_long()}", style="yellow", highlight=False)
        if self.num_leaks:
            places = "; ".join(
                f"{role.count(LEAK)} in {role.key} ({role.removed[LEAK].places()})"
                for role in self.data.values()
                if LEAK in role.removed
            )
            evaluated = " or ".join(each.key for each in self.roles.values() if "train" not in each.splits)
            text = (
                f"LEAK: {self.num_leaks} training rows ask what {evaluated} asks; "
                f"they are left out: {places}.{self._made_by_runs()}"
            )
            console.print(text, style="bold red", markup=False, highlight=False)

    def _read(self, role: str, progress: Progress) -> None:
        """Read a role, after the one whose prompts it takes."""
        if role in self.data:
            return
        other = self.sources.lender(role)
        if other is not None:
            self._read(other, progress)
            self._take_prompts(role, self.data[other])
            return
        sources = self.sources.own(role)
        alike = next((data for data in self.data.values() if self._reads_the_same(data, role)), None)
        if alike is not None:  # rows are read and encoded once
            self.data[role] = replace(
                alike,
                role=role,
                about=self.roles[role],
                rows=alike.rows[:],
                removed=deepcopy(alike.removed),
                cut=Removed(),
            )
            return
        about = self.roles[role]
        store = RowStore(directory=self.scratch, name=role, tokenizer=self.digest, row_types=about.row_types)
        data = self.data[role] = RoleData(role, about, store)
        seen: set[bytes] = set()
        with store, progress.task(f"reading {data.key}", None) as task:
            for source in sources:
                for num_rows in self._read_source(source, data, seen):
                    task.advance(num_rows)

    def _reads_the_same(self, data: RoleData, role: str) -> bool:
        """Whether `data` is what the role would read too."""
        one, other = self.roles[data.role], self.roles[role]
        same_sources = self.sources.own(data.role) == self.sources.own(role)
        has_prompts = self._is_lent(data.role) or not self._is_lent(role)
        return not data.prompts_only and one.parse is other.parse and same_sources and has_prompts

    def _is_lent(self, role: str) -> bool:
        return any(self.sources.lender(other) == role for other in self.roles)

    def _take_prompts(self, role: str, lends: RoleData) -> None:
        """The prompts of another role's rows, each once."""
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
        """Read a source. Gives the number of rows that are newly read."""
        fingerprint, beyond = source.fingerprint(data.key), Removed()
        examiner = Examiner(data.about, source, self.tokenizer, self._is_lent(data.role))
        if source.limit is not None:
            examiner = replace(examiner, chosen=self._within_limit(examiner, source.limit, seen))
        for piece in examiner.all():
            data.num_read += len(piece.found)
            yield len(piece.found)
            if piece.first is not None and str(source) not in data.columns and source.samples is None:
                columns = dict.fromkeys(source.fields.get(column, column) for column in piece.first)
                taken = read_as(piece.first, data.about.columns, source.fields)
                data.columns[str(source)] = f"has {', '.join(columns)}; read as {taken}"
            first, place = data.store.add_piece(piece, fingerprint), 0
            for found in piece.found:
                if isinstance(found, Bad):
                    self._bad(data, found.where, found.complaint, self._advice(source, data, found))
                    continue
                if found in seen:
                    data.remove(DUPLICATE, piece.where(place))
                else:
                    seen.add(found)
                    if examiner.chosen is None or found in examiner.chosen:
                        data.rows.append(first + place)
                    else:
                        beyond.add(piece.where(place))
                place += 1
        if beyond.count:
            data.removed.setdefault(BEYOND_LIMIT, Removed()).extend(beyond)

    def _within_limit(self, examiner: Examiner, limit: int, seen: Collection[bytes]) -> set[bytes]:
        """Digests of the rows that a source's limit leaves."""
        identities: dict[bytes, str] = {}
        for piece in replace(examiner, chosen=()).all():
            usable = (found for found in piece.found if isinstance(found, bytes))
            for digest, identity in zip(usable, piece.numbers.identity, strict=True):
                if digest not in seen:
                    identities.setdefault(digest, identity.hex())
        return {
            *limited([*identities], limit, identities.__getitem__, lambda row: self._kind(identities[row]))
        }

    def _kind(self, identity: str) -> Split:
        """The split that a row would be in if evaluation read its source too."""
        is_evaluated = drawn(identity, self.evaluation_fraction, "evaluation")
        return "evaluation" if is_evaluated else self._training_split(identity)

    def _training_split(self, identity: str) -> Split:
        return "held_out" if drawn(identity, self.held_out_fraction, "held_out") else "train"

    def _advice(self, source: SourceConfig, data: RoleData, bad: Bad) -> str:
        """How to name the columns of a row that lacks some."""
        lacks = bad.complaint.reason in ("missing field", "no answer")
        if not lacks or bad.raw is None or source.fields:
            return ""
        return f" Are they in other columns? {source.with_fields(data.key, data.about.columns, bad.raw)}."

    def _bad(self, data: RoleData, where: str, complaint: Fault, advice: str = "") -> None:
        is_own = self.sources.lender(data.role) is None  # the user never said that others' rows are prompts
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
        """A row that does not fit the context is left out and counted. Where its answer can be cut it stays,
        and training cuts it, as `sft.max_tokens` says."""
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
                    self._bad(role, role.store.where(number), refused)
                    continue
                if role.tokens(number) > self._room(role, number):
                    if not self._can_be_cut(role, number):
                        role.remove_row(TOO_LONG, number)
                        continue
                    role.cut.add(role.store.where(number))
                kept.append(number)
            role.rows = kept
            role.measure_shared_prefix()

    def _room(self, role: RoleData, number: int) -> int:
        """Tokens that a row may have: a prompt leaves some for its answer."""
        waits = role.prompts_only or role.store.waits[number]
        return self.context - (self.response_tokens if waits else 0)

    def _can_be_cut(self, role: RoleData, number: int) -> bool:
        """Whether the context has room for a part of the answer."""
        store = role.store
        return (
            not role.prompts_only
            and bool(store.can_be_cut[number])
            and store.prompt_tokens[number] < self.context
        )

    def _too_long(self) -> str:
        """What is too long, and what becomes of it."""
        return (
            f"Too long is what has more tokens than the model's context of {self.context}, a prompt more "
            f"than {self.context - self.response_tokens} beside an answer of "
            f"ppo.max_new_tokens={self.response_tokens}. "
            "Answers of sft.data are cut there, as at sft.max_tokens; other rows are left out."
        )

    def _choose_evaluation(self) -> None:
        """Take the evaluation prompts and the retention rows, and leave them out of every training role.

        From a source that a training role reads too, a share is drawn. Other sources were meant to be apart
        from training, and a row in both is a leak.
        """
        names = training_roles(self.roles)
        training = [self.data[role] for role in names]
        trained = {fingerprint for role in training for fingerprint in role.fingerprints()}
        shared: set[bytes] = set()
        apart: set[bytes] = set()
        for role in self.data.values():
            if role.role not in names:
                role.keep(partial(self._is_evaluated, role, trained), LEFT_FOR_TRAINING)
                for number in role.rows:
                    is_shared = role.store.fingerprint[number] in trained
                    (shared if is_shared else apart).add(role.store.identity[number])
        for role in training:
            role.keep(partial(role.asks_none_of, shared), IN_EVALUATION)
            role.keep(partial(role.asks_none_of, apart), LEAK)

    def _is_evaluated(self, role: RoleData, trained: Collection[str], number: int) -> bool:
        """Whether an evaluation role keeps a row, if training reads the sources `trained`."""
        is_shared = role.store.fingerprint[number] in trained
        return not is_shared or drawn(role.identity(number), self.evaluation_fraction, "evaluation")

    def _set_judge_apart(self) -> None:
        """Leave the prompts that the judge learns from out of all other preferences."""
        if JUDGE not in self.data:
            return
        judge = self.data[JUDGE]
        taught = {number for number in judge.rows if self._teaches_judge(judge.identity(number))}
        prompts = {judge.store.identity[number] for number in taught}
        for role in self.data.values():
            if role is not judge and PairRow in role.about.row_types:
                role.keep(partial(role.asks_none_of, prompts), FOR_JUDGE)

    def _teaches_judge(self, identity: str) -> bool:
        return drawn(identity, self.judge_fraction, "judge")

    def _split(self) -> None:
        for role in self.data.values():
            splits = role.about.splits
            role.splits = {split: array("i") for split in splits}
            for number in role.rows:
                split = self._split_of(role, number) if "train" in splits else "evaluation"
                role.splits[split].append(number)
        if JUDGE in self.data:  # which is tested on what others learn from, of which some are enough
            judge = self.data[JUDGE]
            tests = {*nsmallest(JUDGE_TESTS, judge.splits["held_out"], key=judge.identity)}  # at random
            judge.splits["held_out"] = array("i", filter(tests.__contains__, judge.splits["held_out"]))

    def _split_of(self, role: RoleData, number: int) -> Split:
        identity = role.identity(number)
        if role.role == JUDGE:
            return "train" if self._teaches_judge(identity) else "held_out"
        return self._training_split(identity)

    def _leave_faults_out(self) -> None:
        """Leave out contradictory and copying rows, and those of other splits that ask nearly what is trained
        on."""
        names = {*training_roles(self.roles)}
        for role in (self.data[name] for name in names if not self.data[name].prompts_only):
            judgement, is_copy = role.store.judgement, role.store.is_copy
            said = {judgement[number]: number for number in reversed(role.rows) if judgement[number]}
            times = Counter(judgement)  # of all rows that were read: duplicates are votes too
            contrary = {number: said.get(-judgement[number]) for number in role.rows}
            found = {number: (role, other) for number, other in contrary.items() if other is not None}
            more = {number: times[judgement[number]] - times[-judgement[number]] for number in found}
            role.leave_out(OUTVOTED, {number: found[number] for number in found if more[number] < 0})
            role.leave_out(CONTRADICTION, {number: found[number] for number in found if more[number] == 0})
            if self.on_copied_answer == "drop":
                role.leave_out(COPIED, {number: None for number in role.rows if is_copy[number]})
        self._leave_near_duplicates_out({*self.roles}, "evaluation", TRAINING)
        for roles in (names - {JUDGE}, names & {JUDGE}):  # a judge is tested on what others learn from
            self._leave_near_duplicates_out(roles, "held_out", ("train",))

    def _leave_near_duplicates_out(
        self, roles: Collection[str], split: Split, trained: Sequence[Split]
    ) -> None:
        """Leave out the rows of a split that ask nearly what rows of the splits `trained` ask."""
        asked = [*self._rows(roles, [split])]
        words = {*map(self._words, asked)}
        first: dict[int, tuple[str, int]] = {}
        for place in self._rows(roles, trained):
            if self._words(place) in words:
                first.setdefault(self._words(place), place)
        near = {place: first[self._words(place)] for place in asked if self._words(place) in first}
        long = [place for place in asked if place not in near and self._is_long(place)]
        if long:
            others = {
                self._words(place): place for place in self._rows(roles, trained) if self._is_long(place)
            }
            near |= changed_little(long, others.values(), self._asked)
        for name in roles:
            found = {
                number: (self.data[other], n) for (role, number), (other, n) in near.items() if role == name
            }
            self.data[name].leave_out(NEAR_DUPLICATE, found)

    def _rows(self, roles: Collection[str], splits: Sequence[Split]) -> Iterator[tuple[str, int]]:
        """Role and number of the rows in these splits."""
        for role in self.data.values():
            for split in splits if role.role in roles else ():
                yield from ((role.role, number) for number in role.splits.get(split, ()))

    def _words(self, place: tuple[str, int]) -> int:
        return self.data[place[0]].store.words[place[1]]

    def _is_long(self, place: tuple[str, int]) -> bool:
        return bool(self.data[place[0]].store.is_long[place[1]])

    def _asked(self, place: tuple[str, int]) -> str:
        return self.data[place[0]].store.row(place[1]).asked()

    def _check_not_empty(self) -> None:
        for role in self.data.values():
            for split, rows in role.splits.items():
                if not rows and self.sources.own(role.role):
                    raise NoRowsError(
                        f"{role.key}: no rows are left for {split}: "
                        f"{'; '.join([f'{role.num_read} read', f'{len(role.rows)} kept', *role.why()])}. "
                        f"{self._more(role, split)}"
                        f"{f' {self._too_long()}' if role.count(TOO_LONG) else ''}"
                    )

    def _more(self, role: RoleData, split: Split) -> str:
        """What gives a split its first row."""
        advice = "".join(each for reason, each in ADVICE.items() if role.count(reason) > len(role.rows))
        advice += self._made_by_runs(role.role)
        if advice:
            return advice.strip()
        if split == "held_out" and len({role.identity(number) for number in role.rows}) == 1:
            return "Rows with the same prompt stay together: give rows with other prompts."
        if split == "train" or role.num_read == 1:  # no other share of one row helps
            return "Give more rows."
        share = self.held_out_fraction if split == "held_out" else self.evaluation_fraction
        return f"Give more rows or raise prepare.{split}_fraction={share:g}."

    def _made_by_runs(self, *roles: str) -> str:
        """Which sources of these roles and of the evaluation a run wrote, and what that means."""
        evaluated = {*self.roles} - {*training_roles(self.roles)}
        names = {self.sources.lender(role) or role for role in roles} | evaluated
        made = [
            f" {self.roles[role].key}={source} was written by the stage {source.written_by} of a run."
            for role in self.data
            for source in self.sources.own(role)
            if role in names and source.written_by
        ]
        return "".join([*made, MADE_BY_RUNS] if made else [])

    def _names(self, role: str) -> list[str]:
        """A role's sources, as the user wrote them."""
        other = self.sources.lender(role)
        return [self.roles[other].key] if other else [*map(str, self.sources.own(role))]

    def _table_cells(self, role: RoleData) -> Iterator[str]:
        yield role.key
        yield ", ".join(source.rsplit("/", 1)[-1] for source in self._names(role.role))
        yield str(role.num_read)
        for split in ("train", "held_out", "evaluation"):
            yield str(len(role.splits[split])) if split in role.splits else "-"
        yield str(role.num_dropped)
        lengths = quantiles(map(role.tokens, role.rows))
        for name in ("p50", "p95", "max"):
            yield str(lengths[name])
