"""Prepare the command line for Hydra, and rewrite error messages of Hydra and YAML."""

from __future__ import annotations

import re
import shlex
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from rlhf.pipeline.recipe import hydra_argument, kind_of

ADDED_GROUPS = ("experiment", "remedy", "sweep")
"""Config groups that need a plus sign: `+experiment=NAME`."""
CHOICE_GROUPS = ("model", "tracker", "recipe")
"""Config groups with one choice in every run: `model=NAME`."""
SUBMITIT_LAUNCHERS = ("submitit_local", "submitit_slurm")
"""Launchers that need submitit."""
EXPERIMENT_PATH = re.compile(r"^\+{0,2}experiment=(.+\.ya?ml)$")
PACKAGE = re.compile(r"^\s*#\s*@package\s+(\S+)", re.M)
KEYS_HINT = "`python -m rlhf keys` says what each means."


def hydra_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments in a form that Hydra can read.

    `-m` moves to the front, because between keys it would end them. An experiment given by its path,
    `+experiment=path/to/mine.yaml`, is registered with Hydra and replaced by its name. A mapping replaces the
    one of an experiment; Hydra alone would merge both.

    Raises:
        ConfigError: there is no such file, or it is no YAML mapping; or a key has dashes.
    """
    for argument, following in zip_longest(arguments, arguments[1:], fillvalue=""):
        key, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("--") and key.partition(".")[0] in packaged_keys():
            typed = argument if equals or following.startswith("-") else f"{argument} {following}".rstrip()
            correct = f"{key}={value or typed.partition(' ')[2] or 'VALUE'}"
            raise ConfigError(f"{typed}: a key has no dashes before it: {correct}.")
    stages = {
        name for name, value in packaged_keys().items() if isinstance(value, dict) and "_target_" in value
    }
    for argument in arguments:
        name = argument.lstrip("+").partition("=")[0]
        if kind_of(name) in stages and "@" in name and hydra_argument(argument) == argument:
            raise ConfigError(
                f"{argument}: write STAGE@LABEL.KEY=VALUE, such as dpo@2.beta=0.3; a label has letters, "
                "digits and _."
            )
    ordered = sorted(arguments, key=lambda argument: argument not in ("-m", "--multirun"))
    registered = [_registered_experiment(hydra_argument(argument)) for argument in ordered]
    return [each for argument in registered for each in (*_null_before_mapping(argument), argument)]


def _null_before_mapping(argument: str) -> Iterator[str]:
    """`KEY=null` if the argument sets KEY to a mapping: so the mapping replaces an earlier one. Nothing if
    conf/ has a mapping there, as for `sft.optim`: then the new mapping changes only its own keys.
    """
    key, equals, value = argument.partition("=")
    packaged: Any = packaged_keys()
    for part in key.split("."):
        packaged = packaged.get(part, {}) if isinstance(packaged, dict) else {}
    if equals and value.startswith("{") and not isinstance(packaged, dict | list):
        yield f"{key}=null"


def _registered_experiment(argument: str) -> str:
    named = EXPERIMENT_PATH.match(argument)
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
    """The text of an experiment file.

    Raises:
        ConfigError: the file cannot be read, or is no experiment.
    """
    try:
        content = path.read_text(encoding="utf-8")
        values = yaml.safe_load(content)
    except OSError as error:
        raise ConfigError(
            f"{argument}: {path.absolute()} cannot be read ({error.strerror}). "
            "Name a YAML file that is there."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = yaml_complaint(error).replace("<unicode string>", str(path))
        raise ConfigError(f"{argument}: {reason}") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{argument}: {path} holds no mapping of keys. Write lines such as "
            "`sft: {data: answers.jsonl}`."
        )
    for complaint in (*choice_complaints(values), *wrong_kind_complaints(values, packaged_keys())):
        raise ConfigError(f"{path}: {complaint}")
    return content


def choice_complaints(values: Mapping[str, Any]) -> Iterator[str]:
    """Advice for a file with `model: tiny`. Only on the command line does this choose a model."""
    for group in CHOICE_GROUPS:
        value = values.get(group)
        if not isinstance(value, str):
            continue
        known = choice_names(group)
        name, extra_lines = (nearest(value, known) or [value])[0], []
        if name not in known and group == "model":  # a directory, or a model of the Hub
            name, key = ("local", "path") if Path(value).expanduser().is_dir() else ("hub", "id")
            extra_lines = ["model:", f"  {key}: {value}"]
        lines = ["", "defaults:", f"  - override /{group}: {name}", *extra_lines]
        advice = f"`{group}: {value}` does not choose a {group} in a file. Write instead:"
        yield "\n".join([advice, *lines])


def yaml_complaint(error: Exception) -> str:
    """Place and reason of a YAML error."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        problem = f"{error.context + ': ' if error.context else ''}{error.problem}"
        return f"{mark.name} line {mark.line + 1}, column {mark.column + 1}: not valid YAML ({problem})."
    return f"not valid YAML ({error})."


