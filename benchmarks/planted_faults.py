"""Do `bisect` and `ceiling` find a planted fault? One run for each fault, and one without a fault.

    python benchmarks/planted_faults.py --directory faults

Every run is the demo's chain with its own data, a fault in one place, and `gates=warn`, so that it runs to
its end. The faults:

- pairs: the better and the worse answer are swapped in a random half of the pairs.
- out_of_step: each answer that SFT learns follows the next row's prompt.
- garbage: SFT learns answers whose letters were shuffled.
- length: the reward model learns pairs whose better answer is the longer one.
- no_kl: PPO without the KL penalty, at four times the learning rate and twice the steps.
- template: the instruction-tuned model is asked in another family's template, without SFT.

The other faults were chosen without knowledge of the rules of blame that the verdict had then, in sets. The
first set:

- temperature: only the evaluation samples at temperature 2.5.
- rate: PPO with LoRA at 1e-6, a learning rate for tuning all parameters.
- arguments: the reward function's arguments are in the wrong order, so it scores the prompts.
- full_stop: an export lost the last punctuation mark of every worse answer, so it decides every pair.
- columns: prompt and answer of SFT's rows are exchanged.

The second set:

- silent_gold: the gold function's threshold has another scale, so every answer gets 1.
- reordered: the reward function sorts the answers and does not sort its scores back.
- sums: PPO's prompts are sums, the evaluation's ask for sentences.
- exchanged: better and worse answer of every pair are exchanged.
- cut: SFT learns answers that a database cut at 32 characters.

The third set:

- markup: the answers that SFT learns come from a web site, as HTML.
- a comparison page showed the sides in random order, and its export did not restore it: this is `pairs`.
- two_exports: one file of two exports. Only the short one has the key `chosen`; the other rows are dropped.
- turned: PPO treats the reward model's score as a cost.
- other_file: the evaluation uses the prompts of another experiment, which are sums.

The fourth set:

- cut_evaluation: the evaluation cuts answers after 3 tokens, as for questions with choices.
- scale: the reward has a weight of 0.001 and is not normalised, so only the KL penalty counts.
- refusals: every worse answer is a refusal, which no model here generates.
- runs_on: the answers that SFT learns continue with the next question and answer.
- held_out: 95% of the rows are held out: the fraction was mistaken for that of training.

The fifth set, with a reward model whose score head was never trained:

- turned_gold: the gold function returns the score of the other class.
- ptx: PPO's language-modelling loss has the weight of a paper, 27.8.
- unending: answers without an end get the score 5, mistaken for a penalty; few tokens are allowed.
- sft_rate: SFT trains all parameters at LoRA's rate.
- lower_case: a normaliser lowercased the worse answers.
- empty: 70% of SFT's answers are "N/A".

The sixth set, where PPO also starts from a copy of the SFT model in very few bits:

- cached_gold: the gold function caches scores by prompt, so all policies get those of the first.
- clip: scores are clipped at 0.01 deviations, a value that was meant for PPO's ratio.
- leak: the prompts of the pairs contain the better answer, as if made from a full transcript.
- no_spaces: a cleaning step removed the spaces from SFT's answers.

The seventh set, with a base model whose conversion left its attention in another layout:

- standardised: the gold function standardises the scores of each call, so all policies have the same mean.
- critic_alone: the critic's warm-up is that of a long run, so the policy learns in only 2 of 12 steps.
- characters: a second reward function should reward twelve words, but counts characters.
- negatives: the worse answer of every pair is the better one of another prompt.

The eighth set, in which every fault also records the stage that it spoils. In four of them the keys do harm
only together:

- stars: the answers of SFT's rows were read from the wrong column, that of the ratings.
- redacted: a filter for personal data took all words of four letters or more in SFT's answers for names.
- text_order: grades from 0 to 20 were compared as text, so "9" is better than "15".
- preview: the pairs come from the list view of the labelling tool, which shows 24 characters.
- cluster: the reward model's batch is that of a cluster, and its warm-up that of a long run, so its learning
  rate hardly rises in the few steps.
- system_prompt: a new template adds a system prompt, and the reward model's limit on tokens fits rows without
  it, so most pairs are too long.
- relevance: the pairs are answers of `generate`, ranked by a rule that counts the prompt's words in them.
- percent: the KL coefficient, 0.05, is written in percent.
- ia3: PPO trains scaling factors (IA3) at LoRA's learning rate.
- lambda: GAE's lambda is mistaken for 1 - lambda, and the critic does not start from the reward model. So it
  knows nothing yet, and the advantages rely on it only.

Every run with a fault also differs from the one without in four harmless keys (`HARMLESS`), the seed among
them, because `bisect` has nothing to search for in a single difference. `harmless` is a run with these alone.
Runs share unchanged artifacts in the store. Then `bisect` searches between the run without a fault and
each run with one, and `ceiling` between the parts of each run with one. A fault in how the run is evaluated
is no difference between policies, so `bisect` is not asked.

results.json in the directory has for each fault the planted keys, its stage if it is recorded, the keys that
`bisect` found, the wrong ones among them (without those of which it says that it cannot tell whether they
are needed), the planted ones that it did not name, the part that `ceiling` blames (the one that
restores most), and what both commands wrote, with their minutes. It is written after each fault, so the same
command continues, and others with other `--faults` add to it. The exit code is 1 if `bisect` names a wrong
key. With the embedded model it takes many hours on two cores; `--faults` chooses some.
"""

