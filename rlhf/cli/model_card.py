"""The model card of an exported policy, made only from the run's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.cli.run_files import RunFiles
from rlhf.data.roles import ROLES
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.recipe import last_evaluation
from rlhf.pipeline.run import NO_VERDICT, as_markdown_list, with_outcome
from rlhf.pipeline.store import Artifact, Manifest, read_manifest
from rlhf.printable import printable
from rlhf.tracking.progress import clock
from rlhf.tracking.redaction import redacted_text
from rlhf.tracking.tables import Cells

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData

EMBEDDED = "SmolLM2-135M-Instruct"
APACHE = "apache-2.0"
UNKNOWN = "not known here"
CARD_METRICS = (
    "gold_mean", "gold_gain", "win_rate", "score_mean", "kl", "length_mean", "stop_rate", "distinct_2",
    "retention_perplexity_ratio", "question_accuracy",
)  # fmt: skip
"""Metrics of `evaluate` that the card shows for each policy."""


def model_card(run: RunFiles, policy: str, artifact: Artifact, name: str, base_name: str | None) -> str:
    """README.md of an exported policy.

    Args:
        name: name of the exported directory.
        base_name: base of a PEFT adapter: a name on the Hub, or the subdirectory `base`; None for a model.
    """
    manifests = lineage(artifact)
    parts = [
        f"---\n{hub_metadata(run, policy, manifests, base_name is not None)}\n---",
        f"# {name}",
        f"The `{policy}` model of the run `{run.directory.resolve().name}`, made by "
        f"rlhf-chain {artifact.manifest.packages['rlhf']} from {base(run)[0]}.",
    ]
    if run.summary["verdict"] == "":
        parts.append(NO_VERDICT)
    elif run.summary["verdict"]:
        verdict = with_outcome(run.summary.get("outcome"), run.summary["verdict"])
        parts.append(f"**Verdict of the run.** {as_markdown_list(verdict)}")
    else:
        parts.append("**The run has not come to its end**, so it has no verdict.")
    parts += ["## How to use it", usage(run, name, base_name)]
    parts += ["## How it was made", stages(run, manifests).markdown()]
    parts += ["## Data", data(run, manifests).markdown()]
    figures = evaluation_table(run, policy)
    if figures.rows:
        parts += ["## Measured", figures.markdown()]
    if run.summary["gates"]:
        parts += ["## Gates", gates(run).markdown()]
    manifest = artifact.manifest
    packages = ", ".join(f"{package} {version}" for package, version in manifest.packages.items())
    parts += [
        "## To make it again",
        f"Revision {manifest.git_revision or 'unknown'}, {packages}. Seed {run.config['seed']}. "
        f"Hardware: {manifest.hardware}. Made on {manifest.created[:10]}. Key: {manifest.key}.",
        "## Limits",
        "The gates and figures above are all that was measured. Nobody tested this model for safety.",
    ]
    return printable(redacted_text("\n\n".join(parts))) + "\n"


def hub_metadata(
    run: RunFiles, policy: str, manifests: Sequence[Manifest], is_adapter: bool
) -> ModelCardData:
    """Metadata for the Hub: https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import ModelCardData

    model, licence = run.config["model"], base(run)[1]
    return ModelCardData(
        base_model=model["id"] if model["kind"] == "hub" else None,
        datasets=hub_sets(run, manifests) or None,
        library_name="peft" if is_adapter else "transformers",
        license=None if licence == UNKNOWN else licence,
        pipeline_tag="text-generation",
        tags=["rlhf", policy.partition("@")[0]],
    )


def base(run: RunFiles) -> tuple[str, str]:
    """The base model in words, and its licence."""
    model = run.config["model"]
    if model["kind"] == "embedded":
        return f"{EMBEDDED} (packaged)", APACHE
    if model["kind"] == "tiny":
        return "a random model for tests", UNKNOWN
    if model["kind"] == "hub":
        return f"{model['id']} (revision {model['revision']})", UNKNOWN
    return f"the local model {Path(model['path']).name}", licence_of(Path(model["path"]) / "README.md")


def licence_of(card: Path) -> str:
    """The licence in the metadata of another model card."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (yaml.YAMLError, ValueError):  # a local card need not follow the Hub's format
        return UNKNOWN
    return str((metadata or {}).get("license", UNKNOWN))


def lineage(artifact: Artifact) -> list[Manifest]:
    """Manifests of the artifact and of everything that it was made from, if the store still has them. The
    artifact's own comes last."""
    manifests: dict[str, Manifest] = {}

    def visit(stage: str, key: str) -> None:
        path = artifact.path.parents[1] / stage / key
        if key in manifests or not path.is_dir():
            return
        manifest = read_manifest(path)
        for name, input_key in manifest.recipe.get("inputs", {}).items():
            visit(name, input_key)
        manifests[key] = manifest

    visit(artifact.manifest.stage, artifact.key)
    return [*manifests.values()]


