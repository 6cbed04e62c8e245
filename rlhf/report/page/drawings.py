"""Geometry of drawings in SVG: points with labels, and bars over time. The templates write the elements.

Positions are in pixels of the drawing's `viewBox`; y grows downwards.
"""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from rlhf.printable import duration

TEXT_PIXELS = 12.5
"""Size of the text in a drawing; page.css has the same value."""
NARROW = " .,:;'|!()[]/ijlftrI-"
"""Characters that take less room than most."""
LINE_PIXELS = 16.0
"""Height of a line of text."""
TIME_STEPS = (
    1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 21_600, 43_200, 86_400,
)  # fmt: skip
"""Distances between the ticks of a time axis, in seconds."""
LOG_RATIO = 6.0
"""Ratio of the largest to the smallest value from which an axis is logarithmic."""
LABEL_DISTANCES = (9.0, 20.0, 34.0, 52.0, 74.0, 100.0)
"""Distances between a point and its label that are tried."""
LEADER_PIXELS = 15.0
"""Distance from which a line leads from the label to its point."""


class Tick(NamedTuple):
    """A mark on an axis."""

    at: float
    text: str


class Box(NamedTuple):
    """A rectangle."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area of both."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(0.0, width) * max(0.0, height)

    def outside(self, other: Box) -> float:
        """How far it reaches out of the other one."""
        beyond = (other.left - self.left, self.right - other.right, other.top - self.top)
        return sum(max(0.0, each) for each in (*beyond, self.bottom - other.bottom))


def text_width(text: str, pixels: float = TEXT_PIXELS) -> float:
    """The estimated width of a text, in a font of usual width."""
    return pixels * sum(map(_character_width, text))


def _character_width(character: str) -> float:
    if unicodedata.east_asian_width(character) in "WF":
        return 1.05
    if character in "WM@%":
        return 0.98
    if character in "<>=+~#&":
        return 0.82
    return 0.4 if character in NARROW else 0.72 if character.isupper() else 0.61


def shortened(text: str, most: float) -> str:
    """A text of at most `most` pixels: the middle is left out, as titles often differ in their end."""
    if text_width(text) <= most:
        return text
    kept = min(len(text), int(3 * most / TEXT_PIXELS))  # no character is narrower than a third
    while kept > 2 and text_width(text[:kept]) + TEXT_PIXELS > most:
        kept -= 1
    end = kept * 2 // 5
    return f"{text[: kept - end].rstrip()}\N{HORIZONTAL ELLIPSIS}{text[len(text) - end :].lstrip()}"


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """At most about `most` round values between two values."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * each for each in (1, 2, 2.5, 5, 10) if power * each >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [step * number for number in range(first, last + 1)]


def time_ticks(high: float, most: int) -> list[Tick]:
    """Round times from 0 to a time, in the unit that suits the whole axis."""
    days = (float(86_400 * each) for each in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000))
    step = next((each for each in (*TIME_STEPS, *days) if each * most >= high), high)
    units = (("s", 1, 120), ("min", 60, 7200), ("h", 3600, 172_800), ("days", 86_400, math.inf))
    unit, size = next((unit, size) for unit, size, limit in units if high < limit)
    count = math.floor(high / step + 1e-9) if step else 0
    texts = ["0", *(f"{step * number / size:.3g} {unit}" for number in range(1, count + 1))]
    return [Tick(step * number, "1 day" if text == "1 days" else text) for number, text in enumerate(texts)]