@cache
def packaged_keys() -> dict[str, Any]:
    """The packaged config with the keys of all choices, to look up each key's kind of value."""
    conf = resources.files("rlhf.conf")

    def read(name: str) -> dict[str, Any]:
        values: dict[str, Any] = yaml.safe_load((conf / name).read_text(encoding="utf-8"))
        return values

    config = read("config.yaml")
    for default in config.pop("defaults"):
        group, name = next(iter(default.items())) if isinstance(default, dict) else (default, "")
        if group.startswith("stages@"):
            config[group.partition("@")[2]] = read(f"stages/{name}.yaml")
    return config | {group: _keys_of_all_choices(group) for group in CHOICE_GROUPS}


def _keys_of_all_choices(group: str) -> dict[str, Any]:
    """The keys of all choices of a group, without those outside the group."""
    keys: dict[str, Any] = {}
    for file in choice_names(group):
        text = (resources.files("rlhf.conf") / group / f"{file}.yaml").read_text(encoding="utf-8")
        values = yaml.safe_load(text)
        keys |= values.get(group, {}) if "@package _global_" in text else values
    return keys


def choice_names(group: str) -> list[str]:
    """Names of the choices in a config group, such as `model`."""
    folder = resources.files("rlhf.conf") / group
    return sorted(file.name.removesuffix(".yaml") for file in folder.iterdir() if file.name.endswith(".yaml"))


def full_keys(values: Mapping[str, Any], before: str = "") -> Iterator[str]:
    """All keys with their full names: `ppo`, `ppo.kl`, `ppo.kl.coef`, ..."""
    for name, value in values.items():
        if name in ("_target_", "hydra"):
            continue
        yield f"{before}{name}"
        if isinstance(value, dict):
            yield from full_keys(value, f"{before}{name}.")


def wrong_kind_complaints(
    values: Mapping[str, Any], known: Mapping[str, Any], before: str = ""
) -> Iterator[str]:
    """Complaints about keys with a mapping instead of a list, or a list instead of a mapping."""
    for name, value in values.items():
        wanted, key = known.get(str(name)), f"{before}{name}"
        if isinstance(wanted, dict) and isinstance(value, dict):
            yield from wrong_kind_complaints(value, wanted, f"{key}.")
        elif isinstance(wanted, dict) and wanted and isinstance(value, list):
            yield f"{key} is a list, and must be a mapping with the keys {', '.join(_key_names(wanted))}."
        elif isinstance(wanted, list) and isinstance(value, dict):
            yield f"{key} is a mapping, and must be a list."


def _key_names(values: Mapping[str, Any]) -> list[str]:
    return [name for name in values if name != "_target_"]


