"""Means, shares and ratios over a sample of rows, each with its 95% confidence interval.

Dimensions: B rows (prompts, pairs, questions, texts), drawn independently. To compare two models, use their
difference on each row as its value: then the difficulty of the rows cancels out.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

from rlhf.evaluation.sampled import Sampled

LEVEL = 0.95
"""Confidence level: the share of samples whose interval holds the true value."""
CONSTANT = 1e-6
"""Smallest standard deviation that is more than rounding."""
NORMAL_QUANTILE = NormalDist().inv_cdf((1 + LEVEL) / 2)


def share(value_B: Tensor) -> Sampled:
    """The mean of values from 0 to 1, such as wins (a tie is 0.5).

    The interval never shrinks to a point, even if all rows agree. For values between 0 and 1 it is a little
    too wide, because their variance is at most that of zeros and ones with the same mean.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference", JASA 22.
    """
    rows = len(value_B)
    if not rows:
        return nothing()
    p, square = float(value_B.double().mean()), NORMAL_QUANTILE**2 / rows
    centre = (p + square / 2) / (1 + square)
    half = math.sqrt(p * (1 - p) * square + square**2 / 4) / (1 + square)
    return Sampled(p, min(p, centre - half), max(p, centre + half), rows)


def difference(value_B: Tensor) -> Sampled:
    """The mean of values from -1 to 1: how often one model is right where another is not, minus the reverse.

    As with `share`, the interval does not shrink to a point if all rows agree: two rows are added, one in
    favour of each model.
    Source: Bonett and Price 2012, "Adjusted Wald confidence interval for a difference of binomial proportions
    based on paired data", Journal of Educational and Behavioral Statistics 37(4).
    """
    rows = len(value_B)
    if not rows:
        return nothing()
    value_B = value_B.double()
    wider = torch.cat([value_B, torch.tensor([-1.0, 1.0], dtype=torch.float64)])
    half = NORMAL_QUANTILE * float(wider.std(correction=0)) / math.sqrt(len(wider))
    mean, centre = float(value_B.mean()), float(wider.mean())
    return Sampled(mean, max(-1.0, centre - half), min(1.0, centre + half), rows)


def mean(value_B: Tensor) -> Sampled:
    """The mean of unbounded values, such as scores or differences of scores.

    Source: Student 1908, "The probable error of a mean", Biometrika 6.
    """
    return ratio(value_B, torch.ones(len(value_B)))


def ratio(part_B: Tensor, whole_B: Tensor) -> Sampled:
    """The sum of the parts over the sum of the wholes, such as nats per token of texts of different lengths.

    The interval uses each row's distance from the ratio instead of its distance from the mean. With a single
    row the interval is infinite, because nothing is known about the spread of rows.
    Source: Cochran 1977, "Sampling Techniques", 3rd edition, section 2.11.
    """
    rows = len(part_B)
    if not rows:
        return nothing()
    part_B, whole_B = part_B.double(), whole_B.double()
    value = float(part_B.sum() / whole_B.sum())
    if rows == 1:
        return Sampled(value, -math.inf, math.inf, 1)
    deviation = math.sqrt(float((part_B - value * whole_B).square().sum()) / (rows - 1))
    half = student(rows - 1) * deviation / math.sqrt(rows) / float(whole_B.mean())
    return Sampled(value, value - half, value + half, rows)


def correlation(x_BN: Tensor, y_BN: Tensor) -> Sampled:
    """Pearson's correlation of N pairs of values in each of B rows. Pairs with a NaN are left out. The result
    is that of no rows if one side is nearly constant.

    The interval is computed on Fisher's scale, from each pair's influence on the figure, summed per row. It
    is a little too narrow for few rows: with 12 rows, 91% of the intervals hold the true value.
    Sources: Fisher 1921, "On the probable error of a coefficient of correlation", Metron 1; Devlin,
    Gnanadesikan and Kettenring 1975, "Robust estimation and outlier detection with correlation coefficients",
    Biometrika 62.
    """
    known_BN = ~(x_BN.isnan() | y_BN.isnan())
    known_B, pairs = known_BN.any(-1), int(known_BN.sum())
    if not pairs:
        return nothing()
    x_BN, y_BN = (
        side_BN.double().masked_fill(~known_BN, 0.0) - (side_BN[known_BN].double().mean() * known_BN)
        for side_BN in (x_BN, y_BN)
    )
    deviations = [float(side_BN.norm()) / math.sqrt(pairs) for side_BN in (x_BN, y_BN)]
    if min(deviations) < CONSTANT:
        return nothing()
    x_BN, y_BN = x_BN / deviations[0], y_BN / deviations[1]
    rows, value = int(known_B.sum()), float((x_BN * y_BN).sum()) / pairs
    value = max(-1.0, min(1.0, value))
    if rows == 1:
        return Sampled(value, -1.0, 1.0, 1)
    if abs(value) == 1.0:
        return Sampled(value, value, value, rows)
    influence_B = (x_BN * y_BN - value * (x_BN.square() + y_BN.square()) / 2).sum(-1)[known_B]
    error = math.sqrt(float(influence_B.square().sum()) * rows / (rows - 1)) / pairs
    half = student(rows - 1) * error / (1 - value**2)
    return Sampled(value, math.tanh(math.atanh(value) - half), math.tanh(math.atanh(value) + half), rows)


def nothing() -> Sampled:
    """The result for no rows: NaN, with an infinite interval."""
    return Sampled(math.nan, -math.inf, math.inf, 0)


def student(freedom: int) -> float:
    """Half width of a 95% interval in standard errors (Student's t). The error is 0.8% at 2 degrees of
    freedom, and below 0.2% from 3 on.

    Source: Abramowitz and Stegun 1964, "Handbook of Mathematical Functions", 26.7.5.
    """
    if freedom == 1:
        return math.tan(math.pi * LEVEL / 2)
    x = NORMAL_QUANTILE
    terms: tuple[float, ...] = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / float(freedom**power) for power, term in enumerate(terms))