@dataclass(frozen=True)
class Axis:
    """Values of one axis and their places in the drawing."""

    low: float
    high: float
    start: float
    """Place of `low`."""
    end: float
    is_log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies."""
        low, high = self.low, self.high
        if self.is_log:
            low, high, value = math.log(low), math.log(high), math.log(value)
        return round(self.start + (self.end - self.start) * (value - low) / (high - low), 1)

    def ticks(self, most: int) -> list[Tick]:
        """Round values, and their places."""
        values = round_ticks(self.low, self.high, most)
        if self.is_log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 2, 5), (1, 3), (1,)):
                values = [10.0**power * step for power in powers for step in steps]
                values = [each for each in values if self.low <= each <= self.high]
                if len(values) <= most + 1:
                    break
            return [Tick(self.place(each), plain(each)) for each in values]
        size = max((abs(each) for each in values), default=0.0)
        exact = (n for n in range(7) if all(abs(round(each, n) - each) <= 1e-9 * size for each in values))
        places = next(exact, None)
        texts = [plain(each) if places is None else f"{each:z,.{places}f}" for each in values]
        return [Tick(self.place(each), text) for each, text in zip(values, texts, strict=True)]


def plain(value: float) -> str:
    """A value of a few digits, without an exponent where that is readable."""
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.3g}"
    text = f"{value:,.{0 if abs(value) >= 100 else max(0, 2 - _exponent(value))}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def _exponent(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


class Point(NamedTuple):
    """A point to draw."""

    title: str
    x: float
    y: float
    low: float | None
    high: float | None
    look: str
    """Its classes in page.css. With `untrained` it is a square, else a circle."""


class PlacedPoint(NamedTuple):
    """A point in its place, with its label."""

    point: Point
    x: float
    y: float
    low: float | None
    high: float | None
    text: str
    text_x: float
    text_y: float
    anchor: str
    leader: tuple[float, float] | None
    """Where the line from the point to a distant label ends."""


@dataclass(frozen=True)
class Scatter:
    """Points, with intervals, over two axes."""

    width: float
    height: float
    area: Box
    """Where the points are."""
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    points: list[PlacedPoint]
    line: str
    """SVG path along the points that no other point beats; empty if there is only one."""
    threshold: float | None
    """Place of the least y that is worth having; None if it is not known."""
    is_log: bool
    """Whether x is logarithmic."""


def scatter(
    points: Sequence[Point],
    front: Sequence[Point],
    *,
    size: tuple[float, float],
    threshold: float | None,
    is_time: bool,
) -> Scatter:
    """Place points and labels.

    Args:
        points: the most important first: their labels are placed first.
        front: the points that no other point beats, by x.
        size: width and height of the drawing.
        threshold: least y that is worth having; None if it is not known.
        is_time: whether x is in seconds.
    """
    width, height = size
    heights = [each for point in points for each in (point.y, point.low, point.high) if each is not None]
    heights += [] if threshold is None else [threshold]
    low, high = min(heights), max(heights)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    y = Axis(low - margin, high + margin, height - 44.0, 10.0)
    y_ticks = y.ticks(max(3, int(height // 70)))
    area = Box(
        max((text_width(tick.text) for tick in y_ticks), default=0.0) + 34.0, 10.0, width - 12.0, y.start
    )
    xs = [point.x for point in points]
    is_log = not is_time and min(xs) > 0 and max(xs) / min(xs) >= LOG_RATIO
    least, most = (min(xs) / 1.4, max(xs) * 1.4) if is_log else _stretch(xs)
    pad = 0.0 if is_log else 0.08 * ((most - least) or 1.0)
    x = Axis(least - pad, most + pad, area.left, area.right, is_log)
    num_ticks = max(3, int(width // 110))
    if is_time:
        x_ticks = [Tick(x.place(tick.at), tick.text) for tick in time_ticks(most + pad, num_ticks)]
    else:
        x_ticks = x.ticks(num_ticks)
    return Scatter(
        width, height, area, x_ticks, y_ticks, _labelled(points, front, x, y, area), _front_line(front, x, y),
        None if threshold is None else y.place(threshold), is_log,
    )  # fmt: skip


def _stretch(xs: Sequence[float]) -> tuple[float, float]:
    """The ends of a linear axis: from 0 unless that leaves most of it empty, and never so near that a
    difference of some percent looks large."""
    least, most = min(xs), max(xs)
    if 0 < most < 3 * least:
        return min(least, 0.7 * most), most
    return min(0.0, least), max(0.0, most)


def _front_line(front: Sequence[Point], x: Axis, y: Axis) -> str:
    if len({(point.x, point.y) for point in front}) < 2:
        return ""
    first, *others = front
    path = f"M {x.place(first.x):g} {y.place(first.y):g}"
    return path + "".join(f" H {x.place(each.x):g} V {y.place(each.y):g}" for each in others)


def _labelled(
    points: Sequence[Point], front: Sequence[Point], x: Axis, y: Axis, area: Box
) -> list[PlacedPoint]:
    """Each point with its label where it covers least."""
    places = [(x.place(point.x), y.place(point.y)) for point in points]
    ends = [
        tuple(None if end is None else y.place(end) for end in (point.low, point.high)) for point in points
    ]
    dots = [Box(px - 8, py - 8, px + 8, py + 8) for px, py in places]
    bars = [
        Box(px - 5, high, px + 5, low)
        for (px, _), (low, high) in zip(places, ends, strict=True)
        if low is not None and high is not None
    ]
    for start, end in pairwise(front):
        left, bottom, right, top = x.place(start.x), y.place(start.y), x.place(end.x), y.place(end.y)
        bars += [Box(left, bottom - 4, right, bottom + 4), Box(right - 4, top, right + 4, bottom)]
    labels: list[Box] = []
    placed = []
    for point, (px, py), (low, high) in zip(points, places, ends, strict=True):
        text = shortened(point.title, 0.42 * (area.right - area.left))
        length = text_width(text) * 1.04
        best, least = None, math.inf
        for box, distance, anchor in _candidates(px, py, length):
            cost = 4.0 * distance + 60.0 * box.outside(area)
            if cost >= least:
                continue
            cost += 9.0 * sum(map(box.overlap, labels)) + 5.0 * sum(map(box.overlap, dots))
            cost += 2.0 * sum(map(box.overlap, bars))
            if cost < least:
                best, least = (box, distance, anchor), cost
        assert best is not None
        box, distance, anchor = best
        labels.append(box)
        edge = {"start": box.left, "end": box.right, "middle": (box.left + box.right) / 2}[anchor]
        middle = (box.top + box.bottom) / 2
        touch = (
            box.top if anchor == "middle" and middle > py else box.bottom if anchor == "middle" else middle
        )
        leader = (round(edge, 1), round(touch, 1)) if distance >= LEADER_PIXELS else None
        placed.append(
            PlacedPoint(
                point, px, py, low, high, text, round(edge, 1), round(box.bottom - 4, 1), anchor, leader
            )
        )
    return placed


def _candidates(px: float, py: float, length: float) -> Iterator[tuple[Box, float, str]]:
    """Boxes for a label around a point: (box, distance, where the text is anchored)."""
    for distance in LABEL_DISTANCES:
        for angle in (0, 180, -30, 30, 150, 210, -55, 55, 125, 235, -90, 90):
            dx, dy = math.cos(math.radians(angle)), math.sin(math.radians(angle))
            top = py + distance * dy - LINE_PIXELS / 2
            if abs(dx) < 0.1:
                left, anchor = px - length / 2, "middle"
            elif dx > 0:
                left, anchor = px + max(distance * dx, 9.0 if abs(dy) < 0.6 else 4.0), "start"
            else:
                left, anchor = px + min(distance * dx, -9.0 if abs(dy) < 0.6 else -4.0) - length, "end"
            if abs(dx) < 0.1:
                top += 6 * dy
            yield Box(left, top, left + length, top + LINE_PIXELS), distance, anchor


class Span(NamedTuple):
    """A stretch of time to draw."""

    start: float
    """In seconds."""
    seconds: float
    look: str
    """Its classes in page.css."""
    texts: Sequence[str]
    """What it says: the first text for which there is room."""
    title: str
    """All of it in words."""


class Bar(NamedTuple):
    """A stretch of time in its place."""

    span: Span
    x: float
    y: float
    width: float
    text: str
    text_x: float
    is_beside: bool
    """Whether the text is at the right of the bar."""


class TimelineRow(NamedTuple):
    """The bars of one candidate."""

    title: str
    text_y: float
    bars: list[Bar]
    rule: float
    """Place of the line below it."""


@dataclass(frozen=True)
class Timeline:
    """Bars over time, one row per candidate."""

    width: float
    height: float
    left: float
    bottom: float
    ticks: list[Tick]
    rows: list[TimelineRow]
    budget: float | None
    """Place of the line at the budget."""
    now: float | None
    """Place of the line at the present; None if it has ended."""
    is_stacked: bool
    """Whether titles stand above the bars."""
    labels: list[tuple[str, float, float, str]]
    """Labels above the lines: text, x, y, anchor."""


BAR_PIXELS = 20.0
TOP_PIXELS = 24.0
"""Room for the labels above the bars."""


def timeline(
    rows: Sequence[tuple[str, Sequence[Span]]],
    *,
    width: float,
    budget: float | None,
    now: float | None,
) -> Timeline:
    """Place bars. Stretches of one row that overlap get lanes of their own.

    Args:
        rows: title and stretches, in order.
        budget: in seconds; None if it is not known.
        now: seconds since the start; None if it has ended.
    """
    is_stacked = width < 600
    longest = max((text_width(title) for title, _ in rows), default=0.0)
    left = 8.0 if is_stacked else min(longest + 16.0, 0.28 * width)
    ends = [span.start + span.seconds for _, spans in rows for span in spans]
    most = max([*ends, budget or 0.0, now or 0.0, 1e-3])
    axis = Axis(0.0, most * 1.02, left, width - 14.0)
    top, placed = TOP_PIXELS, []
    for title, spans in rows:
        lanes = _lanes(spans)
        head = LINE_PIXELS + 4 if is_stacked else 0.0
        bars = [
            bar
            for number, lane in enumerate(lanes)
            for bar in _bars(lane, axis, top + 6 + head + number * (BAR_PIXELS + 4), width - 8)
        ]
        bottom = top + 8 + head + max(1, len(lanes)) * (BAR_PIXELS + 4)
        text_y = top + 17.0 if is_stacked else (top + bottom) / 2 + 4
        text = shortened(title, width - 20 if is_stacked else left - 14)
        placed.append(TimelineRow(text, round(text_y, 1), bars, bottom))
        top = bottom
    labels = []
    if budget:
        x = axis.place(budget)
        labels.append((f"budget: {duration(budget)}", x, 15.0, "end" if x > width / 2 else "start"))
    if now is not None:
        x = axis.place(now)
        text = f"now: {duration(now)}"
        is_free = not labels or abs(x - labels[0][1]) > text_width(text + labels[0][0]) + 12
        if is_free:
            labels.append((text, x, 15.0, "end" if x > width / 2 else "start"))
    ticks = [Tick(axis.place(tick.at), tick.text) for tick in time_ticks(most, max(3, int(width // 110)))]
    return Timeline(
        width, top + 30, left, top, ticks, placed, axis.place(budget) if budget else None,
        None if now is None else axis.place(now), is_stacked, labels,
    )  # fmt: skip


def _lanes(spans: Sequence[Span]) -> list[list[Span]]:
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda each: each.start):
        free = (lane for lane in lanes if lane[-1].start + lane[-1].seconds <= span.start + 1e-6)
        lane = next(free, None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(span)
    return lanes


def _bars(lane: Sequence[Span], axis: Axis, y: float, end: float) -> Iterator[Bar]:
    """The bars of a lane, each with a text inside, or at its right up to the next bar, or without."""
    nexts = [*(axis.place(span.start) for span in lane[1:]), end]
    for span, limit in zip(lane, nexts, strict=True):
        x = axis.place(span.start)
        width = round(max(3.0, axis.place(span.start + span.seconds) - x - 1), 1)
        text, is_beside = _fitting(span.texts, width, limit - x - width)
        text_x = x + width + 4 if is_beside else x + width / 2
        yield Bar(span, x, y, width, text, round(text_x, 1), is_beside)


def _fitting(texts: Sequence[str], inside: float, beside: float) -> tuple[str, bool]:
    """The first text that fits into the bar or next to it, and whether it stands next to it."""
    for text in texts:
        needed = text_width(text)
        if needed + 6 <= inside or needed + 8 <= beside:
            return text, needed + 6 > inside
    return "", False
