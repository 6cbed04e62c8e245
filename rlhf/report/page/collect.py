"""The content of a run's page, read from the run's files. Needs no torch, and no config."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.evaluation.sampled import INTERVAL_SUFFIXES, Sampled, add_suffix, reward_parts
from rlhf.pipeline.defaults import Change
from rlhf.pipeline.recipe import kind_of
from rlhf.printable import printable
from rlhf.report.compare import INTERVAL, comparison_cells, comparison_rows
from rlhf.report.page.curves import (
    Bounds,
    Chart,
    Curve,
    correlation,
    extremes_of,
    healthy_range,
    in_order,
    logged,
    unit_of,
)
from rlhf.report.page.size import MAX_TEXT_CHARS, Limits, clipped, first_of, html_bytes, json_bytes
from rlhf.tracking.redaction import redacted_text

MAX_PROMPTS = 300
"""Most prompts whose answers a page has; the rest is in comparison.jsonl."""
MAX_SCATTER_POINTS = 300
"""Most points of one policy in a scatter plot."""
SAMPLES_BYTES = 400_000
"""Bytes at the end of samples.jsonl that are read."""
MAX_SHOWN_SAMPLES = 5
"""Most samples shown of each stage."""
NUM_OPEN_CURVES = 6
"""Curves of each stage that are shown at once; more are one click away."""
CALIBRATION = "calibration.jsonl"
GOLD_OVER_STEPS, CANDIDATES = "gold_over_steps.jsonl", "candidates.json"


@dataclass(frozen=True)
class StageFacts:
    """One stage of a run."""

    name: str
    status: str
    """ran, reused, failed, stopped, or to do."""
    key: str
    reads: tuple[str, ...]
    seconds: float
    """Seconds in this run; 0 if the stage was reused."""
    took: float | None
    """Seconds that it took to make the artifact, in this or an earlier run."""
    peak_gib: float | None
    hardware: str
    made: str
    """Time at which the artifact was made."""
    revision: str
    metrics: Mapping[str, float | None]
    """Its summary metrics, without the stage's name."""

    def figures(self) -> Iterator[tuple[str, float | None, str]]:
        """Its summary metrics: name, value, interval."""
        ends = {add_suffix(name, end) for name in self.metrics for end in INTERVAL_SUFFIXES[1:]}
        for name, value in self.metrics.items():
            if name in ends:
                continue
            sampled = sampled_of(name, self.metrics)
            shown = f"{sampled.low:.4g} to {sampled.high:.4g} ({sampled.rows:,} rows)" if sampled else ""
            yield name, value, shown


@dataclass(frozen=True)
class Table:
    """Headings and rows of texts."""

    headings: list[str]
    rows: list[list[str]]
    left_out: int = 0
    """How many rows are not on the page."""

    @property
    def bytes(self) -> int:
        """Bytes of the rows in the page."""
        return sum(map(html_bytes, self.rows))

    def within(self, limits: Limits) -> Table:
        """The first rows, as many as fit on the page."""
        rows = [[clipped(cell, limits.characters) for cell in row] for row in self.rows]
        kept = first_of(rows, limits.rows, html_bytes)
        return Table(self.headings, kept, self.left_out + len(rows) - len(kept))


