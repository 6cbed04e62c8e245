"""Do people's votes reach the policy? Three scripted annotators vote in a browser, and the server is killed.

    python benchmarks/human_feedback.py --directory feedback

Their taste is known: VADER's score of an answer, with noise. They vote by keyboard in a headless Chromium
until there are 300 votes. Meanwhile the run is killed with SIGKILL five times and started again. No
acknowledged vote may be lost. Then the same command continues: a reward model learns the votes, and PPO
learns from the model. A second reward model learns as many votes by VADER itself. Both are evaluated on clear
pairs of held-out prompts.

It needs Debian's Chromium and the extras `label` and `test`. With the embedded model it takes hours on two
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from rlhf.data.schema import PromptRow, drawn, prompt_identity
from rlhf.label.pairs import pairs_of_answers
from rlhf.label.votes import votes_in

PEOPLE = ("ada", "ben", "eve")
LINK = re.compile(r"label: (\w+): (http://\S+)")
CLEAR = 0.5
"""Smallest difference of VADER scores in a clear pair."""
HELD_OUT = 0.1
"""`prepare.held_out_fraction`: the share of held-out prompts."""
VADER = SentimentIntensityAnalyzer()


def taste(text: str) -> float:
    """VADER's score of a text, from -1 to 1."""
    return float(VADER.polarity_scores(text)["compound"])


