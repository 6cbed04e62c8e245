"""The scripts in launch/ without a cluster: what they would run, and that this is `python -m rlhf` only."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import MutableMapping
from pathlib import Path

import pytest

from rlhf.config import ConfigError
from rlhf.distributed.compute import find_rank
from rlhf.distributed.signals import leave_exit_code

LAUNCH = Path(__file__).parents[2] / "launch"
PROLOGUE = LAUNCH / "prologue.sh"
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
    others = {LAUNCH / "kubernetes.yaml", LAUNCH / "Dockerfile"}
    assert set(LAUNCH.iterdir()) == {*SCRIPTS, PROLOGUE, *others}


@pytest.mark.parametrize("script", [*SCRIPTS, PROLOGUE], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [shellcheck, "--external-sources", script],
        cwd=LAUNCH.parent,
        capture_output=True,
        text=True,
        check=False,
    )
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


def test_a_container_gets_the_directory_of_submission(tmp_path: Path) -> None:
    """So that relative paths, the store and the ranks' notes are where they are outside."""
    (words,) = dry_run(
        LAUNCH / "slurm.sbatch", CONTAINER_IMAGE="/images/rlhf.sqsh", CONTAINER_MOUNTS="/data:/data"
    )
    here = Path.cwd()
    options = words[words.index("srun") : words.index("python")]
    assert {
        "--container-image=/images/rlhf.sqsh", f"--container-workdir={here}",
        f"--container-mounts={here}:{here},/data:/data",
    } < set(options)  # fmt: skip
    (plain,) = dry_run(LAUNCH / "slurm.sbatch")
    assert not [word for word in plain if word.startswith("--container")]


def test_the_users_own_srun_options_come_last() -> None:
    (words,) = dry_run(LAUNCH / "slurm.sbatch", SRUN_ARGS="--mpi=none --wait=5")
    place = words.index("python")
    assert words[place - 2 : place] == ["--mpi=none", "--wait=5"] and "--wait=60" in words


PROLOGUE_LINES = """
if [ -n "$NOBODY_SET_THIS" ]; then exit 1; fi
export OMP_NUM_THREADS=7 NCCL_SOCKET_IFNAME=ib0
SRUN_ARGS=--mpi=none CONTAINER_IMAGE=image
"""


def test_a_prologue_is_read_first(tmp_path: Path) -> None:
    prologue = tmp_path / "prologue of mine.sh"
    prologue.write_text(PROLOGUE_LINES)
    (words,) = dry_run(LAUNCH / "slurm.sbatch", PROLOGUE=str(prologue))
    assert {"--mpi=none", "--container-image=image"} < set(words)
    (words,) = dry_run(LAUNCH / "torchrun.sh", PROLOGUE=str(prologue), NPROC_PER_NODE="1")
    assert words[0] == "OMP_NUM_THREADS=7"


def test_what_a_prologue_exports_reaches_the_ranks(tmp_path: Path) -> None:
    prologue = tmp_path / "prologue.sh"
    prologue.write_text(PROLOGUE_LINES)
    first = "echo $NCCL_SOCKET_IFNAME > interface"
    assert run_with_ranks(tmp_path, "slurm.sbatch", [0], 0, first=first, PROLOGUE=str(prologue)) == (0, False)
    assert (tmp_path / "interface").read_text() == "ib0\n"


@pytest.mark.parametrize("script", ["slurm.sbatch", "torchrun.sh"])
@pytest.mark.parametrize(("content", "code"), [(None, 2), ("false\ntrue\n", 1)])
def test_nothing_starts_without_its_prologue(
    tmp_path: Path, script: str, content: str | None, code: int
) -> None:
    if content is not None:
        (tmp_path / "prologue.sh").write_text(content)
    outcome = run_with_ranks(tmp_path, script, [0], 0, first="touch started", PROLOGUE="prologue.sh")
    assert outcome == (code, False) and not (tmp_path / "started").exists()


def test_the_prologue_as_it_is_changes_nothing() -> None:
    assert dry_run(LAUNCH / "slurm.sbatch", PROLOGUE=str(PROLOGUE)) == dry_run(LAUNCH / "slurm.sbatch")


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
        assert ("--nodes=1" in job and "--gpus-per-node=2" in job) == (name not in ("prepare", "ppo"))


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (
            "--partition=gpu --nodes=2 --gpus-per-node=8 --exclusive --cpus-per-gpu=12 --account=mine",
            ["--partition=gpu", "--account=mine"],
        ),
        ("-p gpu -N 2 -G 16 --mem-per-gpu 64G -A mine", ["-p", "gpu", "-A", "mine"]),
        ("--gres=gpu:8 --tres-per-task=gres/gpu:1 --time=2:00:00 --gpus 4", ["--time=2:00:00"]),
    ],
)
def test_prepare_gets_no_gpus(options: str, left: list[str]) -> None:
    """It computes on CPUs; SIZE_PREPARE is taken as it is."""
    prepare, sft, *_ = dry_run(LAUNCH / "slurm_pipeline.sh", SIZE=options)
    assert prepare[3:-2] == [*left, "--nodes=1"]
    assert sft[3 : 3 + len(options.split())] == options.split()
    prepare, *_ = dry_run(LAUNCH / "slurm_pipeline.sh", SIZE=options, SIZE_PREPARE="--gpus=1")
    assert prepare[3:-2] == ["--gpus=1"]


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


