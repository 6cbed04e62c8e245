"""Judge pairs of answers: people on a page, a rule, a reward model or a language model.

Reads   the answers of `generate` stages, or a file of pairs; votes that other tools wrote.
Writes  pairs.jsonl (preference rows, which `reward.pairs` and `dpo.data` read as `stage:label`); votes.jsonl
        (every vote, which `label.imports` reads).

Votes are stored in `label.file`, outside the store, so that no `gc` and no `force=` can remove them. The
artifact is a snapshot of them. `prepare` cannot read the votes as a data source: a source's digest is taken
when the run begins, and the file is written while it runs. So they are handled like all rows that a stage
makes (rlhf/pipeline/made_rows.py): they are split and tokenised right before the stage that reads them. The
artifact's key contains the digest of the votes (`recorded`). It is taken before the stage runs, to look for
a snapshot of these votes, and again when it ends. So the same votes give the same artifact, and what learned
from it is reused. One more vote gives another artifact; the old one and what learned from it stay.

Ctrl-C publishes the votes so far and ends the run (exit code 130), as in every stage. The same command asks
for more, until there are `label.votes`. To continue the chain with the votes so far, set `label.votes` to
their number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, NonNegativeFloat, PositiveInt, model_validator

from rlhf.config import Complaint, ConfigError
from rlhf.costs.setup import CostContext
from rlhf.data.prepared import LengthStats
from rlhf.data.schema import PromptRow
from rlhf.data.sources import SourceConfig
from rlhf.digests import DirectoryDigest, digest_of
from rlhf.label.draw import Draw, DrawConfig
from rlhf.label.pairs import Pair, pair_id, pairs_of_answers, pairs_of_file, rows_in
from rlhf.label.server_config import ServerConfig
from rlhf.label.snapshot import MACHINE_MARK, Snapshot, imported
from rlhf.label.votes import Choice, ExternalVote, VotesFile, votes_in
from rlhf.pipeline.abilities import MakesRows, Records
from rlhf.pipeline.fields import UNKEYED, Memory, Reads, Score, reads_of
from rlhf.pipeline.graph import scoring_stages
from rlhf.pipeline.job import Job
from rlhf.pipeline.made_rows import maker_of
from rlhf.pipeline.metrics import Metric, named
from rlhf.pipeline.recipe import kind_of
from rlhf.pipeline.stage import Stage, View
from rlhf.pipeline.store import Artifact
from rlhf.rewards.kinds import models_of, parts_of
from rlhf.tracking.redaction import redacted

AnnotatorName = Annotated[str, Field(pattern=r"^[\w-]{1,40}$")]


class LabelStage(MakesRows, Records):
    """The keys `label.*`. Values: conf/stages/label.yaml."""

    version, in_chain, reads_weights = 1, False, False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "votes": Metric("votes", ",.0f"),
        "pairs": Metric("pairs", ",.0f"),
        "alpha": Metric("agreement (alpha)", "z.2f"),
        **named(
            "ties", "both_bad", "skips", "annotators", "pairs_open", "overlap_pairs", "alpha_ordinal",
            "kappa", "seconds_per_vote", "left_share", "longer_share", "reward_accuracy",
            "check_agreement", "pairs_before", "preferred/*", "judge_*",
        ),
    }  # fmt: skip
    offers: ClassVar[Mapping[str, str]] = {"pairs": "pairs.jsonl", "dpo": "pairs.jsonl"}

    file: Annotated[str, UNKEYED]
    """The file of votes, created if it does not exist. It is yours: no other command changes it. Keep it on a
    local disk of this machine, and back it up like data."""
    annotator: Literal["human", "rule", "reward_model", "judge"]
    """Who judges: people on a page, or `label.reward`: a rule, a reward model, or a language model."""
    reward: Score | None
    """The reward that judges. With annotator=human it predicts the score gaps by which pairs are chosen
    (null: the scores that `generate` wrote, if any)."""
    answers: list[str]
    """The `generate` stages whose answers are judged. With one stage, two answers to a prompt make a pair;
    with two stages, one answer of each. Not used with `label.pairs`."""
    pairs: Annotated[SourceConfig | None, UNKEYED]
    """A file of pairs, not answers: rows with prompt, first, second, or with prompt, chosen, rejected."""
    pairs_per_prompt: PositiveInt
    """Largest number of pairs of answers to one prompt."""
    before: str | None
    """A `label` stage, such as the round before's, whose pairs are published together with this one's."""
    imports: Annotated[list[SourceConfig], UNKEYED]
    """Files with votes of other tools. They are written into `label.file` once: rows with prompt, first,
    second and choice, or with prompt, chosen and rejected."""
    votes: Annotated[PositiveInt, UNKEYED]
    """Number of votes at which the stage ends; it also ends when no pair is left. Skips, attention checks,
    votes that were taken back and the votes of `label.before` do not count."""
    tie_gap: NonNegativeFloat
    """Largest difference of scores that counts as a tie; not used if people judge."""
    annotators: Annotated[list[AnnotatorName], UNKEYED] = Field(min_length=1)
    """Names of the people who judge. Each gets a personal link, which is printed once."""
    draw: Annotated[DrawConfig, UNKEYED]
    server: Annotated[ServerConfig, UNKEYED]
    micro_batch_tokens: Memory
    """Tokens per forward pass of a reward model."""

    @model_validator(mode="after")
    def _fits(self) -> LabelStage:
        parts = [] if self.reward is None else parts_of(self.reward)
        if self.is_pairwise() and (
            len(parts) > 1 or parts[0].args.get("baseline", OTHER_ANSWER) != OTHER_ANSWER
        ):
            raise ValueError("reward: a pairwise judge judges alone, and leaves out args.baseline")
        if self.annotator == "human":
            if len({*self.annotators}) < len(self.annotators):
                raise ValueError("annotators: two have one name. Rename one")
            return self
        if self.reward is None:
            raise ValueError(f"annotator={self.annotator} needs reward: what judges, such as reward=vader")
        models = models_of(self.reward)
        kinds = {"judge" if part.source.startswith("judge:") else "rule" for part in parts}
        kind = "reward_model" if len(models) == len(parts) else "judge" if kinds == {"judge"} else "rule"
        if kind != self.annotator:
            raise ValueError(
                f"annotator={self.annotator}: reward={self.reward} is of another kind. Use annotator={kind}"
            )
        return self

    def reads(self) -> Reads:
        """Also the stages whose answers it shows, and the earlier snapshot."""
        return reads_of(self)._replace(stages=(*self.answering_stages(), *filter(None, [self.before])))

    def answering_stages(self) -> list[str]:
        """The `generate` stages whose answers are judged."""
        return [] if self.pairs is not None else self.answers

    def complaints(self, view: View) -> Iterator[Complaint]:
        """It reads stages of the right kind, its page's packages are installed, and people judge in a run of
        one process."""
        missing = [package for package in PACKAGES if find_spec(package) is None]
        if self.annotator == "human" and missing:
            why = f"it needs {' and '.join(missing)}."
            yield Complaint(f"{self.name}.annotator=human", why, "Install: pip install -e '.[label]'")
        if self.pairs is not None and self.pairs.stage is not None:
            fix = f"Name a file. Answers of stages are {self.name}.answers=[NAME]."
            yield Complaint(f"{self.name}.pairs={self.pairs}", "a stage, and no file.", fix)
        if self.pairs is None and len(self.answers) not in (1, 2):
            yield Complaint(
                f"{self.name}.answers=[{', '.join(self.answers)}]",
                f"{len(self.answers)} stages.",
                f"Name one generate stage or two, or {self.name}.pairs=FILE.",
            )
        before = [] if self.before is None else [self.before]
        for key, names, kind in (
            ("answers", self.answering_stages(), "generate"),
            ("before", before, "label"),
        ):
            for name in names:
                if kind_of(name) != kind:
                    fix = f"Name {kind}, or an instance such as {kind}@2."
                    yield Complaint(f"{self.name}.{key}", f"{name} is no {kind} stage.", fix)
        if self.annotator == "human" and view.compute is not None and view.compute.world_size > 1:
            yield Complaint(
                f"{self.name}.annotator=human",
                f"{view.compute.world_size} processes would wait for people.",
                f"Let them judge first, with stage={self.name} launch.processes=1; then run the rest, which "
                "finds the votes.",
            )

    def check_offers(self, said: str, chain: Mapping[str, Stage]) -> None:
        """Held-out prompts are answered, so that there are held-out rows."""
        for name in self.answering_stages():
            maker_of(name, chain).check_offers(said, chain)

    def offer_advice(self) -> str:
        """How to get more rows."""
        return (
            f"{self.name} makes these rows, one for each pair with a better answer; ties make none. Raise "
            f"{self.name}.votes, or let it judge answers that differ more."
        )

    def offered_lengths(self, on: CostContext, chain: Mapping[str, Stage]) -> LengthStats:
        """As many pairs as votes, with answers of the largest length; lengths in a file by its characters."""
        if self.pairs is not None:
            texts = [
                (sum(len(each["content"]) for each in pair.prompt) + max(len(pair.first), len(pair.second)))
                / 3
                for pair in pairs_of_file(self.pairs, f"{self.name}.pairs")
            ]
            mean = sum(texts) / max(1, len(texts))
            lengths = LengthStats(len(texts), mean, 0.0, round(max(texts, default=0.0)))
        else:
            lengths = maker_of(self.answers[0], chain).offered_lengths(on, chain)
        rows = min(lengths.rows, self.votes)
        if self.before is not None:
            rows += maker_of(self.before, chain).offered_lengths(on, chain).rows
        return lengths._replace(rows=rows)

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """Digests of the files with pairs and votes; `recorded` is that of `label.file`."""
        files = {f"{self.name}.imports[{number}]": each for number, each in enumerate(self.imports)}
        if self.pairs is not None:
            files[f"{self.name}.pairs"] = self.pairs
        return {key: source.reading_digest(key) for key, source in files.items()}

    def recorded(self, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> str:
        """Digest of the present votes on its pairs."""
        votes = votes_in(Path(self.file), self.name)
        if not votes:
            return Snapshot([], [], None).digest
        pairs = self.pairs_to_judge(inputs)
        return Snapshot(votes, {pair.id for pair in pairs}, self.machine(inputs, external)).digest

    def suffices(self, metrics: Mapping[str, float]) -> bool:
        """There are enough votes, or no pair is left."""
        return metrics["votes"] >= self.votes or metrics["pairs_open"] == 0

    def run(self, job: Job) -> Mapping[str, float]:
        """Collect votes, and publish them."""
        pairs, usage = self.with_predicted_gaps(job, self.pairs_to_judge(job.inputs))
        result = job.compute.main_only(lambda: self.collect(job, pairs))
        job.recorded = result.pop("recorded")
        return {**result, **usage}

    def rows_before(self, inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
        """The preference rows of `label.before`."""
        return [] if self.before is None else rows_in(inputs[self.before].path / "pairs.jsonl")

    def pairs_to_judge(self, inputs: Mapping[str, Artifact]) -> list[Pair]:
        """Its pairs, without those that `label.before` has judged.

        Raises:
            ConfigError: there are no pairs at all.
        """
        if self.pairs is not None:
            source, pairs = f"{self.name}.pairs={self.pairs}", pairs_of_file(self.pairs, f"{self.name}.pairs")
        else:
            source = f"{self.name}.answers=[{', '.join(self.answers)}]"
            files = {name: inputs[name].path / "responses.jsonl" for name in self.answers}
            pairs = pairs_of_answers(files, self.pairs_per_prompt)
        if not pairs:
            raise ConfigError(
                f"{source}: there are no two different answers to one prompt. Let it answer more prompts."
            )
        judged = {pair_id(row["prompt"], row["chosen"], row["rejected"]) for row in self.rows_before(inputs)}
        return [pair for pair in pairs if pair.id not in judged]

    def machine(self, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> str | None:
        """The annotator's name if no person judges, with a digest of everything that changes its votes."""
        if self.annotator == "human":
            return None
        models = {name: inputs[name].key for name in scoring_stages(self) if name in inputs}
        decides = digest_of(
            [self.model_dump(mode="json", include={"reward", "tie_gap"}), {**external}, models]
        )
        return f"{self.annotator}{MACHINE_MARK}{redacted(str(self.reward))} ({decides[:8]})"

    def with_predicted_gaps(self, job: Job, pairs: list[Pair]) -> tuple[list[Pair], dict[str, float]]:
        """The pairs with the score gaps that `label.reward` predicts, and the reward's usage. Without a
        reward, the pairs as they are."""
        from rlhf.rewards.combined import scored

        if self.reward is None or not pairs:
            return pairs, {}
        reward = job.reward(self.reward, self.micro_batch_tokens)
        prompts = [PromptRow(pair.prompt, columns={OTHER_ANSWER: pair.second}) for pair in pairs]
        first = scored(reward, prompts, [pair.first for pair in pairs])
        if self.is_pairwise():  # 1, 0.5 or 0
            return [
                pair._replace(predicted=gap - 0.5)
                for pair, gap in zip(pairs, first.score_B.tolist(), strict=True)
            ], first.usage
        prompts = [PromptRow(pair.prompt, columns={OTHER_ANSWER: pair.first}) for pair in pairs]
        second = scored(reward, prompts, [pair.second for pair in pairs])
        gaps = (first.score_B - second.score_B).tolist()
        usage = {name: value + second.usage[name] for name, value in first.usage.items()}
        return [pair._replace(predicted=gap) for pair, gap in zip(pairs, gaps, strict=True)], usage

    def is_pairwise(self) -> bool:
        """Whether a language model compares both answers, instead of scoring each."""
        parts = [] if self.reward is None else parts_of(self.reward)
        return any(part.args.get("mode") == "pairwise" for part in parts)

    def collect(self, job: Job, pairs: list[Pair]) -> dict[str, Any]:
        """Ask for votes and write the snapshot's rows. Returns its metrics, and its digest as `recorded`."""
        machine = self.machine(job.inputs, job.external_digests)
        pairs = [pair._replace(predicted=None) if _is_nan(pair.predicted) else pair for pair in pairs]
        draw = Draw(pairs, self.draw, job.seed, 1 if machine else len(self.annotators))

        def snapshot() -> Snapshot:
            return Snapshot(file.votes(self.name), draw.pairs, machine)

        with closing(VotesFile(Path(self.file), f"{self.name}.file")) as file:
            file.add(self.name, imported(self.imports, f"{self.name}.imports"))
            if machine:
                file.add(self.name, self.automatic_votes(machine, draw, snapshot()))
            elif len(snapshot().counted) < self.votes:
                self.ask(job, file, draw)
            votes = snapshot()
        elsewhere = sum(vote.pair.id not in draw.pairs for vote in votes.counted)
        if elsewhere and len(self.answering_stages()) == 2:
            job.progress.console.print(
                f"{self.name}: {elsewhere} of {len(votes.counted)} votes are on other pairs than those that "
                "it asks about: they make rows, and preferred/STAGE does not count them. Do the votes belong "
                f"to these answers? Is {self.name}.pairs_per_prompt={self.pairs_per_prompt} large enough?",
                **PLAIN_PRINT,
            )
        if job.ending is not None and not votes.counted:
            raise job.ending
        before = self.rows_before(job.inputs)
        job.write_rows("pairs.jsonl", [*before, *votes.rows()])
        job.write_rows("votes.jsonl", votes.vote_rows())
        metrics = (
            votes.metrics(draw) | {"pairs_before": float(len(before))} if before else votes.metrics(draw)
        )
        return metrics | {"recorded": votes.digest}

    def automatic_votes(self, machine: str, draw: Draw, snapshot: Snapshot) -> Iterator[ExternalVote]:
        """The votes that are still missing, from the predicted gaps."""
        judged = {vote.pair.id for vote in snapshot.all}
        missing = self.votes - len(snapshot.counted)
        for pair in draw.in_order():
            if missing <= 0:
                return
            if pair.id in judged:
                continue
            choice: Choice = "skip"
            if pair.predicted is not None:
                choice = "first" if pair.predicted > 0 else "second"
                choice = "tie" if abs(pair.predicted) <= self.tie_gap else choice
                missing -= 1
            yield ExternalVote(machine, pair, choice, draw.purpose[pair.id])

    def ask(self, job: Job, file: VotesFile, draw: Draw) -> None:
        """Serve the page until there are enough votes, or Ctrl-C."""
        from rlhf.label.desk import Desk
        from rlhf.label.server import serve

        import_module("nltk.metrics.agreement")  # takes seconds, for which no one should wait on the page
        desk = Desk(file, draw, self.name, self.annotators, self.votes)
        console = job.progress.console
        try:
            with job.progress.task(f"{self.name}: votes", self.votes) as task:
                task.skip(desk.progress().votes)
                serve(desk, self.server, lambda text: console.print(text, **PLAIN_PRINT), task.advance)
        except KeyboardInterrupt as stop:
            job.ending = stop
            console.print(f"{self.name}: stopped; {desk.progress().votes} votes are published", **PLAIN_PRINT)


PACKAGES = ("nltk", "starlette", "uvicorn")
"""Packages of the page, and of the agreement between annotators."""
OTHER_ANSWER = "completion"
"""The prompt's column with the other answer: the default `baseline` of a pairwise judge."""
PLAIN_PRINT: Mapping[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)
