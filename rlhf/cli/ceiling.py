"""`python -m rlhf ceiling RUN`: how much better a run gets if one of its parts is as good as can be had.

Ceiling analysis: Ng, "Machine Learning Yearning", chapters 53 to 57, error analysis by parts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from hydra.core.override_parser.types import Quote, QuotedString

from rlhf.bisect.differences import Side, downstream, gone
from rlhf.bisect.scores import NoScoresError, Scores, difference, in_words
from rlhf.cli.command import read_words
from rlhf.cli.trials import Judged, Trials, is_true, judged_run, section_of
from rlhf.config import Complaint, ConfigError
from rlhf.data.schema import PromptRow
from rlhf.disk import replace_text
from rlhf.evaluation.sampled import Sampled
from rlhf.exit_codes import DONE
from rlhf.pipeline.defaults import references
from rlhf.pipeline.graph import named_sources, own_roles, roles_of, starts_from
from rlhf.pipeline.key import external_digests
from rlhf.pipeline.recipe import BEST_OF_N, kind_of
from rlhf.pipeline.store import Store
from rlhf.tracking.progress import clock
from rlhf.tracking.redaction import redacted
from rlhf.tracking.tables import Cells, shown

HELP = """python -m rlhf ceiling RUN [dry_run=true] [runs_dir=DIR]

Replace each part of a run by the best that is to be had, and measure how much better its policy gets: the SFT
model by what SFT started from, the reward by the judge itself, the policy gradient by best of n with the same
reward, the prompts by prompts of the evaluation that are not asked. RUN is a run's name or its directory.
dry_run=true only shows the trials and their times. The result is printed, and written to
RUNS_DIR/ceiling-RUN/. After Ctrl-C the same command continues.
"""
MIN_PROMPTS = 8
"""Fewest further prompts from which a policy can learn, and fewest held-out ones that tell whether it did."""


class Replacement(NamedTuple):
    """A part of a run, replaced by the best that is to be had."""

    part: str
    by: str
    config: dict[str, Any] | None
    """The trial's config; None if the part cannot be replaced, for the reason `by`."""
    touches: frozenset[str] = frozenset()
    """The stages that it changes directly."""
    policy: str = ""
    """The policy that is judged, if it is not the run's."""
    files: Mapping[Path, Sequence[PromptRow]] = {}
    """Files that the trial reads, with their prompts."""


class Gain(NamedTuple):
    """How much better the policy of a trial is than the run's."""

    value: Sampled
    why: str = ""
    """Why it does not tell whether the part is better, whatever the interval."""

    @property
    def word(self) -> str:
        """Whether the replacement is better than the run's own part."""
        if self.why:
            return "cannot tell"
        if self.value.low > 0:
            return "restores"
        return "is worse" if self.value.high < 0 else "cannot tell"

    @property
    def words(self) -> str:
        """The gain with its interval, and why it does not tell."""
        return "; ".join(filter(None, [in_words(self.value), self.why]))


def ceiling(arguments: Sequence[str], defaults: Mapping[str, Any]) -> int:
    """Run the trials and show how much each part restores."""
    given = read_words("ceiling", arguments, {"dry_run": "false", "runs_dir": defaults["runs_dir"]}, HELP)
    if given is None:
        return DONE
    words, keys = given
    if len(words) != 1:
        raise ConfigError("ceiling: name one run, as in `python -m rlhf ceiling RUN`.")
    is_dry = is_true("ceiling dry_run", keys["dry_run"])
    base = judged_run("ceiling ", words[0], Path(keys["runs_dir"]))
    trials = Trials(base, "ceiling", f"ceiling-{base.name}", budget=0)
    check_unchanged(base, trials.store)
    if is_dry:
        rows = [
            [each.part, each.by, "-" if each.config is None else clock(seconds_of(base, each))]
            for each in replacements(base, trials.directory)
        ]
        trials.console.print(shown(Cells(["part", "replaced by", "time"], rows), right=[2]))
        return DONE
    return trials.finish(lambda: run_all(base, trials))


def check_unchanged(base: Judged, store: Store) -> None:
    """Refuse a run whose files or code have changed since: its trials would learn or be judged by others.

    Raises:
        ConfigError: it names the keys, or a file that is not there.
    """
    chain, recipes, needed = base.experiment.stages, base.recipes(), {*base.experiment.needed()}
    sources = named_sources(chain)
    roles = {role for name in needed for role in own_roles(chain[name])} - {*sources.makers()}
    for role in sorted(roles):  # a file that is missing is an error of its own, which `gone` does not raise
        sources.content_digest(role)
    for name in {*recipes} - {"prepare"}:
        external_digests(chain[name], chain, store.directory_digest)
    found = gone(Side("good", base.experiment, recipes), store, needed, frozenset())
    if keys := sorted({key for key, _ in found}):
        why = f"the content is no longer that of {base.name}."
        raise ConfigError(Complaint(", ".join(keys), why, "Put it back, or run its command again."))


