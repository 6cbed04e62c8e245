"""Is `recipe=decide` right where the right decision is known? One decision for each case and seed.

    python benchmarks/planted_decisions.py --directory planted --seeds 3
    python benchmarks/planted_decisions.py --directory planted --seeds 1 --cases form,notes
    python benchmarks/planted_decisions.py --directory planted --seeds 1 --embedded --budget 20m

Each decision is the command `python -m rlhf recipe=decide`, with data that are made for the case. What it
tunes is a small language model, which `planted_world.py` pretrains once for each seed. It is asked at
temperature 0.7. A verifier judges its answers. The cases:

- nothing: the answers that SFT learns are random. Do not train.
- coin: a coin chose the better answer of each pair. Do not ship DPO.
- notes: the facts stand only in a corpus. Retrieval is the best option; no training that does not look them
  up.
- form: the answers are right, but not in the wanted form. Ship an SFT model.
- task: the answers can be checked, and the SFT rows are about something else. Ship GRPO or RLOO.
- equal: the same SFT twice, once in small micro-batches, which are slower. Ship the cheaper one.
- enough: SFT, and four times as much of it, which is no better at the end. Ship the cheaper one.
- forgets: SFT gains, but it forgets more than a limit allows. Refuse it.
- slow: the best candidate is the worse one at a quarter of its length. It has `slow: true`. Ship it.
- hack: the reward pays for length, the judge for right answers. Do not ship what learned from the reward.
- contaminated: all evaluation questions, about facts that nobody knows, are among the SFT rows with their
  answers. Refuse to run, or leave these rows out, and ship nothing.
- hidden: the same, but each question is behind a system message, or is the second turn of a conversation.

With `--embedded` the model is the one that is installed with rlhf, and the data of four cases (coin, notes,
form, contaminated) are in English: `planted_english.py`.

A decision is right only by its `decision.json`: the outcome, the winner, the states. For contaminated and
hidden it is also right if the command ends with exit code 2 and an error that names sft.data or
evaluate.prompts. "Cannot be told" is right where only shipping would be wrong; for nothing it is counted as
wrong.

The table also has, for each decision:

- seconds: what it took, without pretraining.
- pilots: how many runs it trained or asked.
- of the grid: the seconds of all its pilots, over the seconds in which each candidate that can run would be
  trained to its full length, once, and asked all questions, also the sealed ones. This is an estimate: a
  candidate's measured seconds of training at its last share, divided by the share; its measured seconds for
  the choosing questions, multiplied by all questions over the choosing ones; and the mean time of a pilot
  outside its stages. A candidate without any pilot counts in neither. Every candidate here starts from the
  base model, so all its training grows with the share. The model is so small that a pilot's fixed time counts
  more than on a real one.

`results.json` (with `--embedded`, `results-embedded.json`) in the directory has the same figures and what
every candidate came to. An earlier result of a case and seed is made anew. The exit code is 1 if a decision
is wrong.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import planted_english as english
from planted_world import (
    COLOURS,
    KNOWN,
    MADE_UP,
    UNKNOWN,
    Asked,
    fact,
    lists,
    note,
    pretrained,
    sentences,
)

Row = dict[str, Any]
Decision = Mapping[str, Any]
"""The content of decision.json."""
CONFIG_ERROR = 2
SAVED = ("state", "why", "share", "quality", "gain", "retention_perplexity_ratio")
"""What results.json has of each candidate."""
HEADINGS = ("case", "right", "what came out", "seconds", "pilots", "of the grid")
FORM = "so : {} !"
"""A form of answers that the model does not know."""
ROWS, QUESTIONS = 400, 480
COMMON = (
    "recipe=decide", "device=cpu", "precision=fp32", "model=local", "ppo.init=base", "dpo.init=base",
    "ppo.max_new_tokens=10", "ppo.score.normalize=none", "evaluate.prompts=asked.jsonl",
    "evaluate.gold=verify:exact", "decide.requests=100", "sft.optim.lr=1e-3", "sft.epochs=6",
    "decide.candidates.sft_lora.set=['sft.peft=lora','sft.optim.lr=5e-3']",
)  # fmt: skip
GROUPS = (
    "ppo.prompts=tasks.jsonl", "grpo.steps=24", "grpo.batch_episodes=96", "grpo.minibatch_episodes=48",
    "grpo.samples_per_prompt=8", "grpo.peft=none", "grpo.optim.lr=3e-4", "grpo.kl.coef=0.01",
    "ppo.score.missing_stop_penalty=0", "ppo.temperature=1.0", "evaluate.temperature=0.7",
)  # fmt: skip
"""Keys of policy gradients on the small model."""

EMBEDDED_COMMON = (
    "recipe=decide", "device=cpu", "ppo.init=base", "dpo.init=base", "ppo.max_new_tokens=32",
    "evaluate.prompts=asked.jsonl", "decide.requests=100",
)  # fmt: skip


class Case(NamedTuple):
    """A decision whose right result is known."""

    right: str
    """The right result, in words."""
    write: Callable[[Path, str], None]
    """Writes the files of a seed into a directory."""
    keys: Sequence[str]
    only: Sequence[str]
    """The candidates."""
    is_right: Callable[[Decision], bool]
    candidates: str = ""
    """YAML of more candidates."""
    may_refuse: bool = False
    """Whether an error that is due to the data is right too."""


def save(path: Path, rows: Iterable[Row]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def questions(asked: Iterable[Asked], form: str = "{}") -> list[Row]:
    """Rows that are asked, with the answer that the judge wants."""
    return [{"prompt": question, "answer": form.format(right)} for question, right in asked]


def lessons(asked: Iterable[Asked], form: str = "{}") -> list[Row]:
    """Rows of SFT."""
    return [{"prompt": question, "completion": form.format(right)} for question, right in asked]


def split_lists(place: str, seed: str) -> tuple[list[Asked], list[Asked]]:
    """Questions about lists to learn from, and others to ask."""
    found = lists(place, ROWS + QUESTIONS, seed)
    return found[:ROWS], found[ROWS:]


def write_nothing(directory: Path, seed: str) -> None:
    """SFT learns any word of the list, or any other one."""
    learned, asked = split_lists("last", seed)
    chance = random.Random(seed)
    wrong = [Asked(question, chance.choice(MADE_UP)) for question, _ in learned]
    save(directory / "sft.jsonl", lessons(wrong))
    save(directory / "asked.jsonl", questions(asked))


def write_coin(directory: Path, seed: str) -> None:
    """A right and a wrong answer, of which a coin chose the better one."""
    learned, asked = split_lists("last", seed)
    chance, pairs = random.Random(seed), []
    for question, right in learned:
        words = question.split()[2:-1]
        chosen, rejected = chance.sample([right, chance.choice(words[:-1])], 2)
        pairs.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    save(directory / "pairs.jsonl", pairs)
    save(directory / "asked.jsonl", questions(asked))


def write_notes(directory: Path, seed: str) -> None:
    """Facts of a corpus, and SFT rows about other names."""
    chance = random.Random(seed)
    facts = [Asked(fact(name).question, chance.choice(COLOURS)) for name in UNKNOWN]
    told = [note(name, right) for name, (_, right) in zip(UNKNOWN, facts, strict=True)]
    save(directory / "corpus.jsonl", [{"text": text} for text in chance.sample(told, len(told))])
    save(directory / "sft.jsonl", lessons([*map(fact, KNOWN), *split_lists("first", seed)[0]]))
    save(directory / "asked.jsonl", questions(facts))


def write_form(directory: Path, seed: str) -> None:
    """SFT teaches the form that is wanted."""
    learned, asked = split_lists("first", seed)
    save(directory / "sft.jsonl", lessons(learned, FORM))
    save(directory / "asked.jsonl", questions(asked, FORM))


def write_task(directory: Path, seed: str) -> None:
    """Tasks with right answers for the reward, and SFT rows about something else."""
    learned, asked = split_lists("last", seed)
    save(directory / "sft.jsonl", lessons([*map(fact, KNOWN), *split_lists("first", seed)[0]]))
    save(directory / "tasks.jsonl", questions(learned))
    save(directory / "asked.jsonl", questions(asked))


def write_forgets(directory: Path, seed: str) -> None:
    """SFT teaches a form, and sentences of the world tell what is forgotten."""
    write_form(directory, seed)
    save(directory / "sentences.jsonl", [{"text": text} for text in sentences(200, seed)])


def write_slow(directory: Path, seed: str) -> None:
    """Two files of SFT rows: of the first one, three of ten answers are wrong."""
    learned, asked = split_lists("first", seed)
    chance = random.Random(seed)
    mixed = [
        Asked(question, chance.choice(MADE_UP) if chance.random() < 0.3 else right)
        for question, right in learned
    ]
    save(directory / "sft.jsonl", lessons(mixed, FORM))
    save(directory / "careful.jsonl", lessons(learned, FORM))
    save(directory / "asked.jsonl", questions(asked, FORM))


def write_hack(directory: Path, seed: str) -> None:
    """Tasks that the model is good at."""
    learned, asked = split_lists("first", seed)
    save(directory / "tasks.jsonl", questions(learned))
    save(directory / "asked.jsonl", questions(asked))


def secrets(seed: str) -> list[Asked]:
    """Questions whose answers only training rows can tell."""
    chance = random.Random(seed)
    return [Asked(fact(name).question, chance.choice(COLOURS)) for name in UNKNOWN]


def write_contaminated(directory: Path, seed: str) -> None:
    """SFT rows with the evaluation questions."""
    asked = secrets(seed)
    save(directory / "sft.jsonl", lessons([*map(fact, KNOWN), *asked]))
    save(directory / "asked.jsonl", questions(asked))


def write_hidden(directory: Path, seed: str) -> None:
    """The evaluation questions behind a system message, or in a second turn."""
    asked, rows = secrets(seed), lessons(map(fact, KNOWN))
    for number, (question, right) in enumerate(asked):
        first = {"role": "system", "content": "you are here"}
        other, answer = fact(KNOWN[number % len(KNOWN)])
        before = [{"role": "user", "content": other}, {"role": "assistant", "content": answer}]
        last = [{"role": "user", "content": question}, {"role": "assistant", "content": right}]
        rows.append({"messages": [*([first] if number % 2 else before), *last]})
    save(directory / "sft.jsonl", [row if "messages" in row else as_messages(row) for row in rows])
    save(directory / "asked.jsonl", questions(asked))


def as_messages(row: Row) -> Row:
    """A row of SFT as a conversation."""
    turns = (("user", row["prompt"]), ("assistant", row["completion"]))
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def states(decision: Decision) -> dict[str, str]:
    """Candidate -> what became of it."""
    return {each["name"]: each["state"] for each in decision["candidates"]}


def ships(*names: str) -> Callable[[Decision], bool]:
    """Whether one of these is shipped."""
    return lambda decision: decision["outcome"] == "ship" and decision["winner"] in names


def does_not_train(decision: Decision) -> bool:
    """Whether it says that no training is worth it."""
    return bool(decision["outcome"] == "no training")


def does_not_ship(decision: Decision) -> bool:
    """Whether it came to a result, and ships nothing."""
    return decision["outcome"] in ("no training", "cannot be told")


def looks_up(decision: Decision) -> bool:
    """Whether retrieval is the best without training, and only what looks up too is shipped."""
    best = decision["untrained"] == "retrieval"
    return best and (does_not_ship(decision) or ships("sft_retrieval")(decision))


def refuses_sft(decision: Decision) -> bool:
    """Whether SFT was refused for what it forgets."""
    sft = next(each for each in decision["candidates"] if each["name"] == "sft")
    over = sft["state"] == "refused" and "retention_perplexity_ratio" in sft["limits_over"]
    return over and decision["outcome"] is not None and decision["winner"] != "sft"


SLOWER = """# @package _global_
decide:
  candidates:
    slower:
      title: SFT, small micro-batches
      asks: sft
      set: [sft.micro_batch_tokens=32]
      length: sft.epochs