from __future__ import annotations

import argparse
import html
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import rlhf

DATA = Path(rlhf.__file__).parent / "samples"
SWAPPED = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def score(responses: list[str], prompts: list[str]) -> list[float]:
    return [analyzer.polarity_scores(text)["compound"] for text in responses]
"""
"""A reward whose arguments are in the wrong order: it scores the prompts."""
REORDERED = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [analyzer.polarity_scores(text)["compound"] for text in sorted(responses, key=len)]
"""
"""Sorts answers by length, to reduce padding, but leaves the scores in that order."""
SILENT = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(analyzer.polarity_scores(text)["compound"] > 0.5 - 1.5) for text in responses]
"""
"""A threshold between 0 and 1 that is converted wrongly to the scale from -1 to 1."""
TURNED = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def score(prompts: list[str], responses: list[str]) -> list[float]:
    sentiment = [analyzer.polarity_scores(text)["compound"] for text in responses]
    classes = [(-each, each) for each in sentiment]
    return [negative for negative, _ in classes]
"""
"""A classifier's first class, which is the negative one."""
CACHED = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()
known: dict[str, float] = {}


def score(prompts: list[str], responses: list[str]) -> list[float]:
    for prompt, text in zip(prompts, responses):
        if prompt not in known:
            known[prompt] = analyzer.polarity_scores(text)["compound"]
    return [known[prompt] for prompt in prompts]
"""
"""A cache as for a slow judge, but its key lacks the answer."""
STANDARDISED = """from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

analyzer = SentimentIntensityAnalyzer()


def score(prompts: list[str], responses: list[str]) -> list[float]:
    raw = [analyzer.polarity_scores(text)["compound"] for text in responses]
    mean = sum(raw) / len(raw)
    deviation = (sum((each - mean) ** 2 for each in raw) / len(raw)) ** 0.5 or 1.0
    return [(each - mean) / deviation for each in raw]
"""
"""Scores are comparable with other metrics, but not between calls."""
CHARACTERS = """def score(prompts: list[str], responses: list[str]) -> list[float]:
    return [-abs(len(text) - 12) for text in responses]
"""
"""Counts characters instead of words."""
RELEVANCE = """def score(prompts: list[str], responses: list[str]) -> list[float]:
    asked = [set(prompt.lower().split()) for prompt in prompts]
    return [float(len(words & set(text.lower().split()))) for words, text in zip(asked, responses)]
"""
"""Ranks answers by how many words of the prompt they repeat."""
REFUSALS = (
    "I'm sorry, but I can't help with that.", "As an AI language model, I am unable to write that.",
    "Unfortunately I cannot do this for you.", "Sorry, I do not know enough to answer that.",
)  # fmt: skip
LLAMA_2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST] ' }}"
    "{% else %}{{ message['content'] + ' ' }}{% endif %}{% endfor %}"
)
WITH_SYSTEM = (
    "{{ '<|im_start|>system\\nYou are a friendly writing assistant. Answer in plain English, with one or two "
    "short sentences, and write nothing before or after them.<|im_end|>\\n' }}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + "
    "'<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""ChatML with a system prompt before every conversation."""