class Experiment:
    """A directory with runs."""

    def __init__(self, directory: Path, votes: int, extra: Sequence[str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory, self.votes = directory, votes
        with closing(socket.create_server(("127.0.0.1", 0))) as taken:
            port = taken.getsockname()[1]
        self.arguments = [
            "recipe=feedback", "gates=warn", f"label.votes={votes}", "label.draw.check_share=0.05",
            "generate@answers.num_prompts=null", f"prepare.held_out_fraction={HELD_OUT}",
            f"label.server.port={port}", f"label.annotators=[{','.join(PEOPLE)}]", *extra,
        ]  # fmt: skip

    def start(self, name: str, *more: str) -> subprocess.Popen[str]:
        """Start a run, in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "rlhf", f"run_name={name}", *self.arguments, *more],
            cwd=self.directory, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True, env={**os.environ, "COLUMNS": "300"},
        )  # fmt: skip

    def run(self, name: str, *more: str) -> dict[str, Any]:
        """Run to the end; the run's summary."""
        process = self.start(name, *more)
        out, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"{name} ended with {process.returncode}:\n{out}")
        return self.summary(name)

    def summary(self, name: str) -> dict[str, Any]:
        """The summary of a run."""
        path = self.directory / "runs" / name / "summary.json"
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def artifact(self, name: str, stage: str) -> Path:
        """Directory of a run's artifact."""
        return self.directory / str(self.summary(name)["stages"][stage]["artifact"])

    def cast(self) -> int:
        """Number of votes in the file."""
        return len(votes_in(self.directory / "votes.sqlite", "label"))


def served(process: subprocess.Popen[str], links: dict[str, str]) -> None:
    """Read the run's output until every annotator's line has appeared, and store new links."""
    assert process.stdout is not None
    for line in process.stdout:
        links.update(LINK.findall(line))
        if f"label: {PEOPLE[-1]}:" in line:
            return
    raise RuntimeError(f"the run ended with {process.wait()} before it served its page")


def vote(experiment: Experiment, noise: float, kills: int) -> dict[str, Any]:
    """Let three annotators vote in turn in Chromium while the run is killed; then run to the end."""
    from playwright.sync_api import Page, sync_playwright

    chance, links, confirmed, lost = random.Random(0), dict[str, str](), 0, 0
    at = [round((number + 1) * experiment.votes / (kills + 1)) for number in range(kills)]
    process = experiment.start("people")
    served(process, links)

    def text(page: Page, side: str) -> str:
        return page.inner_text(f"section[aria-labelledby={side}-title] .text")

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        pages = {name: browser.new_context().new_page() for name in PEOPLE}
        for name, page in pages.items():
            page.goto(links[name])
            page.keyboard.press("Tab")
            page.keyboard.press("Enter")
        while pages:
            for name, page in [*pages.items()]:
                if page.locator("#vote").count() == 0:  # enough votes, or no pair is left for this annotator
                    del pages[name]
                    continue
                left, right = (taste(text(page, side)) + chance.gauss(0, noise) for side in ("left", "right"))
                shown = page.input_value("#vote [name=shown]")
                page.keyboard.press("ArrowLeft" if left > right else "ArrowRight")
                other = f"#vote [name=shown]:not([value='{shown}']), h1:text('Done')"
                page.wait_for_selector(other, state="attached")
                confirmed += 1
                if "enough votes" in page.inner_text("main"):
                    pages = {}
                    break
                if at and confirmed >= at[0]:
                    at.pop(0)
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    lost += confirmed - experiment.cast()
                    process = experiment.start("people")
                    served(process, links)
        browser.close()
    out, _ = process.communicate()
    if process.returncode:
        raise RuntimeError(f"the run ended with {process.returncode}:\n{out}")
    return {"confirmed": confirmed, "in the file": experiment.cast(), "lost": lost, "kills": kills}


def clear_pairs(experiment: Experiment) -> Iterator[dict[str, Any]]:
    """Pairs of answers to held-out prompts with clearly different VADER scores, the better first."""
    answers = experiment.artifact("people", "generate@answers") / "responses.jsonl"
    for pair in pairs_of_answers({"generate@answers": answers}, 1000):
        better, worse = sorted((pair.first, pair.second), key=taste, reverse=True)
        is_held_out = drawn(prompt_identity(PromptRow(pair.prompt)), HELD_OUT, "held_out")
        if is_held_out and taste(better) - taste(worse) >= CLEAR:
            yield {"prompt": pair.prompt, "chosen": better, "rejected": worse}


def accuracy(experiment: Experiment, name: str) -> dict[str, float]:
    """How often the reward model of a run finds the better answer of the clear pairs, with its interval."""
    import torch

    from rlhf.evaluation.intervals import share

    model = experiment.artifact(name, "reward").resolve()
    judged = f"{name}-judged"
    experiment.run(
        judged, "stage=label", "label.pairs=clear.jsonl", "label.annotator=reward_model",
        "label.votes=100000", f"label.reward=model:{model}", f"label.file={judged}.sqlite",
    )  # fmt: skip
    rows = (experiment.artifact(judged, "label") / "votes.jsonl").open(encoding="utf-8")
    right = [
        (row["choice"] == "first") == (taste(row["first"]) > taste(row["second"]))
        for row in map(json.loads, rows)
    ]
    return share(torch.tensor(right, dtype=torch.float64)).metrics("accuracy")


def main() -> None:
    """Run the experiment and print the results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="a new one, for the store and the runs")
    parser.add_argument("--votes", type=int, default=300)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--noise", type=float, default=0.3, help="deviation, in VADER's units")
    parser.add_argument("overrides", nargs="*", help="keys of the runs, such as ppo.steps=24")
    given = parser.parse_args()
    experiment = Experiment(given.directory, given.votes, given.overrides)
    found: dict[str, Any] = {"votes": vote(experiment, given.noise, given.kills)}
    people = experiment.summary("people")["stages"]
    found["label"] = people["label"]["metrics"]
    experiment.run(
        "noise-free", "stage=reward", "label.annotator=rule", "label.reward=vader", "label.file=vader.sqlite"
    )
    clear = [*clear_pairs(experiment)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in clear)
    (given.directory / "clear.jsonl").write_text(lines, encoding="utf-8")
    for name in ("people", "noise-free"):
        found[f"reward model, {name}"] = accuracy(experiment, name)
    wanted = re.compile(r"evaluate/gold_gain")
    measured = people["evaluate"]["metrics"]
    found["gold"] = {name: value for name, value in measured.items() if wanted.match(name)}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