"""
LONGER = """# @package _global_
decide:
  candidates:
    longer:
      title: SFT, four times as long
      asks: sft
      set: [sft.epochs=24]
      length: sft.epochs
"""
CAREFUL = """# @package _global_
decide:
  candidates:
    careful:
      title: SFT, low rate, right rows
      asks: sft
      set: [sft.data=careful.jsonl, sft.optim.lr=1e-4, sft.epochs=24]
      length: sft.epochs
      slow: true
"""
FAST = """# @package _global_
decide:
  candidates:
    dpo_fast:
      title: DPO, high rate
      asks: dpo
      set: [dpo.optim.lr=2e-3, dpo.epochs=4, dpo.evaluations=1]
      length: dpo.epochs
"""
CASES = {
    "nothing": Case(
        "do not train", write_nothing, ["sft.data=sft.jsonl"], ["base", "few_shot", "sft", "sft_lora"],
        does_not_train,
    ),
    "coin": Case(
        "do not ship DPO", write_coin, ["reward.pairs=pairs.jsonl", "dpo.epochs=2"],
        ["base", "dpo", "dpo_fast"], does_not_ship, FAST,
    ),
    "notes": Case(
        "retrieval", write_notes, ["sft.data=sft.jsonl", "evaluate.corpus=corpus.jsonl"],
        ["base", "few_shot", "retrieval", "sft", "sft_retrieval"], looks_up,
    ),
    "form": Case(
        "ship SFT", write_form, ["sft.data=sft.jsonl"], ["base", "few_shot", "sft", "sft_lora"],
        ships("sft", "sft_lora"),
    ),
    "task": Case(
        "ship GRPO or RLOO", write_task, ["sft.data=sft.jsonl", "ppo.reward=verify:exact", *GROUPS],
        ["base", "few_shot", "sft", "grpo", "rloo"], ships("grpo", "rloo"),
    ),
    "equal": Case(
        "ship the cheaper SFT", write_form, ["sft.data=sft.jsonl"], ["base", "sft", "slower"], ships("sft"),
        SLOWER,
    ),
    "enough": Case(
        "ship the shorter SFT", write_form, ["sft.data=sft.jsonl"], ["base", "sft", "longer"], ships("sft"),
        LONGER,
    ),
    "forgets": Case(
        "refuse SFT", write_forgets,
        ["sft.data=sft.jsonl", "evaluate.retention=sentences.jsonl", "sft.optim.lr=3e-3",
         "decide.limits.retention_perplexity_ratio.max=1.15"],
        ["base", "few_shot", "sft", "sft_lora"], refuses_sft,
    ),
    "slow": Case(
        "ship the slow one", write_slow, ["sft.data=sft.jsonl"], ["base", "sft", "careful"],
        ships("careful"), CAREFUL,
    ),
    "hack": Case(
        "do not ship the hacker", write_hack,
        ["ppo.reward={source: verify:length, args: {min: 3}}", *GROUPS], ["base", "grpo", "rloo"],
        does_not_ship,
    ),
    "contaminated": Case(
        "refuse, or leave the rows out", write_contaminated, ["sft.data=sft.jsonl", "sft.epochs=20"],
        ["base", "sft", "sft_lora"], does_not_ship, may_refuse=True,
    ),
    "hidden": Case(
        "refuse, or leave the rows out", write_hidden, ["sft.data=sft.jsonl", "sft.epochs=20"],
        ["base", "sft", "sft_lora"], does_not_ship, may_refuse=True,
    ),
}  # fmt: skip


def write_english_notes(directory: Path, seed: str) -> None:
    """Facts of a corpus, and the demo's SFT rows."""
    facts = english.captains(seed)
    save(directory / "corpus.jsonl", [{"text": english.passage(each)} for each in facts])
    save(directory / "sft.jsonl", english.samples("instructions"))
    save(directory / "asked.jsonl", facts)


