"""Two experiments in one process: neither sees the other's stages, roles, models or random numbers."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy
import pytest

import rlhf
from helpers.chains import SETTINGS, SOURCES, Chain
from helpers.jobs import user
from rlhf.cli.api import check_ended
from rlhf.config import ConfigError
from rlhf.digests import file_digest
from rlhf.exit_codes import CONFIG_ERROR
from rlhf.pipeline.run import GateError

Config = dict[str, Any]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Small data sets, and a model."""
    directory = tmp_path_factory.mktemp("data")
    Chain(directory)
    (directory / "model").symlink_to(tiny_model)
    return directory


def composed(data: Path, place: Path, *overrides: str) -> Config:
    place.mkdir()
    sources = [each.replace("=", f"={data}/") for each in SOURCES[:4]]
    return rlhf.compose(
        *SETTINGS, *sources, "sft.epochs=1", "dpo.batch_rows=8", "gates=warn", "run_name=run",
        f"runs_dir={place}/runs", f"store_dir={place}/store", *overrides,
    )  # fmt: skip


def with_instance(data: Path, place: Path) -> Config:
    """Twice SFT, the second time from rows of its own: a role that the packaged stages do not have."""
    own = f"{{path: {data}/pairs.jsonl, fields: {{completion: chosen}}}}"
    return composed(data, place, "stage=[sft@pairs]", f"sft@pairs.data={own}", "sft@pairs.init=sft")


def from_a_directory(data: Path, place: Path) -> Config:
    """DPO from a directory, which has the name of the other experiment's stage."""
    found = composed(data, place, "stage=[dpo]", f"dpo.data={data}/pairs.jsonl", "seed=1")
    (place / "sft@pairs").symlink_to(data / "model", target_is_directory=True)
    return found | {"dpo": found["dpo"] | {"init": str(place / "sft@pairs")}}


def weights(config: Config) -> dict[str, str]:
    """Run it: the digest of what each stage made."""
    made = rlhf.run(config, quiet=True).directory.glob("artifacts/*/**/*.safetensors")
    return {f"{path.parent.name}/{path.name}": file_digest(path) for path in sorted(made)}


def test_two_threads_run_two_experiments_as_each_runs_alone(tmp_path: Path, data: Path) -> None:
    makers: list[Callable[[Path, Path], Config]] = [with_instance, from_a_directory]
    alone = [weights(make(data, tmp_path / f"alone{number}")) for number, make in enumerate(makers)]
    assert all(alone)

    def composed_and_run(number: int) -> dict[str, str]:
        return weights(makers[number](data, tmp_path / f"together{number}"))

    with ThreadPoolExecutor(2) as threads:
        assert [*threads.map(composed_and_run, (0, 1))] == alone


def test_what_a_run_made_is_read_from_its_directory(tmp_path: Path, data: Path) -> None:
    config = from_a_directory(data, tmp_path / "run")
    config["seed"], config["dpo"]["beta"] = numpy.int64(1), numpy.float32(0.5)  # as of numpy.linspace
    run = rlhf.run(config, quiet=True)
    assert run.policies == ["dpo"] and run.report.is_file()
    steps = run.metrics.query("stage == 'dpo'")
    assert [*steps.step] == sorted({*steps.step}) and steps.loss.notna().sum() > 0
    again = rlhf.open_run(run.directory)
    assert again.summary == run.summary and repr(again) == repr(run)
    one, same, other = (again.policy().generate(["Say 1"], max_new_tokens=8, seed=seed) for seed in (0, 0, 1))
    assert one == same != other
    with pytest.raises(ConfigError, match=r"policy=dpoo: .* Did you mean dpo\?"):
        again.policy("dpoo")
    with pytest.raises(ConfigError, match="Give shorter prompts"):
        again.policy().generate(["long " * 900])
    for prompt in ([user("hi")[0]], [3], [[{"role": "user"}]]):
        with pytest.raises(ConfigError, match="is no prompt"):
            again.policy().generate(prompt)  # type: ignore[arg-type]  # refused, as mypy does


def test_runs_without_a_name_have_directories_of_their_own(tmp_path: Path, data: Path) -> None:
    config = composed(data, tmp_path / "runs", "stage=prepare", "run_name=null")
    first, second = (rlhf.run(config | {"seed": seed}, quiet=True) for seed in (1, 2))
    assert first.directory != second.directory and first.directory.is_dir()


def test_a_failed_gate_is_an_error_that_names_the_run(tmp_path: Path, data: Path) -> None:
    config = composed(data, tmp_path / "run", "stage=sft", "gates=enforce")
    config["sft"]["gates"]["held_out_loss_change"] = {"max": -99.0, "advice": "raise {stage}.epochs"}
    with pytest.raises(GateError, match=r"Try: raise sft\.epochs\.") as error:
        rlhf.run(config, quiet=True)
    (note,) = error.value.__notes__
    assert repr(str(tmp_path / "run" / "runs" / "run")) in note
    found = rlhf.open_run(tmp_path / "run" / "runs" / "run")
    assert "gate sft/held_out_loss_change failed" in repr(found)
    assert found.verdict == "A gate ended the run; a random model says nothing about quality."
    assert [each["outcome"] for each in found.gates if each["name"] == "held_out_loss_change"] == ["failed"]


def test_the_python_api_is_listed() -> None:
    assert {"compose", "run", "open_run", "__version__"} <= {*dir(rlhf)}


def test_what_a_rank_refused_is_told_whole(tmp_path: Path) -> None:
    """Also where it quotes an error of another's, whose name ends like the word before ours."""
    (tmp_path / "ranks").mkdir()
    said = "ppo.reward=python:mine:score: ValueError: no (mine.py, line 3). It returns a list."
    (tmp_path / "ranks" / "rank0.err").write_text(f"loading\nError: {said}\nNothing was loaded.\n")
    with pytest.raises(ConfigError) as error:
        check_ended(CONFIG_ERROR, tmp_path)
    assert str(error.value) == f"{said}\nNothing was loaded."


def test_mistakes_are_told_in_the_users_own_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"sft\.epoch: there is no such key\. Did you mean sft\.epochs\?"):
        rlhf.compose("sft.epoch=3")
    calls = (lambda: rlhf.open_run("none"), lambda: rlhf.compose(config_dir="none"), lambda: rlhf.run({}))
    for wrong in calls:
        with pytest.raises(ConfigError, match=r"Name the directory|no such directory|takes the config"):
            wrong()
    with pytest.raises(ConfigError, match=r"sft\.epochs=-3: "):
        rlhf.run(rlhf.compose("sft.epochs=-3"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"Under torchrun or srun, use python -m rlhf"):
        rlhf.run({})
