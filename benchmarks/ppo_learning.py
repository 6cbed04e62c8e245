"""Quality that PPO reaches with equal episodes and in equal time, here and in TRL's last PPOTrainer.

    python benchmarks/ppo_learning.py --peer-python trl/bin/python
    python benchmarks/ppo_learning.py --peer-python trl/bin/python --model tiny   # small sizes: does it run?

The task is that of the demo (README.md). PPO sees only a learned reward model. VADER, which ranked the pairs,
judges answers to prompts that were not used for training. Each trainer's own policy samples them every few
steps at the temperature of training, while the clock is paused; this script judges them. The models are those
of the demo: `python -m rlhf stage=reward` trains them, once, or --demo names a run that has them.

Equal on both sides: SFT model, reward model, prompts and their order (another one for each seed), lengths,
episodes, minibatches, epochs, temperature, all parameters trained (no LoRA, unless --peft lora), one learning
rate for policy and value model (TRL has no second one) that falls linearly to 0 without a warm-up (TRL's
default), Adam's epsilon 1e-5, no weight decay, no clipping of gradients (TRL's trainer has none), KL
coefficient with the k1 estimator, gamma, lambda, both clip ranges, and the penalty of an answer without a
stop token (--missing-stop-penalty). The value model starts as the reward model in both (as in TRL's example).
Scores are raw in both, without normalisation and clipping, since TRL has none; advantages are whitened in
both, and rewards in neither (TRL's default).

Different, because the other side has no setting for it: TRL scores a cut answer without an end token, puts
the score one token after the last one, and weights the value loss (0.1, its default; Adam nearly cancels it);
this project appends the end token. Precision is each one's default: --precision auto is bf16 with fp32
masters here, if the hardware has it, and fp32 in TRL; --precision bf16 is bf16 here, and in TRL that of
`accelerate launch --mixed_precision bf16`. No setting was searched for either side. The policy of that step
is judged: this project's choice of the best policy is not used.

The directory has a JSON file for each trainer and seed. Runs with a file are not repeated; their settings
must be the same. Without --peer-python only this project's missing runs are made. The output is a table, and
ppo-learning-light.svg and -dark.svg with mean and standard deviation over the seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any, NamedTuple

from look import OURS, THEIRS, label, new_console, new_figure, save
from peer_work import Work
from ppo_step import run
from rich.table import Table
from transformers import PreTrainedTokenizerBase
from workloads import PPO

from rlhf.data.chat_template import prompt_ids, response_text
from rlhf.data.prepared import PreparedData
from rlhf.models.base import ModelConfig, load_tokenizer
from rlhf.ppo.trainer import prompt_batches
from rlhf.rewards.reward import vader_reward

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).parent
NAMES = {"rlhf": "this project", "trl": "TRL"}
COLOURS = {"rlhf": OURS, "trl": THEIRS}
TINY: dict[str, Any] = {
    "seeds": 2, "steps": 3, "episodes": 8, "minibatch_episodes": 4, "new_tokens": 8, "evaluate_every": 1,
    "held_out": 8,
}  # fmt: skip
"""Sizes for --model tiny."""
console = new_console()


class Evaluation(NamedTuple):
    """The policy on the held-out prompts."""

    episodes: int
    """Episodes so far."""
    seconds: float
    """Seconds of training so far."""
    gold: float
    """Mean VADER compound score, from -1 to 1."""
    tokens: float
    """Mean response length."""
    stop_rate: float


class Run(NamedTuple):
    """One trainer with one seed."""

    trainer: str
    seed: int
    evaluations: list[Evaluation]
    kl: list[float]
    """KL divergence from the SFT model, nats per response, over each step's episodes."""
    peak_bytes: int
    how: str
    """Description of the precision."""


class Demo(NamedTuple):
    """Artifacts of a finished run of the demo."""

    sft: Path
    reward: Path
    data: PreparedData
    tokenizer: PreTrainedTokenizerBase


def open_demo(directory: Path) -> Demo:
    """Open a run's artifacts in the store."""
    sft, reward, data = ((directory / "artifacts" / name).resolve() for name in ("sft", "reward", "prepare"))
    tokenizer = load_tokenizer(sft, ModelConfig(kind="local", path=str(sft)))
    return Demo(sft, reward, PreparedData(data), tokenizer)


def make_demo(directory: Path, model: str) -> Path:
    """Run the demo's chain up to the reward model."""
    target = directory / "runs" / f"{model}-reward"
    if not (target / "artifacts" / "reward").exists():
        command = ["-m", "rlhf", f"model={model}", "stage=reward", f"run_name={target.name}"]
        subprocess.run([sys.executable, *command], cwd=directory, check=True, stdout=sys.stderr)
    return target