HEALTHY = [
    "sft.data={samples: instructions}", "reward.pairs={samples: pairs}", "ppo.prompts={samples: prompts}",
    "evaluate.prompts={samples: prompts}", "evaluate.gold=vader",
    "evaluate.retention=[samples:retention_sentences, samples:retention_questions]", "gates=warn",
]  # fmt: skip
"""Values that `auto` gives for the demo; with own files `auto` gives others."""

HARMLESS = [
    "seed=1", "sft.optim.weight_decay=0.01", "reward.optim.weight_decay=0.01", "ppo.optim.weight_decay=0.01",
]  # fmt: skip
"""What every bad run differs in besides its fault."""

Row = dict[str, Any]


class Fault(NamedTuple):
    """A planted fault."""

    overrides: list[str]
    file: str | None = None
    """Sample set that is copied with the fault, as `NAME.jsonl` in the directory."""
    spoil: Callable[[list[Row]], Iterable[Row]] | None = None
    stage: str | None = None
    """The first stage with a bad result, which `ceiling` should blame; recorded from the eighth set on."""

    @property
    def keys(self) -> set[str]:
        """The keys of the fault that can change a policy."""
        return {key for key in (each.partition("=")[0] for each in self.overrides) if key[:9] != "evaluate."}


def swapped(rows: list[Row]) -> Iterator[Row]:
    """Swap better and worse answer at random."""
    chance = random.Random(0)
    for row in rows:
        is_swapped = chance.random() < 0.5
        yield {**row, "chosen": row["rejected"], "rejected": row["chosen"]} if is_swapped else row


def out_of_step(rows: list[Row]) -> Iterator[Row]:
    """Pair each answer with the next row's prompt."""
    for row, before in zip(rows, [rows[-1], *rows], strict=False):
        yield {**row, "completion": before["completion"]}


def shuffled(rows: list[Row]) -> Iterator[Row]:
    """Shuffle the letters of the answer."""
    chance = random.Random(0)
    for row in rows:
        yield {**row, "completion": "".join(chance.sample(row["completion"], len(row["completion"])))}


def without_last_mark(rows: list[Row]) -> Iterator[Row]:
    """Remove the punctuation at the end of every worse answer."""
    for row in rows:
        yield {
            "prompt": row["prompt"],
            "chosen": row["chosen"],
            "rejected": row["rejected"].rstrip(" .!?\"'"),
        }


def exchanged(rows: list[Row]) -> Iterator[Row]:
    """Exchange prompt and answer."""
    for row in rows:
        yield {"prompt": row["completion"], "completion": row["prompt"]}


