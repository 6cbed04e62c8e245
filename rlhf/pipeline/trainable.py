"""A policy that a stage trains: loaded, checked, tuned as `STAGE.peft` says, sampled from, published."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import ConfigError
from rlhf.generation.decoding_check import check_decoding
from rlhf.generation.latency import token_seconds
from rlhf.generation.policy_model import PolicyModel
from rlhf.models.base import BaseModelFiles
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import ResponseModel, answer_logprobs, check_policy, pack_sequences
from rlhf.models.peft.attach import Adapter, attach, check_adapters_used, loads_on
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.merge import publish_policy
from rlhf.models.peft.methods import METHODS
from rlhf.models.weight_sharing import Backbone, Placement, shared_copy
from rlhf.pipeline.learner import Learner
from rlhf.rl.rollout import Responses
from rlhf.training.engine import Access, Groups

if TYPE_CHECKING:
    from rlhf.pipeline.job import Job


@dataclass
class TunedPolicy:
    """A policy with its trainable parameters, before it is in an engine."""

    start: BaseModelFiles
    """The files that it was loaded from."""
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    adapter: Adapter
    peft: PeftConfig
    backbone: Backbone | None
    """Its weights without the adapter, for other models to share."""

    @classmethod
    def load(
        cls, job: Job, init: str, peft: PeftConfig, *, share: bool = False, check_decodes: bool = False
    ) -> TunedPolicy:
        """Load and check the model that a key of the type `Model` names, and add what `peft` trains.

        Args:
            share: let other models share its weights, if possible: only LoRA leaves the weights unchanged,
                and under `zero=` they belong to one engine.
            check_decodes: refuse now, not in a later stage, a model that the local engine cannot sample from.

        Raises:
            ConfigError: the model is of a kind that is not supported.
        """
        compute, start = job.compute, job.start(init)
        model = load_causal_lm(
            start.directory, job.base.config, compute.dtype, loads_on(peft, compute), compute
        )
        compute.ask_once(lambda: check_policy(model))
        if check_decodes:
            compute.ask_once(lambda: check_decoding(model, copies=False))
        can_share = share and METHODS[peft.method].shares and compute.zero == "none"
        backbone = Backbone(start.directory, shared_copy(model)) if can_share else None
        adapter = attach(model, peft, compute.device)
        compute.ask_once(lambda: check_adapters_used(model))
        return cls(start, model, start.load_tokenizer(), adapter, peft, backbone)


class PolicyLearner(Learner):
    """A policy in its engine."""

    def __init__(
        self, job: Job, policy: TunedPolicy, model: nn.Module, groups: Groups, *, in_turns: bool = False
    ) -> None:
        """Args:
        model: the model that the engine runs; the policy is a part of it.
        groups, in_turns: as in `make_engine`.
        """
        super().__init__(job, model, groups, published=policy.model, in_turns=in_turns)
        self._tuned, self._is_alone = policy, isinstance(model, ResponseModel)
        self.policy, self.tokenizer = policy.model, policy.tokenizer

    @property
    def access(self) -> Access:
        """How to run the policy in its current state, for sampling."""
        engine, policy, compute = self.engine, self.policy, self.compute
        if compute.zero == "none":
            return Access(self._tuned.adapter.merged)
        together = (lambda: engine.by_layers(policy)) if compute.shards_weights else None
        return Access(lambda: engine.gathered(policy), together, engine.gathered_weights)

    def sampler(self) -> PolicyModel:
        """The policy that trains, in its state at each call. It samples with the run's engine.

        Raises:
            ConfigError: the stage does not say that it `samples`.
        """
        job = self.job
        if job.experiment is not None and not job.experiment.stages[job.stage].samples:
            raise ConfigError(
                f"{job.stage}: it samples from the model that it trains, and its class does not say so. Set "
                "`samples = True` there: then what samples (`generation`) is in its key."
            )
        return PolicyModel(
            self.policy, self.tokenizer, self.compute, self.access, job.vllm, job.local_sampling
        )

    def reference(self, placement: Placement | None = None, *, in_policy: bool = False) -> PolicyModel:
        """The model that the policy started from, which does not train.

        Args:
            placement: where a separate model's weights are; None: as those of the model that trains.
            in_policy: use the policy's own weights, with its adapter turned off. Only for LoRA.
        """
        tuned, compute = self._tuned, self.compute
        if tuned.backbone is not None:
            return PolicyModel(tuned.backbone.model, self.tokenizer, compute)
        if in_policy:
            return PolicyModel(
                self.policy, self.tokenizer, compute, _with_adapter_off(tuned.adapter, self.access)
            )
        return PolicyModel.load(
            tuned.start.directory, self.job.base.config, compute, self.tokenizer, placement=placement
        )

    def log_probabilities(
        self, responses: Responses, micro_batch_tokens: int, temperature: float = 1.0
    ) -> Tensor:
        """Log probabilities of responses under the policy, in nats: fp32 [B, R] on the CPU, 0 on padding, no
        gradient. The forward passes are those that train; `sampler` merges adapters first, which rounds."""
        assert self._is_alone, "the engine runs the policy with another model: ask it"
        return answer_logprobs(self.engine.model, responses, temperature, micro_batch_tokens, self.compute)

    def learn(
        self,
        responses: Responses,
        loss: Callable[..., Tensor],
        *beside_BR: Tensor,
        micro_batch_tokens: int,
        temperature: float = 1.0,
    ) -> dict[str, float]:
        """Take one optimizer step on responses. Ranks share them.

        Dimensions: B responses, R tokens of a response (padded).

        Args:
            loss: receives for a micro-batch logp_BR (nats, under the current policy; carries the gradient),
                mask_BR (bool, true on response tokens), and the same rows and columns of each tensor in
                `beside_BR`. It returns a scalar: its part of the loss, a sum divided by a count of the whole
                step, so that the parts of micro-batches and ranks add up.
            beside_BR: further tensors with the rows of all responses, such as advantages.
            temperature: divides the logits.

        Returns:
            `loss` of the whole step, and `grad_norm` before clipping.
        """
        assert self._is_alone, "the engine runs the policy with another model: use engine.accumulate"
        device, model = self.compute.device, self.engine.model

        def of_part(rows: Sequence[int]) -> tuple[Tensor, dict[str, Tensor]]:
            prompts, answers = (
                [ids[row] for row in rows] for ids in (responses.prompt_ids, responses.response_ids)
            )
            batch = pack_sequences(prompts, answers, device)
            logp_BR = batch.to_rows(model(batch, temperature=temperature).logp_N)
            beside = (x_BR[rows, : logp_BR.shape[1]].to(device) for x_BR in beside_BR)
            value = loss(logp_BR, batch.mask_BR, *beside)
            return value, {"loss": value}

        return self.engine.learn(responses.lengths, list, of_part, micro_batch_tokens)

    def publish(self) -> dict[str, float]:
        """Write the policy into the artifact: a plain model; or, with a method that does not merge, the
        trained parameters and a reference to the start.

        Returns:
            Summary metrics of it: `artifact_bytes`, `trained_parameters`, ...
        """
        job, tuned = self.job, self._tuned
        with self.weights() as weights:
            written = job.compute.main_only(
                lambda: publish_policy(
                    job.directory, weights, self.tokenizer, start=tuned.start.directory,
                    key=tuned.start.identity, settings=job.base.config, dtype=job.compute.dtype,
                    peft=tuned.peft,
                )
            )  # fmt: skip
        return {
            **written,
            **token_seconds(self.policy, job.compute),
            "trained_parameters": self.trained_parameters,
        }


OpenContext = Callable[[], AbstractContextManager[None]]


def _with_adapter_off(adapter: Adapter, access: Access) -> Access:
    """How to run the policy's start in the policy's own weights: with the adapter turned off."""

    def opened(context: OpenContext) -> OpenContext:
        @contextmanager
        def both() -> Iterator[None]:
            with adapter.off(), context():
                yield

        return both

    return Access(opened(access.alone), access.together and opened(access.together), access.weights)
