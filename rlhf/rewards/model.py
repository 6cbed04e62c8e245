"""Rewards from reward models, each with its own template and tokenizer; and `make_reward` for all kinds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import Complaint
from rlhf.data.chat_template import exchange_ids, tokenizer_digest
from rlhf.data.schema import PromptRow
from rlhf.digests import weights_digest
from rlhf.distributed.compute import Compute
from rlhf.models.base import ModelConfig, load_tokenizer
from rlhf.models.load import context_left
from rlhf.models.peft.saved import adapter_config, attach_published, origin_of
from rlhf.models.value_head import ScalarModel, load_scalar_model
from rlhf.models.weight_sharing import Backbone, Placement, load_frozen, shared_copy
from rlhf.rewards.combined import CombinedReward, Moments
from rlhf.rewards.function import FunctionReward, Tolerance
from rlhf.rewards.http import RewardServerConfig
from rlhf.rewards.judge import Judge
from rlhf.rewards.kinds import RewardMix, RewardPart, parts_of, reward_directory, reward_kind
from rlhf.rewards.reward import Prompts, Reward, RewardError, as_scores
from rlhf.training.engine import FULL_MODEL, Access

CUT_TOKENS = 8
"""Most tokens that are cut before the end token. A response that fills the limit may get longer when its
text is encoded again with an end token."""
TOKENS_PER_BROKEN_CHARACTER = 3
"""Most tokens that encode U+FFFD, which has three bytes. A sampled part of a character decodes to U+FFFD."""


class LearnedReward:
    """A one-label classification model. A truncated response gets an end token too."""

    def __init__(
        self,
        directory: Path,
        model: ScalarModel,
        tokenizer: PreTrainedTokenizerBase,
        micro_batch_tokens: int,
        compute: Compute,
        access: Access = FULL_MODEL,
    ) -> None:
        """Args:
        access: how the model runs with its published weights.
        """
        self.directory, self.model, self.tokenizer = directory, model, tokenizer
        self.micro_batch_tokens, self.compute, self.access = micro_batch_tokens, compute, access

    @property
    def digest(self) -> str:
        """Identity of the tokenizer: with equal digests, token ids can be shared."""
        return tokenizer_digest(self.tokenizer)

    def __call__(self, prompts: Prompts, completions: Sequence[str]) -> Tensor:
        rows = [torch.tensor(ids) for ids in self._all_ids(prompts, completions)]
        with self.access.reading():
            return self.model.score(rows, self.micro_batch_tokens, self.compute)

    def _all_ids(self, prompts: Prompts, completions: Sequence[str]) -> list[list[int]]:
        """Token ids of all rows. Each rank encodes its share.

        Raises:
            RewardError: a row is too long. It is raised on every rank.
        """
        lengths = [len(completion) for completion in completions]
        mine: list[list[int] | RewardError] = []
        try:
            for index in self.compute.shard_indices(lengths):
                mine.append(self._ids(prompts[index], completions[index]))
        except RewardError as error:
            mine = [error] * len(self.compute.shard_indices(lengths))
        rows = []
        for ids in self.compute.collect(mine, lengths):
            if isinstance(ids, RewardError):
                raise ids
            rows.append(ids)
        return rows

    def _ids(self, row: PromptRow, completion: str) -> list[int]:
        ids, _ = exchange_ids(self.tokenizer, row.prompt, completion)
        limit = context_left(self.model.model)
        broken = TOKENS_PER_BROKEN_CHARACTER * completion.count("\N{REPLACEMENT CHARACTER}")
        if len(ids) > limit + CUT_TOKENS + broken:
            raise RewardError(
                Complaint(
                    str(self.directory),
                    f"the reward model reads {limit} tokens, and a prompt with its response has {len(ids)}.",
                    "Give shorter prompts, sample fewer tokens, or take another reward model.",
                )
            )
        return [*ids[: limit - 1], ids[-1]] if len(ids) > limit else ids


def load_learned_reward(
    directory: Path,
    config: ModelConfig,
    compute: Compute,
    micro_batch_tokens: int,
    backbone: Backbone | None = None,
    placement: Placement | None = None,
) -> LearnedReward:
    """Load a published reward model; only its LoRA adapter, if it was trained on the weights of `backbone`.

    The adapter is merged while it scores. The published weights were merged in the same way, so the scores
    are bit-identical in any precision, if this device multiplies as the one that published them.

    Raises:
        ConfigError: the model is not a sequence-classification model with one label.
    """
    tokenizer = load_tokenizer(directory, config)
    if backbone is not None and is_adapter_of(directory, backbone, compute):
        trunk = shared_copy(backbone.model)
        adapter, head = attach_published(trunk, directory)
        assert head is not None
        weight = nn.Parameter(head.to(compute.device, compute.dtype).float())  # cast as in load_scalar_model
        model = ScalarModel(trunk, weight)
        return LearnedReward(directory, model, tokenizer, micro_batch_tokens, compute, Access(adapter.merged))
    model, access = load_frozen(
        lambda device: load_scalar_model(directory, config, compute.dtype, device, compute),
        compute,
        placement,
    )
    return LearnedReward(directory, model, tokenizer, micro_batch_tokens, compute, access)


def is_adapter_of(directory: Path, backbone: Backbone, compute: Compute) -> bool:
    """Whether a published reward model is the backbone, by the digest of its weights, plus a LoRA adapter."""
    origin = origin_of(directory)
    if origin is None or origin.in_4_bits:
        return False
    adapter = adapter_config(directory)
    if adapter["peft_type"] != "LORA" or adapter["use_dora"]:
        return False
    return origin.digest == compute.main_only(lambda: weights_digest(backbone.directory))


def make_reward(
    source: str | RewardMix,
    learned: Mapping[str, Path],
    config: ModelConfig,
    compute: Compute,
    micro_batch_tokens: int,
    server: RewardServerConfig,
    backbone: Backbone | None = None,
    placement: Placement | None = None,
    moments: Mapping[str, Moments] | None = None,
    tolerance: Tolerance | None = None,
) -> Reward:
    """The reward that a `RewardSource` names.

    Args:
        learned: the artifacts of reward stages.
        server: how to ask a reward at a URL.
        backbone: weights that a learned reward may share.
        placement: where a model is placed; None: as the weights that are trained.
        moments: moments of several rewards that are normalised: see `CombinedReward`.
        tolerance: how often a user's function may raise.
    """

    def made(part: RewardPart) -> Reward:
        directory = reward_directory(part.source, learned)
        if directory is not None:
            return load_learned_reward(directory, config, compute, micro_batch_tokens, backbone, placement)
        make = reward_kind(part.source).make
        assert make is not None, f"{part.source}: its kind has neither a model nor a rule"
        rule = make(part, server)
        if isinstance(rule, Judge):
            judges[id(part)] = rule
        if isinstance(rule, FunctionReward):
            rule.tolerance = tolerance
        return score_in_shards(_checked(part, rule), compute)

    judges: dict[int, Judge] = {}
    rewards = [made(part) for part in parts_of(source)]
    if isinstance(source, str):
        return rewards[0]
    metered = {
        label: judges[id(part)]
        for label, part in zip(source.labels, source.of, strict=True)
        if id(part) in judges
    }
    return CombinedReward(source, rewards, moments, metered, compute)


def _checked(part: RewardPart, rule: Reward) -> Reward:

    def checked(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        fix = "It must return one number for each response."
        scores = rule(prompts, completions)
        return as_scores(scores, len(completions), part.source, fix, place=" (`RewardKind.make`)")

    return checked


def score_in_shards(reward: Reward, compute: Compute) -> Reward:
    """Let each rank score its share. So all ranks get the same scores, even from a random reward."""
    if compute.world_size == 1:
        return reward

    def score(prompts: Prompts, completions: Sequence[str]) -> Tensor:
        lengths = [len(completion) for completion in completions]
        mine = compute.shard_indices(lengths)
        results: list[float | RewardError] = []
        try:
            if mine:
                results = reward([prompts[i] for i in mine], [completions[i] for i in mine]).tolist()
        except RewardError as error:  # sent to all ranks, so that all raise it
            results = [error] * len(mine)
        scores = compute.collect(results, lengths)
        for score in scores:
            if isinstance(score, RewardError):
                raise score
        return torch.tensor(scores)

    return score
