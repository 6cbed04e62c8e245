"""Preferences as token ids, and how a policy learns from them without a reward model.

A row has two sides: an answer that was preferred (0) and one that was not (1). A pair has both. An answer
with a thumb has one of them. Dimensions: B rows, 2 sides, S present sides, R response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from pydantic import Field, NonNegativeFloat, PositiveFloat

from rlhf.config import STAGE, Complaint, ConfigError, Strict
from rlhf.data.schema import PairRow, ThumbRow
from rlhf.data.tokens import TokenIds
from rlhf.distributed.compute import Compute

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray
    from torch import Tensor, nn

    from rlhf.training.engine import Engine

ABSENT = -1
LossName = Literal["dpo", "ipo", "kto", "simpo"]


class PromptsAndAnswers(NamedTuple):
    """Prompts and one answer to each, as long [length] tensors."""

    prompts: list[Tensor]
    answers: list[Tensor]


@dataclass(frozen=True)
class Preferences:
    """Rows in a mapped file. Only the arrays below are in memory; token ids are read on access."""

    rows: Sequence[PairRow | ThumbRow]
    ids: TokenIds
    max_tokens: int
    row_B: NDArray[Any]
    """Index of each row in `rows`."""
    side_B2: NDArray[Any]
    """Index of each side's sequence in `ids`, or ABSENT."""
    other_B2: NDArray[Any]
    """For KTO's reference point: index in `ids` of the sequence whose answer is put behind this row's prompt.
    It answers another prompt. ABSENT for absent sides, and before `with_others`."""
    reference_B2: NDArray[Any]
    """Log-probability of each side under the reference, nats; 0 if not measured."""
    other_reference_B2: NDArray[Any]
    """The same for the answers to other prompts."""

    @classmethod
    def of(cls, rows: Sequence[PairRow | ThumbRow], ids: TokenIds, max_tokens: int) -> Preferences:
        """The rows whose sides have at most `max_tokens` tokens.

        Args:
            ids: token ids of the rows.
        """
        import numpy

        count_N = numpy.bincount(ids.row, minlength=len(rows))
        first_N = numpy.cumsum(count_N) - count_N
        side_N2 = numpy.stack([first_N, numpy.where(count_N == 2, first_N + 1, ABSENT)], -1)
        for number in numpy.flatnonzero(count_N == 1):
            row = rows[int(number)]
            assert isinstance(row, ThumbRow)
            if not row.thumb:
                side_N2[number] = side_N2[number, ::-1]
        lengths_N2 = numpy.where(side_N2 == ABSENT, 0, ids.lengths[side_N2]) if len(ids) else side_N2
        short_enough = numpy.flatnonzero(lengths_N2.max(-1) <= max_tokens)
        none = numpy.zeros((len(short_enough), 2))
        absent = numpy.full((len(short_enough), 2), ABSENT)
        return cls(rows, ids, max_tokens, short_enough, side_N2[short_enough], absent, none, none)

    def __len__(self) -> int:
        return len(self.row_B)

    def pick(self, indices: Sequence[int] | slice) -> Preferences:
        """The rows at these indices."""
        names = ("row_B", "side_B2", "other_B2", "reference_B2", "other_reference_B2")
        return replace(self, **{name: getattr(self, name)[indices] for name in names})

    def with_others(self) -> Preferences:
        """A copy with an answer to another prompt for each side: that of the next row with another prompt, on
        the same side if that row has it.

        Raises:
            ConfigError: all rows have the same prompt.
        """
        import numpy

        prompts = [self._prompt(index).tobytes() for index in range(len(self))]
        next_B = numpy.full(len(self), ABSENT)
        for place in reversed(range(2 * len(self))):  # two rounds: the first row follows the last one
            row, after = place % len(self), (place + 1) % len(self)
            next_B[row] = after if prompts[after] != prompts[row] else next_B[after]
        if (next_B == ABSENT).any():
            raise ConfigError(
                "dpo.loss=kto: all rows of a split have the same prompt. Its reference point needs answers "
                "to other prompts: give rows with at least two prompts, or use another dpo.loss."
            )
        theirs_B2 = self.side_B2[next_B]
        theirs_B2 = numpy.where(theirs_B2 == ABSENT, theirs_B2[:, ::-1], theirs_B2)
        return replace(self, other_B2=numpy.where(self.has_B2, theirs_B2, ABSENT))

    def with_reference(self, reference_B2: NDArray[Any], other_reference_B2: NDArray[Any]) -> Preferences:
        """A copy with the reference's log-probabilities of each side.

        Raises:
            ConfigError: one of them is not finite.
        """
        import numpy

        logp_B4 = numpy.concatenate([reference_B2, other_reference_B2], -1)
        bad_B4 = ~numpy.isfinite(logp_B4)
        if bad_B4.any():
            count, first = bad_B4.any(-1).sum(), bad_B4.any(-1).argmax()
            raise ConfigError(
                Complaint(
                    f"{STAGE}.init",
                    f"the reference's log-probability is not finite in {count} of {len(self)} rows, first in "
                    f"row {self.row_B[first]} (from 0), where it is {logp_B4[bad_B4][0]}. Its weights are "
                    "damaged, or the precision is too small for them.",
                    f"Try precision=fp32, or another {STAGE}.init.",
                )
            )
        return replace(self, reference_B2=reference_B2, other_reference_B2=other_reference_B2)

    @property
    def has_B2(self) -> NDArray[numpy.bool_]:
        """Whether each side is present."""
        has_B2: NDArray[numpy.bool_] = self.side_B2 != ABSENT
        return has_B2

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, both sides together."""
        import numpy

        lengths: list[int] = numpy.where(self.has_B2, self.ids.lengths[self.side_B2], 0).sum(-1).tolist()
        return lengths

    @property
    def other_lengths(self) -> list[int]:
        """Tokens of each row in `others`, both sides together."""
        import numpy

        prompt_B1 = self.ids.spans[self.side_B2.max(-1), 0][:, None]
        total_B2 = prompt_B1 + (self.ids.lengths - self.ids.spans[:, 0])[self.other_B2]
        present_B2 = numpy.where(self.other_B2 == ABSENT, 0, total_B2.clip(max=self.max_tokens))
        lengths: list[int] = present_B2.sum(-1).tolist()
        return lengths

    @property
    def answer_lengths_B2(self) -> NDArray[numpy.int64]:
        """Tokens of each side's answer; 1 for an absent side, so that it can be a divisor."""
        import numpy

        own = self.ids.lengths - self.ids.spans[:, 0]  # an answer ends its sequence
        lengths: NDArray[numpy.int64] = numpy.where(self.has_B2, own[self.side_B2], 1)
        return lengths

    def sides(self) -> PromptsAndAnswers:
        """The present sides with their prompts, row by row. Both sides of a row are next to each other, so
        that the prompt is computed once."""
        import torch

        exchanges = PromptsAndAnswers([], [])
        for number in self.side_B2[self.has_B2]:
            ids, begin = torch.from_numpy(self.ids[number].astype("int64")), int(self.ids.spans[number, 0])
            exchanges.prompts.append(ids[:begin])
            exchanges.answers.append(ids[begin:])
        return exchanges

    def others(self) -> PromptsAndAnswers:
        """The rows' prompts with answers to other prompts; answers are cut so that both have `max_tokens`."""
        import torch

        exchanges = PromptsAndAnswers([], [])
        for index, pair in enumerate(self.other_B2):
            prompt = self._prompt(index)
            for number in pair[pair != ABSENT]:
                begin = int(self.ids.spans[number, 0])
                answer = self.ids[number][begin:][: max(1, self.max_tokens - len(prompt))]
                exchanges.prompts.append(torch.from_numpy(prompt.astype("int64")))
                exchanges.answers.append(torch.from_numpy(answer.astype("int64")))
        return exchanges

    def _prompt(self, index: int) -> NDArray[numpy.int32]:
        number = self.side_B2[index].max()
        return self.ids[number][: int(self.ids.spans[number, 0])]

    def as_json(self, index: int) -> dict[str, Any]:
        """The row's texts and label, as the user gave them."""
        row = self.rows[int(self.row_B[index])]
        names = ("prompt", "chosen", "rejected") if isinstance(row, PairRow) else tuple(vars(row))
        return {name: getattr(row, name) for name in names}