def make_settings(options: argparse.Namespace, demo: Demo) -> dict[str, Any]:
    """Settings that all runs share; each seed adds its prompts."""
    return {
        **PPO, "sft_key": demo.sft.name, "reward_key": demo.reward.name, "new_tokens": options.new_tokens,
        "honour_stop": True, "stop_id": demo.tokenizer.eos_token_id, "temperature": options.temperature,
        "epochs": options.epochs, "episodes": options.episodes, "steps": options.steps,
        "minibatch_episodes": options.minibatch_episodes, "lr": options.lr, "kl_coef": options.kl_coef,
        "peft": options.peft, "precision": options.precision, "threads": len(os.sched_getaffinity(0)),
        "lr_schedule": "linear", "adam_eps": 1e-5, "missing_stop_penalty": options.missing_stop_penalty,
        "evaluate_every": options.evaluate_every, "num_held_out": options.held_out,
    }  # fmt: skip


def make_work(settings: dict[str, Any], demo: Demo, seed: int) -> dict[str, Any]:
    """The settings, a seed's prompts, and the settings as keys of this project."""
    rows = prompt_batches(demo.data.rows("ppo", "train"), settings["episodes"], settings["steps"], seed)
    prompts = [[row.prompt for row in batch] for batch in rows]
    held_out = [row.prompt for row in demo.data.rows("evaluate", "evaluation")[: settings["num_held_out"]]]
    ids = [[prompt_ids(demo.tokenizer, prompt) for prompt in batch] for batch in [*prompts, held_out]]
    optimizers = ("ppo.optim", "ppo.critic.optim")
    keys = [f"{optimizer}.warmup_fraction=0" for optimizer in optimizers]
    keys += [f"{optimizer}.eps={settings['adam_eps']}" for optimizer in optimizers]
    keys += [f"{optimizer}.max_grad_norm=inf" for optimizer in optimizers]
    keys += ["device=cpu"]  # as TRL's runner
    keys += ["ppo.score.clip=null", f"ppo.score.missing_stop_penalty={settings['missing_stop_penalty']}"]
    return {
        **settings, "model": str(demo.sft), "reward": str(demo.reward), "seed": seed, "prompts": prompts,
        "held_out_prompts": held_out, "batches": ids[:-1], "held_out": ids[-1], "overrides": keys,
    }  # fmt: skip


