"""What the stages of policy gradients (PPO, and those without a critic) have in common."""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

from rlhf.config import Complaint
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost
from rlhf.distributed.compute import Compute
from rlhf.models.peft.methods import METHODS
from rlhf.pipeline.checks import length_complaints
from rlhf.pipeline.fields import Reads, reads_of
from rlhf.pipeline.graph import with_ancestors
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import TUNED, Healthy, Metric, named
from rlhf.pipeline.stage import Stage, View
from rlhf.ppo.config import PolicyConfig
from rlhf.ppo.cost import policy_cost
from rlhf.rewards.kinds import models_of, stage_of

if TYPE_CHECKING:
    from rlhf.ppo.objective import Objective
    from rlhf.ppo.trainer import PolicyTrainer


class PolicyStage(PolicyConfig, Stage):
    """A stage that samples responses and learns from their scores."""

    makes: ClassVar[Literal["policy"]] = "policy"
    metrics: ClassVar[Mapping[str, Metric]] = {
        "held_out_score_before": Metric("score before", "+z.2f"),
        "held_out_score": Metric(
            "after", "+z.2f", healthy=Healthy(gate="held_out_score_gain", from_start=True)
        ),
        "kl": Metric("KL", "z.2f"),
        **TUNED,
        "held_out_score_gain": Metric(
            better="higher",
            purpose="{title}'s score on held-out prompts",
        ),
        **named(
            "first_ratio_deviation", "first_kl", "engine_mismatch", "held_out_score_last",
            "held_out_kl_last", "held_out_length", "best_step", "steps", "episodes",
        ),
        "bad_steps": Metric(healthy=Healthy(max=0.0)),
        "held_out_kl": Metric(healthy=Healthy(gate="kl"), is_curve=True),
        "kl_k3": Metric(healthy=Healthy(gate="kl"), is_curve=True),
        "skipped_minibatches": Metric(healthy=Healthy(max=0.0), is_curve=True),
    }  # fmt: skip
    samples: ClassVar[bool] = True

    @property
    def prompts_key(self) -> str:
        """The key of the prompts' source, as the user writes it."""
        return "ppo.prompts"

    @property
    def moments_alternative(self) -> str:
        """The setting that normalises without scores of the policy's start, as the user writes it."""
        return f"{self.name}.score.normalize=running"

    def reads(self) -> Reads:
        """The prompts; and `generate`, if its scores' moments normalise the scores."""
        found = reads_of(self)
        needs_moments = self.score.normalize == "sft"
        return found._replace(roles=found.roles or ("ppo",), stages=("generate",) if needs_moments else ())

    def unit(self) -> int:
        """Episodes of one group: a batch holds whole groups."""
        return self.group_size

    def not_checked(self) -> dict[str, str]:
        """Some methods change the policy before its first step."""
        method = self.peft.method
        if not METHODS[method].changes_start:
            return {}
        return {"first_kl": f"with {self.name}.peft={method} the policy does not start as its own reference"}

    def complaints(self, view: View) -> Iterator[Complaint]:
        """Checks that the moments of `generate` fit, that ranks and device support the settings, and that
        there are enough held-out prompts, short enough for an answer."""
        yield from super().complaints(view)
        yield from self.missing_moments(view.chain)
        if view.compute is not None:
            yield from self.unsupported(view.compute)
            self.objective().try_functions(view.compute.device)
        if (data := view.data) is None:
            return
        held_out = data.rows("ppo", "held_out")
        if len(held_out) < 2:
            yield Complaint(
                self.prompts_key,
                f"{len(held_out)} held-out prompt, but at least 2 are needed: one half chooses the weights, "
                "the other half judges them.",
                "Give more prompts, or raise prepare.held_out_fraction.",
            )
        virtual = self.peft.tokens if METHODS[self.peft.method].pads else 0
        yield from length_complaints(
            view, f"{self.name}.init", self.init, self.prompts_key,
            lambda: itertools.chain(data.rows("ppo", "train"), held_out[: self.evaluate_prompts]),
            reserved_tokens=virtual + self.max_new_tokens,
            fix=f"Lower {self.name}.max_new_tokens={self.max_new_tokens}, leave out the longest prompts, or "
            "start from a model with a longer context.",
        )  # fmt: skip

    def unsupported(self, compute: Compute) -> Iterator[Complaint]:
        """Settings that these ranks or this device do not support."""
        name = self.name
        if self.frozen_placement == "sharded" and compute.zero == "none":
            yield Complaint(
                f"{name}.frozen_placement=sharded",
                "it needs DeepSpeed or FSDP2.",
                "Use it with zero=zero1, zero2, zero3, fsdp2 or hsdp, or use "
                f"{name}.frozen_placement=replicated.",
            )
        if self.frozen_placement != "offloaded":
            return
        if METHODS[self.peft.method].shares and compute.zero == "none":
            yield Complaint(
                f"{name}.frozen_placement=offloaded",
                f"with {name}.peft={self.peft.method} the frozen models share the policy's weights, so these "
                "must stay on the GPU.",
                f"Use {name}.frozen_placement=replicated.",
            )
        elif compute.device.type == "cpu":
            yield Complaint(
                f"{name}.frozen_placement=offloaded",
                "it keeps the reference and reward model in the host's memory while a GPU does not need "
                "them; this run has no GPU.",
                f"Use {name}.frozen_placement=replicated.",
            )

    def missing_moments(self, chain: Mapping[str, Stage]) -> Iterator[Complaint]:
        """Complaints where `generate` measured other scores than those that are to be normalised."""
        if self.score.normalize != "sft":
            return
        wanted = {"policy": self.init} | {
            name: getattr(self, name) for name in ("reward", "temperature", "max_new_tokens")
        }
        measured = dict(chain["generate"])
        for name, value in wanted.items():
            if measured[name] != value:
                wanted_there, fix = f"so this must be {value}.", "Or use"
                if "generate" in with_ancestors(str(value), chain):  # it would read what is made from it
                    wanted_there, fix = f"and those of {self.name}.init={value} are not there.", "Use"
                yield Complaint(
                    f"generate.{name}={measured[name]}",
                    f"{self.name}.score.normalize=sft takes the score's mean and deviation from `generate`, "
                    f"{wanted_there}",
                    f"{fix} {self.moments_alternative}.",
                )

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """See rlhf/ppo/cost.py."""
        stages = filter(None, (stage_of(part.source) for part in models_of(self.reward)))
        trained = next((dict(chain[name]) for name in stages), None)
        if trained is None:
            return policy_cost(self, on, reward_method=None)
        return policy_cost(self, on, reward_method=trained["peft"].method, reward_init=trained["init"])

    @abstractmethod
    def objective(self) -> Objective:
        """How advantages and losses are computed from a rollout."""

    def trainer(self, job: Job) -> PolicyTrainer:
        """The trainer with its models, before the first step."""
        from rlhf.ppo.models import load_models
        from rlhf.ppo.trainer import MISMATCH_LIMIT_FACTOR, PolicyTrainer

        bound = self.gates.get("engine_mismatch")
        limit = math.inf if bound is None or bound.max is None else MISMATCH_LIMIT_FACTOR * bound.max
        return PolicyTrainer(self, self.objective(), load_models(self, job), job, mismatch_limit=limit)