class Values(NamedTuple):
    """Losses and rewards of rows."""

    loss_B: Tensor
    """Loss of each row, summed over its examples."""
    reward_B2: Tensor
    """The implicit reward of each side."""
    margin_B: Tensor
    """Margin of the preferred answer. In a pair: its reward minus that of the other answer. For an answer
    with a thumb: its reward minus the reference point's, in the thumb's direction."""


class PreferenceConfig(Strict):
    """The loss of preference rows."""

    loss: LossName
    """dpo: Rafailov et al. 2023. ipo: Azar et al. 2023, does not overfit pairs that all agree. kto:
    Ethayarajh et al. 2024, learns from answers with a thumb up or down, and from pairs as one of each. simpo:
    Meng et al. 2024, needs no reference."""
    beta: PositiveFloat
    """dpo, ipo, kto: how strongly the policy is held near the reference; larger is nearer. simpo: scale of
    the log-probabilities per token, 2 to 10."""
    label_smoothing: float = Field(ge=0, le=0.5)
    """dpo and simpo: assumed share of pairs with a wrong preference (conservative DPO, Mitchell 2023)."""
    gamma: NonNegativeFloat
    """simpo: target margin of the chosen answer, usually 0.3 to 0.5 of beta."""
    desirable_weight: PositiveFloat
    """kto: weight of answers with a thumb up. Keep (weight x number) of both kinds within 1 : 1 and 4 : 3."""
    undesirable_weight: PositiveFloat
    """kto: weight of answers with a thumb down."""
    sft_weight: NonNegativeFloat
    """Weight of the negative log-likelihood per token of preferred answers, added to each of their losses
    (Pang et al. 2024, arXiv:2404.19733); 0 turns it off."""

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares the policy with the model that it starts from."""
        return self.loss != "simpo"

    @property
    def needs_others(self) -> bool:
        """Whether the loss needs answers to other prompts."""
        return self.loss == "kto"

    def examples(self, rows: Preferences) -> Tensor:
        """Number of examples in each row, [B], over which losses are means: answers for kto, else pairs."""
        import torch

        has_B2 = torch.from_numpy(rows.has_B2)
        return has_B2.sum(-1) if self.loss == "kto" else torch.ones(len(rows), dtype=torch.long)

    def values(self, rows: Preferences, logp_B2: Tensor, point: Tensor) -> Values:
        """Losses and rewards.

        Args:
            logp_B2: log-probability of each side under the policy, nats; carries the gradient.
            point: KTO's reference point, nats; 0 for the others.
        """
        import numpy
        import torch

        from rlhf.losses.preference import dpo_loss, ipo_loss, kto_loss, simpo_loss

        def as_tensor(array: NDArray[Any]) -> Tensor:
            return torch.from_numpy(numpy.ascontiguousarray(array)).to(logp_B2.device)

        has_B2, tokens_B2 = as_tensor(rows.has_B2), as_tensor(rows.answer_lengths_B2)
        # subtract in fp64: a policy that equals its reference must have a log-ratio of 0
        ratio_B2 = (logp_B2.double() - as_tensor(rows.reference_B2)).to(logp_B2.dtype)
        if self.loss in ("ipo", "simpo"):
            ratio_B2 = ratio_B2 / tokens_B2
        gap_B = ratio_B2[:, 0] - ratio_B2[:, 1]
        reward_B2 = self.beta * ratio_B2
        margin_B = self.beta * gap_B
        if self.loss == "dpo":
            loss_B = dpo_loss(gap_B, beta=self.beta, label_smoothing=self.label_smoothing)
        elif self.loss == "ipo":
            loss_B = ipo_loss(gap_B, beta=self.beta)
        elif self.loss == "simpo":
            loss_B = simpo_loss(gap_B, beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing)
        else:
            is_up_B2 = torch.tensor([True, False], device=logp_B2.device).expand_as(has_B2)
            loss_B2 = kto_loss(
                ratio_B2, is_up_B2, beta=self.beta, point=point,
                desirable_weight=self.desirable_weight, undesirable_weight=self.undesirable_weight,
            )  # fmt: skip
            loss_B = torch.where(has_B2, loss_B2, 0.0).sum(-1)
            ahead_B2 = self.beta * torch.where(is_up_B2, ratio_B2 - point, point - ratio_B2)
            alone_B = torch.where(has_B2, ahead_B2, 0.0).sum(-1)
            margin_B = torch.where(has_B2.all(-1), margin_B, alone_B)
        if self.sft_weight > 0:
            nll_B = -torch.where(has_B2[:, 0], logp_B2[:, 0], 0.0) / tokens_B2[:, 0]
            loss_B = loss_B + self.sft_weight * nll_B
        return Values(loss_B, reward_B2.detach(), margin_B.detach())


def preference_step(
    engine: Engine, config: PreferenceConfig, batch: Preferences, micro_batch_tokens: int, compute: Compute
) -> dict[str, float]:
    """One optimizer step. The loss is the mean over all examples of the batch, over all ranks."""
    import torch

    point = reference_point(engine.model, config, batch, micro_batch_tokens, compute)
    examples = int(config.examples(batch).sum())

    def loss(rows: Preferences) -> tuple[Tensor, dict[str, Tensor]]:
        loss_B, reward_B2, margin_B = config.values(rows, logps(engine.model, rows, compute), point)
        has_B2 = torch.from_numpy(rows.has_B2).to(compute.device)
        chosen, rejected = torch.where(has_B2, reward_B2, 0.0).sum(0)
        mean = loss_B.sum() / examples
        return mean, {
            "loss": mean, "train_accuracy": ranked_right(margin_B).sum(), "train_margin": margin_B.sum(),
            "chosen_reward": chosen, "rejected_reward": rejected,
        }  # fmt: skip

    sums = engine.learn(batch.lengths, batch.pick, loss, micro_batch_tokens)
    chosen, rejected = batch.has_B2.sum(0).tolist()
    counts = {
        "train_accuracy": len(batch), "train_margin": len(batch), "chosen_reward": chosen,
        "rejected_reward": rejected,
    }  # fmt: skip
    metrics = {"loss": sums["loss"], "grad_norm": sums["grad_norm"]} | {
        name: sums[name] / number for name, number in counts.items() if number
    }
    return metrics | ({"reference_point": float(point)} if config.needs_others else {})


def ranked_right(margin_B: Tensor) -> Tensor:
    """1 where the preferred answer has the higher reward, 0.5 for a tie, else 0."""
    return (margin_B > 0).to(margin_B.dtype) + 0.5 * (margin_B == 0).to(margin_B.dtype)


def logps(model: nn.Module, rows: Preferences, compute: Compute, *, others: bool = False) -> Tensor:
    """Log-probability of each side [B, 2], nats, 0 where it is absent. Differentiable.

    Args:
        model: a `ResponseModel`, by itself or as an engine holds it.
        others: measure the answers to other prompts instead.
    """
    import torch

    from rlhf.models.logprobs import pack_sequences

    batch = pack_sequences(*(rows.others() if others else rows.sides()), compute.device)
    logp_S = batch.to_rows(model(batch, temperature=1.0).logp_N.float()).sum(-1)
    has_B2 = torch.from_numpy(rows.has_B2).to(logp_S.device)
    return logp_S.new_zeros(has_B2.shape).masked_scatter(has_B2, logp_S)


def all_logps(
    model: nn.Module, rows: Preferences, micro_batch_tokens: int, compute: Compute, *, others: bool = False
) -> Tensor:
    """`logps` of many rows, without gradient, fp64 on the CPU. Each rank computes its share, and all ranks
    get all results."""
    import torch

    logp_B2 = torch.zeros(len(rows), 2, dtype=torch.float64)
    lengths = rows.other_lengths if others else rows.lengths
    with torch.no_grad():
        for indices, weight, _ in compute.micro_batches(lengths, micro_batch_tokens):
            part_B2 = logps(model, rows.pick(indices), compute, others=others)
            if weight:
                logp_B2[indices] = part_B2.double().cpu()
    return compute.global_sum(logp_B2)


def reference_point(
    model: nn.Module, config: PreferenceConfig, rows: Preferences, micro_batch_tokens: int, compute: Compute
) -> Tensor:
    """KTO's reference point for these rows, nats, on the device: one pass over answers to other prompts,
    without gradient. 0 for the other losses."""
    import numpy
    import torch

    from rlhf.losses.preference import kto_point

    if not config.needs_others:
        return torch.zeros((), device=compute.device)
    logp_B2 = all_logps(model, rows, micro_batch_tokens, compute, others=True)
    ratio_sum = (logp_B2 - torch.from_numpy(numpy.ascontiguousarray(rows.other_reference_B2))).sum()
    return kto_point(ratio_sum, int(rows.has_B2.sum())).float().to(compute.device)


class Measurement(NamedTuple):
    """Measurement of a policy on held-out rows, on the CPU."""

    logp_B2: Tensor
    """Log-probability of each side, fp64, nats."""
    point: Tensor
    """KTO's reference point, nats."""


