"""Check the data sets, split them, and measure them.

Reads   the sources named by sft.data, reward.pairs, ppo.prompts and evaluate.*; the base model's tokenizer.
Writes  normalised rows, ROLE.SPLIT.jsonl, and report.json: what was read, kept, dropped and why.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, ClassVar, Literal

from jinja2 import TemplateError
from pydantic import Field, PositiveInt
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from rlhf.config import ConfigError, Strict
from rlhf.data.collection import (
    DUPLICATE,
    IN_EVALUATION,
    LEFT_FOR_TRAINING,
    Entry,
    RoleData,
    quantiles,
    token_length,
)
from rlhf.data.prepared import REPORT, PreparedData, splits_of
from rlhf.data.recognise import recognise
from rlhf.data.schema import (
    ROLES,
    TRAINING_ROLES,
    USER_KEYS,
    PromptRow,
    Role,
    Row,
    RowError,
    Split,
    drawn,
    prompt_identity,
    row_to_json,
)
from rlhf.data.sources import SourceConfig
from rlhf.job import Job
from rlhf.plan.demand import Demand
from rlhf.plan.setting import Setting
from rlhf.secrets import redacted_text
from rlhf.stage import Stage

Share = Annotated[float, Field(gt=0, lt=1)]


class Sources(Strict):
    """Which source each role reads."""

    sft: SourceConfig
    reward: SourceConfig
    ppo: SourceConfig
    evaluate: SourceConfig
    retention_text: SourceConfig
    retention_questions: SourceConfig

    def __getitem__(self, role: Role) -> SourceConfig:
        return {
            "sft": self.sft,
            "reward": self.reward,
            "ppo": self.ppo,
            "evaluate": self.evaluate,
            "retention_text": self.retention_text,
            "retention_questions": self.retention_questions,
        }[role]


class PrepareStage(Stage):
    """What `prepare.*` can be told. Values: conf/stages/prepare.yaml."""

    name: ClassVar[str] = "prepare"
    version: ClassVar[int] = 2
    random: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False
    not_in_key: ClassVar[frozenset[str]] = frozenset({"sources"})  # their content is: see external()

    sources: Sources
    held_out_fraction: Share
    """Share of the training prompts that no stage trains on."""
    evaluation_fraction: Share
    """Share of the prompts set aside when evaluate.prompts names the same source as a training role."""
    on_bad_row: Literal["error", "drop"]
    response_tokens: PositiveInt
    """Tokens of the context to leave for the answer to a prompt."""

    def reads_base_model(self) -> bool:
        """Its tokenizer and context length decide what is too long."""
        return True

    def external(self) -> dict[str, str]:
        """The content of every source, wherever it lies."""
        return {role: self.sources[role].reading_digest(USER_KEYS[role]) for role in ROLES}

    def demand(self, on: Setting, chain: Mapping[str, Stage]) -> Demand:
        """It runs no model."""
        return Demand()

    def run(self, job: Job) -> None:
        """Read and check every role, set the evaluation prompts aside, split the rest."""
        data = {role: self._read(role) for role in ROLES}
        self._measure(data, job)
        evaluation_is_drawn = self._choose_evaluation(data)
        self._split(data)
        self._check_not_empty(data)
        job.compute.main_only(lambda: self._write(data, job))  # all ranks have read the same
        leaks = 0 if evaluation_is_drawn else sum(data[role].count(IN_EVALUATION) for role in TRAINING_ROLES)
        self._show(data, leaks, job)
        job.publish(
            {
                "sft_rows": len(data["sft"].entries),
                "reward_pairs": len(data["reward"].entries),
                "ppo_prompts": len(data["ppo"].entries),
                "evaluation_prompts": len(data["evaluate"].entries),
                "retention_texts": len(data["retention_text"].entries),
                "retention_questions": len(data["retention_questions"].entries),
                "dropped": sum(role.num_dropped for role in data.values()),
                "leaks": leaks,
            }
        )

    def _read(self, role: Role) -> RoleData:
        data = RoleData(role)
        seen = set()
        for where, raw in self.sources[role].rows(data.key):
            data.num_read += 1
            try:
                if isinstance(raw, RowError):
                    raise raw
                row = recognise(raw, role)
            except RowError as error:
                self._bad(data, where, error)
                continue
            text = row_to_json(row)
            if text in seen:
                data.remove(DUPLICATE, where)
                continue
            seen.add(text)
            data.entries.append(Entry(where, row, prompt_identity(row)))
        return data

    def _bad(self, data: RoleData, where: str, error: RowError) -> None:
        if self.on_bad_row == "error":
            raise ConfigError(
                f"{data.key}: {where}: {error} "
                "Mend the row, or set prepare.on_bad_row=drop to leave out such rows."
            )
        data.remove(error.reason, where)

    def _measure(self, data: dict[Role, RoleData], job: Job) -> None:
        """Count tokens; a row that does not fit the context is a bad row."""
        tokenizer, context = job.base.load_tokenizer(), job.base.context_length
        if self.response_tokens >= context:
            raise ConfigError(
                f"ppo.max_new_tokens={self.response_tokens} leaves no room for a prompt "
                f"in the model's context of {context} tokens. Lower it."
            )
        total = sum(len(role.entries) for role in data.values())
        with job.progress.task("counting tokens", total) as task:
            for role in data.values():
                kept = []
                for entry in role.entries:
                    try:
                        entry.tokens = self._tokens_that_fit(entry.row, tokenizer, context)
                        kept.append(entry)
                    except RowError as error:
                        self._bad(role, entry.where, error)
                    task.advance()
                role.entries = kept

    def _tokens_that_fit(self, row: Row, tokenizer: PreTrainedTokenizerBase, context: int) -> int:
        try:
            tokens = token_length(tokenizer, row)
        except TemplateError as error:  # some refuse a system turn, or two turns of one speaker
            raise RowError(
                "refused by template", f"the chat template refuses the conversation: {error}."
            ) from None
        room = context - self.response_tokens
        if isinstance(row, PromptRow) and tokens > room:
            raise RowError(
                "too long",
                f"the prompt has {tokens} tokens; the model's context of {context} leaves it {room} "
                f"beside an answer of ppo.max_new_tokens={self.response_tokens}. "
                "Shorten it or lower ppo.max_new_tokens.",
            )
        if tokens > context:
            raise RowError(
                "too long", f"{tokens} tokens do not fit the model's context of {context}. Shorten it."
            )
        return tokens

    def _choose_evaluation(self, data: dict[Role, RoleData]) -> bool:
        """Take the evaluation prompts, and leave them out of every training role.

        Returns:
            Whether they were drawn from what a training role reads. If not, the two sources were meant to be
            apart, and a prompt in both is a leak.
        """
        fingerprints = {role: self.sources[role].fingerprint(USER_KEYS[role]) for role in ROLES}
        is_drawn = fingerprints["evaluate"] in [fingerprints[role] for role in TRAINING_ROLES]
        if is_drawn:
            data["evaluate"].keep(
                lambda entry: drawn(entry.identity, self.evaluation_fraction, "evaluation"), LEFT_FOR_TRAINING
            )
        evaluation = {entry.identity for entry in data["evaluate"].entries}
        for role in TRAINING_ROLES:
            data[role].keep(lambda entry: entry.identity not in evaluation, IN_EVALUATION)
        return is_drawn

    def _split(self, data: dict[Role, RoleData]) -> None:
        for role in data.values():
            role.splits = {split: [] for split in splits_of(role.role)}
            for entry in role.entries:
                role.splits[self._split_of(role.role, entry)].append(entry)

    def _split_of(self, role: Role, entry: Entry) -> Split:
        if role not in TRAINING_ROLES:
            return "evaluation"
        return "held_out" if drawn(entry.identity, self.held_out_fraction, "held_out") else "train"

    def _check_not_empty(self, data: dict[Role, RoleData]) -> None:
        advice: dict[Split, str] = {
            "train": "Give more rows.",
            "held_out": f"Give more rows or raise prepare.held_out_fraction={self.held_out_fraction:g}.",
            "evaluation": "Give more rows or raise prepare.evaluation_fraction="
            f"{self.evaluation_fraction:g}.",
        }
        for role in data.values():
            for split, entries in role.splits.items():
                if not entries:
                    raise ConfigError(
                        f"{role.key}: no rows are left for {split}: "
                        f"{'; '.join([f'{role.num_read} read', f'{len(role.entries)} kept', *role.why()])}. "
                        f"{advice[split]}"
                    )

    def _write(self, data: dict[Role, RoleData], job: Job) -> None:
        prepared = PreparedData(job.directory)
        report = {}
        for role in data.values():
            for split, entries in role.splits.items():
                prepared.write(role.role, split, (entry.row for entry in entries))
            source, digest = str(self.sources[role.role]), prepared.digest(role.role)
            report[role.role] = {"source": source, "digest": digest, **role.report()}
        text = json.dumps(report, indent=2, ensure_ascii=False)
        (job.directory / REPORT).write_text(redacted_text(text), encoding="utf-8")

    def _show(self, data: dict[Role, RoleData], leaks: int, job: Job) -> None:
        console = job.progress.console
        table = Table("data", "source", box=None, pad_edge=False, header_style="dim")
        for heading in ("read", "train", "held out", "evaluation", "dropped", "tokens p50", "p95", "max"):
            table.add_column(heading, justify="right")
        for role in data.values():
            table.add_row(*self._table_cells(role))
        console.print(table, highlight=False)
        for role in data.values():
            if role.num_dropped:
                text = f"  {role.key}: {'; '.join(role.why())}"
                console.print(text, style="yellow", markup=False, highlight=False)
        if leaks:
            places = "; ".join(
                f"{role.count(IN_EVALUATION)} in {role.key} ({role.removed[IN_EVALUATION].places()})"
                for role in data.values()
                if IN_EVALUATION in role.removed
            )
            text = f"LEAK: {leaks} training rows ask what evaluate.prompts asks; they are left out: {places}."
            console.print(text, style="bold red", markup=False, highlight=False)

    def _table_cells(self, role: RoleData) -> Iterator[str]:
        yield role.key
        yield str(self.sources[role.role]).rsplit("/", 1)[-1]
        yield str(role.num_read)
        for split in ("train", "held_out", "evaluation"):
            yield str(len(role.splits[split])) if split in role.splits else "-"
        yield str(role.num_dropped)
        lengths = quantiles(entry.tokens for entry in role.entries)
        for name in ("p50", "p95", "max"):
            yield str(lengths[name])
