"""Check the data sets, split them, and measure them.

Reads   the sources named by sft.*, reward.pairs, ppo.* and evaluate.*; the base model's tokenizer.
Writes  normalised rows, ROLE.SPLIT.jsonl, and report.json: what was read, kept, dropped and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator
from rich.table import Table

from rlhf.config import ConfigError, Strict
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.data.chat_template import prompt_ids
from rlhf.data.dataset_stats import (
    BEYOND_LIMIT,
    DUPLICATE,
    IN_EVALUATION,
    LEAK,
    LEFT_FOR_TRAINING,
    NO_PROMPT,
    SAME_PROMPT,
    TOO_LONG,
    Entry,
    RoleData,
    limited,
    quantiles,
    sequences,
)
from rlhf.data.formats import likely_fields, read_as, recognise
from rlhf.data.prepared import REPORT, PreparedData, splits_of
from rlhf.data.schema import (
    EVALUATION_ROLES,
    ROLE_OF,
    ROLES,
    TRAINING_ROLES,
    USER_KEYS,
    PromptRow,
    QuestionRow,
    Role,
    Row,
    RowError,
    SftRow,
    Split,
    TextRow,
    drawn,
    prompt_identity,
    prompt_of,
    row_to_json,
)
from rlhf.data.sources import PromptSource, RowsOf, SourceConfig, SourceList
from rlhf.digests import DirectoryDigest, digest_of, directory_digest
from rlhf.distributed.batching import equal_tokens
from rlhf.pipeline.job import Job
from rlhf.pipeline.stage import Stage
from rlhf.tracking.redaction import redacted_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def fields_line(source: SourceConfig, data: RoleData, raw: Mapping[str, Any]) -> str:
    """`sft.data='{path: FILE, fields: {prompt: question, ...}}'`, ready to be corrected and typed."""
    place = {"path": source.path} if source.path is not None else {"hub": source.hub}
    kind, name = next(iter(place.items()))
    return f"{data.key}='{{{kind}: {name}, fields: {likely_fields(raw, data.role)}}}'"


Share = Annotated[float, Field(gt=0, lt=1)]


class Sources(Strict):
    """Source of each role; null for none. They repeat the keys `sft.data`, `reward.pairs`, ...: set those."""

    sft: SourceConfig | None
    replay: SourceConfig | None
    reward: SourceConfig | None
    ppo: PromptSource | None
    ptx: SourceConfig | None
    evaluate: PromptSource | None
    retention: SourceList | None

    def __getitem__(self, role: Role) -> list[SourceConfig]:
        """The role's own; none where its prompts are another's."""
        if role == "retention":
            return self.retention or []
        source = self._named(role)
        return [source] if isinstance(source, SourceConfig) else []

    def other(self, role: Role) -> Role | None:
        """The role whose rows' prompts it takes."""
        source = None if role == "retention" else self._named(role)
        return ROLE_OF[source] if isinstance(source, str) else None

    def described(self, role: Role) -> list[str]:
        """As the user wrote them."""
        other = self.other(role)
        return [USER_KEYS[other]] if other else [*map(str, self[role])]

    def _named(self, role: Role) -> SourceConfig | RowsOf | None:
        return {
            "sft": self.sft,
            "replay": self.replay,
            "reward": self.reward,
            "ppo": self.ppo,
            "ptx": self.ptx,
            "evaluate": self.evaluate,
        }[role]

    @model_validator(mode="after")
    def _others_have_rows(self) -> Self:
        for role in ROLES:
            other = self.other(role)
            if other is not None and (other == role or not self.described(other)):
                raise ValueError(f"{USER_KEYS[role]}={USER_KEYS[other]}: there are no rows. Name a source")
        return self


