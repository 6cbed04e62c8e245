"""Who answers in a comparison: a model, and how it is asked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from rlhf.models.start import ModelDirectory
from rlhf.pipeline.recipe import BEST_OF_N

Method = Literal["zero_shot", "few_shot", "retrieval", "best_of_n"]
"""zero_shot asks the question alone; few_shot shows examples before it, retrieval passages; best_of_n asks it
several times and takes the answer with the highest reward."""
METHODS: tuple[Method, ...] = get_args(Method)
PROMPTED = ("few_shot", "retrieval")
"""Methods that add something to the question."""

JUDGES = {"score": "reward", "gold": "gold", "judge": "judge"}
"""Name of a score in metrics -> the key of its source."""

CANDIDATES = "candidates.json"
"""File in the artifact of a comparison: who was asked, and what the gains are over."""


class Candidate(NamedTuple):
    """A model with the method that asks it."""

    name: str
    """Its name in metrics and tables: `base`, `base+few_shot`, `sft`, `sft+retrieval`."""
    model: str
    """`base`, `init`, a stage of this run, a directory, or an endpoint."""
    method: Method


def candidate(model: str, method: Method = "zero_shot") -> Candidate:
    """A model, asked with a method."""
    name = label(model)
    return Candidate(name if method == "zero_shot" else f"{name}+{method}", model, method)


def parse_candidate(text: str, start: str) -> Candidate:
    """The candidate MODEL or MODEL+METHOD. `best_of_n` alone is that of `start`."""
    if text == BEST_OF_N:
        return Candidate(BEST_OF_N, start, "best_of_n")
    model, plus, word = text.rpartition("+")
    method = next((each for each in METHODS if plus and each == word), None)
    return candidate(text) if method is None else candidate(model, method)


def is_directory(model: str) -> bool:
    """Whether a model's name is a path. Stages have no slash in their names."""
    return "/" in model and not is_endpoint(model)


def is_endpoint(model: str) -> bool:
    """Whether a model is behind an endpoint: `http://HOST:PORT/v1#NAME`, or https."""
    return model.startswith(("http://", "https://"))


def is_stage(model: str) -> bool:
    """Whether a stage of this run makes the model."""
    return model not in ("base", "init") and "/" not in model


def sampled_models(
    key: str, models: Sequence[str], named: Mapping[str, tuple[str, str]]
) -> Iterator[tuple[str, str]]:
    """(key, model) of all models that run here, as in `Reads.sampled`.

    Args:
        key: the key that lists the models.
        named: models that another key names.
    """
    for model in models:
        if not is_endpoint(model):
            yield named.get(model) or (key, ModelDirectory(model) if is_directory(model) else model)


def label(model: str) -> str:
    """The model's name in tables: RUN/STAGE for a run's link, else the last two parts of its path; the name
    behind the # of an endpoint."""
    if is_endpoint(model):
        return model.partition("#")[2].replace("/", "-") or model
    return "/".join([part for part in Path(model).parts if part != "artifacts"][-2:])


def in_order(candidates: Sequence[Candidate], models: Sequence[str]) -> list[Candidate]:
    """The candidates by model, and by method for each model.

    Args:
        models: their order; models that are missing come last, as they are listed.
    """
    places = {
        model: place for place, model in enumerate([*models, *(each.model for each in candidates)][::-1])
    }
    return sorted(candidates, key=lambda each: (-places[each.model], METHODS.index(each.method)))
