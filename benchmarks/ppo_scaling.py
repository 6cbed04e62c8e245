"""Is a PPO step's time proportional to its real tokens, and what determines its memory?

    python benchmarks/ppo_scaling.py
    python benchmarks/ppo_scaling.py --peft lora --directory lora
    python benchmarks/ppo_scaling.py --model tiny       # small sizes too: does it run?

Four sweeps of the `uniform` workload (workloads.py). All responses of a point are equally long, and all
episodes are in one minibatch:

    response length   --lengths, in batches of --episodes
    batch             --batches, with responses of --new-tokens
    micro-batch       --micro-batches, in batches of --memory-episodes with responses of --memory-new-tokens
    vocabulary        the model's own times --vocabularies, in the same batches

Every point is a fresh process (run_rlhf.py); its seconds are the median over the steps except the first. Time
is fitted to the real tokens, prompts and responses together, by least squares: for each of the first two
sweeps, and for both together. Their micro-batches have --micro-batch-tokens. A larger vocabulary is the same
model with rows of zeros appended to its embeddings, which are rarely sampled. The memory of weights,
gradients and optimizer states is computed, not measured: 4 + 4 + 8 bytes per trained parameter for fp32
masters, their gradients and Adam's moments, and each model's own copy.

The directory gets ppo_scaling.json with every point, and two pictures, each for a light and a dark page.
Points that it already has, with the same settings, are not measured again: remove it after a change of the
code.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import correlation, linear_regression, median
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from look import OTHER, OURS, THEIRS, label, new_console, new_figure, save
from ppo_step import run
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from workloads import make_work, reward_model

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
WANTED_R2 = 0.98
TINY: dict[str, Any] = {
    "lengths": [8, 16, 32], "episodes": 4, "batches": [4, 8, 16], "new_tokens": 8,
    "micro_batches": [128, 512], "vocabularies": [1, 4], "memory_episodes": 8, "memory_new_tokens": 16,
}  # fmt: skip
"""Sizes for --model tiny."""
console = new_console()


@dataclass(frozen=True)
class ModelShape:
    """A point to measure."""

    sweep: str
    episodes: int
    new_tokens: int
    micro_batch_tokens: int
    vocabulary: int = 1
    """Factor of the model's own vocabulary."""


@dataclass(frozen=True)
class Settings:
    """Settings that all points share."""

    model: str
    precision: str
    peft: str
    steps: int


@dataclass
class Point:
    """A measured point."""

    shape: ModelShape
    settings: Settings
    seconds: list[float]
    """Seconds of each step, the warm-up included."""
    phases: list[dict[str, float]]
    real_tokens: list[float]
    """Tokens of prompts and responses in each step."""
    positions_a_token: float
    peak_bytes: int
    state_bytes: int | None
    """Computed bytes of weights, gradients and optimizer states; None with an adapter."""
    vocabulary_size: int
    how: str
    """Description of the precision."""
    versions: dict[str, str]

    @property
    def step_seconds(self) -> float:
        """Median over the steps, without the warm-up."""
        return median(self.seconds[1:])

    @property
    def step_tokens(self) -> float:
        """Median over the steps, without the warm-up."""
        return median(self.real_tokens[1:])


class Fit(NamedTuple):
    """seconds = intercept + slope * real tokens."""

    slope: float
    intercept: float
    r2: float


def shapes(options: argparse.Namespace) -> list[ModelShape]:
    """All points, the cheap ones first."""
    fixed = options.micro_batch_tokens
    memory = (options.memory_episodes, options.memory_new_tokens)
    return [
        *(ModelShape("response length", options.episodes, length, fixed) for length in options.lengths),
        *(ModelShape("batch", episodes, options.new_tokens, fixed) for episodes in options.batches),
        *(ModelShape("micro-batch", *memory, tokens) for tokens in options.micro_batches),
        *(ModelShape("vocabulary", *memory, fixed, factor) for factor in options.vocabularies),
    ]


