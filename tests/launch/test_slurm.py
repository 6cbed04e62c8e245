"""launch/slurm.sbatch and launch/slurm_pipeline.sh on a real SLURM with two nodes."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.chains import SETTINGS, SOURCES, Chain, check_submitit_sweep, submitit_sweep_arguments
from helpers.hosts import SlurmCluster, wait_for

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "slurm.sbatch"
COMMAND = (
    *SETTINGS, *SOURCES, "zero=zero3", "precision=fp32", "gates=warn",
    # so that the published weights are those of a later step
    "ppo.steps=10", "ppo.evaluate_every=2", "ppo.peft=none", "ppo.optim.lr=3e-3", "ppo.kl.coef=0",
)  # fmt: skip
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not SlurmCluster.is_possible(), reason="needs root, slurmctld, slurmd and munge"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    """Two nodes; the chain's data lie in its directory `work`, where jobs are submitted."""
    directory = tmp_path_factory.mktemp("slurm")
    (directory / "work").mkdir()
    Chain(directory / "work")
    with (
        pytest.MonkeyPatch.context() as patch,
        SlurmCluster(directory / "cluster", num_nodes=2) as cluster,
    ):
        patch.chdir(directory / "work")
        cluster.environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        yield cluster


def submit(cluster: SlurmCluster, *words: str | Path) -> str:
    """A job's number."""
    return cluster.command("sbatch", "--parsable", *words)


def steps_of(job: str) -> int:
    """PPO steps that it has taken."""
    file = Path("runs") / f"slurm-{job}" / "metrics.jsonl"
    return file.read_text().count('"ppo/kl"') if file.exists() else 0


def log_of(job: str) -> str:
    return Path(f"slurm-{job}.out").read_text()


def results(store: str) -> tuple[bytes, list[dict[str, Any]]]:
    """PPO's weights, and every line of its metrics apart from times."""
    (artifact,) = Path(store).glob("ppo/[!.]*/")
    lines = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    timeless = [{k: v for k, v in line.items() if k != "time" and "seconds" not in k} for line in lines]
    return (artifact / "model.safetensors").read_bytes(), timeless


def test_a_preempted_pipeline_ends_as_an_undisturbed_one(cluster: SlurmCluster) -> None:
    printed = cluster.command(
        ROOT / "launch" / "slurm_pipeline.sh", *COMMAND, STAGES="generate ppo evaluate", SIZE_PPO="--nodes=2"
    )
    jobs = dict(line.split() for line in printed.splitlines())
    assert list(jobs) == ["generate", "ppo", "evaluate"]
    ppo = jobs["ppo"]

    wait_for("PPO takes steps", lambda: steps_of(ppo) >= 3, seconds=240)
    cluster.command("scancel", "--batch", "--signal=USR1", ppo)
    wait_for("it is back in the queue", lambda: cluster.job(ppo)["Restarts"] == "1", seconds=60)
    assert cluster.job(jobs["evaluate"])["JobState"] == "PENDING"

    for job in jobs.values():
        ended = cluster.finished(job)
        assert (ended["JobState"], ended["ExitCode"]) == ("COMPLETED", "0:0"), log_of(job)
    stopped_at = re.search(r"ppo: saving step (\d+), then stopping", log_of(ppo))
    went_on = re.search(r"ppo: continues from step (\d+)", log_of(ppo))
    assert stopped_at and went_on and stopped_at[1] == went_on[1], log_of(ppo)
    assert 3 <= int(went_on[1]) < 10
    assert "2 ranks, zero3" in log_of(ppo)

    shutil.copytree("store", "undisturbed", ignore=shutil.ignore_patterns("ppo", "evaluate"))
    again = submit(cluster, "--nodes=2", SCRIPT, *COMMAND, "stage=ppo", "store_dir=undisturbed")
    assert cluster.finished(again)["JobState"] == "COMPLETED", log_of(again)
    assert "continues" not in log_of(again)
    weights, metrics = results("store")
    assert results("undisturbed") == (weights, metrics)
    (start,) = Path("store").glob("sft/[!.]*/model.safetensors")
    assert weights != start.read_bytes()  # otherwise the comparison would say nothing
    assert not list(Path().glob(".slurm-*"))