def worse_first(rows: list[Row]) -> Iterator[Row]:
    """Exchange better and worse answer, and drop the gold scores that would reveal it."""
    for row in rows:
        yield {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"]}


def cut(rows: list[Row]) -> Iterator[Row]:
    """Cut answers at 32 characters."""
    for row in rows:
        yield {**row, "completion": row["completion"][:32]}


def every_fifth(rows: list[Row]) -> Iterator[Row]:
    """Every fifth row, for the evaluation: no other stage may use these prompts."""
    yield from rows[::5]


def as_html(rows: list[Row]) -> Iterator[Row]:
    """Each answer as an HTML paragraph."""
    for row in rows:
        yield {**row, "completion": f'<p class="answer">{html.escape(row["completion"])}</p><br />'}


def in_two_exports(rows: list[Row]) -> Iterator[Row]:
    """64 unchanged pairs, and those of an export with another key."""
    for number, row in enumerate(rows):
        key = "chosen" if number < 64 else "preferred"
        yield {"prompt": row["prompt"], key: row["chosen"], "rejected": row["rejected"]}


def longer_first(rows: list[Row]) -> Iterator[Row]:
    """The longer answer as the better one."""
    for row in rows:
        rejected, chosen = sorted((row["chosen"], row["rejected"]), key=len)
        yield {**row, "chosen": chosen, "rejected": rejected}


def against_refusals(rows: list[Row]) -> Iterator[Row]:
    """Each answer as the better one, with a refusal as the worse one."""
    chance = random.Random(0)
    for row in rows:
        chosen = row[chance.choice(("chosen", "rejected"))]
        yield {"prompt": row["prompt"], "chosen": chosen, "rejected": chance.choice(REFUSALS)}


def run_on(rows: list[Row]) -> Iterator[Row]:
    """Append the next question and its answer to each answer."""
    for row, after in zip(rows, [*rows[1:], rows[0]], strict=True):
        more = f"\n\nUser: {after['prompt']}\nAssistant: {after['completion']}"
        yield {**row, "completion": row["completion"] + more}


def lowered(rows: list[Row]) -> Iterator[Row]:
    """Lowercase every worse answer."""
    for row in rows:
        yield {**row, "rejected": row["rejected"].lower()}


def mostly_empty(rows: list[Row]) -> Iterator[Row]:
    """Replace seven of ten answers by "N/A", as an export writes an empty field."""
    for number, row in enumerate(rows):
        yield {**row, "completion": "N/A"} if number % 10 < 7 else row


def with_the_better_answer(rows: list[Row]) -> Iterator[Row]:
    """Append the better answer to the prompt."""
    for row in rows:
        asked = row["prompt"][-1]["content"] if isinstance(row["prompt"], list) else row["prompt"]
        yield {**row, "prompt": f"{asked}\n\n{row['chosen']}"}


def of_other_prompts(rows: list[Row]) -> Iterator[Row]:
    """Use the better answer of another prompt as the worse one."""
    chance = random.Random(7)
    for row in rows:
        other = chance.choice([each for each in rows if each["prompt"] != row["prompt"]])
        yield {"prompt": row["prompt"], "chosen": row["chosen"], "rejected": other["chosen"]}


def without_spaces(rows: list[Row]) -> Iterator[Row]:
    """Remove the spaces from answers."""
    for row in rows:
        yield {**row, "completion": "".join(row["completion"].split())}


def as_stars(rows: list[Row]) -> Iterator[Row]:
    """Replace each answer by a rating of 1 to 5 stars, as from the wrong column."""
    chance = random.Random(8)
    for row in rows:
        yield {**row, "completion": str(chance.randint(1, 5))}


def redacted(rows: list[Row]) -> Iterator[Row]:
    """Replace the words of four letters or more in answers, as if they were names."""
    for row in rows:
        yield {**row, "completion": re.sub(r"[A-Za-z]{4,}", "<NAME>", row["completion"])}


def in_text_order(rows: list[Row]) -> Iterator[Row]:
    """Grade answers from 0 to 20 by their gold scores, and compare the grades as text."""
    for row in rows:
        graded = [(str(round(10 * (row[f"{side}_gold"] + 1))), row[side]) for side in ("chosen", "rejected")]
        (_, rejected), (_, chosen) = sorted(graded, key=lambda each: each[0])
        yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


def previews(rows: list[Row]) -> Iterator[Row]:
    """Cut both answers at 24 characters; pairs whose previews are equal are left out."""
    for row in rows:
        chosen, rejected = (f"{row[side][:24].rstrip()}..." for side in ("chosen", "rejected"))
        if chosen != rejected:
            yield {"prompt": row["prompt"], "chosen": chosen, "rejected": rejected}


FAULTS = {
    "none": Fault([]),
    "harmless": Fault([]),
    "pairs": Fault(["reward.pairs=pairs.jsonl"], "pairs", swapped),
    "out_of_step": Fault(["sft.data=out_of_step.jsonl"], "instructions", out_of_step),
    "garbage": Fault(["sft.data=garbage.jsonl"], "instructions", shuffled),
    "length": Fault(["reward.pairs=length.jsonl"], "pairs", longer_first),
    "no_kl": Fault(["ppo.kl.coef=0", "ppo.optim.lr=2e-3", "ppo.steps=24"]),
    "template": Fault(["model.chat_template=llama2.jinja", "ppo.init=base", "reward.init=base"]),
    "temperature": Fault(["evaluate.temperature=2.5"]),
    "rate": Fault(["ppo.optim.lr=1e-6"]),
    "arguments": Fault(["ppo.reward=python:swapped:score"]),
    "full_stop": Fault(["reward.pairs=full_stop.jsonl"], "pairs", without_last_mark),
    "columns": Fault(["sft.data=columns.jsonl"], "instructions", exchanged),
    "silent_gold": Fault(["evaluate.gold=python:silent:score"]),
    "reordered": Fault(["ppo.reward=python:reordered:score"]),
    "sums": Fault(
        ["ppo.prompts={samples: arithmetic}", "evaluate.prompts=sums.jsonl"],
        "prompts",
        every_fifth,
    ),
    "exchanged": Fault(["reward.pairs=exchanged.jsonl"], "pairs", worse_first),
    "cut": Fault(["sft.data=cut.jsonl"], "instructions", cut),
    "markup": Fault(["sft.data=markup.jsonl"], "instructions", as_html),
    "two_exports": Fault(
        ["reward.pairs=two_exports.jsonl", "prepare.on_bad_row=drop"], "pairs", in_two_exports
    ),
    "turned": Fault(["ppo.reward=[{source: learned, weight: -1}]"]),
    "other_file": Fault(["evaluate.prompts={samples: arithmetic_held_out}"]),
    "cut_evaluation": Fault(["evaluate.max_new_tokens=3"]),
    "scale": Fault(["ppo.reward=[{source: learned, weight: 0.001}]", "ppo.score.normalize=none"]),
    "refusals": Fault(["reward.pairs=refusals.jsonl"], "pairs", against_refusals),
    "runs_on": Fault(["sft.data=runs_on.jsonl"], "instructions", run_on),
    "held_out": Fault(["prepare.held_out_fraction=0.95"]),
    "turned_gold": Fault(["evaluate.gold=python:turned_gold:score"]),
    "ptx": Fault(["ppo.ptx.coef=27.8"]),
    "unending": Fault(
        ["ppo.score.missing_stop=5", "ppo.score.missing_stop_penalty=0", "ppo.max_new_tokens=24"],
    ),
    "sft_rate": Fault(["sft.optim.lr=1e-3"]),
    "lower_case": Fault(["reward.pairs=lower_case.jsonl"], "pairs", lowered),
    "empty": Fault(["sft.data=empty.jsonl"], "instructions", mostly_empty),
    "cached_gold": Fault(["evaluate.gold=python:cached_gold:score"]),
    "clip": Fault(["ppo.score.clip=0.01"]),
    "leak": Fault(["reward.pairs=leak.jsonl"], "pairs", with_the_better_answer),
    "no_spaces": Fault(["sft.data=no_spaces.jsonl"], "instructions", without_spaces),
    "standardised": Fault(["evaluate.gold=python:standardised:score"]),
    "critic_alone": Fault(["ppo.critic.warmup_steps=10"]),
    "characters": Fault(["ppo.reward=[{source: learned}, {source: 'python:characters:score', weight: 0.1}]"]),
    "negatives": Fault(["reward.pairs=negatives.jsonl"], "pairs", of_other_prompts),
    "stars": Fault(["sft.data=stars.jsonl"], "instructions", as_stars, stage="sft"),
    "redacted": Fault(["sft.data=redacted.jsonl"], "instructions", redacted, stage="sft"),
    "text_order": Fault(["reward.pairs=text_order.jsonl"], "pairs", in_text_order, stage="reward"),
    "preview": Fault(["reward.pairs=preview.jsonl"], "pairs", previews, stage="reward"),
    "cluster": Fault(["reward.batch_pairs=128", "reward.optim.warmup_steps=100"], stage="reward"),
    "system_prompt": Fault(["model.chat_template=system.jinja", "reward.max_tokens=66"], stage="reward"),
    "relevance": Fault(
        [
            "reward.pairs={stage: generate}",
            "generate.reward=python:relevance:score",
            "generate.splits=[train, held_out]",
            "ppo.score.normalize=running",
            "ppo.critic.init=sft",
        ],
        stage="generate",
    ),
    "percent": Fault(["ppo.kl.coef=5"], stage="ppo"),
    "ia3": Fault(["ppo.peft=ia3"], stage="ppo"),
    "lambda": Fault(["ppo.lam=0.05", "ppo.critic.init=sft"], stage="ppo"),
}


def plant(fault: str, directory: Path, most: int | None) -> None:
    """Write the fault's file, if it has one, from at most so many rows."""
    file, spoil = FAULTS[fault].file, FAULTS[fault].spoil
    if file is None or spoil is None:
        return
    with (DATA / f"{file}.jsonl").open(encoding="utf-8") as lines_of_rows:
        rows = [json.loads(line) for line in lines_of_rows]
    if most is not None and most < len(rows):
        rows = random.Random(0).sample(rows, most)  # the first ones have no prompt that is held out
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in spoil(rows)]
    (directory / f"{fault}.jsonl").write_text("".join(lines), encoding="utf-8")