def measure(shape: ModelShape, settings: Settings, directory: Path) -> Point:
    """Run one point in a separate process."""
    work = make_work(
        "uniform", directory, steps=settings.steps, peft=settings.peft, precision=settings.precision,
        model=settings.model, episodes=shape.episodes, new_tokens=shape.new_tokens,
    )  # fmt: skip
    work["overrides"] = [f"ppo.micro_batch_tokens={shape.micro_batch_tokens}"]
    if shape.vocabulary > 1:
        model = with_vocabulary(Path(work["model"]), shape.vocabulary)
        work |= {"model": str(model), "reward": str(reward_model(directory, model, settings.peft))}
    answer = run(sys.executable, "run_rlhf.py", work, directory / "ppo_scaling.log")
    return Point(
        shape, settings, answer["seconds"], answer["phases"],
        [step["prompt_tokens"] + step["response_tokens"] for step in answer["metrics"]],
        answer["positions_a_token"], answer["peak_bytes"],
        state_bytes(Path(work["model"]), answer["precision"]) if settings.peft == "none" else None,
        AutoConfig.from_pretrained(work["model"]).vocab_size, answer["precision"], answer["versions"],
    )  # fmt: skip


def with_vocabulary(model: Path, factor: int) -> Path:
    """The model with `factor` times its vocabulary, saved next to it."""
    target = model.with_name(f"{model.name}-vocabulary-{factor}")
    if not (target / "config.json").exists():
        larger: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        size = larger.config.vocab_size
        larger.resize_token_embeddings(factor * size, mean_resizing=False)
        with torch.no_grad():
            larger.get_input_embeddings().weight[size:] = 0.0
            larger.get_output_embeddings().weight[size:] = 0.0
        larger.save_pretrained(target)
        AutoTokenizer.from_pretrained(model).save_pretrained(target)
    return target


