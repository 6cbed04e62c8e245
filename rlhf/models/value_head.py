"""Models that give one number per token: the reward model (only the last token's is used) and the critic (all
tokens').

Dimensions: B sequences, N response tokens laid end to end, H hidden size.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rlhf.config import Complaint, ConfigError
from rlhf.distributed.compute import Compute
from rlhf.models.base import ModelConfig, reading
from rlhf.models.form import use_file_layout
from rlhf.models.load import attention_of, check_complete, device_map, files_as_loaded
from rlhf.models.logprobs import Sequences, TokenStatistics, response_statistics
from rlhf.models.packed_attention import hidden_states, pack_where_possible
from rlhf.models.packed_batch import Packed
from rlhf.models.peft.methods import PREFIX
from rlhf.models.peft.saved import ADAPTER, WEIGHTS, attach_published, base_of, origin_of
from rlhf.models.save import write_model
from rlhf.models.weight_sharing import shared_copy

NO_HEAD = "{} has no linear `score` head without bias, as a reward model needs."
OTHER_FAMILY = "Use another family of model."
ONE_LABEL = "Give a sequence-classification model with one label."


class ScalarHead(nn.Module):
    """value = weight . hidden + offset, computed in fp32 whatever the dtype of the weights."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight
        self.offset = nn.Parameter(torch.zeros(1, device=weight.device))

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., H] -> [...]."""
        return functional.linear(hidden.float(), self.weight.float()).squeeze(-1) + self.offset.float()


class ScalarModel(nn.Module):
    """A model with an fp32 head. Any other head of the model does not run.

    `offset` is added to every value. It is 0 in a reward model. In a critic it carries the bias of a
    normalised score.
    """

    def __init__(self, model: PreTrainedModel, weight: nn.Parameter) -> None:
        """`weight` [1, H] is the head. For a sequence-classification model, pass its own `score.weight`."""
        super().__init__()
        self.model = model
        self.head = ScalarHead(weight)

    @property
    def offset(self) -> nn.Parameter:
        """[1], added to every value."""
        return self.head.offset

    def forward(self, rows: Sequence[Tensor]) -> Tensor:
        """`last_values`, for the engine that trains a reward model."""
        return self.last_values(rows)

    def values(self, batch: Sequences) -> Tensor:
        """V(prompt + y_<t) for each response token y_t, fp32 [N], at the position that predicts y_t."""
        value_N: Tensor = self.head(hidden_states(self.model, batch.packed, batch.predicts_N))
        return value_N

    def last_values(self, rows: Sequence[Tensor]) -> Tensor:
        """The value at each row's last token, fp32 [B]: the score of a complete exchange."""
        packed = Packed(rows, self.model.device)
        value_B: Tensor = self.head(hidden_states(self.model, packed, packed.last_B))
        return value_B

    @torch.no_grad()
    def score(
        self,
        rows: Sequence[Tensor],
        micro_batch_tokens: int,
        compute: Compute,
        lengths: Sequence[int] | None = None,
    ) -> Tensor:
        """`last_values` without gradient, in micro-batches with a token budget. The result is on the CPU, in
        the order of the rows.

        The ranks share the work, and each gets all scores.

        Args:
            lengths: tokens of each row. Pass it if `rows` is lazy: then a rank reads only its own share.
        """
        scores_B = torch.zeros(len(rows))
        lengths = [len(row) for row in rows] if lengths is None else lengths
        for group, weight, _ in compute.micro_batches(lengths, micro_batch_tokens):
            part_B = self.last_values([rows[index] for index in group]).cpu()
            if weight:
                scores_B[group] = part_B
        return compute.global_sum(scores_B)

    def shared_copy(self) -> ScalarModel:
        """A second ScalarModel that shares the frozen weights and has its own copy of the head."""
        return shared_copy(self, own=self.head.parameters())

    def rescale(self, gain: float, bias: float) -> None:
        """Change the head so that the model returns gain * value + bias."""
        with torch.no_grad():
            self.head.weight.mul_(gain)
            self.offset.mul_(gain).add_(bias)


class ActorCritic(nn.Module):
    """Policy and critic in one module, so that one engine and one optimizer train both. They read the same
    token ids, one after the other."""

    def __init__(self, policy: PreTrainedModel, critic: ScalarModel | None) -> None:
        """`critic` is None for an algorithm without a critic."""
        super().__init__()
        self.policy, self.critic = policy, critic

    def forward(
        self, half: Literal["policy", "critic"], batch: Sequences, temperature: float = 1.0
    ) -> TokenStatistics | Tensor:
        """Run the policy or the critic on every response token.

        Returns:
            policy: log-probability and entropy in nats, at the sampling temperature.
            critic: V(prompt + y_<t) in units of the normalised reward, fp32 [N] (response tokens of the
            micro-batch, end to end).
        """
        if half == "policy":
            return response_statistics(self.policy, batch, temperature)
        assert self.critic is not None
        return self.critic.values(batch)


