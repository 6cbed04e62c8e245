"""The model card of an exported policy: what the run's files say of it, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf.cli.run_files import RunFiles
from rlhf.data.roles import ROLES
from rlhf.evaluation.sampled import Sampled
from rlhf.pipeline.recipe import last_evaluation
from rlhf.pipeline.run import NO_VERDICT, headed, listed
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
FIGURES = (
    "gold_mean", "gold_gain", "win_rate", "score_mean", "kl", "length_mean", "stop_rate", "distinct_2",
    "retention_perplexity_ratio", "question_accuracy",
)  # fmt: skip
"""Of `evaluate`: what it says of each policy."""


def model_card(run: RunFiles, policy: str, artifact: Artifact, name: str, below: str | None) -> str:
    """README.md of an exported policy.

    Args:
        name: of the exported directory.
        below: what PEFT puts it on: a name on the Hub, or `base` in the same directory; None for a model.
    """
    made = lineage(artifact)
    parts = [
        f"---\n{hub_metadata(run, policy, made, below is not None)}\n---",
        f"# {name}",
        f"The `{policy}` model of the run `{run.directory.resolve().name}`, made by "
        f"rlhf-chain {artifact.manifest.packages['rlhf']} from {base(run)[0]}.",
    ]
    if run.summary["verdict"] == "":
        parts.append(NO_VERDICT)
    elif run.summary["verdict"]:
        said = headed(run.summary.get("outcome"), run.summary["verdict"])
        parts.append(f"**Verdict of the run.** {listed(said)}")
    else:
        parts.append("**The run has not come to its end**, so it has no verdict.")
    parts += ["## How to use it", usage(run, name, below)]
    parts += ["## How it was made", stages(run, made).markdown()]
    parts += ["## Data", data(run, made).markdown()]
    figures = measured(run, policy)
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


def hub_metadata(run: RunFiles, policy: str, made: Sequence[Manifest], is_adapter: bool) -> ModelCardData:
    """What the Hub reads: https://huggingface.co/docs/hub/model-cards."""
    from huggingface_hub import ModelCardData

    model, licence = run.config["model"], base(run)[1]
    return ModelCardData(
        base_model=model["id"] if model["kind"] == "hub" else None,
        datasets=hub_sets(run, made) or None,
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
    """What another model card says of its licence."""
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card) if card.is_file() else None
    except (yaml.YAMLError, ValueError):  # nobody has to write it as the Hub wants it
        return UNKNOWN
    return str((found or {}).get("license", UNKNOWN))


def lineage(artifact: Artifact) -> list[Manifest]:
    """The manifests of all that it was made from, itself last, as far as the store still has them."""
    found: dict[str, Manifest] = {}

    def visit(stage: str, key: str) -> None:
        path = artifact.path.parents[1] / stage / key
        if key in found or not path.is_dir():
            return
        manifest = read_manifest(path)
        for name, below in manifest.recipe.get("inputs", {}).items():
            visit(name, below)
        found[key] = manifest

    visit(artifact.manifest.stage, artifact.key)
    return [*found.values()]


def stages(run: RunFiles, made: Sequence[Manifest]) -> Cells:
    """One row a stage."""
    rows = []
    for manifest in made:
        knobs: Mapping[str, Any] = manifest.recipe["knobs"]
        inputs = manifest.recipe.get("inputs", {})
        method = knobs.get("peft")
        how = str(method["method"] if isinstance(method, Mapping) else method or "-")
        rows.append([manifest.stage, ", ".join(inputs) or "-", how, clock(manifest.seconds), manifest.key])
    return Cells(["stage", "reads", "trains", "time", "key"], rows)


def data(run: RunFiles, made: Sequence[Manifest]) -> Cells:
    """The data sets that the stages learned from. Of a file only its name: its place may be private."""
    rows = [[key, *said(source)] for role in roles_of(made) for key, source in sources_of(run, role)]
    return Cells(["key", "source", "licence"], rows)


def roles_of(made: Sequence[Manifest]) -> list[str]:
    """The roles of data that the stages read."""
    return [*dict.fromkeys(role for manifest in made for role in manifest.recipe.get("data", {}))]


def sources_of(run: RunFiles, role: str) -> Iterator[tuple[str, Any]]:
    """Key and source of a role's data, as the config names them. Prompts may be those of another key's rows:
    then it is their source."""
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


def hub_sets(run: RunFiles, made: Sequence[Manifest]) -> list[str]:
    """Names of the data sets of the Hub."""
    sources = [source for role in roles_of(made) for _, source in sources_of(run, role)]
    named = [each.get("hub") if isinstance(each, Mapping) else each.partition("hub:")[2] for each in sources]
    return sorted({name for name in named if name})


def said(source: Any) -> tuple[str, str]:
    """A source in words, and its licence."""
    if isinstance(source, Mapping):
        kind, value = next(
            (kind, source[kind]) for kind in ("path", "samples", "hub", "stage") if source.get(kind)
        )
        return said(value if kind == "path" else f"{kind}:{value}")
    kind, _, rest = source.partition(":")
    if kind == "samples":
        return f"{rest}, packaged with rlhf-chain", APACHE
    if kind == "hub":
        return f"[{rest}](https://huggingface.co/datasets/{rest})", "see its page"
    if kind == "stage":
        return f"rows that {rest} made", "-"
    return Path(source).name, UNKNOWN


def measured(run: RunFiles, policy: str) -> Cells:
    """What `evaluate` says of this policy and of the others, with intervals where there are any."""
    _, found = last_evaluation(run.summary["stages"])
    metrics = {name: value for name, value in found.items() if value is not None}
    names = [name.removeprefix("length_mean/") for name in metrics if name.startswith("length_mean/")]
    rows = []
    for figure in FIGURES:
        cells = [shown(metrics, f"{figure}/{name}") for name in names]
        if any(cell != "-" for cell in cells):
            rows.append([figure, *cells])
    heading = f"{metrics.get('prompts', 0):.0f} prompts"
    return Cells([heading, *names], rows if policy in names else [])


def shown(metrics: Mapping[str, float], figure: str) -> str:
    """A figure with its 95% interval."""
    value, sampled = metrics.get(figure), Sampled.found(figure, metrics)
    if value is None or sampled is None:
        return _number(value)
    return f"{sampled.value:.3g} ({sampled.low:.3g} to {sampled.high:.3g})"


def gates(run: RunFiles) -> Cells:
    """One row a gate."""
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


def usage(run: RunFiles, name: str, below: str | None) -> str:
    """Code that loads it."""
    remote = ", trust_remote_code=True" if run.config["model"].get("trust_remote_code") else ""
    if below is None:
        return WITH_TRANSFORMERS.format(name=name, remote=remote)
    return WITH_PEFT.format(name=name, remote=remote, base=f"{name}/base" if below == "base" else below)