def measure(
    model: nn.Module, config: PreferenceConfig, rows: Preferences, micro_batch_tokens: int, compute: Compute
) -> Measurement:
    """Measure all that the losses of these rows depend on."""
    point = reference_point(model, config, rows, micro_batch_tokens, compute)
    return Measurement(all_logps(model, rows, micro_batch_tokens, compute), point.cpu())


REFERENCE = "reference.arrow"
"""File with `Preferences.reference_B2` and `other_reference_B2`, row by row."""
COLUMNS = ("chosen", "rejected", "chosen_of_next", "rejected_of_next")


def write_reference(path: Path, rows: Preferences) -> None:
    """Write the reference's log-probabilities of each row; null for an absent side."""
    import pyarrow

    from rlhf.data.arrow import ArrowWriter

    schema = pyarrow.schema([("row", pyarrow.int64()), *((name, pyarrow.float64()) for name in COLUMNS)])
    with ArrowWriter(path, schema) as file:
        for index, row in enumerate(rows.row_B.tolist()):
            values = [*rows.reference_B2[index].tolist(), *rows.other_reference_B2[index].tolist()]
            present = [*rows.has_B2[index], *(rows.other_B2[index] != ABSENT)]
            file.add({
                "row": row,
                **{name: value if is_there else None
                   for name, value, is_there in zip(COLUMNS, values, present, strict=True)},
            })  # fmt: skip


def read_reference(path: Path, rows: Preferences) -> Preferences:
    """A copy of the rows with the log-probabilities of the file."""
    import numpy

    from rlhf.data.arrow import map_table

    table = map_table(path)
    columns = [table[name].fill_null(0.0).to_numpy() for name in COLUMNS]
    return rows.with_reference(numpy.stack(columns[:2], -1), numpy.stack(columns[2:], -1))