def write_english_form(directory: Path, seed: str) -> None:
    """SFT teaches the form that is wanted."""
    asked = english.asked(seed)
    save(directory / "sft.jsonl", english.in_form(asked))
    save(directory / "asked.jsonl", asked)


def write_english_coin(directory: Path, seed: str) -> None:
    """Pairs without a meaning."""
    asked = english.asked(seed)
    save(directory / "pairs.jsonl", english.tossed(asked, seed))
    save(directory / "asked.jsonl", asked)


def write_english_contaminated(directory: Path, seed: str) -> None:
    """SFT rows with the evaluation questions, twice each."""
    facts = english.captains(seed)
    taught = [{"prompt": each["prompt"], "completion": f"It is {each['answer']}."} for each in facts]
    save(directory / "sft.jsonl", [*english.samples("instructions"), *taught])
    save(directory / "asked.jsonl", facts)


BY_REFERENCE = ("evaluate.reference=answer", "evaluate.quality=answer_found")
EMBEDDED = {
    "coin": Case(
        CASES["coin"].right, write_english_coin, ["reward.pairs=pairs.jsonl", "evaluate.gold=vader"],
        ["base", "dpo", "dpo_fast"], does_not_ship, FAST,
    ),
    "notes": Case(
        CASES["notes"].right, write_english_notes,
        ["sft.data=sft.jsonl", "evaluate.corpus=corpus.jsonl", *BY_REFERENCE],
        ["base", "few_shot", "retrieval", "sft", "sft_lora", "sft_retrieval"], looks_up,
    ),
    "form": Case(
        CASES["form"].right, write_english_form,
        ["sft.data=sft.jsonl",
         f"evaluate.gold={{source: verify:regex, args: {{pattern: '{english.FORM_PATTERN}'}}}}"],
        ["base", "few_shot", "sft", "sft_lora", "sft_prefix", "sft_prompt"],
        ships("sft", "sft_lora", "sft_prefix", "sft_prompt"),
    ),
    "contaminated": Case(
        CASES["contaminated"].right, write_english_contaminated, ["sft.data=sft.jsonl", *BY_REFERENCE],
        ["base", "few_shot", "sft", "sft_lora"], does_not_ship, may_refuse=True,
    ),
}  # fmt: skip
"""Cases on the embedded model."""