def find(
    fault: str, directory: Path, overrides: Iterable[str], budget: int, most: int | None
) -> dict[str, Any]:
    """Run the chain with a fault, and let both commands search."""
    plant(fault, directory, most)
    harmless = [] if fault == "none" else HARMLESS
    start = time.monotonic()
    run(directory, f"run_name={fault}", *HEALTHY, *overrides, *harmless, *FAULTS[fault].overrides)
    found: dict[str, Any] = {"minutes": minutes_since(start)}
    if fault == "none":
        return found
    found |= {"planted": sorted(FAULTS[fault].keys), "stage": FAULTS[fault].stage}
    commands = {"bisect": ["good=none", f"bad={fault}"]}
    if FAULTS[fault].overrides:
        commands = (commands if FAULTS[fault].keys else {}) | {"ceiling": [fault]}
    for command, arguments in commands.items():
        name = f"bisect-none-{fault}" if command == "bisect" else f"ceiling-{fault}"
        start, limit = time.monotonic(), [f"budget={budget}"] if command == "bisect" else []
        run(directory, command, *arguments, *limit)
        path = directory / "runs" / name / f"{command}.json"
        result = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        found[command] = {**result, "minutes": minutes_since(start)}
    causes = {key for cause in found.get("bisect", {}).get("causes", []) for key in cause}
    unsure = {*found.get("bisect", {}).get("unsure", [])}
    best: dict[str, Any] = next(iter(found.get("ceiling", {}).get("parts", [])), {})
    return found | {
        "found": sorted(causes),
        "wrong": sorted(causes - unsure - FAULTS[fault].keys),
        "missing": sorted(FAULTS[fault].keys - causes),
        "blamed": best["part"] if best.get("result") == "restores" else None,
    }


