"""Which candidate to ship: a split of the questions, pilots that are stopped, and one judgement at the end.

Dimensions: C candidates, K finalists, S seeds (1: the artifact itself is judged), B questions. Any dimensions
before them hold separate problems. Scores are fp64, higher is better; NaN is a question that was not scored.

Questions that chose a finalist flatter it. So `split_questions` seals a third of them before anything runs.
`rung` and `best_untrained` read the others. `judge` reads the sealed third once.
benchmarks/decision_statistics.py measures the error rates.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.data.schema import drawn
from rlhf.evaluation.crossed import Estimate, estimate
from rlhf.evaluation.sampled import Sampled

SEALED = 1 / 3
"""Share of the questions that only the final judgement reads."""
ERROR = 0.05
"""Chance of a wrong statement: that the halving drops its best candidate, or that an interval misses."""
POWER = 0.8
"""Chance that the further questions tell, if the leader's true gain is the measured one."""
MOST_QUESTIONS = 100_000
"""Number of further questions above which nobody writes them, and none is advised."""
TIE = 1e-9
"""Difference of two means that is only rounding."""


def split_questions(identities: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the questions that choose, and of the sealed ones: about a third of the questions.

    The hash of its identity (`prompt_identity`) decides for each question alone. So neither the order nor the
    other questions matter, and a question that has chosen is not sealed later when more are added.

    Raises:
        ValueError: one of the parts is empty.
    """
    sealed = [drawn(identity, SEALED, "sealed") for identity in identities]
    if all(sealed) or not any(sealed):
        part = "choose candidates" if all(sealed) else "judge the finalists"
        raise ValueError(f"None of the {len(sealed)} questions is left to {part}. Add questions: 60 or more.")
    return [i for i, each in enumerate(sealed) if not each], [i for i, each in enumerate(sealed) if each]


class Rung(NamedTuple):
    """What becomes of the candidates after a rung. Each is [..., C]."""

    kept: Tensor
    """bool: runs on."""
    worse: Tensor
    """bool: dropped because it is clearly worse than the best."""
    cut: Tensor
    """bool: dropped for lack of budget, not for quality."""
    upper: Tensor
    """Upper end of the interval of its lead over the best; infinite for the best."""


def rung(
    score_CB: Tensor,
    *,
    max_kept: int,
    cost_C: Tensor,
    running_C: Tensor | None = None,
    slow_C: Tensor | None = None,
    is_last: bool = False,
    num_rungs: int = 1,
    score_range: float | None = 1.0,
) -> Rung:
    """Choose the candidates that run on.

    A candidate is worse if the upper end of its paired difference to the best lies below 0. The level is
    Bonferroni's over candidates and rungs: all rungs together drop the best of their candidates in at most 5%
    of cases (Gupta's subset selection). There is no limit to how many are dropped as worse: the level holds
    for any number, and a limit of half only cost more in simulations. But a short run can mislead about a
    slow starter, and no interval shows that: mark it in `slow_C`.

    The rest of successive halving is the budget's: of those not worse, `max_kept` run on, with half of the
    candidates as the usual value. The best is kept first, then slow starters, then the highest upper ends: a
    candidate that is little known keeps its chance. Ties go to the cheaper one.

    Sources: Gupta 1965, "On some multiple decision (selection and ranking) rules", Technometrics 7; Karnin,
    Koren and Somekh 2013, "Almost optimal exploration in multi-armed bandits"; Jamieson and Talwalkar 2016,
    arXiv:1502.07943.

    Args:
        score_CB: [..., C, B] on the choosing questions.
        cost_C: [..., C] in any unit.
        running_C: bool [..., C], candidates that are still running; all if None.
        slow_C: bool [..., C], candidates that are not dropped before the last rung if the budget allows.
        score_range: see `crossed.estimate`.
    """
    assert max_kept >= 1 and num_rungs >= 1
    shape, (candidates, questions) = score_CB.shape[:-1], score_CB.shape[-2:]
    score_NCB = score_CB.reshape(-1, candidates, questions).double()
    running, slow = (
        (torch.full(shape, default) if given is None else given.expand(shape)).reshape(-1, candidates)
        for given, default in ((running_C, True), (slow_C, False))
    )
    mean_NC = score_NCB.nanmean(-1)
    mean_NC = mean_NC.masked_fill(~running | mean_NC.isnan(), -math.inf)
    best = running & (mean_NC >= mean_NC.amax(-1, keepdim=True) - TIE)
    upper = torch.full_like(mean_NC, -math.inf)
    tail_N = ERROR / num_rungs / (running.sum(-1) - 1).clamp(min=1)
    for candidate in range(candidates):  # of several best, the one to which the lead is most favourable
        at = best[:, candidate].nonzero().squeeze(-1)
        lead = score_NCB[at] - score_NCB[at, candidate, None]
        end = estimate(lead[:, :, None], score_range).bound(tail_N[at, None], 1)
        upper[at] = torch.maximum(upper[at], end)
    upper = upper.masked_fill(best, math.inf)
    worse = running & (upper < 0) & ~(slow & (not is_last))
    kept = running & ~worse
    order = torch.arange(candidates).expand_as(upper)
    first = best * 2 + (slow & (not is_last)) * 1
    for key in (cost_C.expand(shape).reshape(-1, candidates), -upper, -first, ~kept):  # the last decides
        order = order.gather(-1, key.double().gather(-1, order).argsort(dim=-1, stable=True))
    cut = kept & (order.argsort(-1) >= max_kept)
    return Rung(*(each.reshape(shape) for each in (kept & ~cut, worse, cut, upper)))


def best_untrained(score: Mapping[str, Tensor], cost: Mapping[str, float]) -> str:
    """The untrained option with the highest mean on the choosing questions ([B]) that all options answered.
    Of equal ones it is the cheapest."""
    if not score:
        raise ValueError("There is no untrained option to compare with. The base model is one.")
    common_B = ~torch.stack([*score.values()]).isnan().any(0)
    mean = {name: round(float(score_B[common_B].double().mean()), 9) for name, score_B in score.items()}
    return min(score, key=lambda name: (-mean[name], cost[name], name))


def over_limits(
    measured: Mapping[str, Mapping[str, float]], limits: Mapping[str, tuple[float, float]]
) -> dict[str, tuple[str, ...]]:
    """The limits that each refused candidate exceeds. A value that is missing or NaN is over its limit.

    Args:
        measured: candidate -> figure -> value.
        limits: figure -> lowest and highest allowed value.
    """
    over = {
        name: tuple(
            figure
            for figure, (least, most) in limits.items()
            if not least <= values.get(figure, math.nan) <= most
        )
        for name, values in measured.items()
    }
    return {name: limits_over for name, limits_over in over.items() if limits_over}


class Claims(NamedTuple):
    """What the sealed questions say about the finalists."""

    gain: Estimate
    """Lead over the untrained option, [..., K]."""
    p: Tensor
    """Holm's adjusted one-sided p-value of "no gain", [..., K]."""
    claimed: Tensor
    """bool [..., K]: a gain is shown."""
    low: Tensor
    high: Tensor
    """Simultaneous intervals of the gains, [..., K]."""
    at_most: Tensor
    """[...]: no finalist gains more (97.5%)."""
    winner: Tensor
    """[...]: index of the finalist to ship; -1 for none."""
    leader: Tensor
    """[...]: index of the finalist with the highest gain."""


def claims(
    score_KSB: Tensor,
    untrained_SB: Tensor,
    *,
    cost_K: Tensor,
    in_play_K: Tensor | None = None,
    smallest_gain: float = 0.0,
    score_range: float | None = 1.0,
    error: float = ERROR,
) -> Claims:
    """Compare the finalists with the untrained option.

    - A gain above 0 is claimed by Holm's step-down test, one-sided at error / 2. So at most 2.5% of
      judgements claim any gain that is not there.
    - The intervals are Dunn's (Bonferroni's), of which each side has error / 4 / K; error / 2 for a single
      finalist. If Holm claims a gain, the interval begins at 0 or above. So interval and claim always agree,
      and by Bonferroni's inequality all claims and intervals are right together in 95% of cases. The exact
      counterpart of Holm's test (Strassburger and Bretz) would begin at 0 for each claimed gain, however
      large, as long as one finalist has none.
    - `at_most` is the highest of the one-sided upper ends at error / 2. It needs no correction: it is too low
      only if the end of the best finalist is (Berger's intersection-union test).
    - A finalist can be shipped if its gain is claimed, and measured as `smallest_gain` or more. Of these, all
      that the sealed questions cannot tell from the best (a paired interval, two-sided at `error`) count as
      equal, and the cheapest is the winner.

    Sources: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of
    Statistics 6; Dunn 1961, "Multiple comparisons among means", JASA 56; Strassburger and Bretz 2008,
    "Compatible simultaneous lower confidence bounds for the Holm procedure and other Bonferroni-based closed
    tests", Statistics in Medicine 27; Berger 1982, "Multiparameter hypothesis testing and acceptance
    sampling", Technometrics 24. A test against 0 with a smallest measured gain is the dual criterion of
    Roychoudhury, Scheuer and Neuenschwander 2018, Clinical Trials 15.

    Args:
        score_KSB: [..., K, S, B] on the sealed questions.
        untrained_SB: [..., 1 or S, B]; with S seeds, the seeds are compared in pairs.
        in_play_K: bool [..., K]; finalists that are left out, are also not counted. All play if None.
        smallest_gain: smallest gain that is worth training for, in units of the score.
    """
    gain = estimate(score_KSB - untrained_SB[..., None, :, :], score_range)
    plays = torch.ones_like(gain.value, dtype=torch.bool) if in_play_K is None else in_play_K
    plays = plays.expand(gain.value.shape)
    number = plays.sum(-1, keepdim=True).double()
    adjusted = holm(gain.p_above(0.0), plays)
    claimed = plays & (adjusted <= error / 2)
    tail = error / torch.where(number > 1, 4 * number, 2.0)
    low, high = gain.bound(tail, -1), gain.bound(tail, 1)
    low = torch.where(claimed, low.clamp(min=0.0), low)
    at_most = gain.bound(error / 2, 1).masked_fill(~plays, -math.inf).amax(-1)
    measured = gain.value.masked_fill(~plays | gain.value.isnan(), -math.inf)
    fit = claimed & (measured >= smallest_gain - TIE)
    best = measured.masked_fill(~fit, -math.inf).argmax(-1)
    best_SB = score_KSB.take_along_dim(best[..., None, None, None], -3)
    behind = estimate(score_KSB - best_SB, score_range).bound(error / 2, 1) < 0
    price = cost_K.double().expand(gain.value.shape).masked_fill(~fit | behind, math.inf)
    cheapest = price <= price.amin(-1, keepdim=True)
    winner = measured.masked_fill(~(fit & ~behind & cheapest), -math.inf).argmax(-1)
    winner = torch.where(fit.any(-1), winner, -1)
    return Claims(gain, adjusted, claimed, low, high, at_most, winner, measured.argmax(-1))


def holm(p_K: Tensor, plays_K: Tensor) -> Tensor:
    """Holm's adjusted p-values, [..., K]; 1 for who does not play. The smallest counts as often as there are
    players, the next once less, and none is below a smaller one's."""
    p, order = p_K.masked_fill(~plays_K, math.inf).sort(dim=-1)
    left = plays_K.sum(-1, keepdim=True) - torch.arange(p.shape[-1])
    steps = (left.clamp(min=1) * p).cummax(-1).values
    return torch.empty_like(p).scatter(-1, order, steps).clamp(max=1.0)


class Outcome(StrEnum):
    """What the sealed questions decide."""

    SHIP = "ship"
    NO_TRAINING = "no training"
    UNTOLD = "cannot be told"


@dataclass(frozen=True)
class Finalist:
    """A finalist's gain over the untrained option."""

    gain: Sampled
    """With its simultaneous interval."""
    p: float
    """Holm's adjusted one-sided p-value."""
    claimed: bool
    """Whether a gain is shown. Then the interval begins at 0 or above."""


@dataclass(frozen=True)
class Decision:
    """The outcome and its reasons."""

    outcome: Outcome
    winner: str | None = None
    finalists: Mapping[str, Finalist] = field(default_factory=dict)
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Finalist -> limits that it exceeds."""
    at_most: float = math.nan
    """No finalist gains more (97.5%)."""
    more_questions: int | None = None
    """How many more questions, of which a third is sealed, tell with 80% power if the true gains are the
    measured ones. None if 100,000 do not: a gain is almost `smallest_gain`, or the seeds are too few."""
    is_method: bool = False
    """Whether the finalists are methods, judged over seeds, and not single artifacts."""


def judge(
    finalists: Mapping[str, Tensor],
    untrained_SB: Tensor,
    *,
    cost: Mapping[str, float],
    smallest_gain: float = 0.0,
    refused: Mapping[str, tuple[str, ...]] | None = None,
    score_range: float | None = 1.0,
    error: float = ERROR,
) -> Decision:
    """The judgement on the sealed questions, by the rules of `claims`.

    The outcome is to ship the winner, if there is one. It is not to train, if `at_most` is no more than
    `smallest_gain` or all finalists are refused. Else it cannot be told. With a `smallest_gain` of 0 "no
    training" is only told of finalists that are worse, because nobody can show that a gain is exactly 0.

    The error rates are those of one look. Who adds questions and judges again should halve `error` each time:
    then all looks together err in at most twice the first one's rate.

    Args:
        finalists: name -> [S, B] on the sealed questions; S=1 judges the artifact, more seeds the method.
        untrained_SB: [1 or S, B], of the option that `best_untrained` chose on the other questions.
        refused: finalists that may not be shipped, from `over_limits`. They are not compared.
    """
    refused = {name: limits for name, limits in (refused or {}).items() if name in finalists}
    names = sorted(finalists.keys() - refused.keys())
    if not names:
        return Decision(Outcome.NO_TRAINING, refused=refused)
    score_KSB = torch.stack([finalists[name] for name in names])
    found = claims(
        score_KSB,
        untrained_SB,
        cost_K=torch.tensor([cost[name] for name in names], dtype=torch.float64),
        smallest_gain=smallest_gain,
        score_range=score_range,
        error=error,
    )
    limit = score_range or math.inf
    judged = {
        name: Finalist(
            Sampled(
                float(found.gain.value[k]),
                max(-limit, float(found.low[k])),
                min(limit, float(found.high[k])),
                int(found.gain.rows[k]),
            ),
            float(found.p[k]),
            bool(found.claimed[k]),
        )
        for k, name in enumerate(names)
    }
    at_most, winner, more = float(found.at_most), None, None
    if found.winner >= 0:
        outcome, winner = Outcome.SHIP, names[int(found.winner)]
    elif at_most <= smallest_gain:
        outcome = Outcome.NO_TRAINING
    else:
        outcome, more = Outcome.UNTOLD, more_questions(found, smallest_gain, error, untrained_SB.shape[-1])
    return Decision(
        outcome, winner, judged, refused, min(limit, at_most), more, is_method=score_KSB.shape[-2] > 1
    )


def more_questions(found: Claims, smallest_gain: float, error: float, sealed: int) -> int | None:
    """How many more questions would tell, a third of them sealed; None if `MOST_QUESTIONS` would not.

    If the leader's measured gain is large enough, they would show that it is above 0. Else they would show
    that no finalist reaches `smallest_gain`.

    Args:
        sealed: number of sealed questions. The same share of further ones is taken to have no score.
    """
    leader, num_finalists = int(found.leader), len(found.p)
    value = float(found.gain.value[leader])
    if value > 0 and value >= smallest_gain:
        told = [(leader, value, error / 2 / num_finalists)]
    else:
        told = [(k, smallest_gain - float(found.gain.value[k]), error / 2) for k in range(num_finalists)]
    needed = [
        questions_needed(
            float(found.gain.question_variance[k]), float(found.gain.seed_variance[k]), gap, tail
        )
        for k, gap, tail in told
    ]
    known = [each for each in needed if each is not None]
    if len(known) < len(needed):
        return None
    rows = int(found.gain.rows[leader])
    more = math.ceil(max(1, max(known) - rows) / SEALED * sealed / max(1, rows))
    return more if more <= MOST_QUESTIONS else None


def questions_needed(question_variance: float, seed_variance: float, gap: float, tail: float) -> int | None:
    """Sealed questions with which the bound at `tail` excludes a value that lies `gap` from the truth, with a
    power of 80%. None if the seeds' part of the variance alone is too large.

        (z(tail) + z(0.2))^2 (seed_variance + question_variance / questions) = gap^2

    Source: Chow, Shao and Wang 2008, "Sample size calculations in clinical research", 2nd edition, 3.1.
    """
    z_tail, z_power = -torch.special.ndtri(torch.tensor([tail, 1 - POWER], dtype=torch.float64))
    left = (max(0.0, gap) / float(z_tail + z_power)) ** 2 - seed_variance
    return math.ceil(question_variance / left) if left > 0 and question_variance >= 0 else None