def test_slurm_preempts_it_and_the_user_cancels_it(cluster: SlurmCluster) -> None:
    job = submit(cluster, "--nodes=2", SCRIPT, *COMMAND, "stage=ppo", "ppo.steps=1000", "seed=1")
    wait_for("PPO takes steps", lambda: steps_of(job) >= 1, seconds=240)
    urgent = submit(cluster, "--nodes=2", "--exclusive", "--partition=urgent", "--wrap", "true")
    assert cluster.finished(urgent, seconds=90)["JobState"] == "COMPLETED"
    assert cluster.job(job)["Restarts"] == "1", log_of(job)

    wait_for("it goes on", lambda: "ppo: continues from step" in log_of(job), seconds=120)
    before = steps_of(job)
    wait_for("it takes more steps", lambda: steps_of(job) > before, seconds=60)
    cluster.command("scancel", job)
    ended = cluster.finished(job, seconds=60)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "1"), log_of(job)


def test_a_job_whose_time_is_nearly_up_saves_what_it_has_measured_to_need(cluster: SlurmCluster) -> None:
    """SLURM's own warning comes 28 minutes later. The prologue lets the first start end soon."""
    Path("prologue.sh").write_text(
        'test "$SLURM_JOB_END_TIME" -gt "$(date +%s)"\n'
        'if [ "${SLURM_RESTART_COUNT:-0}" -eq 0 ]; then SLURM_JOB_END_TIME=$(date +%s); fi\n'
    )
    job = submit(
        cluster, "--nodes=2", "--time=30", "--export=ALL,PROLOGUE=prologue.sh", SCRIPT, *COMMAND,
        "stage=sft", "sft.epochs=1000", "checkpoint.every_steps=2",
    )  # fmt: skip
    wait_for("it is back in the queue", lambda: cluster.job(job)["Restarts"] == "1", seconds=240)
    wait_for("it goes on", lambda: "sft: continues from step" in log_of(job), seconds=120)
    assert re.search(r"sft: saving step \d+, then stopping", log_of(job)), log_of(job)
    cluster.command("scancel", job)
    assert cluster.finished(job, seconds=60)["JobState"] == "CANCELLED", log_of(job)


@pytest.mark.parametrize(
    ("overrides", "code"),
    [
        (("ppo.stepz=3",), 2),
        (("stage=sft", "gates=enforce", "sft.gates.held_out_loss_change.max=-99"), 3),
    ],
)
def test_other_exit_codes_are_passed_on(cluster: SlurmCluster, overrides: tuple[str, ...], code: int) -> None:
    job = submit(cluster, "--nodes=2", SCRIPT, *COMMAND, *overrides)
    ended = cluster.finished(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", f"{code}:0", "0"), log_of(
        job
    )


def test_a_crashed_rank_ends_the_job_with_its_reason(cluster: SlurmCluster) -> None:
    Path("failing.py").write_text(
        "import os\n"
        "def score(prompts, responses):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        os.write(2, b'no score today\\n')\n"
        "        os._exit(1)\n"
        "    return [float(len(response)) for response in responses]\n"
    )
    reward = ("ppo.reward=python:failing:score", "ppo.critic.init=sft", "ppo.score.normalize=running")
    job = submit(
        cluster,
        "--nodes=2",
        "--export=ALL,PYTHONPATH=.",
        SCRIPT,
        *COMMAND,
        *reward,
        "stage=ppo",
        "evaluate.gold=null",
    )
    ended = cluster.finished(job)
    assert (ended["JobState"], ended["ExitCode"], ended["Restarts"]) == ("FAILED", "1:0", "0"), log_of(job)
    assert "no score today" in log_of(job)


def test_the_trials_of_a_submitit_sweep_train_sft_once(
    cluster: SlurmCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_CONF", "PATH", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, cluster.environment[name])
    chain = Chain(tmp_path)
    outcome = chain.run(*submitit_sweep_arguments("submitit_slurm", "timeout_min=10", "cpus_per_task=1"))
    assert outcome.code == 0, outcome.out + outcome.err
    check_submitit_sweep(chain)