@dataclass
class RunFacts:
    """Everything of one run that a page shows."""

    name: str
    directory: Path
    verdict: str | None
    outcome: str | None
    stages: list[StageFacts]
    gates: list[dict[str, Any]]
    changed: list[Change] | None
    """None for a run of a version that did not record this."""
    bounds: dict[str, dict[str, Bounds]]
    """Stage -> gate -> its bound."""
    healthy: dict[str, dict[str, tuple[float | None, float | None, bool]]]
    """Stage -> curve -> its healthy range, and whether that is relative to the curve's start: see
    `rlhf.pipeline.metrics.Healthy`. Empty for a run of a version that did not record this."""
    curves: dict[str, dict[str, Curve]]
    answers: dict[str, Any] = field(default_factory=dict)
    """policies: their names; titles: policy -> its title in tables; before and after: the two policies shown
    first; kinds: the known kinds of score; rows: prompt and answers; left_out: number of prompts that are not
    on the page."""
    samples: Sequence[Mapping[str, Any]] = ()
    """The last samples, the newest first, for a run that has compared no policies (yet)."""
    gold_over_steps: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """Policy -> KL and gold score of its held-out answers, evaluation by evaluation."""
    candidates: Mapping[str, Any] = field(default_factory=dict)
    """Who was compared, and with what: candidates.json of the evaluation. Empty for a run of a version that
    did not record this."""
    titles: Mapping[str, str] = field(default_factory=dict)
    """Policy -> its title in tables; empty for a run of a version that did not record this."""
    price: float | None = None
    """Price of a GPU hour, if `plan.price_per_gpu_hour` is set."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of gates and of changed keys that are not on the page."""

    def stage(self, name: str) -> StageFacts | None:
        """The stage with this name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def evaluation(self) -> StageFacts | None:
        """The last stage that compared policies: an `evaluate`, or else `compare`."""
        by_kind = {kind_of(each.name): each for each in self.stages if each.metrics}
        return by_kind.get("evaluate") or by_kind.get("compare")

    def within(self, limits: Limits) -> RunFacts:
        """A copy with as many answers, gates and changed keys as fit on the page."""
        most = limits.characters
        gates = [
            {key: clipped(each, most) if isinstance(each, str) else each for key, each in gate.items()}
            for gate in self.gates
        ]
        changed = [_clipped(each, most) for each in self.changed or ()]
        kept = first_of(gates, limits.rows, lambda gate: html_bytes([*map(str, gate.values())], 60))
        shown_changes = first_of(
            changed, limits.rows, lambda each: html_bytes([*map(str, each.values())], 30)
        )
        answers = self.answers
        if answers:
            rows = first_of(answers["rows"], limits.answers, json_bytes)
            left_out = answers["left_out"] + len(answers["rows"]) - len(rows)
            answers = answers | {"rows": rows, "left_out": left_out}
        return replace(
            self, gates=kept, changed=None if self.changed is None else shown_changes, answers=answers,
            verdict=None if self.verdict is None else clipped(self.verdict, most),
            samples=first_of(self.samples, limits.answers, json_bytes),
            left_out={"gates": len(gates) - len(kept), "changed": len(changed) - len(shown_changes)},
        )  # fmt: skip


def _clipped(change: Change, most: int) -> Change:
    """A changed key with values of at most `most` characters."""
    default, value = clipped(change["default"], most), clipped(change["value"], most)
    return {"key": change["key"], "default": default, "value": value}


def read_run(directory: Path) -> RunFacts:
    """Read a run's files. Secrets are taken out, and control characters made visible."""
    summary = cleaned(json.loads((directory / "summary.json").read_bytes()))
    reads: dict[str, list[str]] = summary.get("reads", {})
    entries = summary["stages"]
    stages = [
        _stage(directory, name, entries.get(name), reads.get(name, [])) for name in {**reads, **entries}
    ]
    run = RunFacts(
        name=directory.name,
        directory=directory,
        verdict=summary["verdict"],
        outcome=summary.get("outcome"),
        stages=stages,
        gates=summary["gates"],
        changed=changed_keys(summary),
        bounds={
            stage: {metric: (low, high) for metric, (low, high) in each.items()}
            for stage, each in summary.get("bounds", {}).items()
        },
        healthy={
            stage: {curve: (low, high, from_start) for curve, (low, high, from_start) in each.items()}
            for stage, each in summary.get("healthy", {}).items()
        },
        curves=logged(directory / "metrics.jsonl"),
        titles={name: each["title"] for name, each in summary.get("policies", {}).items()},
    )
    prices = [each["value"] for each in run.changed or () if each["key"] == "plan.price_per_gpu_hour"]
    run.price = float(prices[0]) if prices else None
    if run.evaluation is not None:
        path = directory / "artifacts" / run.evaluation.name / "comparison.jsonl"
        if path.with_name(CANDIDATES).is_file():
            run.candidates = json.loads(path.with_name(CANDIDATES).read_bytes())
        run.answers = read_answers(path, policies_of(run))
        for row in read_rows(path.with_name(GOLD_OVER_STEPS)):
            run.gold_over_steps.setdefault(row["policy"], []).append(row)
    if not run.answers:
        run.samples = read_samples(directory / "samples.jsonl")
    if run.answers:
        names = run.answers["policies"]
        start = start_of(run)
        run.answers["before"] = start if start in names else names[0]
        run.answers["after"] = names[-1]
        run.answers["titles"] = run.titles
    return run


