"""The scripts in launch/ without a cluster: what they would run, and that this is `python -m rlhf` only."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf.config import ConfigError
from rlhf.distributed.compute import find_rank
from rlhf.distributed.signals import leave_exit_code

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = [LAUNCH / "slurm.sbatch", LAUNCH / "slurm_pipeline.sh", LAUNCH / "torchrun.sh"]
QUOTED = "ppo.peft={method: lora, rank: 8}"


def dry_run(script: Path, *arguments: str, **variables: str) -> list[list[str]]:
    """The words of each line that a script prints, in an empty environment but for these variables."""
    environment = {"PATH": os.environ["PATH"], **variables}
    done = subprocess.run(
        ["bash", script, "--dry-run", *arguments], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_every_script_is_known_here() -> None:
    assert sorted(path for path in LAUNCH.iterdir() if path.suffix != ".yaml") == sorted(SCRIPTS)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run([shellcheck, script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_can_be_started_and_stops_at_its_first_error(script: Path) -> None:
    assert os.access(script, os.X_OK)
    assert "\nset -euo pipefail\n" in script.read_text()


def test_a_slurm_job_is_one_step_of_the_command_line() -> None:
    (words,) = dry_run(LAUNCH / "slurm.sbatch", "stage=ppo", QUOTED, SLURM_JOB_ID="12345")
    command = words[words.index("srun") :]
    assert command[command.index("python") :] == [
        "python", "-m", "rlhf", "stage=ppo", QUOTED, "run_name=slurm-12345",
    ]  # fmt: skip
    assert {"--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1"} <= set(command)
    assert "MASTER_PORT=22345" in words


@pytest.mark.parametrize(
    ("variables", "tasks", "cpus"),
    [
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "96"}, 8, 12),
        ({"SLURM_GPUS_ON_NODE": "0", "SLURM_CPUS_ON_NODE": "16"}, 1, 16),
        ({"SLURM_CPUS_ON_NODE": "16"}, 1, 16),
        ({"SLURM_GPUS_ON_NODE": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_ON_NODE": "96"}, 4, 24),
        ({"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_PER_TASK": "3", "SLURM_CPUS_ON_NODE": "16"}, 2, 3),
    ],
)
def test_one_task_a_gpu_else_one_a_node(variables: dict[str, str], tasks: int, cpus: int) -> None:
    (words,) = dry_run(LAUNCH / "slurm.sbatch", SLURM_JOB_NUM_NODES="4", **variables)
    assert {"--nodes=4", f"--ntasks-per-node={tasks}", f"--cpus-per-task={cpus}"} <= set(words)


def test_more_ranks_than_cpus_are_refused() -> None:
    environment = {"PATH": os.environ["PATH"], "SLURM_GPUS_ON_NODE": "8", "SLURM_CPUS_ON_NODE": "1"}
    done = subprocess.run(
        ["bash", LAUNCH / "slurm.sbatch"], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "8 ranks a node, but 1 CPU" in done.stderr and "--cpus-per-gpu" in done.stderr


def test_the_users_run_name_is_kept() -> None:
    (words,) = dry_run(LAUNCH / "slurm.sbatch", "run_name=mine", SLURM_JOB_ID="7")
    assert [word for word in words if word.startswith("run_name=")] == ["run_name=mine"]


def test_a_pipeline_is_a_chain_of_jobs_of_their_own_size() -> None:
    jobs = dry_run(
        LAUNCH / "slurm_pipeline.sh", "zero=zero3", QUOTED,
        SIZE="--nodes=1 --gpus-per-node=2", SIZE_PPO="--nodes=4 --gpus-per-node=8",
    )  # fmt: skip
    names = [next(word for word in job if word.startswith("stage=")).removeprefix("stage=") for job in jobs]
    assert names == ["prepare", "sft", "reward", "generate", "ppo", "evaluate"]
    for name, before, job in zip(names, [None, *names], jobs, strict=False):
        assert job[:2] == ["sbatch", "--parsable"]
        assert Path(job[job.index(f"stage={name}") - 1]).name == "slurm.sbatch"
        assert job[-2:] == ["zero=zero3", QUOTED]
        assert (f"--dependency=afterok:{str(before).upper()}_JOB" in job) == (before is not None)
        assert ("--nodes=4" in job and "--gpus-per-node=8" in job) == (name == "ppo")
        assert ("--nodes=1" in job and "--gpus-per-node=2" in job) == (name != "ppo")


def test_torchrun_gets_the_machines_and_the_signals() -> None:
    (words,) = dry_run(
        LAUNCH / "torchrun.sh", "stage=ppo", QUOTED,
        NNODES="3", NODE_RANK="2", MASTER_ADDR="10.0.0.1", NPROC_PER_NODE="8",
    )  # fmt: skip
    assert words[-4:] == ["-m", "rlhf", "stage=ppo", QUOTED]
    assert {
        "--nnodes=3", "--node-rank=2", "--nproc-per-node=8", "--master-addr=10.0.0.1", "--master-port=29500",
    } < set(words)  # fmt: skip
    assert words[words.index("--signals-to-handle") + 1].split(",") == ["SIGTERM", "SIGUSR1", "SIGINT"]


def test_kubernetes_runs_torchrun_on_every_pod_with_one_shared_volume() -> None:
    volume, jobset = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (volume["kind"], jobset["kind"]) == ("PersistentVolumeClaim", "JobSet")
    assert volume["spec"]["accessModes"] == ["ReadWriteMany"]
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert [LAUNCH.parent / container["command"][0]] == [LAUNCH / "torchrun.sh"]

    variables: dict[str, Any] = {each["name"]: each for each in container["env"]}
    assert variables["NNODES"]["value"] == str(job["completions"]) == str(job["parallelism"])
    assert "job-completion-index" in variables["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    name = jobset["metadata"]["name"]
    assert variables["MASTER_ADDR"]["value"] == f"{name}-{replicated['name']}-0-0.{name}"

    directories = {argument.partition("=")[2] for argument in container["args"] if "_dir=" in argument}
    (mount,) = [each for each in container["volumeMounts"] if each["name"] == "shared"]
    assert len(directories) == 2 and all(each.startswith(mount["mountPath"] + "/") for each in directories)
    (shared,) = [each for each in pod["volumes"] if each["name"] == "shared"]
    assert shared["persistentVolumeClaim"]["claimName"] == volume["metadata"]["name"]


def test_kubernetes_restarts_what_was_stopped_and_nothing_that_cannot_work() -> None:
    _, jobset = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    by_code = {
        code: rule["action"]
        for rule in job["podFailurePolicy"]["rules"]
        for code in rule.get("onExitCodes", {}).get("values", [])
    }
    assert by_code == {75: "Ignore", 2: "FailJob", 3: "FailJob"}
    (final,) = jobset["spec"]["failurePolicy"]["rules"]
    assert (final["action"], final["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy is refused otherwise
    assert pod["terminationGracePeriodSeconds"] >= 300


def run_with_ranks(
    tmp_path: Path,
    script: str,
    rank_codes: list[int],
    launcher_code: int,
    *,
    state: str = "RUNNING",
    first: str = "",
) -> tuple[int, bool]:
    """Run a script whose launcher only leaves these codes; its exit code, and whether it requeued.

    Args:
        state: what SLURM says of the job.
        first: what the launcher does before.
    """
    notes = "".join(f'echo {code} > "$RLHF_EXIT_CODES/rank{rank}"\n' for rank, code in enumerate(rank_codes))
    launcher = f"#!/bin/bash\n{first}\n{notes}exit {launcher_code}\n"
    commands = {"srun": launcher, "python": launcher, "squeue": f"#!/bin/bash\necho {state}\n"}
    commands["scontrol"] = "#!/bin/bash\ntouch requeued\n"
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    done = subprocess.run(["bash", LAUNCH / script], cwd=tmp_path, env=environment, check=False)
    assert not list(tmp_path.glob(".slurm-*"))  # it tidies up
    return done.returncode, (tmp_path / "requeued").exists()


@pytest.mark.parametrize(
    ("rank_codes", "srun_code", "state", "expected"),
    [
        ([], 0, "RUNNING", (0, False)),
        ([75, 75], 75, "RUNNING", (75, True)),  # the preempted job's own exit code no longer matters
        ([75, 75], 75, "COMPLETING", (75, False)),  # cancelled by its user
        ([1, 75], 75, "RUNNING", (1, False)),  # rank 1 was only stopped because rank 0 crashed
        ([75, 3], 75, "RUNNING", (3, False)),
        ([2, 2], 2, "RUNNING", (2, False)),
        ([1], 137, "RUNNING", (137, False)),
        ([], 138, "RUNNING", (138, False)),  # USR1, but not from us
    ],
)
def test_only_a_stopped_job_goes_back_to_the_queue(
    tmp_path: Path, rank_codes: list[int], srun_code: int, state: str, expected: tuple[int, bool]
) -> None:
    assert run_with_ranks(tmp_path, "slurm.sbatch", rank_codes, srun_code, state=state) == expected


def test_a_job_warned_before_python_was_up_goes_back_to_the_queue(tmp_path: Path) -> None:
    """The warning comes to the batch script, which passes it on to srun, which dies of it here."""
    warn = 'kill -USR1 "$PPID"; while :; do :; done'
    assert run_with_ranks(tmp_path, "slurm.sbatch", [], 0, first=warn) == (75, True)


@pytest.mark.parametrize(
    ("rank_codes", "torchrun_code", "expected"),
    [([0, 0], 0, 0), ([75, 75], 1, 75), ([75], 1, 1), ([3, 75], 1, 3), ([75, 2], 1, 2), ([], 1, 1)],
)
def test_torchrun_tells_what_its_ranks_ended_with(
    tmp_path: Path, rank_codes: list[int], torchrun_code: int, expected: int
) -> None:
    """One of two ranks without a code was killed: that is no stop."""
    assert run_with_ranks(tmp_path, "torchrun.sh", rank_codes, torchrun_code) == (expected, False)


@pytest.mark.parametrize("path", [*SCRIPTS, LAUNCH / "kubernetes.yaml"], ids=lambda path: path.name)
def test_python_is_only_called_for_rlhf(path: Path) -> None:
    code = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    modules = set(re.findall(r"python -m ([\w.]+)", code))
    assert modules <= {"rlhf", "torch.distributed.run"}
    assert "deepspeed " not in code and ".py" not in code


SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_NUM_TASKS": "11",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2),3", "MASTER_ADDR": "n1",
}  # fmt: skip


def test_srun_names_the_rank() -> None:
    environment: MutableMapping[str, str] = dict(SRUN)
    assert find_rank(environment) == (5, 11)
    assert (environment["LOCAL_RANK"], environment["LOCAL_WORLD_SIZE"]) == ("1", "4")


@pytest.mark.parametrize(
    ("tasks", "node", "here"), [("1", 0, 1), ("2(x3)", 2, 2), ("2,1", 0, 2), ("2,1", 1, 1), ("4(x2),3", 2, 3)]
)
def test_ranks_on_this_node(tasks: str, node: int, here: int) -> None:
    environment = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node)}
    find_rank(environment)
    assert environment["LOCAL_WORLD_SIZE"] == str(here)


def test_srun_without_an_address_is_refused() -> None:
    environment = {name: value for name, value in SRUN.items() if name != "MASTER_ADDR"}
    with pytest.raises(ConfigError, match=r"MASTER_ADDR is not set.*launch/slurm\.sbatch"):
        find_rank(environment)


def test_torchrun_names_the_rank_even_inside_srun() -> None:
    assert find_rank({**SRUN, "RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == (2, 4)


@pytest.mark.parametrize("one_task", [{}, {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}])
def test_alone_there_is_one_rank(one_task: dict[str, str]) -> None:
    assert find_rank(one_task) == (0, 1)


def test_without_a_launcher_that_asks_no_exit_code_is_left(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        patch.delenv("RLHF_EXIT_CODES", raising=False)
        leave_exit_code(75)
    assert not list(tmp_path.iterdir())


def run_and_signal(tmp_path: Path, signal_name: str) -> subprocess.Popen[bytes]:
    """`python -m rlhf` that is signalled while it imports `hydra`, which is before any run began."""
    early = tmp_path / "hydra"
    early.mkdir()
    (early / "__init__.py").write_text(
        f"import os, signal, sys\nos.kill(os.getpid(), signal.{signal_name})\n"
        f"sys.path[:] = [each for each in sys.path if each != {str(tmp_path)!r}]\n"
        "del sys.modules['hydra']\nimport hydra\n"  # itself
    )
    return subprocess.Popen(
        [sys.executable, "-m", "rlhf", "model=tiny"], cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": str(tmp_path), "RLHF_EXIT_CODES": str(tmp_path), "RANK": "3", "WORLD_SIZE": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("signal_name", "code"), [("SIGUSR1", 75), ("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_during_the_first_imports_is_a_stop(tmp_path: Path, signal_name: str, code: int) -> None:
    assert run_and_signal(tmp_path, signal_name).wait(timeout=60) == code
    assert (tmp_path / "rank3").read_text() == f"{code}\n"