def replacements(base: Judged, directory: Path) -> Iterator[Replacement]:
    """The parts of the run, in the order of the chain."""
    stage = base.experiment.stages[base.subject]
    yield from of_start(base)
    rewards = [*stage.reads().rewards]
    judge = base.config()[base.evaluation][base.kind]
    if len(rewards) != 1:
        yield Replacement("reward", f"{base.subject} learns from no reward, or from several", None)
        yield Replacement("policy gradient", f"{base.subject} learns from no reward, or from several", None)
    else:
        key = rewards[0].removeprefix(f"{base.subject}.")
        reward = base.config()[base.subject][key]
        if reward == judge:
            yield Replacement("reward", "it is the judge already", None)
        else:
            config, touched = with_key(base, rewards[0], judge)
            yield Replacement("reward", f"{rewards[0]}={typed(redacted(judge))}", config, touched)
        yield of_best_of_n(base, reward)
    yield from of_prompts(base, directory)


def of_start(base: Judged) -> Iterator[Replacement]:
    """The model that the policy starts from, replaced by what that started from."""
    chain = base.experiment.stages
    start = starts_from(chain[base.subject])
    if start is None or start[1] not in chain:
        yield Replacement("start", f"{base.subject} starts from no stage's model", None)
        return
    key, made_by = start
    before = starts_from(chain[made_by])
    by = "base" if before is None else before[1]
    config, touched = with_key(base, f"{base.subject}.{key}", by)
    yield Replacement(made_by, f"{base.subject}.{key}={by}", config, touched)


def of_best_of_n(base: Judged, reward: Any) -> Replacement:
    """The policy gradient, replaced by the best of several answers of its start."""
    start = starts_from(base.experiment.stages[base.subject])
    own = {} if start is None else {"init": start[1]}
    config = base.config(BEST_OF_N, reward=reward, **own)
    by = f"the best of {base.section.best_of} answers by the same reward"
    return Replacement("policy gradient", by, config, frozenset([base.evaluation]), BEST_OF_N)


def of_prompts(base: Judged, directory: Path) -> Iterator[Replacement]:
    """The prompts that the policy learns from, replaced by evaluation prompts that are not asked."""
    role = prompts_role(base)
    if role is None:
        yield Replacement("prompts", f"{base.subject} learns from no prompts", None)
        return
    asked, others = base.rows()[: base.prompts], base.rows()[base.prompts :]
    if len(others) < MIN_PROMPTS:
        words = f"{base.evaluation}.prompts has only {len(others)} prompts that are not asked"
        yield Replacement("prompts", words, None)
        return
    files = {directory / "asked.jsonl": asked, directory / "not_asked.jsonl": others}
    paths = [*map(str, files)]
    chain = base.experiment.stages
    config, _ = with_key(base, roles_of(chain)[role].key, paths[1])
    section_of(config, base.evaluation)["prompts"] = paths[0]
    touched = {name for name in base.experiment.needed() if role in own_roles(chain[name])}
    by = f"{len(others)} prompts of {base.evaluation} that are not asked"
    yield Replacement("prompts", by, config, frozenset({*touched, "prepare"}), files=files)


def prompts_role(base: Judged) -> str | None:
    """The role of the prompts that the policy learns from, which may be those of `ppo.prompts`; None if it
    learns from no prompts."""
    chain = base.experiment.stages
    roles = roles_of(chain)
    learned = (role for role in own_roles(chain[base.subject]) if "train" in roles[role].splits)
    return next((role for role in learned if PromptRow in roles[role].row_types), None)


def as_row(row: PromptRow) -> dict[str, Any]:
    """A prompt as it stands in a file of prompts."""
    is_text = row.is_text and len(row.prompt) == 1
    return {**row.columns, "prompt": row.prompt[0]["content"] if is_text else row.prompt}


def with_key(base: Judged, key: str, value: Any) -> tuple[dict[str, Any], frozenset[str]]:
    """The run's config with another value of a key, and of the keys that repeat it; and the stages that this
    changes. The evaluation stays as it is."""
    config = base.config()
    section, _, own_key = key.partition(".")
    before = config[section][own_key]
    section_of(config, section)[own_key] = value
    touched = {section}
    for other, repeated in references().items():
        name, _, own = other.partition(".")
        is_same = repeated == f"{kind_of(section)}.{own_key}" and "." not in own
        if is_same and name != kind_of(base.evaluation) and config[name].get(own) == before:
            config[name][own] = value
            touched.add(name)
    return config, frozenset(touched & {*base.experiment.needed()})


