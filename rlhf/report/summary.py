"""The summary of a finished run: on the terminal, and as report.md in the run directory."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from rlhf.disk import naming
from rlhf.evaluation.sampled import Sampled, reward_parts
from rlhf.pipeline.recipe import BEST_OF_N, last_evaluation
from rlhf.pipeline.run import GateError, GateResult, Run, as_markdown_list, with_outcome
from rlhf.printable import printable
from rlhf.report.compare import METHOD_WORDS, comparison_cells, comparison_rows
from rlhf.report.over_seeds import policies_json
from rlhf.report.page.write import NAME, write_page
from rlhf.report.policies import PICTURE, cost_of, write_picture
from rlhf.report.verdict import UNTRAINED_VERDICT, decisive, outcome, verdict
from rlhf.tracking.progress import clock
from rlhf.tracking.redaction import RedactingConsole, redacted_text
from rlhf.tracking.tables import Cells, shown

SCALES = {"artifact_bytes": 1e-6, "adapter_bytes": 1e-6, "token_seconds": 1e3, "token_seconds_base": 1e3}
"""Metric -> factor to the unit in which its headline shows it."""
COMPARED_METRICS = {
    "gold_mean": ("gold score", "+z.3f"),
    "judge_mean": ("judge's score", "+z.3f"),
    "score_mean": ("learned score", "+z.3f"),
    "kl": ("KL from {}, nats per sequence", "z.2f"),
    "length_mean": ("length, tokens", "z.1f"),
    "stop_rate": ("ends by itself", ".0%"),
    "distinct_2": ("distinct bigrams", "z.2f"),
    "task_loss": ("loss on held-out answers", "z.3f"),
    "task_gain": ("task gain, nats per token", "+z.3f"),
    "retention_perplexity_ratio": ("perplexity against base", "z.3f"),
    "question_accuracy": ("questions answered right", "z.3f"),
}
"""Metrics of `evaluate` that end in /POLICY: (words, format)."""
GAINS_OVER_START = {
    "win_rate": ("win rate against {}", "z.2f"),
    "gold_gain": ("gold gain over {}", "+z.2f"),
    "gold_over_base": ("gold gain over base", "+z.2f"),
    "judge_gain": ("judge's gain over {}", "+z.2f"),
    "judge_over_base": ("judge's gain over base", "+z.2f"),
}
"""Metrics with intervals, for every policy but {}, the one that PPO started from: (words, format)."""
MARKS = {
    "passed": "[green]passed[/]",
    "failed": "[bold red]FAILED[/]",
    "cannot tell": "[yellow]cannot tell[/]",
    "not checked": "[dim]not checked[/]",
}
ENDED_UNTRAINED_VERDICT = "A gate ended the run; a random model says nothing about quality."
"""The verdict of a run of a random model that a gate ended."""
MAX_SHOWN_CHARS = 400
"""Most characters shown of a prompt or an answer."""


class ShownAnswer(NamedTuple):
    """One policy's answer, cut to one readable line."""

    policy: str
    text: str
    scores: str
    """The scores as text, the gold score first if there is one."""