def policies_of(run: RunFacts) -> list[str]:
    """The compared policies, in the order in which they are made."""
    if run.evaluation is None:
        return []
    if run.candidates:
        return [each["name"] for each in run.candidates["candidates"]]
    return [name.partition("/")[2] for name in run.evaluation.metrics if name.startswith("length_mean/")]


def start_of(run: RunFacts) -> str | None:
    """The policy that the others are compared with."""
    return run.candidates["start"] if run.candidates else None


def cleaned(value: Any) -> Any:
    """A JSON value, its texts without secrets and control characters. Keys are not user texts and stay."""
    if isinstance(value, str):
        return printable(redacted_text(value))
    if isinstance(value, dict):
        return {key: cleaned(item) for key, item in value.items()}
    return [cleaned(item) for item in value] if isinstance(value, list) else value


def _stage(directory: Path, name: str, entry: Mapping[str, Any] | None, reads: list[str]) -> StageFacts:
    if entry is None:
        return StageFacts(name, "to do", "", tuple(reads), 0.0, None, None, "", "", "", {})
    manifest = _manifest(directory / "artifacts" / name / "manifest.json")
    cost = entry.get("cost") or {}
    peak = cost.get("peak_bytes")
    return StageFacts(
        name=name,
        status=entry["status"],
        key=entry["key"],
        reads=tuple(reads),
        seconds=entry["seconds"],
        took=cost.get("seconds"),
        peak_gib=None if peak is None else peak / 2**30,
        hardware=manifest.get("hardware", ""),
        made=manifest.get("created", ""),
        revision=manifest.get("git_revision") or "",
        metrics={metric.removeprefix(f"{name}/"): value for metric, value in entry["metrics"].items()},
    )


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError):  # the store was cleaned up, or the run is being written
        return {}
    return {
        name: cleaned(manifest[name]) for name in ("hardware", "created", "git_revision") if manifest[name]
    }


def changed_keys(summary: Mapping[str, Any]) -> list[Change] | None:
    """The keys that differ from the defaults, without the advice of gates, which a recipe words anew."""
    changed: list[Change] | None = summary.get("changed")
    return changed and [each for each in changed if not re.search(r"\.gates\..*\.advice$", each["key"])]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a small .jsonl file; none if there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def read_answers(path: Path, policies: list[str]) -> dict[str, Any]:
    """The answers side by side, as many as fit on a page; empty if there are none."""
    if not path.is_file():
        return {}
    with path.open(encoding="utf-8") as file:
        answered = (_answered(json.loads(line)) for line in islice(file, MAX_PROMPTS))
        rows = first_of(answered, Limits().answers, json_bytes)
    with path.open("rb") as whole:
        total = sum(1 for _ in whole)
    kinds = [
        kind
        for kind in ("gold", "judge", "score")
        if any(kind in answer for row in rows for answer in row["answers"].values())
    ]
    return {"policies": policies, "kinds": kinds, "rows": rows, "left_out": total - len(rows)}


def read_samples(path: Path) -> list[dict[str, Any]]:
    """The last logged samples, the newest first: those of the last step of each stage."""
    if not path.is_file():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - SAMPLES_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    rows: list[dict[str, Any]] = []
    for line in reversed(lines):
        with suppress(ValueError):  # half a line, at either end
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) and "stage" in row else []
    last: dict[str, Any] = {}
    for row in rows:
        last.setdefault(row["stage"], row.get("step"))
    counts = Counter[str]()
    kept = []
    for row in rows:
        counts[row["stage"]] += row.get("step") == last[row["stage"]]
        if row.get("step") == last[row["stage"]] and counts[row["stage"]] <= MAX_SHOWN_SAMPLES:
            kept.append(_sampled(row))
    return kept


def _sampled(row: Mapping[str, Any]) -> dict[str, Any]:
    facts = [] if row.get("step") is None else [f"step {row['step']}"]
    facts += [f"{row['tokens']} tokens"] if "tokens" in row else []
    facts += ["cut off"] if row.get("stopped") is False else []
    facts += [f"score {row['score']:.4g}"] if isinstance(row.get("score"), int | float) else []
    return {
        "stage": cleaned(str(row["stage"])),
        "prompt": [
            [turn["role"], cleaned(str(turn["content"])[:MAX_TEXT_CHARS])] for turn in row.get("prompt", [])
        ],
        "text": cleaned(str(row.get("response", ""))[:MAX_TEXT_CHARS]),
        "facts": " · ".join(facts),
    }


