"""Judge pairs of answers: people on a page, a rule, a reward model or a language model.

Reads   the answers of `generate` stages, or a file of pairs; votes that other tools wrote.
Writes  pairs.jsonl (preference rows, which `reward.pairs` and `dpo.data` read as `stage:label`); votes.jsonl
        (every vote, which `label.imports` reads).

Votes live in `label.file`, outside the store, where no `gc` and no `force=` can reach them. The artifact is a
snapshot of them. `prepare` could not have them as a data source: the file is written while the run goes on,
and a source's digest is taken when the run begins. So the rows go the way of all rows that a stage makes
(rlhf/pipeline/made_rows.py): they are split and tokenised right before the stage that reads them. And the key
of the artifact has the digest of the votes themselves (`records`): it is taken before the stage runs, to see
whether there is a snapshot of just these votes, and again when it ends. So the same votes are the same
artifact, whenever it was made, and what learned from it is reused. One vote more is another artifact; the old
one and what learned from it stay.

Ctrl-C publishes what is there and ends the run (exit code 130), as it does everywhere. The same command asks
on, until there are `label.votes`. To go on in the chain with what is there, set `label.votes` to that number.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import closing
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

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

if TYPE_CHECKING:
    pass

Person = Annotated[str, Field(pattern=r"^[\w-]{1,40}$")]


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
    """The file of votes, which is made if it is not there. It is yours: no other command changes it. Keep it
    on a disk of this machine, and copy it as you copy data."""
    annotator: Literal["human", "rule", "reward_model", "judge"]
    """Who judges: people on a page, or `label.reward`: a rule, a reward model, or a language model."""
    reward: Score | None
    """What judges; with annotator=human it predicts the gaps by which pairs are chosen (null: the scores that
    `generate` wrote, if it wrote some)."""
    answers: list[str]
    """The `generate` stages whose answers are judged. Of one stage, two answers to a prompt make a pair; of
    two stages, an answer of each. Not used with `label.pairs`."""
    pairs: Annotated[SourceConfig | None, UNKEYED]
    """A file of pairs, instead: rows with prompt, first and second, or with prompt, chosen and rejected."""
    pairs_per_prompt: PositiveInt
    """At most so many pairs of answers to one prompt."""
    before: str | None
    """A `label` stage whose pairs this one's are added to, such as that of the round before."""
    imports: Annotated[list[SourceConfig], UNKEYED]
    """Files with votes of other tools, which are written into `label.file` once: rows with prompt, first,
    second and choice, or with prompt, chosen and rejected."""
    votes: Annotated[PositiveInt, UNKEYED]
    """It ends at so many votes, or when no pair is left. Skips, attention checks and votes that were taken
    back do not count. The votes of `label.before` do not count either."""
    tie_gap: NonNegativeFloat
    """Scores that differ by no more are a tie; where people judge, it is not used."""
    annotators: Annotated[list[Person], UNKEYED] = Field(min_length=1)
    """The people who judge. Each gets a link of their own, which is printed once."""
    draw: Annotated[DrawConfig, UNKEYED]
    server: Annotated[ServerConfig, UNKEYED]
    micro_batch_tokens: Memory
    """Tokens per forward pass of a reward model."""

    @model_validator(mode="after")
    def _fits(self) -> LabelStage:
        parts = [] if self.reward is None else parts_of(self.reward)
        if self.is_pairwise() and (len(parts) > 1 or parts[0].args.get("baseline", OTHER) != OTHER):
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
        """Also the stages whose answers it shows, and the snapshot before."""
        return reads_of(self)._replace(stages=(*self.answering_stages(), *filter(None, [self.before])))

    def answering_stages(self) -> list[str]:
        """The `generate` stages whose answers are judged."""
        return [] if self.pairs is not None else self.answers

    def complaints(self, view: View) -> Iterator[Complaint]:
        """What it reads is of the right kind, what its page needs is installed, and people judge in a run of
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
        """There may be held-out rows: the answers to held-out prompts."""
        for name in self.answering_stages():
            maker_of(name, chain).check_offers(said, chain)

    def offer_advice(self) -> str:
        """How to get more rows."""
        return (
            f"{self.name} makes these rows, one for each pair with a better answer; ties make none. Raise "
            f"{self.name}.votes, or let it judge answers that differ more."
        )

    def offered_lengths(self, on: CostContext, chain: Mapping[str, Stage]) -> LengthStats:
        """As many pairs as votes, with answers as long as they may be; a file's by its characters."""
        if self.pairs is not None:
            texts = [
                (sum(len(each["content"]) for each in pair.prompt) + max(len(pair.first), len(pair.second)))
                / 3
                for pair in pairs_of_file(self.pairs, f"{self.name}.pairs")
            ]
            mean = sum(texts) / max(1, len(texts))
            found = LengthStats(len(texts), mean, 0.0, round(max(texts, default=0.0)))
        else:
            found = maker_of(self.answers[0], chain).offered_lengths(on, chain)
        rows = min(found.rows, self.votes)
        if self.before is not None:
            rows += maker_of(self.before, chain).offered_lengths(on, chain).rows
        return found._replace(rows=rows)

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """Those of the files with pairs and votes; not of `label.file`: see `recorded`."""
        files = {f"{self.name}.imports[{number}]": each for number, each in enumerate(self.imports)}
        if self.pairs is not None:
            files[f"{self.name}.pairs"] = self.pairs
        return {key: source.reading_digest(key) for key, source in files.items()}

    def recorded(self, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> str:
        """Digest of the votes that there are on its pairs."""
        votes = votes_in(Path(self.file), self.name)
        if not votes:
            return Snapshot([], [], None).digest
        pairs = self.to_judge(inputs)
        return Snapshot(votes, {pair.id for pair in pairs}, self.machine(inputs, external)).digest

    def suffices(self, metrics: Mapping[str, float]) -> bool:
        """There are enough votes, or no pair is left."""
        return metrics["votes"] >= self.votes or metrics["pairs_open"] == 0

    def run(self, job: Job) -> Mapping[str, float]:
        """Collect votes, and publish those that there are."""
        pairs, usage = self.predicted(job, self.to_judge(job.inputs))
        found = job.compute.main_only(lambda: self.collect(job, pairs))
        job.recorded = found.pop("recorded")
        return {**found, **usage}

    def rows_before(self, inputs: Mapping[str, Artifact]) -> list[dict[str, Any]]:
        """The preference rows of `label.before`."""
        return [] if self.before is None else rows_in(inputs[self.before].path / "pairs.jsonl")

    def to_judge(self, inputs: Mapping[str, Artifact]) -> list[Pair]:
        """Its pairs, without those that `label.before` has judged.

        Raises:
            ConfigError: there are none at all.
        """
        if self.pairs is not None:
            said, found = f"{self.name}.pairs={self.pairs}", pairs_of_file(self.pairs, f"{self.name}.pairs")
        else:
            said = f"{self.name}.answers=[{', '.join(self.answers)}]"
            files = {name: inputs[name].path / "responses.jsonl" for name in self.answers}
            found = pairs_of_answers(files, self.pairs_per_prompt)
        if not found:
            raise ConfigError(
                f"{said}: there are no two different answers to one prompt. Let it answer more prompts."
            )
        judged = {pair_id(row["prompt"], row["chosen"], row["rejected"]) for row in self.rows_before(inputs)}
        return [pair for pair in found if pair.id not in judged]

    def machine(self, inputs: Mapping[str, Artifact], external: Mapping[str, str]) -> str | None:
        """The annotator's name if no person judges. It has a digest of all that decides its votes."""
        if self.annotator == "human":
            return None
        models = {name: inputs[name].key for name in scoring_stages(self) if name in inputs}
        decides = digest_of(
            [self.model_dump(mode="json", include={"reward", "tie_gap"}), {**external}, models]
        )
        return f"{self.annotator}{MACHINE_MARK}{redacted(str(self.reward))} ({decides[:8]})"

    def predicted(self, job: Job, pairs: list[Pair]) -> tuple[list[Pair], dict[str, float]]:
        """The pairs with what `label.reward` says of their gap, and what it counted. Without a reward, as
        they are."""
        from rlhf.rewards.combined import scored

        if self.reward is None or not pairs:
            return pairs, {}
        reward = job.reward(self.reward, self.micro_batch_tokens)
        prompts = [PromptRow(pair.prompt, columns={OTHER: pair.second}) for pair in pairs]
        first = scored(reward, prompts, [pair.first for pair in pairs])
        if self.is_pairwise():  # 1, 0.5 or 0
            return [
                pair._replace(predicted=gap - 0.5)
                for pair, gap in zip(pairs, first.score_B.tolist(), strict=True)
            ], first.usage
        prompts = [PromptRow(pair.prompt, columns={OTHER: pair.first}) for pair in pairs]
        second = scored(reward, prompts, [pair.second for pair in pairs])
        gaps = (first.score_B - second.score_B).tolist()
        usage = {name: value + second.usage[name] for name, value in first.usage.items()}
        return [pair._replace(predicted=gap) for pair, gap in zip(pairs, gaps, strict=True)], usage

    def is_pairwise(self) -> bool:
        """Whether a language model says which answer is better, instead of scoring each."""
        parts = [] if self.reward is None else parts_of(self.reward)
        return any(part.args.get("mode") == "pairwise" for part in parts)

    def collect(self, job: Job, pairs: list[Pair]) -> dict[str, Any]:
        """Ask for votes, write the snapshot's rows; its metrics, and its digest as `recorded`."""
        machine = self.machine(job.inputs, job.external_digests)
        pairs = [pair._replace(predicted=None) if _is_nan(pair.predicted) else pair for pair in pairs]
        draw = Draw(pairs, self.draw, job.seed, 1 if machine else len(self.annotators))

        def snapshot() -> Snapshot:
            return Snapshot(file.votes(self.name), draw.pairs, machine)

        with closing(VotesFile(Path(self.file), f"{self.name}.file")) as file:
            file.add(self.name, imported(self.imports, f"{self.name}.imports"))
            if machine:
                file.add(self.name, self.judged(machine, draw, snapshot()))
            elif len(snapshot().counted) < self.votes:
                self.ask(job, file, draw)
            found = snapshot()
        elsewhere = sum(vote.pair.id not in draw.pairs for vote in found.counted)
        if elsewhere and len(self.answering_stages()) == 2:
            job.progress.console.print(
                f"{self.name}: {elsewhere} of {len(found.counted)} votes are on other pairs than those that "
                "it asks about: they make rows, and preferred/STAGE does not count them. Do the votes belong "
                f"to these answers? Is {self.name}.pairs_per_prompt={self.pairs_per_prompt} large enough?",
                **PLAIN,
            )
        if job.ending is not None and not found.counted:
            raise job.ending
        before = self.rows_before(job.inputs)
        job.write_rows("pairs.jsonl", [*before, *found.rows()])
        job.write_rows("votes.jsonl", found.vote_rows())
        metrics = (
            found.metrics(draw) | {"pairs_before": float(len(before))} if before else found.metrics(draw)
        )
        return metrics | {"recorded": found.digest}

    def judged(self, machine: str, draw: Draw, snapshot: Snapshot) -> Iterator[ExternalVote]:
        """The votes that are still wanted, by the predicted gaps."""
        known = {vote.pair.id for vote in snapshot.all}
        wanted = self.votes - len(snapshot.counted)
        for pair in draw.in_order():
            if wanted <= 0:
                return
            if pair.id in known:
                continue
            choice: Choice = "skip"
            if pair.predicted is not None:
                choice = "first" if pair.predicted > 0 else "second"
                choice = "tie" if abs(pair.predicted) <= self.tie_gap else choice
                wanted -= 1
            yield ExternalVote(machine, pair, choice, draw.purpose[pair.id])

    def ask(self, job: Job, file: VotesFile, draw: Draw) -> None:
        """Serve the page until there are enough votes, or Ctrl-C."""
        from rlhf.label.desk import Desk
        from rlhf.label.server import serve

        import_module("nltk.metrics.agreement")  # for seconds, which nobody shall wait for on the page
        desk = Desk(file, draw, self.name, self.annotators, self.votes)
        console = job.progress.console
        try:
            with job.progress.task(f"{self.name}: votes", self.votes) as task:
                task.skip(desk.progress().votes)
                serve(desk, self.server, lambda text: console.print(text, **PLAIN), task.advance)
        except KeyboardInterrupt as stop:
            job.ending = stop
            console.print(f"{self.name}: stopped; {desk.progress().votes} votes are published", **PLAIN)


PACKAGES = ("nltk", "starlette", "uvicorn")
"""What the page needs, and the agreement of those who use it."""
OTHER = "completion"
"""The column of a prompt that holds the other answer: a pairwise judge's `baseline` by default."""
PLAIN: Mapping[str, Any] = {"highlight": False, "markup": False, "soft_wrap": True}


def _is_nan(value: float | None) -> bool:
    return value is not None and math.isnan(value)