def print_summary(run: Run, console: Console, *, ended_by: GateError | None = None) -> None:
    """Show the results of the run, and write them to report.md and summary.json. Only rank 0 does this.

    Args:
        ended_by: the failed gate that ended the run.
    """
    if not run.writes:
        return
    if isinstance(console, RedactingConsole):
        console.has_times = False
    run.verdict, run.outcome = verdict(run), outcome(run)
    if ended_by is not None and run.verdict == UNTRAINED_VERDICT:
        run.verdict = ENDED_UNTRAINED_VERDICT
    decided = decisive(run)
    run.judged_by = None if decided is None else decided.metric
    _, metrics = last_evaluation(run.stages)
    compared = {name: title for name, title in policies_of(run).items() if f"length_mean/{name}" in metrics}
    run.policies = policies_json(compared, {name: cost_of(run, name) for name in compared})
    run.write()
    report = write_report(run)
    _print_cells(stage_cells(run), console, right={2})
    policies = policy_cells(run)
    if policies.rows:
        console.print()
        _print_cells(policies, console, right=set(range(1, len(policies.headings))))
    comparison = comparison_cells(run.metrics_of("compare"))
    if comparison.rows:
        console.print()
        _print_cells(comparison, console, right=set(range(1, len(comparison.headings))))
    for prompt, answers in shown_answers(run):
        console.print(f"\n[bold]{escape(prompt)}[/]", highlight=False)
        _print_answers(answers[-2:], console)
    if run.gates:
        console.print()
        _print_gates(run.gates, console)
    console.print(f"\nReport: {report}", highlight=False, soft_wrap=True)
    write_page_too(run, console)
    for words, path in places(run):
        console.print(f"{words}: {run.directory / path}", highlight=False, soft_wrap=True)
    if run.verdict:
        console.print(
            f"\n[bold]Verdict.[/] {escape(with_outcome(run.outcome, run.verdict))}", highlight=False
        )


def write_page_too(run: Run, console: Console) -> None:
    """Write report.html. The run is complete without it, so an error is printed and does not end the run."""
    try:
        console.print(f"Page: {write_page(run.directory)}", highlight=False, soft_wrap=True)
    except Exception as error:  # of any type: it must not end a run after hours of training
        message = f"Page: {run.directory / NAME} could not be written ({type(error).__name__}: {error}). "
        console.print(f"{message}Everything else was.", highlight=False, markup=False, soft_wrap=True)


def write_report(run: Run) -> Path:
    """Write report.md into the run directory."""
    text = verdict(run) if run.verdict is None else run.verdict
    heading = [f"**Verdict.** {as_markdown_list(with_outcome(outcome(run), text))}"] if text else []
    parts = [f"# Run {run.directory.name}", *heading, stage_cells(run).markdown()]
    policies = policy_cells(run)
    if policies.rows:
        parts += ["## Policies", policies.markdown(), *write_picture(run, policies_of(run))]
    comparison = comparison_cells(run.metrics_of("compare"))
    if comparison.rows:
        picture = Path("artifacts", "compare", "comparison.png")
        shown = [f"![Quality against cost]({picture})"] if (run.directory / picture).is_file() else []
        parts += ["## Prompting, retrieval, tuning", comparison.markdown(), *shown]
    answers = list(shown_answers(run))
    if answers:
        parts.append("## Answers side by side")
    for prompt, lines in answers:
        parts += [_quoted(prompt), "\n".join(map(_answer_bullet, lines))]
    if run.gates:
        parts += ["## Gates", "\n".join(_gate_bullet(gate) for gate in run.gates)]
    parts += ["## Files", "\n".join(f"- {words}: `{path}`" for words, path in places(run))]
    path = run.directory / "report.md"
    with naming(path):
        path.write_text(printable(redacted_text("\n\n".join(parts))) + "\n", encoding="utf-8")
    return path


def stage_cells(run: Run) -> Cells:
    """One row per stage: status, time, and headline metrics."""
    rows = []
    for name, stage in run.stages.items():
        headlines = [
            f"{run.chain[name].filled(each.words)} {format(value * SCALES.get(metric, 1.0), each.format)}"
            for metric, each in (run.chain[name].metrics if name in run.chain else {}).items()
            if each.words
            and (value := stage["metrics"].get(f"{name}/{metric}")) is not None
            and (value or each.is_shown_at_zero)
        ]
        time = clock(stage["seconds"]) if stage["status"] != "reused" else "-"
        rows.append([name, stage["status"], time, ", ".join(headlines)])
    return Cells(["stage", "", "time", "result"], rows)