def grid_seconds(decision: Decision) -> float:
    """Seconds to train all candidates to their full length and to ask them all questions, estimated."""
    done = [each for each in decision["pilots"] if each["ended"] == "done"]
    outside = mean(max(0.0, each["seconds"] - sum(each["stages"].values())) for each in done)
    numbers = decision["questions"]
    more = 1 + numbers["sealed"] / numbers["choosing"] if numbers["sealed"] else 1.0
    total = 0.0
    for each in decision["candidates"]:
        asking = [
            pilot["stages"]["evaluate"]
            for pilot in done
            if (pilot["candidate"], pilot["part"]) == (each["name"], "choosing")
            and "evaluate" in pilot["stages"]
        ]
        if asking:
            training = each["train_seconds"] / each["share"] if each["trained"] else 0.0
            total += training + mean(asking) * more + outside
    return total


def blames_data(log: str) -> bool:
    """Whether the last error of a command's output names the rows that are taught or asked."""
    error = log.rpartition("Error: ")[2] if "Error: " in log else ""
    return "sft.data" in error or "evaluate.prompts" in error


def summary(case: Case, decision: Decision | None, code: int, seconds: float, log: str) -> Row:
    """A decision's entry in results.json.

    Args:
        code: the command's exit code.
        log: what it printed.
    """
    if code != 0 or decision is None:
        refused = code == CONFIG_ERROR and blames_data(log)
        came = "refused the data" if refused else f"exit code {code}"
        right = refused and case.may_refuse
        return {"right": right, "came": came, "seconds": seconds, "pilots": 0, "of_grid": None}
    winner = decision["winner"] or decision["untrained"]
    spent = sum(each["seconds"] for each in decision["pilots"])
    candidates = {each["name"]: {key: each[key] for key in SAVED} for each in decision["candidates"]}
    return {
        "right": case.is_right(decision),
        "came": f"{decision['outcome']}: {winner}",
        "seconds": seconds,
        "pilots": len(decision["pilots"]),
        "of_grid": spent / grid_seconds(decision),
        "candidates": candidates,
        "sentences": decision["sentences"],
    }