def _answered(row: Mapping[str, Any]) -> dict[str, Any]:
    answers = {
        name: {
            "text": cleaned(answer["response"][:MAX_TEXT_CHARS]),
            **{key: answer[key] for key in ("tokens", "stopped", "gold", "judge", "score") if key in answer},
        }
        for name, answer in row.items()
        if isinstance(answer, dict) and "response" in answer
    }
    prompt = [[turn["role"], cleaned(str(turn["content"])[:MAX_TEXT_CHARS])] for turn in row["prompt"]]
    return {"prompt": prompt, "answers": answers}


def sampled_of(name: str, metrics: Mapping[str, float | None]) -> Sampled | None:
    """A metric with its interval; None unless all of it is known and finite."""
    return Sampled.found(name, {key: value for key, value in metrics.items() if value is not None})


def stage_charts(run: RunFacts, stage: str) -> list[Chart]:
    """A stage's curves, one chart each, the most informative first."""
    curves, gates = run.curves.get(stage, {}), run.bounds.get(stage, {})
    healthy = run.healthy.get(stage, {})
    ranges = {name: healthy_range(curves[name], *each) for name, each in healthy.items() if name in curves}
    ranges |= gates
    return [
        Chart(
            f"{stage}/{name}",
            "step",
            name,
            [curves[name]],
            ranges.get(name, (None, None)),
            unit_of(name),
            extremes_of(name),
        )
        for name in in_order(curves, gates)
    ]


def over_kl(run: RunFacts) -> Chart | None:
    """Learned score and gold score over the KL from the start (Gao et al. 2022, arXiv:2210.10760)."""
    curves = []
    for stage, each in run.curves.items():
        if {"held_out_kl", "held_out_score"} <= {*each}:
            kl, score = each["held_out_kl"], each["held_out_score"]
            pairs = [(x, y) for x, y in zip(kl.y, score.y, strict=False) if x is not None]
            pairs.sort(key=lambda pair: pair[0])
            curves.append(
                Curve(f"learned score, {stage}'s steps", [x for x, _ in pairs], [y for _, y in pairs])
            )
    for policy, rows in run.gold_over_steps.items():
        known = sorted((row["kl"], row["gold"]) for row in rows if None not in (row["kl"], row["gold"]))
        curves.append(Curve(f"gold score, {policy}'s steps", [x for x, _ in known], [y for _, y in known]))
    if run.evaluation is not None:
        metrics = run.evaluation.metrics
        start, names = start_of(run), policies_of(run)
        for kind, words in SCORES.items():
            at = [
                (0.0 if name == start else metrics.get(f"kl/{name}"), metrics.get(f"{kind}_mean/{name}"))
                for name in names
            ]
            known = sorted((x, y) for x, y in at if x is not None and y is not None)
            if len(known) > 1:
                curves.append(
                    Curve(f"{words}, new prompts", [x for x, _ in known], [y for _, y in known], marks=True)
                )
    if not curves:
        return None
    return Chart("Score over KL", "KL from the start, nats per sequence", "score", curves)


SCORES = {"score": "learned score", "gold": "gold score", "judge": "judge's score"}
"""Kinds of scores of answers -> their names on the page."""


def over_length(run: RunFacts) -> tuple[Chart, list[str]] | None:
    """Each answer's score against its length, and the correlation of both, for each policy."""
    if not run.answers or not run.answers["kinds"]:
        return None
    kind = next(each for each in SCORES if each in run.answers["kinds"])
    curves, words = [], []
    for policy in run.answers["policies"]:
        answers = [row["answers"][policy] for row in run.answers["rows"] if policy in row["answers"]]
        known = [(each["tokens"], each[kind]) for each in answers if each.get(kind) is not None]
        known = sorted(known[:MAX_SCATTER_POINTS])
        x, y = [float(tokens) for tokens, _ in known], [score for _, score in known]
        if not x:
            continue
        title = run.titles.get(policy, policy)
        curves.append(Curve(title, x, [*y], marks=True))
        together = correlation(x, y)
        words.append(f"{title} {'no spread' if together is None else format(together, '+.2f')}")
    return (Chart("Score over length", "tokens of the answer", SCORES[kind], curves), words)