def typed(value: Any) -> str:
    """A value as it is typed behind `KEY=`."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {typed(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(typed, value)) + "]"
    if not isinstance(value, str):
        return json.dumps(value)
    is_plain = re.fullmatch(r"[\w./:-]+( [\w./:-]+)*", value) and yaml.safe_load(value) == value
    return value if is_plain else QuotedString(value, Quote.single).with_quotes()


def seconds_of(base: Judged, each: Replacement) -> float:
    """Roughly how long a trial takes, by the run's own times."""
    changed = downstream(each.touches, base.experiment.stages)
    seconds = {name: base.seconds(name) or 0.0 for name in base.experiment.needed() if name in changed}
    of_one = seconds.pop(base.evaluation, 0.0) / len(base.section.policies)
    return sum(seconds.values()) + of_one * (base.section.best_of if each.policy else 1)


def run_all(base: Judged, trials: Trials) -> int:
    """Run the trials, print and write the table."""
    own, results = base.scores(), dict[str, Gain | str]()
    found = [*replacements(base, trials.directory)]
    pending = [each for each in found if each.config is not None]
    trials.budget = len(pending)
    for number, each in enumerate(pending):
        left = sum(seconds_of(base, other) for other in pending[number + 1 :])
        words, seconds = f"{each.part} replaced: {each.by}", seconds_of(base, each)
        for path, rows in each.files.items():
            replace_text(path, "".join(json.dumps(as_row(row)) + "\n" for row in rows))
        try:
            scores = trials.run(each.config or {}, words, seconds, left, each.policy)
            results[each.part] = Gain(difference([scores], [own]), unlearned(base, trials))
        except NoScoresError as error:
            results[each.part] = str(error)
    heading = f"{base.words} minus that of {base.subject}"
    table = Cells(["part", "replaced by", "", heading], [*rows_of(base, own, found, results)])
    parts = [dict(zip(("part", "by", "result", "gain"), row, strict=True)) for row in table.rows]
    content = {"run": str(base.files.directory), "judge": base.kind, "parts": parts}
    trials.write(f"Ceilings of {base.name}", [conclusion(base.evaluation, results)], table, content)
    return DONE


def conclusion(evaluation: str, results: Mapping[str, Gain | str]) -> str:
    """Where to look first.

    Args:
        evaluation: the stage that judged.
        results: part -> gain, or why it could not be measured.
    """
    gains = {part: gain for part, gain in results.items() if isinstance(gain, Gain)}
    better = {part: gain for part, gain in gains.items() if gain.word == "restores"}
    if better:
        first = max(better, key=lambda part: better[part].value.value)
        return f"Look first at {first}: the best that is to be had in its place restores the most."
    told = "No replacement is shown to be better than what the run has."
    if all(gain.word == "is worse" for gain in gains.values()):
        return told
    return f"{told} More prompts would tell more ({evaluation}.num_prompts)."


def unlearned(base: Judged, trials: Trials) -> str:
    """Why the newest trial's policy tells nothing of what it learned from: it is what it started from, for
    lack of held-out prompts; empty if it does tell."""
    name = base.subject
    stage: Mapping[str, Any] = trials.newest.summary["stages"].get(name, {"metrics": {}})
    rows = stage["metrics"].get(f"{name}/held_out_score_gain_rows")
    if stage["metrics"].get(f"{name}/best_step") != 0 or rows is None or rows >= MIN_PROMPTS:
        return ""
    return f"the policy is what {name} started from: too few held-out prompts chose among its steps"


def rows_of(
    base: Judged, own: Scores, found: Sequence[Replacement], results: Mapping[str, Gain | str]
) -> Iterator[list[str]]:
    """The table: the parts, the largest gain first; those that could not be replaced; the other policies."""
    measured = [(each, gain) for each in found if isinstance(gain := results.get(each.part), Gain)]
    for each, gain in sorted(measured, key=lambda pair: -pair[1].value.value):
        yield [each.part, each.by, gain.word, gain.words]
    for each in found:
        why = results.get(each.part, each.by)
        if isinstance(why, str):
            yield [each.part, each.by if each.config else "-", "no trial", why]
    for name in base.section.policies:
        if name != base.subject:
            gain = Gain(difference([base.scores(name)], [own]))
            yield [f"(policy {name})", "its own answers, no trial", gain.word, gain.words]