def check_score_head(directory: Path) -> None:
    """Check that a directory has a trained linear head with one label. Only names and shapes are read.

    Raises:
        ConfigError: it has no such head.
    """
    files, prefix = sorted(directory.glob("*.safetensors")), ""
    if not files and origin_of(directory) is not None:
        files, prefix = [directory / ADAPTER / WEIGHTS], PREFIX
    shapes: dict[str, list[int]] = {}
    with reading(directory):
        if not files:
            raise OSError("no safetensors there")
        for file in files:
            with safe_open(file, framework="pt") as weights:
                names = {f"{prefix}score.{name}" for name in ("weight", "bias")} & set(weights.keys())
                shapes |= {name: weights.get_slice(name).get_shape() for name in names}
        architectures = json.loads((directory / "config.json").read_bytes()).get("architectures")
    kind = architectures[0] if architectures else "the model"
    is_trained = f"{prefix}score.weight" in shapes
    if f"{prefix}score.bias" in shapes or (not is_trained and kind.endswith("ForSequenceClassification")):
        raise ConfigError(Complaint(str(directory), NO_HEAD.format(kind), OTHER_FAMILY))
    if not is_trained:
        why = "its score head was never trained (is it a causal language model?)."
        raise ConfigError(Complaint(str(directory), why, ONE_LABEL))
    if (labels := shapes[f"{prefix}score.weight"][0]) != 1:
        raise ConfigError(Complaint(str(directory), f"it has {labels} labels.", ONE_LABEL))


def classifier_for(config: PreTrainedConfig) -> Any:
    """The sequence-classification class of a model family. If transformers has none, build one as
    transformers builds its own: the family's `AutoModel` with a linear `score`."""
    kind = type(config)
    if kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[kind]
    if kind not in MODEL_MAPPING:  # a model with code of its own
        return AutoModelForSequenceClassification
    trunk: Any = MODEL_MAPPING[kind]
    family = trunk.__mro__[1]
    name = f"{family.__name__.removesuffix('PreTrainedModel')}ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, family), {"__module__": family.__module__})


def linear_head(model: PreTrainedModel, of: object) -> nn.Linear:
    """The head of a sequence-classification model.

    Raises:
        ConfigError: the head is not a linear `score` without bias.
    """
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ConfigError(Complaint(str(of), NO_HEAD.format(type(model).__name__), OTHER_FAMILY))
    return head


def check_scorable(config: PreTrainedConfig) -> None:
    """Refuse a base model that cannot become a reward model or critic. No weights are allocated or read.

    Raises:
        ConfigError: the model has no usable classification class or head.
    """
    classifier = classifier_for(config)
    if classifier is AutoModelForSequenceClassification:
        if classifier.__name__ not in (getattr(config, "auto_map", None) or {}):
            raise ConfigError(
                f"model: the code that comes with this {config.model_type} has no {classifier.__name__} "
                "(auto_map in config.json), so it cannot become a reward model. Choose another model."
            )
    elif not issubclass(classifier, GenericForSequenceClassification):
        with torch.device("meta"), torch.random.fork_rng(devices=[]):
            linear_head(classifier(config), "model")


def load_scalar_model(
    directory: Path,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    compute: Compute | None = None,
    *,
    new_head: bool = False,
    scratch: Path | None = None,
) -> ScalarModel:
    """A published reward model. With `new_head`, instead, a causal model's trunk with a head that
    `reset_head` must initialise.

    If the artifact is an adapter with a reference to its base model, the result is the base model with the
    adapter attached, all frozen.

    Args:
        device, compute, scratch: as of `load_causal_lm`.

    Raises:
        ConfigError: the directory has no classification model with one label and a trained linear head.
    """
    if not new_head:
        check_score_head(directory)
    base = base_of(directory, compute)
    if base is not None:
        scalar = load_scalar_model(base, config, dtype, device, compute, new_head=True, scratch=scratch)
        _, published = attach_published(scalar.model, directory)
        if published is not None:
            scalar.head.weight.data.copy_(published)
        return scalar
    # transformers draws a missing head here, and `reset_head` draws it again: keep the random state
    with (
        reading(directory),
        torch.random.fork_rng(devices=[]),
        files_as_loaded(directory, config, dtype, device, compute, scratch) as files,
    ):
        settings = AutoConfig.from_pretrained(
            directory, num_labels=1, trust_remote_code=config.trust_remote_code
        )
        model, info = classifier_for(settings).from_pretrained(
            files,
            config=settings,
            dtype=dtype,
            device_map=device_map(device),
            attn_implementation=attention_of(config),
            use_safetensors=True,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    if files != directory:
        use_file_layout(model, directory)
    model.config.name_or_path = str(directory)
    head: Any = linear_head(model, directory)
    check_complete(directory, set(info["missing_keys"]) - {"score.weight"})
    if config.attention == "auto":
        pack_where_possible(model, compute)
    scalar = ScalarModel(model, head.float().weight)
    scalar.eval().to(device)
    return scalar


def reset_head(scalar: ScalarModel, deviation: float | None = None) -> None:
    """Draw the head from N(0, deviation^2). None means a variance of 1 / (H + 1); 0 gives a zero head.

    Source: Stiennon et al. 2020 (arXiv:2009.01325, B.1) and Huang et al. 2024 (arXiv:2403.17031, detail 11).
    """
    size = scalar.head.weight.shape[1]
    with torch.no_grad():
        if deviation == 0.0:
            scalar.head.weight.zero_()
        else:
            deviation = math.sqrt(1 / (size + 1)) if deviation is None else deviation
            drawn_1H = torch.empty(1, size).normal_(std=deviation)  # on the CPU: the same for every device
            scalar.head.weight.copy_(drawn_1H)


def save_scalar_model(scalar: ScalarModel, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
    """Write a reward model. `AutoModelForSequenceClassification` loads it with the same scores, if
    transformers has a class for its family and the tokenizer's pad token is not its eos token. Format:
    docs/models.md."""
    assert float(scalar.offset.detach()) == 0.0, "a classification head has no bias to keep the offset in"
    scalar.model.config.pad_token_id = tokenizer.pad_token_id  # transformers pools at the last non-pad token
    write_model(scalar.model, directory)
    tokenizer.save_pretrained(directory)
