"""Two experiments in one process: neither sees the other's stages, roles, models or random numbers."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.console import Console

from helpers.chains import SETTINGS, SOURCES, Chain
from helpers.experiments import compose
from rlhf.digests import file_digest
from rlhf.distributed.compute import Compute
from rlhf.pipeline.experiment import Experiment, build_experiment
from rlhf.pipeline.runner import Pipeline

LEARNS = ("sft.epochs=1", "dpo.batch_rows=8", "dpo.epochs=1", "gates=warn", "reward.peft=none")


def with_instance(data: Path, place: Path) -> Experiment:
    """Twice SFT, the second time from rows of its own: a role that the packaged stages do not have."""
    rows = {"path": str(data / "pairs.jsonl"), "fields": {"completion": "chosen"}}
    own = {"data": rows, "init": "sft"}
    return composed(data, place, {"sft@pairs": own}, "stage=[sft@pairs]", "sft.peft=none")


def with_pairs(data: Path, place: Path) -> Experiment:
    """DPO from a directory, which has the name of the other experiment's stage."""
    (place / "sft@pairs").symlink_to(data / "model", target_is_directory=True)
    return composed(
        data,
        place,
        {},
        "stage=[dpo]",
        f"dpo.data={data}/pairs.jsonl",
        f"dpo.init={place}/sft@pairs",
        "seed=1",
    )


def composed(data: Path, place: Path, instances: Mapping[str, Any], *overrides: str) -> Experiment:
    sources = [each.replace("=", f"={data}/").replace("[", f"{data}/") for each in SOURCES[:4]]
    config = compose(
        *SETTINGS, *sources, *LEARNS, f"runs_dir={place}/runs", f"store_dir={place}/store", *overrides
    )
    return build_experiment(config | {"instances": instances})


def run(experiment: Experiment) -> dict[str, str]:
    """What each stage's weights are."""
    Pipeline(experiment, "run", Console(file=io.StringIO()), Compute("cpu", "float32")).run()
    found = Path(experiment.settings.runs_dir, "run", "artifacts").glob("*/*.safetensors")
    return {f"{path.parent.name}/{path.name}": file_digest(path) for path in sorted(found)}


def test_two_threads_run_two_experiments_as_each_runs_alone(tmp_path: Path, tiny_model: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    Chain(data)
    (data / "model").symlink_to(tiny_model)
    makers: list[Callable[[Path, Path], Experiment]] = [with_instance, with_pairs]

    def place(name: str, number: int) -> Path:
        found = tmp_path / f"{name}{number}"
        found.mkdir()
        return found

    alone = [run(make(data, place("alone", number))) for number, make in enumerate(makers)]
    assert [*alone[0]] == ["sft/model.safetensors", "sft@pairs/model.safetensors"]
    assert all(alone)
    together = [make(data, place("together", number)) for number, make in enumerate(makers)]
    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(run, together)] == alone