def policies_of(run: Run) -> dict[str, str]:
    """Policies that can be evaluated -> their titles in tables, in the order in which they are made."""
    evaluation, _ = last_evaluation(run.stages)
    judge = run.chain.get(evaluation)
    titles = {"base": "base"}
    for name, each in run.chain.items():
        if each.makes == "policy":
            titles |= {"init": "PPO's start"} if name == "ppo" else {}
            titles |= {name: each.full_title}
    asked = getattr(judge, "candidates", [])
    models = {each.model: titles.get(each.model, label) for each in asked if (label := each.name)}
    several = f"best of {getattr(judge, 'best_of', 'n')}"
    words = METHOD_WORDS | {"best_of_n": several}
    ordered: dict[str, str] = {}
    for model, title in (titles | models).items():
        ordered[model] = title
        for each in asked:
            if each.model == model and each.method != "zero_shot":
                alone = each.name == BEST_OF_N
                ordered[each.name] = several if alone else f"{title}, {words[each.method]}"
            elif each.model == model:
                ordered[each.name] = title
    return ordered


def policy_cells(run: Run) -> Cells:
    """One row per metric, one column per policy; no rows if `evaluate` was not part of the run."""
    evaluation, metrics = last_evaluation(run.stages)
    titles = policies_of(run)
    names = [name for name in titles if f"length_mean/{name}" in metrics]
    start = titles.get(getattr(run.chain.get(evaluation), "start", ""), "SFT")
    rows = []
    of_harness = {
        metric: (" ".join(metric.split("/")[1:]), "z.3f")
        for metric in (name.rpartition("/")[0] for name in metrics)
        if metric.startswith("lm_eval/")
    }
    compared: dict[str, tuple[str, str]] = {}
    for metric, (words, spec) in COMPARED_METRICS.items():
        parts = reward_parts(metric, metrics)
        compared[metric] = (f"{words}, all together" if parts else words, spec)
        compared |= {f"{metric}/{part}": (f"  {part} alone", spec) for part in parts}
    for metric, (words, spec) in (compared | of_harness).items():
        values = [metrics.get(f"{metric}/{name}") for name in names]
        if any(value is not None for value in values):
            rows.append(
                [words.format(start), *("-" if value is None else format(value, spec) for value in values)]
            )
    for metric, (words, spec) in GAINS_OVER_START.items():
        sampled = [Sampled.found(f"{metric}/{name}", metrics) for name in names]
        is_twice = start == "base" and metric.endswith("_over_base")  # the gain over the start
        if any(sampled) and not is_twice:
            cells = ["-" if each is None else format(each.value, spec) for each in sampled]
            rows.append([words.format(start), *cells])
            cells = ["-" if each is None else f"{each.low:{spec}}..{each.high:{spec}}" for each in sampled]
            rows.append(["  95% interval, over prompts", *cells])
    shown = {*COMPARED_METRICS, *GAINS_OVER_START, "question_accuracy_change"}
    rows += comparison_rows(metrics, names, shown)
    rows += [[words, *cells] for words, cells in cost_cells(run, names)]
    prompts = int(metrics.get("prompts", 0))
    heading = f"{prompts} prompt{'s' * (prompts != 1)}"
    if evaluation != "evaluate":
        heading += f" ({evaluation})"
    return Cells([heading, *(titles[name] for name in names)], rows)