def decide(
    name: str, directory: Path, seed: int, budget: str, overrides: Sequence[str], *, embedded: bool
) -> Row:
    """Make a case's data for a seed, and decide.

    Args:
        overrides: keys of the decision, which win over the case's.
    """
    case = (EMBEDDED if embedded else CASES)[name]
    common = [*EMBEDDED_COMMON]
    if not embedded:
        common = [*COMMON, f"model.path={pretrained(directory, seed).resolve()}"]
    place = directory / f"{name}{'-embedded' * embedded}-{seed}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    case.write(place, f"{name} {seed}")
    (place / "candidates.yaml").write_text(case.candidates or "# @package _global_\n{}\n", encoding="utf-8")
    arguments = [
        *common, f"seed={seed}", f"budget={budget}", "run_name=choice",
        *case.keys, "+experiment=candidates.yaml", f"decide.only=[{','.join(case.only)}]",
        *overrides,
    ]  # fmt: skip
    start = time.monotonic()
    with (place / "log.txt").open("w", encoding="utf-8") as log:
        command = [sys.executable, "-m", "rlhf", *arguments]
        done = subprocess.run(command, cwd=place, check=False, stdout=log, stderr=subprocess.STDOUT)
    seconds = time.monotonic() - start
    path = place / "runs" / "choice" / "decision.json"
    decision = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    return summary(case, decision, done.returncode, seconds, (place / "log.txt").read_text(encoding="utf-8"))


