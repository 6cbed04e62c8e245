"""Check the data sets, split them, and measure them.

Reads   the sources that the roles' keys name (sft.data, reward.pairs, ...); the base model's tokenizer.
Writes  normalised rows, ROLE.SPLIT.arrow; their token ids, ROLE.SPLIT.tokens.arrow; report.json: rows read,
        kept and dropped, and why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PositiveInt

from rlhf.config import Complaint
from rlhf.data.preparation import Preparation, Sources
from rlhf.data.prepared import FAULTS
from rlhf.data.schema import TextRow
from rlhf.digests import DirectoryDigest, digest_of
from rlhf.models.base import BaseModelFiles
from rlhf.models.intact import uses_other_template
from rlhf.pipeline.fields import Reads
from rlhf.pipeline.graph import named_sources
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric, named
from rlhf.pipeline.stage import Stage, View
from rlhf.rewards.code import own_code

Share = Annotated[float, Field(gt=0, lt=1)]


class PrepareStage(Stage):
    """The keys `prepare.*`. Values: conf/stages/prepare.yaml."""

    version, random, repeats_keys, reads_weights = 17, False, True, False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "sft_rows": Metric("SFT rows", ".0f"),
        "reward_pairs": Metric("pairs", ".0f"),
        "ppo_prompts": Metric("prompts", ".0f"),
        "evaluation_prompts": Metric("evaluation prompts", ".0f"),
        **named("dropped", "bad_share", "leaks", "foreign_template", "vocabulary_size"),
    }

    held_out_fraction: Share
    """Share of the training prompts that no stage trains on."""
    evaluation_fraction: Share
    """Share of the rows that is set aside for evaluation if evaluate.prompts or evaluate.retention names a
    source that training reads too."""
    judge_fraction: Share
    """Share of the pairs' prompts that only `reward@judge` learns from, if evaluate.judge=auto makes it."""
    on_bad_row: Literal["error", "drop"]
    """error ends the run at the first bad rows; drop leaves them out, counts them and shows where they
    are."""
    on_copied_answer: Literal["drop", "keep"]
    """For rows whose answer (40 characters or more) is in their own prompt: drop leaves them out and counts
    them; keep does not look for them, for answers that are meant to quote their prompts."""
    response_tokens: PositiveInt
    """Tokens of the context that are reserved for the answer to a prompt."""

    def more_metrics(self) -> Iterator[str]:
        """The number of rows of each role, and of rows left out for each reason."""
        yield from (name for role in self.mount.roles.values() for name in role.metrics)
        yield from (f"{reason}{end}" for reason in FAULTS for end in ("s", "_share"))

    def reads(self) -> Reads:
        """The base model's tokenizer and context length decide what is too long."""
        return Reads(base=True)

    def complaints(self, view: View) -> Iterator[Complaint]:
        """A key that takes its prompts from another key's rows finds them."""
        sources_of(view.chain).check_lenders()
        yield from ()

    def external_digests(self, digest: DirectoryDigest, chain: Mapping[str, Stage]) -> dict[str, str]:
        """The content of every source, wherever it is stored; the names of text sources, since their metrics
        have these names; and the code of users' roles."""
        sources = sources_of(chain)
        roles = sources.roles
        digests = {role: sources.content_digest(role) for role in roles}
        digests["names"] = digest_of(
            [
                source.name
                for role in roles
                if TextRow in roles[role].row_types
                for source in sources.own(role)
            ]
        )
        for role, entry in roles.items():
            digests |= own_code(entry.parse.__module__, role)
        return digests

    def run(self, job: Job) -> Mapping[str, float]:
        """Read and check every role, set the evaluation prompts aside, and split the rest."""
        return job.compute.main_only(lambda: self.prepare(job))

    def preparation(self, sources: Sources, base: BaseModelFiles, scratch: Path) -> Preparation:
        """The preparation of these sources with the config's settings.

        Args:
            scratch: a directory for temporary files.
        """
        return Preparation(
            sources, self.held_out_fraction, self.evaluation_fraction, self.judge_fraction, self.on_bad_row,
            self.on_copied_answer, self.response_tokens, base.load_tokenizer(), base.context_length, scratch,
        )  # fmt: skip

    def prepare(self, job: Job) -> dict[str, float]:
        """Write the artifact; returns the summary metrics."""
        with TemporaryDirectory(
            prefix=f"{job.directory.name}.", dir=job.directory.parent, ignore_cleanup_errors=True
        ) as scratch:  # on NFS a directory whose files are still mapped stays until the store clears it
            assert job.experiment is not None
            sources = sources_of(job.experiment.stages)
            preparation = self.preparation(sources, job.base, Path(scratch))
            preparation.prepare(job.progress)
            preparation.write(job.directory)
            preparation.show(job.progress.console, {})
            return preparation.metrics() | {
                "foreign_template": float(uses_other_template(job.base)),
                "vocabulary_size": float(len(preparation.tokenizer)),
            }


def sources_of(chain: Mapping[str, Stage]) -> Sources:
    """The sources that the roles' keys name, without rows that stages make."""
    sources = named_sources(chain)
    return replace(sources, named={**sources.named, **dict.fromkeys(sources.makers())})
