"""Interpolate between the base model and a tuned one, to recover part of what tuning forgot.

Reads   the base model; the model of another stage.
Writes  a plain causal-LM directory with the weights base + alpha (tuned - base).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import ClassVar

from pydantic import Field

from rlhf.config import Complaint
from rlhf.costs.memory import Allocation, MemoryPhase, billions, over, weight_bytes
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, ThroughputModel
from rlhf.models.alike import differing_token, differing_weight
from rlhf.models.base import UnknownShapeError, load_tokenizer
from rlhf.models.on_disk import open_scratch
from rlhf.models.peft.methods import METHODS
from rlhf.models.peft.saved import origin_of
from rlhf.models.save import save_policy
from rlhf.models.start import directory_of, files_of
from rlhf.pipeline.fields import Policy, Reads, peft_of, reads_of
from rlhf.pipeline.graph import root_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric
from rlhf.pipeline.stage import Stage, View


class MergeStage(Stage):
    """The keys `merge.*`. Values: conf/stages/merge.yaml."""

    title, makes, in_chain = "merged", "policy", False
    metrics: ClassVar[Mapping[str, Metric]] = {
        "alpha": Metric("alpha", ".2f"),
        "relative_change": Metric("change of the weights", ".2%"),
    }

    policy: Policy
    """The stage of the tuned model, such as sft or ppo."""
    alpha: float = Field(ge=0, le=1)
    """0 is the base model, 1 the tuned one.

    Source: WiSE-FT, Wortsman et al. 2022 (arXiv:2109.01903).
    """

    def reads(self) -> Reads:
        """Both models."""
        return reads_of(self)._replace(base=True)

    def complaints(self, view: View) -> Iterator[Complaint]:
        """The tuned model has weights of its own, which can be interpolated with those of the base model one
        by one."""
        peft = peft_of(view.chain[self.policy])
        if peft is not None and not METHODS[peft.method].merges:
            merging = " or ".join(name for name, each in METHODS.items() if each.merges)
            yield Complaint(
                f"merge.policy={self.policy}",
                f"{self.policy}.peft={peft.method} cannot be merged into the weights.",
                f"Use {self.policy}.peft={merging}.",
            )
        key, init = root_of("merge.policy", self.policy, view.chain)
        directory = directory_of(init)
        if directory is None or view.base is None or view.compute is None:
            return
        base, start = view.base, files_of(init, view.base)
        try:
            weight = differing_weight(
                base.architecture, start.architecture, trust_remote_code=base.config.trust_remote_code
            )
        except UnknownShapeError:  # the checks that follow report it
            return
        token = differing_token(base.load_tokenizer(), start.load_tokenizer())
        why = weight and f"weights of another shape ({weight})"
        why = why or (token and f"another vocabulary ({token!r} has another id, or none)")
        if why:
            yield Complaint(
                f"merge.policy={self.policy}",
                f"{key}={directory} has {why} than {base.config.user_key}, and merging is between these two, "
                "weight by weight.",
                f"Use model=local model.path={directory} {key}=base, or leave merge out.",
            )

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """Both models are mapped from files; rank 0 interpolates one weight at a time in fp32."""
        here, count = on.machine.ranks_here, on.shape.head
        how = f"the largest weight of both and what comes of them: {billions(count)} x 3 x 4 B{over(here)}"
        models = Allocation("weights", 3 * 4 * count / here, how, True)
        load = ThroughputModel(on).load(3, what="base, tuned and published model")
        return StageCost([MemoryPhase("interpolating", [models])], [load], artifact=weight_bytes(on))

    def run(self, job: Job) -> Mapping[str, float]:
        """Load both models, interpolate into the tuned one, and publish it."""
        change = job.compute.main_only(lambda: self.merge(job))
        return {"alpha": self.alpha, "relative_change": change}

    def merge(self, job: Job) -> float:
        """Write the model. Returns its distance from the base model, relative to the base model's norm."""
        from rlhf.models.interpolation import interpolate
        from rlhf.models.load import load_causal_lm
        from rlhf.models.peft.merge import merged_policy

        directory, settings, dtype = job.inputs[self.policy].path, job.base.config, job.compute.dtype
        with open_scratch(job.directory) as scratch:
            base = load_causal_lm(job.base.directory, settings, dtype, scratch=scratch.directory)
            if origin_of(directory) is not None:
                tuned = merged_policy(directory, settings, dtype, scratch)
            else:
                tuned = load_causal_lm(directory, settings, dtype, scratch=scratch.directory)
            change = interpolate(base, tuned, self.alpha, scratch.map_to_file)
            save_policy(tuned, load_tokenizer(directory, settings), job.directory)
        return change