def table(results: Mapping[str, Mapping[str, Row]]) -> str:
    """The results as a Markdown table: a line for each case, in a cell the values of its seeds."""
    lines = [
        "| case | right | what came out | seconds | pilots | of the grid |",
        "| -- | -- | -- | -- | -- | -- |",
    ]
    for name, seeds in results.items():
        found = [*seeds.values()]
        came = "; ".join(each["came"] if each["right"] else f"**wrong:** {each['came']}" for each in found)
        grid = ", ".join("-" if each["of_grid"] is None else f"{each['of_grid']:.0%}" for each in found)
        seconds = ", ".join(f"{each['seconds']:.0f}" for each in found)
        pilots = ", ".join(str(each["pilots"]) for each in found)
        lines.append(f"| {name} | {CASES[name].right} | {came} | {seconds} | {pilots} | {grid} |")
    return "\n".join(lines)


def main() -> int:
    """Decide each case for each seed; the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True, help="for the models, the data and the runs")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--cases", help="names with commas between them; all, if none is given")
    parser.add_argument("--budget", default="3m", help="of each decision")
    parser.add_argument("--embedded", action="store_true", help="on the model that is installed with rlhf")
    parser.add_argument("--overrides", nargs="*", default=[], help="keys of every decision: sft.epochs=10")
    given = parser.parse_args()
    cases = EMBEDDED if given.embedded else CASES
    names = given.cases.split(",") if given.cases else [*cases]
    if unknown := {*names} - {*cases}:
        parser.error(f"--cases: there is no {', '.join(sorted(unknown))}. There are {', '.join(cases)}.")
    given.directory.mkdir(parents=True, exist_ok=True)
    path = given.directory / f"results{'-embedded' * given.embedded}.json"
    results: dict[str, dict[str, Row]] = (
        json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    )
    for seed in range(given.first, given.first + given.seeds):
        for name in names:
            found = decide(
                name, given.directory, seed, given.budget, given.overrides, embedded=given.embedded
            )
            results.setdefault(name, {})[str(seed)] = found
            print(
                f"{name}, seed {seed}: {'right' if found['right'] else 'WRONG'}, {found['came']}", flush=True
            )
            path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"\n{table(results)}")
    return int(not all(each["right"] for seeds in results.values() for each in seeds.values()))


if __name__ == "__main__":
    sys.exit(main())