class PrepareStage(Stage):
    """The keys `prepare.*`. Values: conf/stages/prepare.yaml."""

    name: ClassVar[str] = "prepare"
    repeats_keys: ClassVar[bool] = True
    headlines: ClassVar[Mapping[str, tuple[str, str]]] = {
        "sft_rows": ("SFT rows", ".0f"),
        "reward_pairs": ("pairs", ".0f"),
        "ppo_prompts": ("prompts", ".0f"),
        "evaluation_prompts": ("evaluation prompts", ".0f"),
    }
    version: ClassVar[int] = 6
    random: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False
    not_in_key: ClassVar[frozenset[str]] = frozenset({"sources"})  # their content is: see external()

    sources: Sources
    held_out_fraction: Share
    """Share of the training prompts that no stage trains on."""
    evaluation_fraction: Share
    """Share of the rows that is set aside for evaluation, if evaluate.prompts or evaluate.retention names a
    source that training reads too."""
    on_bad_row: Literal["error", "drop"]
    """error ends the run at the first bad rows; drop leaves them out, counts them and shows where they
    are."""
    response_tokens: PositiveInt
    """Tokens of the context that are left for the answer to a prompt."""

    def metrics(self) -> tuple[str, ...]:
        """What `run` publishes."""
        return (
            "sft_rows", "reward_pairs", "ppo_prompts", "evaluation_prompts", "retention_texts",
            "retention_questions", "dropped", "leaks",
        )  # fmt: skip

    def reads_base_model(self) -> bool:
        """Its tokenizer and context length decide what is too long."""
        return True

    def external_digests(self, digest: DirectoryDigest = directory_digest) -> dict[str, str]:
        """The content of every source, wherever it lies; and what retention figures are called."""
        contents = {
            role: self.sources.other(role)
            or digest_of([source.reading_digest(USER_KEYS[role]) for source in self.sources[role]])
            for role in ROLES
        }
        return contents | {"names": digest_of([source.name for source in self.sources["retention"]])}

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """It runs no model."""
        return StageCost()

    def run(self, job: Job) -> None:
        """Read and check every role, set the evaluation prompts aside, split the rest."""
        data: dict[Role, RoleData] = {}
        for role in ROLES:  # in this order: prompts are taken from rows that were read before
            data[role] = self._read(role, data)
        self._measure(data, job)
        self._choose_evaluation(data)
        self._split(data)
        self._check_not_empty(data, job.base.context_length)
        job.compute.main_only(lambda: self._write(data, job))  # all ranks have read the same
        leaks = sum(data[role].count(LEAK) for role in TRAINING_ROLES)
        self._show(data, leaks, job)
        retention = data["retention"].entries
        job.publish(
            {
                "sft_rows": len(data["sft"].entries),
                "reward_pairs": len(data["reward"].entries),
                "ppo_prompts": len(data["ppo"].entries),
                "evaluation_prompts": len(data["evaluate"].entries),
                "retention_texts": sum(isinstance(entry.row, TextRow) for entry in retention),
                "retention_questions": sum(isinstance(entry.row, QuestionRow) for entry in retention),
                "dropped": sum(role.num_dropped for role in data.values()),
                "leaks": leaks,
            }
        )

    def _read(self, role: Role, before: Mapping[Role, RoleData]) -> RoleData:
        data = RoleData(role)
        other = self.sources.other(role)
        if other is not None:
            self._take_prompts(data, before[other])
            return data
        seen: set[str] = set()
        for source in self.sources[role]:
            self._read_source(source, data, seen)
        return data

    def _take_prompts(self, data: RoleData, rows: RoleData) -> None:
        """The prompts of another role's rows, each once."""
        seen: set[str] = set()
        for entry in rows.entries:
            data.num_read += 1
            prompt = prompt_of(entry.row)
            if not prompt:
                data.remove(NO_PROMPT, entry.where)
            elif entry.identity in seen:
                data.remove(SAME_PROMPT, entry.where)
            else:
                seen.add(entry.identity)
                data.entries.append(replace(entry, row=PromptRow(prompt)))

    def _read_source(self, source: SourceConfig, data: RoleData, seen: set[str]) -> None:
        fingerprint, found = source.fingerprint(data.key), list[Entry]()
        for where, raw in source.rows(data.key):
            data.num_read += 1
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = recognise(raw, data.role)
            except RowError as error:
                advice, lacks = "", error.reason in ("missing field", "no answer")
                if lacks and isinstance(raw, dict) and not source.fields:
                    advice = f" Are they in other columns? {fields_line(source, data, raw)}."
                self._bad(data, where, error, advice)
                continue
            if not data.columns.get(str(source)) and source.samples is None:
                columns = dict.fromkeys(source.fields.get(column, column) for column in raw)
                data.columns[str(source)] = (
                    f"has {', '.join(columns)}; read as {read_as(raw, data.role, source.fields)}"
                )
            text = row_to_json(row)
            if text in seen:
                data.remove(DUPLICATE, where)
                continue
            seen.add(text)
            if isinstance(row, TextRow):
                row = replace(row, source=source.name)
            found.append(Entry(where, row, prompt_identity(row), fingerprint))
        kept = limited(found, source.limit, lambda entry: entry.identity, self._kind)
        left = set(map(id, kept))
        for entry in found:
            if id(entry) not in left:
                data.remove(BEYOND_LIMIT, entry.where)
        data.entries += kept

    def _kind(self, entry: Entry) -> Split:
        """The split that a row would be in if evaluation read its source too."""
        if drawn(entry.identity, self.evaluation_fraction, "evaluation"):
            return "evaluation"
        return "held_out" if drawn(entry.identity, self.held_out_fraction, "held_out") else "train"

    def _bad(self, data: RoleData, where: str, error: RowError, advice: str = "") -> None:
        is_own = self.sources.other(data.role) is None  # the user never said that others' rows are prompts
        if self.on_bad_row == "error" and is_own:
            raise ConfigError(
                f"{data.key}: {where}: {error}{advice} "
                "Fix the row, or set prepare.on_bad_row=drop to leave out such rows."
            )
        data.remove(error.reason, where)

    def _measure(self, data: dict[Role, RoleData], job: Job) -> None:
        """Count tokens. A row that does not fit the context is left out and counted. Where its answer can be
        cut it stays, and training cuts it, as `sft.max_tokens` says."""
        tokenizer, context = job.base.load_tokenizer(), job.base.context_length
        if self.response_tokens >= context:
            raise ConfigError(
                f"ppo.max_new_tokens={self.response_tokens} leaves no room for a prompt "
                f"in the model's context of {context} tokens. Lower it."
            )
        total = sum(len(role.entries) for role in data.values())
        with job.progress.task("counting tokens", total) as task:
            for role in data.values():
                kept: list[Entry] = []
                before: list[int] = []
                for entry in role.entries:
                    task.advance()
                    try:
                        found = self._sequences(entry.row, tokenizer)
                    except RowError as error:
                        self._bad(role, entry.where, error)
                        continue
                    entry.tokens = max(map(len, found))
                    room = context - (self.response_tokens if isinstance(entry.row, PromptRow) else 0)
                    if entry.tokens > room:
                        if not self._can_be_cut(entry.row, tokenizer, context):
                            role.remove(TOO_LONG, entry.where)
                            continue
                        role.cut.add(entry.where)
                    entry.shared_prefix = fmean(equal_tokens(*pair) for pair in pairwise([before, *found]))
                    before = found[-1]
                    kept.append(entry)
                role.entries = kept

    def _sequences(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
        from jinja2 import TemplateError

        try:
            return sequences(tokenizer, row)
        except TemplateError as error:  # some refuse a system turn, or two turns of one speaker
            raise RowError(
                "refused by template", f"the chat template refuses the conversation: {error}."
            ) from None

    def _can_be_cut(self, row: Row, tokenizer: PreTrainedTokenizerBase, context: int) -> bool:
        """Whether the context has room for a part of the answer."""
        return isinstance(row, SftRow) and len(prompt_ids(tokenizer, row.prompt)) < context

    def _too_long(self, context: int) -> str:
        """What is too long, and what becomes of it."""
        return (
            f"Too long is what has more tokens than the model's context of {context}, a prompt more than "
            f"{context - self.response_tokens} beside an answer of "
            f"ppo.max_new_tokens={self.response_tokens}. "
            "Answers of sft.data are cut there, as at sft.max_tokens; other rows are left out."
        )

    def _choose_evaluation(self, data: dict[Role, RoleData]) -> None:
        """Take the evaluation prompts and the retention rows, and leave them out of every training role.

        From a source that a training role reads too, a share is drawn. Other sources were meant to be apart
        from training, and a row in both is a leak.
        """
        trained = {entry.fingerprint for role in TRAINING_ROLES for entry in data[role].entries}
        shared: set[str] = set()
        apart: set[str] = set()
        for role in EVALUATION_ROLES:
            data[role].keep(
                lambda entry: (
                    entry.fingerprint not in trained
                    or drawn(entry.identity, self.evaluation_fraction, "evaluation")
                ),
                LEFT_FOR_TRAINING,
            )
            for entry in data[role].entries:
                (shared if entry.fingerprint in trained else apart).add(entry.identity)
        for role in TRAINING_ROLES:
            data[role].keep(lambda entry: not entry.asks & shared, IN_EVALUATION)
            data[role].keep(lambda entry: not entry.asks & apart, LEAK)

    def _split(self, data: dict[Role, RoleData]) -> None:
        for role in data.values():
            role.splits = {split: [] for split in splits_of(role.role)}
            for entry in role.entries:
                role.splits[self._split_of(role.role, entry)].append(entry)

    def _split_of(self, role: Role, entry: Entry) -> Split:
        if role not in TRAINING_ROLES:
            return "evaluation"
        return "held_out" if drawn(entry.identity, self.held_out_fraction, "held_out") else "train"

    def _check_not_empty(self, data: dict[Role, RoleData], context: int) -> None:
        for role in data.values():
            for split, entries in role.splits.items():
                if not entries and self.sources[role.role]:
                    raise ConfigError(
                        f"{role.key}: no rows are left for {split}: "
                        f"{'; '.join([f'{role.num_read} read', f'{len(role.entries)} kept', *role.why()])}. "
                        f"{self._more(role, split)}"
                        f"{f' {self._too_long(context)}' if role.count(TOO_LONG) else ''}"
                    )

    def _more(self, role: RoleData, split: Split) -> str:
        """What gives a split its first row."""
        if split == "held_out" and len({entry.identity for entry in role.entries}) == 1:
            return "Rows with the same prompt stay together: give rows with other prompts."
        if split == "train" or role.num_read == 1:  # no other share of one row helps
            return "Give more rows."
        share = self.held_out_fraction if split == "held_out" else self.evaluation_fraction
        return f"Give more rows or raise prepare.{split}_fraction={share:g}."

    def _write(self, data: dict[Role, RoleData], job: Job) -> None:
        prepared = PreparedData(job.directory)
        report = {}
        for role in data.values():
            for split, entries in role.splits.items():
                prepared.write(role.role, split, (entry.row for entry in entries))
            if not self.sources.described(role.role):
                continue
            sources, digest = ", ".join(self.sources.described(role.role)), prepared.digest(role.role)
            report[role.role] = {"source": sources, "digest": digest, **role.report()}
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (job.directory / REPORT).write_text(redacted_text(text), encoding="utf-8")

    def _show(self, data: dict[Role, RoleData], leaks: int, job: Job) -> None:
        console = job.progress.console
        table = Table("data", "source", box=None, pad_edge=False, header_style="dim")
        for heading in ("read", "train", "held out", "evaluation", "dropped", "tokens p50", "p95", "max"):
            table.add_column(heading, justify="right")
        for role in data.values():
            if self.sources.described(role.role):
                table.add_row(*self._table_cells(role))
        console.print(table, highlight=False)
        for role in data.values():
            for name, columns in role.columns.items():
                text = f"  {role.key}: {Path(name).name} {columns}"
                console.print(text, style="dim", markup=False, highlight=False)
            cut = [f"{role.cut.count} to be cut ({role.cut.places()})"] if role.cut.count else []
            if role.num_dropped or cut:
                text = f"  {role.key}: {'; '.join([*role.why(), *cut])}"
                console.print(text, style="yellow", markup=False, highlight=False)
        if any(role.count(TOO_LONG) + role.cut.count for role in data.values()):
            console.print(f"  {self._too_long(job.base.context_length)}", style="yellow", highlight=False)
        if leaks:
            places = "; ".join(
                f"{role.count(LEAK)} in {role.key} ({role.removed[LEAK].places()})"
                for role in data.values()
                if LEAK in role.removed
            )
            text = (
                f"LEAK: {leaks} training rows ask what evaluate.prompts or evaluate.retention asks; "
                f"they are left out: {places}."
            )
            console.print(text, style="bold red", markup=False, highlight=False)

    def _table_cells(self, role: RoleData) -> Iterator[str]:
        yield role.key
        yield ", ".join(source.rsplit("/", 1)[-1] for source in self.sources.described(role.role))
        yield str(role.num_read)
        for split in ("train", "held_out", "evaluation"):
            yield str(len(role.splits[split])) if split in role.splits else "-"
        yield str(role.num_dropped)
        lengths = quantiles(entry.tokens for entry in role.entries)
        for name in ("p50", "p95", "max"):
            yield str(lengths[name])