@pytest.mark.parametrize(
    ("cores", "ranks", "given", "threads"),
    [("96", "8", None, 12), ("7", "2", None, 3), ("2", "4", None, 1), ("96", "8", "5", 5)],
)
def test_torchrun_shares_the_cores_among_the_ranks(
    tmp_path: Path, cores: str, ranks: str, given: str | None, threads: int
) -> None:
    (tmp_path / "nproc").write_text(f"#!/bin/sh\necho {cores}\n")
    (tmp_path / "nproc").chmod(0o755)
    variables = {} if given is None else {"OMP_NUM_THREADS": given}
    (words,) = dry_run(
        LAUNCH / "torchrun.sh", NPROC_PER_NODE=ranks, PATH=f"{tmp_path}:{os.environ['PATH']}", **variables
    )
    assert words[0] == f"OMP_NUM_THREADS={threads}"


def run_with_ranks(
    tmp_path: Path,
    script: str,
    rank_codes: list[int],
    launcher_code: int,
    *,
    state: str = "RUNNING",
    first: str = "",
    **variables: str,
) -> tuple[int, bool]:
    """Run a script whose launcher only leaves these codes; its exit code, and whether it requeued.

    Args:
        state: what SLURM says of the job.
        first: what the launcher does before.
        variables: of the script's environment.
    """
    notes = "".join(f'echo {code} > "$RLHF_NOTES/rank{rank}"\n' for rank, code in enumerate(rank_codes))
    launcher = f"#!/bin/bash\n{first}\n{notes}exit {launcher_code}\n"
    commands = {"srun": launcher, "python": launcher, "squeue": f"#!/bin/bash\necho {state}\n"}
    commands["scontrol"] = "#!/bin/bash\ntouch requeued\n"
    commands["sleep"] = "#!/bin/bash\necho >> looks\nexec /bin/sleep 0.05\n"
    for name, text in commands.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "NPROC_PER_NODE": "2", "SLURM_JOB_ID": "7"}
    environment |= variables
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


# A launcher that goes on until it is warned, or until nobody has done so in three looks at the clock.
WARNED = """
trap 'echo warned >> warnings' USR1
echo {stop} > "$RLHF_NOTES/stop_seconds"
touch looks
until [ -e warnings ] || [ "$(wc -l < looks)" -ge 3 ]; do :; done
{more}
"""


@pytest.mark.parametrize(("left", "stop", "warned"), [(700, 400, True), (700, 300, False)])
def test_a_job_is_warned_twice_the_time_that_a_stop_takes_before_its_limit(
    tmp_path: Path, left: int, stop: int, warned: bool
) -> None:
    end = str(int(time.time()) + left)
    first = WARNED.format(stop=stop, more="")
    run_with_ranks(tmp_path, "slurm.sbatch", [75], 75, first=first, SLURM_JOB_END_TIME=end)
    assert (tmp_path / "warnings").exists() == warned


def test_slurms_own_warning_does_not_end_what_saves_after_an_earlier_one(tmp_path: Path) -> None:
    """A second signal would end the ranks at once. A passed one comes within milliseconds."""
    first = WARNED.format(stop=400, more='kill -USR1 "$PPID"; /bin/sleep 0.5')
    end = str(int(time.time()) + 700)
    code = run_with_ranks(tmp_path, "slurm.sbatch", [75], 75, first=first, SLURM_JOB_END_TIME=end)
    assert code == (75, True)
    assert (tmp_path / "warnings").read_text() == "warned\n"


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
        patch.delenv("RLHF_NOTES", raising=False)
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
        | {"PYTHONPATH": str(tmp_path), "RLHF_NOTES": str(tmp_path), "RANK": "3", "WORLD_SIZE": "1"},
    )  # fmt: skip


@pytest.mark.parametrize(("signal_name", "code"), [("SIGUSR1", 75), ("SIGTERM", 75), ("SIGINT", 130)])
def test_a_signal_during_the_first_imports_is_a_stop(tmp_path: Path, signal_name: str, code: int) -> None:
    assert run_and_signal(tmp_path, signal_name).wait(timeout=60) == code
    assert (tmp_path / "rank3").read_text() == f"{code}\n"