def cost_cells(run: Run, names: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Time and memory of each policy; no rows if no cost is known."""
    costs = [cost_of(run, name) for name in names]
    if any(costs):
        yield "seconds, all its stages", ["-" if cost is None else f"{cost.seconds:,.0f}" for cost in costs]
    if any(cost is not None and cost.gib is not None for cost in costs):
        gibs = [None if cost is None else cost.gib for cost in costs]
        yield "peak memory of its stage, GiB", ["-" if gib is None else f"{gib:.2f}" for gib in gibs]


def shown_answers(run: Run) -> Iterator[tuple[str, list[ShownAnswer]]]:
    """The first prompts, as many as `evaluate.num_shown` says, each with every policy's answer."""
    evaluation, _ = last_evaluation(run.stages)
    if not run.stages.get(evaluation, {}).get("artifact"):
        return
    # Not from the artifact: num_shown is not part of its key, so a reused artifact may have another value.
    num_shown = _keys_of(run, evaluation)["num_shown"]
    path = Path(run.stages[evaluation]["artifact"]) / "comparison.jsonl"
    with path.open(encoding="utf-8") as file:
        for line in islice(file, num_shown):
            row = json.loads(line)
            yield (
                _conversation(row["prompt"]),
                [
                    ShownAnswer(words, _one_line(row[name]["response"]), _scores(row[name]))
                    for name, words in policies_of(run).items()
                    if name in row
                ],
            )


def _keys_of(run: Run, stage: str) -> dict[str, Any]:
    config = yaml.safe_load((run.directory / "config.yaml").read_text(encoding="utf-8"))
    keys: dict[str, Any] = config[stage]
    return keys


def gate_text(gate: GateResult) -> str:
    """A gate with its value, its interval and its bound."""
    return f"{gate.stage}/{gate.name} = {gate.figure}, wanted {gate.bound}"


def places(run: Run) -> Iterator[tuple[str, Path]]:
    """The run's results: (words, path relative to its directory)."""
    for name, each in reversed([*run.chain.items()]):
        if each.makes and run.stages.get(name, {}).get("artifact"):
            yield f"{each.full_title[:1].upper()}{each.full_title[1:]} model", Path("artifacts", name)
    evaluation, _ = last_evaluation(run.stages)
    if run.stages.get(evaluation, {}).get("artifact"):
        yield "All answers", Path("artifacts", evaluation, "comparison.jsonl")
    if (run.directory / PICTURE).exists():
        yield "Policies compared", Path(PICTURE)
    if run.stages.get("compare", {}).get("artifact"):
        for words, name in (("Comparison", "comparison.md"), ("Quality against cost", "comparison.png")):
            if (run.directory / "artifacts" / "compare" / name).is_file():
                yield words, Path("artifacts", "compare", name)
    yield "Metrics", Path("metrics.jsonl")
    yield "Samples", Path("samples.jsonl")


def _print_cells(cells: Cells, console: Console, right: set[int]) -> None:
    console.print(shown(cells, right), highlight=False)


def _print_answers(answers: Iterable[ShownAnswer], console: Console) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(style="cyan", no_wrap=True)
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    for answer in answers:
        grid.add_row(f"  {answer.policy}", answer.scores.partition(",")[0], escape(answer.text))
    console.print(grid, highlight=False)


def _print_gates(gates: Iterable[GateResult], console: Console) -> None:
    grid = Table.grid(padding=(0, 2, 0, 0))
    for gate in gates:
        advice = f"\n{escape(gate.advice)}" if gate.advice else ""
        grid.add_row(MARKS[gate.outcome], f"{escape(gate_text(gate))}{advice}")
    console.print(grid, highlight=False)


def _answer_bullet(answer: ShownAnswer) -> str:
    scores = f" ({answer.scores})" if answer.scores else ""
    return f"- {answer.policy}: {_quoted(answer.text)}{scores}"


def _gate_bullet(gate: GateResult) -> str:
    word = f"**{gate.outcome}**" if gate.outcome == "failed" else gate.outcome
    return f"- {word}: {gate_text(gate)}. {gate.advice}".rstrip()


def _scores(answer: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{kind} -" if answer[kind] is None else f"{kind} {answer[kind]:+z.2f}"
        for kind in ("gold", "judge", "score")
        if kind in answer
    )


def _conversation(messages: Iterable[Mapping[str, str]]) -> str:
    turns = list(messages)
    if len(turns) == 1:
        return _one_line(turns[0]["content"])
    return " / ".join(f"{turn['role']}: {_one_line(turn['content'])}" for turn in turns)


def _one_line(text: str) -> str:
    # A model may write terminal control characters.
    line = "".join(c if c.isprintable() else "\ufffd" for c in " ".join(text.split()))
    return line if len(line) <= MAX_SHOWN_CHARS else f"{line[:MAX_SHOWN_CHARS]} ..."


def _quoted(text: str) -> str:
    """Markdown must not interpret what a model wrote."""
    return f"`{text.replace('`', chr(39))}`" if text else "(empty)"