def results(path: Path) -> dict[str, dict[str, Any]]:
    """Fault -> its results so far; another process may add to them."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def minutes_since(start: float) -> float:
    """Minutes since a reading of the clock."""
    return round((time.monotonic() - start) / 60, 1)


def run(directory: Path, *arguments: str) -> None:
    """Run a command; 3 means that a gate failed, or that nothing was found."""
    done = subprocess.run([sys.executable, "-m", "rlhf", *arguments], cwd=directory, check=False)
    if done.returncode not in (0, 3):
        sys.exit(f"rlhf {' '.join(arguments)} ended with exit code {done.returncode}")


def main() -> None:
    """Run the faults one after the other, and write the results as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--directory", type=Path, required=True, help="for the store, the runs and spoiled data"
    )
    parser.add_argument("--faults", nargs="+", choices=FAULTS, default=[*FAULTS], help="none comes first")
    parser.add_argument("--overrides", nargs="*", default=[], help="keys of every run, such as ppo.steps=6")
    parser.add_argument("--rows", type=int, help="most rows of a spoiled file")
    parser.add_argument("--budget", type=int, default=30, help="most trials of one bisection")
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    for name, template in {"llama2": LLAMA_2, "system": WITH_SYSTEM}.items():
        (given.directory / f"{name}.jinja").write_text(template, encoding="utf-8")
    for name, code in {
        "swapped": SWAPPED,
        "reordered": REORDERED,
        "silent": SILENT,
        "turned_gold": TURNED,
        "cached_gold": CACHED,
        "standardised": STANDARDISED,
        "characters": CHARACTERS,
        "relevance": RELEVANCE,
    }.items():
        (given.directory / f"{name}.py").write_text(code, encoding="utf-8")
    path = given.directory / "results.json"
    for fault in dict.fromkeys(["none", *given.faults]):
        if fault not in results(path):
            own = {fault: find(fault, given.directory, given.overrides, given.budget, given.rows)}
            path.write_text(json.dumps(results(path) | own, indent=2), encoding="utf-8")
    found = results(path)
    keys = ("planted", "found", "wrong", "missing", "stage", "blamed")
    for fault, each in found.items():
        print(fault, json.dumps({key: each[key] for key in keys if key in each}))
    sys.exit(any(each.get("wrong") for each in found.values()))


if __name__ == "__main__":
    main()