def state_bytes(directory: Path, how: str) -> int:
    """Bytes of weights, gradients and optimizer states of policy and critic, and of the frozen models'
    weights, without scalar heads."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        policy = AutoModelForCausalLM.from_config(config)
    trunk: torch.nn.Module = getattr(policy, policy.base_model_prefix)
    parameters = sum(each.numel() for model in (policy, trunk) for each in model.parameters())
    copy = 2 if how.startswith("bf16") else 4
    return parameters * (copy + 4 + 4 + 8) + parameters * copy


def fit(points: Sequence[Point]) -> Fit:
    """Fit by least squares."""
    tokens, seconds = [p.step_tokens for p in points], [p.step_seconds for p in points]
    slope, intercept = linear_regression(tokens, seconds)
    return Fit(slope, intercept, correlation(tokens, seconds) ** 2)


def load_points(path: Path) -> list[Point]:
    """Load the points that were measured before."""
    if not path.exists():
        return []
    return [
        Point(**{**row, "shape": ModelShape(**row["shape"]), "settings": Settings(**row["settings"])})
        for row in json.loads(path.read_text(encoding="utf-8"))["points"]
    ]


def write(path: Path, points: Sequence[Point]) -> None:
    """Write every point, and the fits of the available sweeps."""
    fits = {name: found._asdict() for name, found in fits_of(points).items()}
    path.write_text(
        json.dumps({"fits": fits, "points": [asdict(point) for point in points]}, indent=1), encoding="utf-8"
    )


def fits_of(points: Sequence[Point]) -> dict[str, Fit]:
    """Fits of the sweeps over tokens that have enough points."""
    timed = {name: [p for p in points if p.shape.sweep == name] for name in ("response length", "batch")}
    timed["both"] = [point for each in timed.values() for point in each]
    return {name: fit(found) for name, found in timed.items() if len(found) > 2}


def show(points: Sequence[Point]) -> None:
    """Print a table of all points, and the fits."""
    table = Table(
        "sweep", "episodes", "new tokens", "micro-batch tokens", "vocabulary", "real tokens", "seconds",
        "tokens/s", "positions per token", "peak GB", "state GB", box=None,
    )  # fmt: skip
    for point in points:
        shape, state = point.shape, point.state_bytes
        table.add_row(
            shape.sweep, str(shape.episodes), str(shape.new_tokens), str(shape.micro_batch_tokens),
            str(point.vocabulary_size), f"{point.step_tokens:.0f}", f"{point.step_seconds:.2f}",
            f"{point.step_tokens / point.step_seconds:.0f}", f"{point.positions_a_token:.2f}",
            f"{point.peak_bytes / 1e9:.2f}", "" if state is None else f"{state / 1e9:.2f}",
        )  # fmt: skip
    console.print(table)
    for name, found in fits_of(points).items():
        verdict = "as wanted" if found.r2 >= WANTED_R2 else f"less than the {WANTED_R2} that are wanted"
        console.print(
            f"{name}: {found.slope * 1e3:.2f} ms per token and {found.intercept:.2f} s, "
            f"R² {found.r2:.4f}, {verdict}"
        )


def draw_time(points: Sequence[Point]) -> Figure:
    """Seconds over real tokens, with the fitted lines."""
    figure, (axes,) = new_figure(title(points), 1)
    for name, colour, marker in (("response length", OURS, "o"), ("batch", THEIRS, "s")):
        found = [point for point in points if point.shape.sweep == name]
        line = fits_of(found).get(name)
        tokens = [point.step_tokens for point in found]
        text = name if line is None else f"{name}: {line.slope * 1e3:.1f} ms per token, R² {line.r2:.3f}"
        axes.plot(tokens, [p.step_seconds for p in found], marker, color=colour, label=text)
        if line is not None:
            ends = [0.0, max(tokens)]
            axes.plot(ends, [line.intercept + line.slope * x for x in ends], "-", color=colour)
    label(axes, "prompt and response tokens of a step", "seconds of a step")
    return figure


def draw_memory(points: Sequence[Point]) -> Figure:
    """Peak memory over the varied quantities."""
    panels: list[tuple[str, str, Callable[[Point], float]]] = [
        ("micro-batch", "tokens of a micro-batch (at most)", lambda p: p.shape.micro_batch_tokens),
        ("batch", "episodes of a batch", lambda p: p.shape.episodes),
        ("vocabulary", "vocabulary (thousand tokens)", lambda p: p.vocabulary_size / 1e3),
    ]
    figure, every_axes = new_figure(title(points), len(panels))
    for axes, (name, x_label, x_of) in zip(every_axes, panels, strict=True):
        found = sorted((p for p in points if p.shape.sweep == name), key=x_of)
        x = [x_of(point) for point in found]
        axes.plot(x, [p.peak_bytes / 1e9 for p in found], "o-", color=OURS, label="of the process")
        states = [p.state_bytes / 1e9 for p in found if p.state_bytes is not None]
        if len(states) == len(x):
            axes.plot(x, states, "s--", color=OTHER, label="weights, gradients, Adam (counted)")
        label(axes, x_label, "peak memory (GB)")
    return figure


def title(points: Sequence[Point]) -> str:
    """Title with the settings that the points share."""
    settings = points[0].settings
    trained = "all parameters" if settings.peft == "none" else settings.peft
    return f"PPO, model={settings.model}, {trained}, {points[0].how.partition(' ')[0]}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--peft", choices=["none", "lora"], default="none")
    parser.add_argument("--steps", type=int, default=3, help="of each point; the first one warms up")
    parser.add_argument("--lengths", type=int, nargs="*", default=[32, 64, 128, 256, 512])
    parser.add_argument("--episodes", type=int, default=8)
    parser.add_argument("--batches", type=int, nargs="*", default=[8, 16, 32, 64, 128])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--micro-batches", type=int, nargs="*", default=[512, 1024, 2048, 4096])
    parser.add_argument("--vocabularies", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--memory-episodes", type=int, default=40)
    parser.add_argument("--memory-new-tokens", type=int, default=64)
    parser.add_argument("--directory", type=Path, default=HERE / ".work", help="for models, points, pictures")
    if parser.parse_known_args(arguments)[0].model == "tiny":
        parser.set_defaults(**TINY)
    options = parser.parse_args(arguments)
    if options.steps < 2:
        parser.error("--steps must be 2 or more: the first one warms up")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    options = parse(arguments)
    directory: Path = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "ppo_scaling.json"
    settings = Settings(options.model, options.precision, options.peft, options.steps)
    known = {(point.shape, point.settings): point for point in load_points(path)}
    points: list[Point] = []
    for shape in shapes(options):
        if (shape, settings) not in known:
            console.print(f"measuring {shape}")
            known[shape, settings] = measure(shape, settings, directory)
            write(path, list(known.values()))
        points.append(known[shape, settings])
    write(path, points)
    show(points)
    save(lambda: draw_time(points), directory / "ppo-scaling-time.svg")
    save(lambda: draw_memory(points), directory / "ppo-scaling-memory.svg")
    console.print(f"written: ppo_scaling.json, and ppo-scaling-*-light.svg and -dark.svg, in {directory}")


if __name__ == "__main__":
    main()