def train(trainer: str, python: str, work: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Run one trainer in a separate process."""
    log = directory / f"{trainer}-{work['seed']}.log"
    if trainer == "rlhf":
        return run(python, "learn_rlhf.py", work, log)
    known = {field.name: work[field.name] for field in fields(Work)}
    return run(python, "peer_trl.py", known, log)


def judge(answer: dict[str, Any], demo: Demo, work: dict[str, Any]) -> dict[str, Any]:
    """Replace each evaluation's token ids by scores; add the texts of the last evaluation."""
    judged, texts = [], []
    for done, rows in answer.pop("evaluations"):
        texts = [response_text(demo.tokenizer, ids) for ids in rows]
        judged.append(
            Evaluation(
                episodes=sum(answer["episodes"][:done]),
                seconds=sum(answer["seconds"][:done]),
                gold=float(vader_reward(work["held_out_prompts"], texts).mean()),
                tokens=mean(map(len, rows)),
                stop_rate=mean(ids[-1] == work["stop_id"] for ids in rows),
            )._asdict()
        )
    return {**answer, "evaluations": judged, "last_texts": texts}


def read_run(path: Path, settings: dict[str, Any]) -> Run:
    """Read a finished run; its settings must be these."""
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["settings"] != settings:
        names = [name for name in settings if found["settings"].get(name) != settings[name]]
        sys.exit(f"{path} comes from other settings ({', '.join(names)}). Give another --directory.")
    evaluations = [Evaluation(**row) for row in found["evaluations"]]
    trainer, seed = found["trainer"], found["seed"]
    return Run(trainer, seed, evaluations, found["kl"], found["peak_bytes"], found["precision"])


def columns(runs: Sequence[Run], field: str) -> list[list[float]]:
    """For each evaluation, the field's values over the seeds."""
    rows = [[float(getattr(evaluation, field)) for evaluation in run.evaluations] for run in runs]
    return [list(column) for column in zip(*rows, strict=True)]


def spread(values: Sequence[float]) -> float:
    """Standard deviation over the seeds."""
    return stdev(values) if len(values) > 1 else 0.0


def seconds_to_reach(runs: Sequence[Run], gold: float) -> float | None:
    """Seconds until the mean over the seeds reaches `gold`, interpolated linearly between evaluations."""
    seconds = list(map(mean, columns(runs, "seconds")))
    golds = list(map(mean, columns(runs, "gold")))
    if golds[0] >= gold:
        return seconds[0]
    for place in range(1, len(golds)):
        before, after = golds[place - 1], golds[place]
        if before < gold <= after:
            share = (gold - before) / (after - before)
            return seconds[place - 1] + share * (seconds[place] - seconds[place - 1])
    return None


def show(runs: dict[str, list[Run]]) -> None:
    """Print a row for each trainer, and their difference."""
    table = Table(
        "", "seeds", "gold before", "gold at the end", "KL of the last step", "response tokens",
        "end by themselves", "seconds", "seconds to the other's final gold", "peak GB", box=None,
    )  # fmt: skip
    final = {trainer: mean(columns(found, "gold")[-1]) for trainer, found in runs.items()}
    for trainer, found in runs.items():
        others = [other for other in runs if other != trainer]
        reached = [seconds_to_reach(found, final[other]) for other in others]
        last = [run.evaluations[-1] for run in found]
        golds = columns(found, "gold")
        table.add_row(
            NAMES[trainer], str(len(found)), f"{mean(golds[0]):+.3f} ± {spread(golds[0]):.3f}",
            f"{mean(golds[-1]):+.3f} ± {spread(golds[-1]):.3f}", f"{mean(run.kl[-1] for run in found):.2f}",
            f"{mean(each.tokens for each in last):.1f}", f"{mean(each.stop_rate for each in last):.0%}",
            f"{mean(each.seconds for each in last):.1f}",
            "".join("not reached" if seconds is None else f"{seconds:.1f}" for seconds in reached),
            f"{max(run.peak_bytes for run in found) / 1e9:.2f}",
        )  # fmt: skip
    console.print(table)
    for trainer, found in runs.items():
        console.print(f"{NAMES[trainer]}: {found[0].how}")
    if len(runs) == 2:
        show_difference(*runs.values())


def show_difference(ours: Sequence[Run], theirs: Sequence[Run]) -> None:
    """Print the difference by seed."""
    other = {run.seed: run.evaluations[-1].gold for run in theirs}
    gaps = [run.evaluations[-1].gold - other[run.seed] for run in ours if run.seed in other]
    if gaps:
        console.print(
            f"gold at the end, this project less TRL, seed by seed: {mean(gaps):+.3f} ± {spread(gaps):.3f}, "
            f"higher in {sum(gap > 0 for gap in gaps)} of {len(gaps)}"
        )


def draw(runs: dict[str, list[Run]]) -> Figure:
    """Gold score over episodes and over seconds."""
    figure, every_axes = new_figure("gold reward on held-out prompts, mean and deviation over seeds", 2)
    for axes, (field, text) in zip(
        every_axes, [("episodes", "episodes"), ("seconds", "seconds of training")], strict=True
    ):
        for trainer, found in runs.items():
            x = list(map(mean, columns(found, field)))
            golds = columns(found, "gold")
            middle, around = list(map(mean, golds)), list(map(spread, golds))
            name = f"{NAMES[trainer]} ({len(found)} seeds)"
            axes.plot(x, middle, "o-" if trainer == "rlhf" else "s-", color=COLOURS[trainer], label=name)
            low, high = ([m + sign * s for m, s in zip(middle, around, strict=True)] for sign in (-1, 1))
            axes.fill_between(x, low, high, color=COLOURS[trainer], alpha=0.15, linewidth=0)
        label(axes, text, "mean of VADER's compound score", from_0=False)
    return figure


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=["embedded", "tiny"], default="embedded")
    parser.add_argument("--demo", type=Path, help="a run with SFT and reward model, such as runs/demo")
    parser.add_argument("--peer-python", help="the python of TRL's environment (peer_trl.py)")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--peft", choices=["none", "lora"], default="none")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--episodes", type=int, default=48, help="of a step")
    parser.add_argument("--minibatch-episodes", type=int, default=24)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--lr", type=float, default=3e-5)
    parser.add_argument("--kl-coef", type=float, default=0.05)
    parser.add_argument("--missing-stop-penalty", type=float, default=0.5, help="raw score units")
    parser.add_argument("--evaluate-every", type=int, default=4, help="steps")
    parser.add_argument("--held-out", type=int, default=96, help="prompts")
    parser.add_argument("--directory", type=Path, default=HERE / ".work" / "learning")
    if parser.parse_known_args(arguments)[0].model == "tiny":
        parser.set_defaults(**TINY)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, then show all."""
    options = parse(arguments)
    directory: Path = options.directory.resolve()
    directory.mkdir(parents=True, exist_ok=True)
    demo = open_demo(options.demo or make_demo(directory, options.model))
    settings = make_settings(options, demo)
    pythons = {"rlhf": sys.executable, "trl": options.peer_python}
    runs: dict[str, list[Run]] = {}
    for seed in range(options.seeds):
        for trainer, python in pythons.items():
            path = directory / f"{trainer}-{seed}.json"
            if not path.exists() and python:
                work = make_work(settings, demo, seed)
                answer = judge(train(trainer, python, work, directory), demo, work)
                whole = {"trainer": trainer, "seed": seed, "settings": settings, **answer}
                path.write_text(json.dumps(whole, indent=1), encoding="utf-8")
            if path.exists():
                runs.setdefault(trainer, []).append(read_run(path, settings))
                last = runs[trainer][-1].evaluations[-1]
                console.print(f"{trainer} seed {seed}: gold {last.gold:+.3f} after {last.seconds:.0f} s")
    show(runs)
    save(lambda: draw(runs), directory / "ppo-learning.svg")
    console.print(
        f"written to {directory}: a JSON file for each trainer and seed, ppo-learning-light.svg and -dark.svg"
    )


if __name__ == "__main__":
    main()
