"""Reads the command line before Hydra does, and rewrites messages of Hydra and YAML about mistakes."""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, MissingConfigException, OverrideParseException

from rlhf.config import ConfigError, did_you_mean, nearest
from rlhf.pipeline.recipe import kind_of, typed_key

ADDED = ("experiment", "remedy", "sweep")
"""Groups that must be added: `+experiment=NAME`."""
CHOSEN = ("model", "tracker", "recipe")
"""Groups with one choice in every run: `model=NAME`."""
SUBMITIT = ("submitit_local", "submitit_slurm")
"""Launchers that Hydra knows once submitit is installed."""
EXPERIMENT = re.compile(r"^\+{0,2}experiment=(.+\.ya?ml)$")
PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.M)
ALL_KEYS = "`python -m rlhf keys` says what each means."


def readable(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra can read them: `-m` stands first (between keys it would end them), and an
    experiment that is named by its path, `+experiment=path/to/mine.yaml`, is made known to Hydra, and named
    by its name. A mapping replaces the one of an experiment, where Hydra would mix both.

    Raises:
        ConfigError: there is no such file, or it is no YAML mapping; or a key has dashes.
    """
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        key, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("--") and key.partition(".")[0] in shape():
            typed = argument if equals or following.startswith("-") else f"{argument} {following}".rstrip()
            meant = f"{key}={value or typed.partition(' ')[2] or 'VALUE'}"
            raise ConfigError(f"{typed}: a key has no dashes before it: {meant}.")
    stages = {name for name, value in shape().items() if isinstance(value, dict) and "_target_" in value}
    for argument in arguments:
        name = argument.lstrip("+").partition("=")[0]
        if kind_of(name) in stages and "@" in name and typed_key(argument) == argument:
            raise ConfigError(
                f"{argument}: write STAGE@LABEL.KEY=VALUE, such as dpo@2.beta=0.3; a label has letters, "
                "digits and _."
            )
    ordered = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))
    known = [_known_experiment(typed_key(argument)) for argument in ordered]
    return [each for argument in known for each in (*_emptied(argument), argument)]


def _emptied(argument: str) -> Iterator[str]:
    """Before a mapping: its key without a value. Not where conf/ has a mapping, as for `sft.optim`: there a
    mapping changes some of the keys.
    """
    key, equals, value = argument.partition("=")
    packaged: Any = shape()
    for part in key.split("."):
        packaged = packaged.get(part, {}) if isinstance(packaged, dict) else {}
    if equals and value.startswith("{") and not isinstance(packaged, dict | list):
        yield f"{key}=null"


def _known_experiment(argument: str) -> str:
    named = EXPERIMENT.match(argument)
    if named is None:
        return argument
    names = []
    for text in named[1].split(","):  # a sweep over several
        path = Path(text.strip("'\"")).expanduser()
        content = read_experiment(path, argument)
        package = PACKAGE.search(content.splitlines()[0] if content else "")
        name = re.sub(r"\W", "_", path.stem)
        ConfigStore.instance().store(
            name=name, node=yaml.safe_load(content), group="experiment",
            package=package[1] if package else "_global_", provider="path",
        )  # fmt: skip
        names.append(name)
    return f"+experiment={','.join(names)}"


def read_experiment(path: Path, argument: str) -> str:
    """The text of an experiment's file.

    Raises:
        ConfigError: it cannot be read as one.
    """
    try:
        content = path.read_text(encoding="utf-8")
        found = yaml.safe_load(content)
    except OSError as error:
        raise ConfigError(
            f"{argument}: {path.absolute()} cannot be read ({error.strerror}). "
            "Name a YAML file that is there."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = not_yaml(error).replace("<unicode string>", str(path))
        raise ConfigError(f"{argument}: {reason}") from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{argument}: {path} holds no mapping of keys. Write lines such as "
            "`sft: {data: answers.jsonl}`."
        )
    for complaint in (*not_chosen(found), *wrong_kinds(found, shape())):
        raise ConfigError(f"{path}: {complaint}")
    return content


def not_chosen(values: Mapping[str, Any]) -> Iterator[str]:
    """The advice for a file with `model: tiny`, which chooses a model only on the command line."""
    for group in CHOSEN:
        value = values.get(group)
        if not isinstance(value, str):
            continue
        known = choices(group)
        name, rest = (nearest(value, known) or [value])[0], []
        if name not in known and group == "model":  # a directory, or a model of the Hub
            name, key = ("local", "path") if Path(value).expanduser().is_dir() else ("hub", "id")
            rest = ["model:", f"  {key}: {value}"]
        lines = ["", "defaults:", f"  - override /{group}: {name}", *rest]
        said = f"`{group}: {value}` does not choose a {group} in a file. Write instead:"
        yield "\n".join([said, *lines])


def not_yaml(error: Exception) -> str:
    """The place and reason why a file is no YAML."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = f"{error.context + ': ' if error.context else ''}{error.problem}"
        return f"{mark.name} line {mark.line + 1}, column {mark.column + 1}: not valid YAML ({problem})."
    return f"not valid YAML ({error})."


@cache
def shape() -> dict[str, Any]:
    """The packaged config without its choices: every key and its kind of value."""
    conf = resources.files("rlhf.conf")

    def read(name: str) -> dict[str, Any]:
        found: dict[str, Any] = yaml.safe_load((conf / name).read_text(encoding="utf-8"))
        return found

    whole = read("config.yaml")
    for default in whole.pop("defaults"):
        group, name = next(iter(default.items())) if isinstance(default, dict) else (default, "")
        if group.startswith("stages@"):
            whole[group.partition("@")[2]] = read(f"stages/{name}.yaml")
    return whole | {group: _of_all(group) for group in CHOSEN}


def _of_all(group: str) -> dict[str, Any]:
    """The keys of all choices of a group, without those that a choice sets elsewhere."""
    found: dict[str, Any] = {}
    for file in choices(group):
        text = (resources.files("rlhf.conf") / group / f"{file}.yaml").read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        found |= values.get(group, {}) if "@package _global_" in text else values
    return found


def choices(group: str) -> list[str]:
    """The names in a group, such as `model`."""
    folder = resources.files("rlhf.conf") / group
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def keys(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """`ppo`, `ppo.kl`, `ppo.kl.coef`, ..."""
    for name, value in values.items():
        if name in ("_target_", "hydra"):
            continue
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from keys(value, f"{before}{name}.")


def wrong_kinds(values: Mapping[str, Any], known: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """The keys that have a mapping instead of a list, or a list instead of a mapping."""
    for name, value in values.items():
        wanted, key = known.get(str(name)), f"{before}{name}"
        if isinstance(wanted, dict) and isinstance(value, dict):
            yield from wrong_kinds(value, wanted, f"{key}.")
        elif isinstance(wanted, dict) and wanted and isinstance(value, list):
            yield f"{key} is a list, and must be a mapping with the keys {', '.join(_own(wanted))}."
        elif isinstance(wanted, list) and isinstance(value, dict):
            yield f"{key} is a mapping, and must be a list."


def _own(values: Mapping[str, Any]) -> list[str]:
    return [name for name in values if name != "_target_"]


def in_our_words(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong and how to fix it, for an error of Hydra, OmegaConf or YAML."""
    if isinstance(error, OverrideParseException):
        return _not_read(error, arguments)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _no_choice(error)
    if isinstance(error, yaml.YAMLError):
        return not_yaml(error)
    if isinstance(error, RecursionError):
        return "files name each other in their `defaults`, in a circle. Remove one of these lines."
    text = str(error)
    if missing_file := re.match(r"(?:In '.+': )?Could not (?:load|find) '(\w+)/([^']+)'", text):
        group, name = missing_file.groups()
        known = choices(group) if (resources.files("rlhf.conf") / group).is_dir() else []
        return (
            f"{group}/{name}: there is no such file.{did_you_mean(name, known)} `defaults` and a list of "
            "names take files of rlhf/conf and of --config-dir, by their names without .yaml."
        )
    if unknown := re.match(r"Could not override '(.+)'", text):
        return no_key(unknown[1], arguments)
    if ambiguous := re.match(r"Ambiguous value for argument '(.+)'\n", text):
        key, _, value = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]}: a comma separates the values of a sweep, which -m starts. One value: "
            f"{quoted(key, value)}. A list: {key}=[{value}]."
        )
    if merged := re.match(r"Error merging override (.+)", text):
        return _wrong_kind(merged[1])
    if missing := re.search(r"Interpolation key '(.+?)' not found", text):
        place = re.search(r"full_key: (\S+)", text)
        where = f"{place[1]}: " if place else ""
        return f"{where}${{{missing[1]}}} names no key.{did_you_mean(missing[1], keys(shape()))}"
    if variable := re.search(r"Environment variable '(\w+)' not found", text):
        return f"${{oc.env:{variable[1]}}}: the environment has no variable {variable[1]}."
    if unset := re.search(r"Missing mandatory value: (\S+)", text):
        return f"{unset[1]}: a value is required."
    if part := re.search(r"node `(\S+)` is not a container and thus cannot contain `(\S+)`", text):
        return f"{part[1]}: one value stands here, and it must be a mapping of keys, such as {part[2]}."
    if composed := re.match(r"In '(.+)': (?:ConfigTypeError|ValidationError) raised while composing", text):
        return (
            f"{composed[1]}: a list stands where a mapping of keys must, or a mapping where a list must. "
            "`python -m rlhf keys KEY` shows a key's kind."
        )
    return text


def no_key(key: str, arguments: Sequence[str]) -> str:
    """The message for a key that does not exist."""
    if key in ADDED:
        value = next((each.partition("=")[2] for each in arguments if each.startswith(f"{key}=")), "NAME")
        return f"{key}={value}: it is added, with a plus sign: +{key}={value}."
    group, _, name = key.partition(".")
    for choice in choices(group) if group in CHOSEN else ():
        text = (resources.files("rlhf.conf") / group / f"{choice}.yaml").read_text(encoding="utf-8")
        if name in yaml.safe_load(text):
            return f"{key}: this key belongs to {group}={choice}, which this run does not have."
    return f"{key}: there is no such key.{did_you_mean(key, keys(shape()))} {ALL_KEYS}"


def _no_choice(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or [])
    if name in SUBMITIT:
        return f"{group}={name} needs submitit: pip install -e '.[slurm]'."
    if group == "hydra/launcher":
        options = sorted({*options, *SUBMITIT})
    plus = "+" if group in ADDED else ""
    own = " Or a path that ends in .yaml." if group == "experiment" else ""
    return (
        f"{plus}{group}={name}: there is no such choice.{did_you_mean(name, options)} "
        f"There are: {', '.join(options)}.{own}"
    )


def _wrong_kind(override: str) -> str:
    key, _, value = override.partition("=")
    key, known = key.lstrip("+"), shape()
    for name in key.split("."):
        known = known.get(name, {}) if isinstance(known, dict) else {}
    if value.startswith("[") and isinstance(known, dict) and known:
        names = _own(known)
        return (
            f"{override}: a mapping, not a list. Set its keys, such as {key}.{names[0]}; "
            f"it has {', '.join(names)}."
        )
    if value.startswith("{"):
        return f"{override}: a list, not a mapping, such as {key}=[A,B]."
    return f"{override}: this value cannot stand here. `python -m rlhf keys {key}` says what can."


def _not_read(error: OverrideParseException, arguments: Sequence[str]) -> str:
    override, reason = str(error.override), str(error).splitlines()[0]
    key, has_value, value = override.partition("=")
    place = list(arguments).index(override) if override in arguments else 0
    before, behind = list(arguments)[max(0, place - 1) : place], list(arguments)[place + 1 :]
    if not has_value:
        if not before or "=" not in before[0]:
            return f"{override}: not KEY=VALUE."
        joined = shlex.quote(" ".join([*before, override]))
        return f"{override}: not KEY=VALUE. Does it belong to {before[0]}? Then write {joined}."
    if not _can_be_key(key):
        return no_key(key, arguments)
    if not value.startswith(("[", "{")):
        return (
            f"{override}: some of these characters mean something to Hydra. Put quotes around the value: "
            f"{quoted(key, value)}."
        )
    if behind and sum(map(override.count, "{[")) > sum(map(override.count, "}]")):
        return (
            f"{override}: the bracket is not closed. Put quotes around the whole, blanks included: "
            f"'{key}={{path: a.jsonl, limit: 100}}'."
        )
    reason = reason.removeprefix(f"{override}: ")
    return (
        f"{override}: not a list or a mapping ({reason}). Close every bracket, put a space behind each "
        "colon, and quotes around a text with =, (, ), a comma or a colon: "
        """"sft.data={path: 'a=b.jsonl'}"."""
    )


def _can_be_key(text: str) -> bool:
    """Whether Hydra can read the text as a key."""
    try:
        OverridesParser.create().parse_override(f"{text}=0")
    except HydraException:
        return False
    return True


def quoted(key: str, value: str) -> str:
    """An override as typed in a shell, with quotes that keep the value as it is."""
    bare = value.strip("'\"")
    escaped = bare.replace("\\", "\\\\").replace("'", "\\'")
    override = f"{key}='{escaped}'"
    OverridesParser.create().parse_override(override)
    return f'"{override}"' if not set(override) & set('"$`\\!') else shlex.quote(override)


def is_of_composing(error: RecursionError) -> bool:
    """Whether files name each other in their `defaults`, in a circle."""
    return any("defaults_list" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