def calibrations(run: RunFacts) -> Iterator[tuple[str, Chart]]:
    """For each reward model, a chart of how often it is right against how sure it is."""
    for stage in run.stages:
        rows = read_rows(run.directory / "artifacts" / stage.name / CALIBRATION)
        if not rows:
            continue
        x, y = [row["confidence"] for row in rows], [row["accuracy"] for row in rows]
        named = f"{stage.name} ({sum(row['pairs'] for row in rows):,} held-out pairs)"
        yield (
            stage.name,
            Chart(
                "Calibration",
                "how sure (probability)",
                "how often right (share)",
                [Curve(named, x, y, marks=True)],
                extremes=(0.0, 1.0),
                diagonal=True,
            ),
        )


FORGETTING_METRICS = (
    ("perplexity", "perplexity of general texts"),
    ("retention_perplexity_ratio", "the same against base"),
    ("question_accuracy", "questions answered right"),
    ("question_accuracy_change", "the same against base"),
    ("task_loss", "loss on held-out answers"),
    ("task_gain", "the same, gained over base"),
)
COMPARED_METRICS = (
    ("gold_mean", "gold score"),
    ("judge_mean", "judge's score"),
    ("score_mean", "learned score"),
    ("win_rate", "win rate against the start"),
    ("gold_gain", "gold gain over the start"),
    ("gold_over_base", "gold gain over base"),
    ("judge_gain", "judge's gain over the start"),
    ("judge_over_base", "judge's gain over base"),
    ("kl", "KL from the start, nats"),
    ("length_mean", "length, tokens"),
    ("stop_rate", "ends by itself"),
    ("distinct_2", "distinct bigrams"),
)


def comparison_table(run: RunFacts) -> Table | None:
    """The table of `compare`, as on the terminal; None if it was not part of the run."""
    stage = run.stage("compare")
    metrics = {} if stage is None else stage.metrics
    cells = comparison_cells(dict(finite_or_never(metrics)))
    return Table(list(cells.headings), cells.rows) if cells.rows else None


def policy_table(run: RunFacts, which: tuple[tuple[str, str], ...]) -> Table | None:
    """Metrics of `evaluate` that end in /POLICY, with intervals: a row per metric, a column per policy."""
    if run.evaluation is None or kind_of(run.evaluation.name) != "evaluate":
        return None
    metrics = run.evaluation.metrics
    policies = policies_of(run)
    rows = []
    named: list[tuple[str, str]] = []
    for metric, words in which:
        parts = reward_parts(metric, metrics)
        named.append((metric, f"{words}, all together" if parts else words))
        named += [(f"{metric}/{part}", f"{part} alone") for part in parts]
    for metric, words in named:
        cells = []
        for policy in policies:
            value, sampled = metrics.get(f"{metric}/{policy}"), sampled_of(f"{metric}/{policy}", metrics)
            text = "-" if value is None else f"{value:.3g}"
            cells.append(f"{text} ({sampled.low:.3g} to {sampled.high:.3g})" if sampled else text)
        if any(cell != "-" for cell in cells):
            rows.append([words, *cells])
    return Table(["", *(run.titles.get(policy, policy) for policy in policies)], rows) if rows else None


def compared_table(run: RunFacts) -> Table | None:
    """What `evaluate` measured on each policy's answers: its own metrics, then those that it shares with
    `compare`, as on the terminal. Forgetting has a table of its own."""
    table = policy_table(run, COMPARED_METRICS)
    if table is None or run.evaluation is None:
        return None
    metrics = dict(finite_or_never(run.evaluation.metrics))
    shown = {metric for metric, _ in (*COMPARED_METRICS, *FORGETTING_METRICS)}
    rows = [*table.rows]
    for words, *cells in comparison_rows(metrics, policies_of(run), shown):
        if words == INTERVAL:
            both = zip(rows[-1][1:], cells, strict=True)
            cells = [cell if ends == "-" else f"{cell} ({ends.replace('..', ' to ')})" for cell, ends in both]
            words = rows.pop()[0]
        rows.append([words, *cells])
    return Table(table.headings, rows)


def finite_or_never(metrics: Mapping[str, float | None]) -> Iterator[tuple[str, float]]:
    """The metrics that have a value. JSON knows no infinity, so a break-even without one is "never"."""
    for name, value in metrics.items():
        if value is not None:
            yield name, value
        elif name.startswith("break_even"):
            yield name, math.inf