def stages(run: RunFiles, manifests: Sequence[Manifest]) -> Cells:
    """A table with one row per stage."""
    rows = []
    for manifest in manifests:
        knobs: Mapping[str, Any] = manifest.recipe["knobs"]
        inputs = manifest.recipe.get("inputs", {})
        method = knobs.get("peft")
        how = str(method["method"] if isinstance(method, Mapping) else method or "-")
        rows.append([manifest.stage, ", ".join(inputs) or "-", how, clock(manifest.seconds), manifest.key])
    return Cells(["stage", "reads", "trains", "time", "key"], rows)


def data(run: RunFiles, manifests: Sequence[Manifest]) -> Cells:
    """A table of the data sets that the stages read. Shows only a file's name: its path may be private."""
    rows = [
        [key, *described_source(source)]
        for role in roles_of(manifests)
        for key, source in sources_of(run, role)
    ]
    return Cells(["key", "source", "licence"], rows)


def roles_of(manifests: Sequence[Manifest]) -> list[str]:
    """The roles of data that the stages read."""
    return [*dict.fromkeys(role for manifest in manifests for role in manifest.recipe.get("data", {}))]


def sources_of(run: RunFiles, role: str) -> Iterator[tuple[str, Any]]:
    """Key and source of a role's data, as the config names them. If the source is another data key (such as
    `ppo.prompts=sft.data`), gives that key's source."""
    kind, at, label = role.partition("@")
    if kind not in ROLES:
        yield role, "named by that stage"
        return
    stage, *path = ROLES[kind].key.split(".")
    value: Any = run.config.get(f"{stage}{at}{label}", run.config[stage])
    for name in path:
        value = value[name]
    lenders = {each.key: name for name, each in ROLES.items()}
    if isinstance(value, str) and value in lenders:
        yield from ((f"{ROLES[kind].key}: {key}", source) for key, source in sources_of(run, lenders[value]))
        return
    for source in value if isinstance(value, list) else [value]:
        if source is not None:
            yield ROLES[kind].key, source


def hub_sets(run: RunFiles, manifests: Sequence[Manifest]) -> list[str]:
    """Names of the data sets that come from the Hub."""
    sources = [source for role in roles_of(manifests) for _, source in sources_of(run, role)]
    named = [each.get("hub") if isinstance(each, Mapping) else each.partition("hub:")[2] for each in sources]
    return sorted({name for name in named if name})


def described_source(source: Any) -> tuple[str, str]:
    """A source in words and its licence."""
    if isinstance(source, Mapping):
        kind, value = next(
            (kind, source[kind]) for kind in ("path", "samples", "hub", "stage") if source.get(kind)
        )
        return described_source(value if kind == "path" else f"{kind}:{value}")
    kind, _, rest = source.partition(":")
    if kind == "samples":
        return f"{rest}, packaged with rlhf-chain", APACHE
    if kind == "hub":
        return f"[{rest}](https://huggingface.co/datasets/{rest})", "see its page"
    if kind == "stage":
        return f"rows that {rest} made", "-"
    return Path(source).name, UNKNOWN


def evaluation_table(run: RunFiles, policy: str) -> Cells:
    """A table with the metrics of `evaluate` for this policy and the others, with known intervals."""
    _, evaluation = last_evaluation(run.summary["stages"])
    metrics = {name: value for name, value in evaluation.items() if value is not None}
    names = [name.removeprefix("length_mean/") for name in metrics if name.startswith("length_mean/")]
    rows = []
    for figure in CARD_METRICS:
        cells = [with_interval(metrics, f"{figure}/{name}") for name in names]
        if any(cell != "-" for cell in cells):
            rows.append([figure, *cells])
    heading = f"{metrics.get('prompts', 0):.0f} prompts"
    return Cells([heading, *names], rows if policy in names else [])


def with_interval(metrics: Mapping[str, float], figure: str) -> str:
    """A metric with its 95% interval, if it has one."""
    value, sampled = metrics.get(figure), Sampled.found(figure, metrics)
    if value is None or sampled is None:
        return _number(value)
    return f"{sampled.value:.3g} ({sampled.low:.3g} to {sampled.high:.3g})"


def gates(run: RunFiles) -> Cells:
    """A table with one row per gate."""
    rows = [
        [f"{gate['stage']}/{gate['name']}", _number(gate["value"]), gate["bound"], gate["outcome"]]
        for gate in run.summary["gates"]
    ]
    return Cells(["gate", "value", "wanted", "outcome"], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


WITH_TRANSFORMERS = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})
model = AutoModelForCausalLM.from_pretrained("{name}"{remote})
messages = [{{"role": "user", "content": "Hello!"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

With vLLM: `vllm serve {name}`."""
WITH_PEFT = """It is a PEFT adapter: it cannot be merged into the weights of its base model.

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})
base = AutoModelForCausalLM.from_pretrained("{base}"{remote})
model = PeftModel.from_pretrained(base, "{name}")
```"""


def usage(run: RunFiles, name: str, base_name: str | None) -> str:
    """Code that loads the exported model."""
    remote = ", trust_remote_code=True" if run.config["model"].get("trust_remote_code") else ""
    if base_name is None:
        return WITH_TRANSFORMERS.format(name=name, remote=remote)
    return WITH_PEFT.format(
        name=name, remote=remote, base=f"{name}/base" if base_name == "base" else base_name
    )
