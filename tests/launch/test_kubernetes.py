"""launch/kubernetes.yaml without a cluster: by Kubernetes' own schemas, and that its parts fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"


def closed(required: list[str], **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object with these properties and no others."""
    return {
        "type": "object", "properties": properties, "required": required, "additionalProperties": False,
    }  # fmt: skip


TEXT, TEXTS, BOOL = {"type": "string"}, {"type": "array", "items": {"type": "string"}}, {"type": "boolean"}
# jobset.x-k8s.io/v1alpha2, of which Kubernetes' schemas say nothing: the fields that one would use here. The
# template is checked as a Job.
JOBSET = closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "jobset.x-k8s.io/v1alpha2"},
    kind={"const": "JobSet"},
    metadata=closed(["name"], name=TEXT, labels={"type": "object"}, annotations={"type": "object"}),
    spec=closed(
        ["replicatedJobs"],
        network=closed([], enableDNSHostnames=BOOL, subdomain=TEXT, publishNotReadyAddresses=BOOL),
        failurePolicy=closed(
            [],
            maxRestarts={"type": "integer", "minimum": 0},
            restartStrategy={"enum": ["Recreate", "BlockingRecreate", "InPlaceRestart"]},
            rules={
                "type": "array",
                "items": closed(
                    ["name", "action"],
                    name={"type": "string", "pattern": "^[A-Za-z]([A-Za-z0-9_,:]*[A-Za-z0-9_])?$"},
                    action={"enum": ["FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"]},
                    onJobFailureReasons=TEXTS,
                    targetReplicatedJobs=TEXTS,
                ),
            },
        ),
        replicatedJobs={
            "type": "array",
            "items": closed(
                ["name", "template"],
                name=TEXT, replicas={"type": "integer", "minimum": 0}, template={"type": "object"},
            ),
        },
        suspend=BOOL,
        ttlSecondsAfterFinished={"type": "integer", "minimum": 0},
    ),
)  # fmt: skip


def documents() -> tuple[dict[str, Any], dict[str, Any]]:
    """The volume claim and the JobSet."""
    volume, jobset = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    return volume, jobset


def check(volume: dict[str, Any], jobset: dict[str, Any]) -> None:
    """Raise unless Kubernetes would take both, unknown fields refused."""
    version = kubernetes_validate.latest_version()
    kubernetes_validate.validate(volume, version, strict=True)
    jsonschema.validate(jobset, JOBSET)
    for replicated in jobset["spec"]["replicatedJobs"]:
        job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": replicated["name"]}}
        kubernetes_validate.validate(job | replicated["template"], version, strict=True)


def test_kubernetes_takes_every_field() -> None:
    check(*documents())


SPEC = ("spec", "replicatedJobs", 0, "template", "spec")
CONTAINER = (*SPEC, "template", "spec", "containers", 0)


@pytest.mark.parametrize(
    "place",
    [
        ("spec", "network"),
        ("spec", "failurePolicy", "rules", 0),
        ("spec", "replicatedJobs", 0),
        (*SPEC, "podFailurePolicy", "rules", 0, "onExitCodes"),
        (*SPEC, "template", "spec", "volumes", 1, "emptyDir"),
        (*CONTAINER, "securityContext", "capabilities"),
        (*CONTAINER, "env", 1, "valueFrom"),
    ],
    ids=lambda place: str(place[-1]),
)
def test_an_unknown_field_is_found_at_every_depth(place: tuple[str | int, ...]) -> None:
    """So the check above checks."""
    volume, jobset = documents()
    found: Any = jobset
    for name in place:
        found = found[name]
    found["mispelt"] = True
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError), match="mispelt"):
        check(volume, jobset)


def container_of(jobset: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The pod's spec and that of its only container."""
    (replicated,) = jobset["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    return pod, container


def gibibytes(amount: str) -> float:
    assert amount.endswith("Gi")
    return float(amount.removesuffix("Gi"))


def test_a_pod_asks_for_what_nccl_and_the_ranks_need() -> None:
    pod, container = container_of(documents()[1])
    assert container["securityContext"]["capabilities"]["add"] == ["IPC_LOCK"]
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert set(requests) == {"cpu", "memory"} and int(limits["nvidia.com/gpu"]) > 0
    assert requests["memory"] == limits["memory"]  # or the kernel may kill it below its limit
    assert int(requests["cpu"]) >= int(limits["nvidia.com/gpu"])
    (mount,) = [each for each in container["volumeMounts"] if each["mountPath"] == "/dev/shm"]
    (volume,) = [each for each in pod["volumes"] if each["name"] == mount["name"]]
    assert volume["emptyDir"]["medium"] == "Memory"
    assert gibibytes(volume["emptyDir"]["sizeLimit"]) < gibibytes(limits["memory"])


def test_its_image_and_directory_are_those_of_the_dockerfile() -> None:
    _, container = container_of(documents()[1])
    dockerfile = (LAUNCH / "Dockerfile").read_text()
    assert f"\nWORKDIR {container['workingDir']}\n" in dockerfile
    assert f"--tag {container['image']} ." in dockerfile


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