def explain_error(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong and how to fix it, from an error of Hydra, OmegaConf or YAML."""
    if isinstance(error, OverrideParseException):
        return _unreadable_message(error, arguments)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _unknown_choice_message(error)
    if isinstance(error, yaml.YAMLError):
        return yaml_complaint(error)
    if isinstance(error, RecursionError):
        return "files name each other in their `defaults`, in a circle. Remove one of these lines."
    text = str(error)
    if missing_file := re.match(r"(?:In '.+': )?Could not (?:load|find) '(\w+)/([^']+)'", text):
        group, name = missing_file.groups()
        known = choice_names(group) if (resources.files("rlhf.conf") / group).is_dir() else []
        return (
            f"{group}/{name}: there is no such file.{did_you_mean(name, known)} `defaults` and a list of "
            "names take files of rlhf/conf and of --config-dir, by their names without .yaml."
        )
    if unknown := re.match(r"Could not override '(.+)'", text):
        return unknown_key_message(unknown[1], arguments)
    if ambiguous := re.match(r"Ambiguous value for argument '(.+)'\n", text):
        key, _, value = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]}: a comma separates the values of a sweep, which -m starts. One value: "
            f"{quoted(key, value)}. A list: {key}=[{value}]."
        )
    if merged := re.match(r"Error merging override (.+)", text):
        return _wrong_kind_message(merged[1])
    if missing := re.search(r"Interpolation key '(.+?)' not found", text):
        place = re.search(r"full_key: (\S+)", text)
        where = f"{place[1]}: " if place else ""
        return f"{where}${{{missing[1]}}} names no key.{did_you_mean(missing[1], full_keys(packaged_keys()))}"
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


def unknown_key_message(key: str, arguments: Sequence[str]) -> str:
    """The message for a key that does not exist."""
    if key in ADDED_GROUPS:
        value = next((each.partition("=")[2] for each in arguments if each.startswith(f"{key}=")), "NAME")
        return f"{key}={value}: it is added, with a plus sign: +{key}={value}."
    group, _, name = key.partition(".")
    for choice in choice_names(group) if group in CHOICE_GROUPS else ():
        text = (resources.files("rlhf.conf") / group / f"{choice}.yaml").read_text(encoding="utf-8")
        if name in yaml.safe_load(text):
            return f"{key}: this key belongs to {group}={choice}, which this run does not have."
    return f"{key}: there is no such key.{_similar(key, [*full_keys(packaged_keys())])} {KEYS_HINT}"


def _similar(key: str, known: Collection[str]) -> str:
    """Similar keys; those of its subsection, if none of these is similar."""
    parts = key.split(".")
    for depth in range(len(parts) - 1, 1, -1):
        section = ".".join(parts[:depth]) + "."
        own = {each[len(section) :].partition(".")[0]: None for each in known if each.startswith(section)}
        if own and not nearest(parts[depth], own):
            return f" {section[:-1]} has {', '.join(own)}."
        if own:
            break
    return did_you_mean(key, known)


def _unknown_choice_message(error: MissingConfigException) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    options = sorted(error.options or [])
    if name in SUBMITIT_LAUNCHERS:
        return f"{group}={name} needs submitit: pip install -e '.[slurm]'."
    if group == "hydra/launcher":
        options = sorted({*options, *SUBMITIT_LAUNCHERS})
    plus = "+" if group in ADDED_GROUPS else ""
    path_hint = " Or a path that ends in .yaml." if group == "experiment" else ""
    return (
        f"{plus}{group}={name}: there is no such choice.{did_you_mean(name, options)} "
        f"There are: {', '.join(options)}.{path_hint}"
    )


def _wrong_kind_message(override: str) -> str:
    key, _, value = override.partition("=")
    key, known = key.lstrip("+"), packaged_keys()
    for name in key.split("."):
        known = known.get(name, {}) if isinstance(known, dict) else {}
    if value.startswith("[") and isinstance(known, dict) and known:
        names = _key_names(known)
        return (
            f"{override}: a mapping, not a list. Set its keys, such as {key}.{names[0]}; "
            f"it has {', '.join(names)}."
        )
    if value.startswith("{"):
        return f"{override}: a list, not a mapping, such as {key}=[A,B]."
    return f"{override}: this value cannot stand here. `python -m rlhf keys {key}` says what can."


def _unreadable_message(error: OverrideParseException, arguments: Sequence[str]) -> str:
    override, reason = str(error.override), str(error).splitlines()[0]
    key, has_value, value = override.partition("=")
    place = list(arguments).index(override) if override in arguments else 0
    before, after = list(arguments)[max(0, place - 1) : place], list(arguments)[place + 1 :]
    if key != key.strip():
        return f"{override!r}: spaces stand around the sign. Write {key.strip()}={value.strip()}."
    if not has_value:
        if key in full_keys(packaged_keys()):
            return f"{key}: it has no value. Write {key}=VALUE."
        if not before or "=" not in before[0]:
            return f"{override}: not KEY=VALUE."
        joined = shlex.quote(" ".join([*before, override]))
        return f"{override}: not KEY=VALUE. Does it belong to {before[0]}? Then write {joined}."
    if not _is_key(key):
        return unknown_key_message(key, arguments)
    if not value.startswith(("[", "{")):
        return (
            f"{override}: some of these characters mean something to Hydra. Put quotes around the value: "
            f"{quoted(key, value)}."
        )
    if after and sum(map(override.count, "{[")) > sum(map(override.count, "}]")):
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


def _is_key(text: str) -> bool:
    """Whether Hydra can read the text as a key."""
    try:
        OverridesParser.create().parse_override(f"{text}=0")
    except HydraException:
        return False
    return True


def quoted(key: str, value: str) -> str:
    """An override as typed in a shell, with quotes that keep the value as it is."""
    unquoted = value.strip("'\"")
    escaped = unquoted.replace("\\", "\\\\").replace("'", "\\'")
    override = f"{key}='{escaped}'"
    OverridesParser.create().parse_override(override)
    return f'"{override}"' if not set(override) & set('"$`\\!') else shlex.quote(override)


def is_defaults_cycle(error: RecursionError) -> bool:
    """Whether the error comes from files that name each other in their `defaults`, in a circle."""
    return any("defaults_list" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
