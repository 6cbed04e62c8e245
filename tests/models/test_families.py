"""Every family of helpers/models.py: what runs, runs as transformers runs it; the rest is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from helpers.jobs import on_cpu
from helpers.models import FAMILIES, REFUSED, tiny_family
from helpers.trained import write_trained
from rlhf.config import ConfigError
from rlhf.costs.model_shape import shape_of_model
from rlhf.generation.decoding_check import check_decoding
from rlhf.generation.sampler import generate
from rlhf.models.base import ModelConfig, load_tokenizer, skeleton
from rlhf.models.load import load_causal_lm
from rlhf.models.logprobs import check_policy, pack_sequences, response_statistics
from rlhf.models.peft.attach import attach, check_attachable, count_parameters
from rlhf.models.peft.config import PeftConfig
from rlhf.models.peft.merge import publish_policy
from rlhf.models.save import save_policy
from rlhf.models.value_head import check_scorable, load_scalar_model, reset_head, save_scalar_model

DOCS = Path(__file__).parents[2] / "docs"
MODELS_PAGE, SHOWN = DOCS / "models.md", run_path(str(DOCS / "models.py"))
LOCAL = ModelConfig(kind="local")
LORA = PeftConfig(method="lora", rank=2)
LENGTHS = ((4, 9), (14, 6), (1, 3), (7, 1))
"""Of prompts and responses: some are longer than windows, chunks and blocks."""


@dataclass(frozen=True)
class Family:
    """A family's model as transformers made it, and where it was saved."""

    model: PreTrainedModel
    directory: Path
    tokenizer: PreTrainedTokenizerBase

    def load(self) -> PreTrainedModel:
        """As the project loads it."""
        return load_causal_lm(self.directory, LOCAL, torch.float32)


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Callable[[str], Family]:
    """Each is made once, when it is first asked for."""
    made: dict[str, Family] = {}

    def family(name: str) -> Family:
        if name not in made:
            directory, model = tmp_path_factory.mktemp(name), tiny_family(name)
            save_policy(model, load_tokenizer(tiny_model, LOCAL), directory)
            made[name] = Family(model, directory, load_tokenizer(directory, LOCAL))
        return made[name]

    return family


@pytest.fixture(params=[name for name in FAMILIES if name not in REFUSED])
def family(request: pytest.FixtureRequest, families: Callable[[str], Family]) -> Family:
    """One that runs."""
    return families(request.param)


def pairs() -> tuple[list[Tensor], list[Tensor]]:
    """Prompts and responses."""
    generator = torch.Generator().manual_seed(3)
    rows = [[torch.randint(3, 259, (size,), generator=generator) for size in sizes] for sizes in LENGTHS]
    return [row[0] for row in rows], [row[1] for row in rows]


def theirs(model: PreTrainedModel, prompts: list[Tensor], responses: list[Tensor]) -> Tensor:
    """Log-probabilities of the response tokens by transformers' own forward pass, each row alone."""
    found = []
    for prompt, response in zip(prompts, responses, strict=True):
        logits_TV = model(input_ids=torch.cat([prompt, response])[None], use_cache=False).logits[0]
        logp_RV = logits_TV[len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logp_RV.gather(-1, response[:, None]).squeeze(-1))
    return torch.cat(found)


def ours(model: PreTrainedModel) -> Tensor:
    """The same by the project's, all rows together."""
    return response_statistics(model, pack_sequences(*pairs(), torch.device("cpu")), 1.0).logp_N


def documented_lines() -> str:
    """What docs/models.md shows for families without a sequence-classification class."""
    return MODELS_PAGE.read_text().partition("```python\n")[2].partition("```")[0]


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_by_name_when_it_is_loaded(
    name: str, families: Callable[[str], Family]
) -> None:
    with pytest.raises(ConfigError, match=REFUSED[name]) as refusal:
        check_decoding(families(name).load())
    assert "\n" not in str(refusal.value)


def test_log_probabilities_and_gradients_are_those_of_transformers(family: Family) -> None:
    model = family.load()
    check_policy(model)
    found_rows = SHOWN["rows_of"](model)
    if any("experts" in name for name, _ in model.named_parameters()):
        found_rows = "padded"  # by rounding, which may be another one on another processor
    assert SHOWN["line"](family.model.config.model_type, found_rows) in MODELS_PAGE.read_text()
    expected, found = theirs(family.model, *pairs()), ours(model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
    weights_N = torch.randn(len(found), generator=torch.Generator().manual_seed(4))
    gradients = []
    for logp_N, of in ((expected, family.model), (found, model)):
        named = {name: each for name, each in of.named_parameters() if each.requires_grad}
        found_of = torch.autograd.grad((logp_N * weights_N).sum(), [*named.values()], allow_unused=True)
        gradients.append(dict(zip(named, found_of, strict=True)))
    wanted = gradients[0]
    largest = max(float(each.abs().max()) for each in wanted.values() if each is not None)
    assert wanted.keys() <= gradients[1].keys()  # what no gradient reaches may have been told to want one
    for parameter, gradient in gradients[1].items():
        if gradient is None or wanted[parameter] is None:
            assert gradient is wanted.get(parameter), parameter
        else:
            torch.testing.assert_close(gradient, wanted[parameter], atol=1e-5 * largest, rtol=1e-3)


def test_greedy_answers_are_those_of_transformers_own_generate(family: Family) -> None:
    prompts, _ = pairs()
    model = family.load()
    check_decoding(model)
    rollout = generate(
        model, prompts, max_new_tokens=12, temperature=0.0, stop_ids=[], pad_id=0,
        uniform_BR=torch.zeros(len(prompts), 12), batch_rows=len(prompts),
    )  # fmt: skip
    expected = []
    untyped: Any = family.model
    for prompt in prompts:
        ids = untyped.generate(
            prompt[None], attention_mask=torch.ones_like(prompt)[None], max_new_tokens=12, do_sample=False,
            eos_token_id=None, use_cache=True,
        )  # fmt: skip
        expected.append(ids[0, len(prompt) :].tolist())
    assert [ids.tolist() for ids in rollout.response_ids] == expected
    assert rollout.sampled_logp is not None
    whole = theirs(family.model, prompts, rollout.response_ids).detach()
    torch.testing.assert_close(torch.cat(rollout.sampled_logp), whole, atol=2e-5, rtol=1e-5)
    assert len({tuple(ids) for ids in expected}) > 1


def test_what_is_saved_is_what_was_loaded(family: Family, tmp_path: Path) -> None:
    save_policy(family.load(), family.tokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    weights = family.model.state_dict()
    assert again.state_dict().keys() == weights.keys()
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, weights[name]), name


def test_a_reward_model_scores_alike_wherever_it_is_loaded(family: Family, tmp_path: Path) -> None:
    check_scorable(family.model.config)
    scalar = load_scalar_model(family.directory, LOCAL, torch.float32, new_head=True)
    torch.manual_seed(0)
    reset_head(scalar)
    text = "<|im_start|>user\nHow much?<|im_end|>\n<|im_start|>assistant\nSo much.<|im_end|>"
    rows = [torch.cat(pair) for pair in zip(*pairs(), strict=True)]
    rows.append(torch.tensor(family.tokenizer(text).input_ids))
    scores = scalar.score(rows, 1000, on_cpu())
    save_scalar_model(scalar, family.tokenizer, tmp_path)
    again = load_scalar_model(tmp_path, LOCAL, torch.float32)
    torch.testing.assert_close(again.score(rows, 1000, on_cpu()), scores, atol=1e-6, rtol=1e-6)

    names: dict[str, Any] = {"DIR": tmp_path, "text": text}
    exec(documented_lines(), names)
    assert names["score"] == pytest.approx(float(scores[-1]), abs=2e-5, rel=1e-5)
    if type(family.model.config) in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        published = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
        with torch.no_grad():
            logits = [published.eval()(row[None]).logits[0, 0] for row in rows]
        torch.testing.assert_close(torch.stack(logits), scores, atol=2e-5, rtol=1e-5)


def test_an_adapter_trains_and_is_merged(family: Family, tmp_path: Path) -> None:
    check_attachable(skeleton(family.model.config), LORA)
    model = family.load()
    attach(model, LORA)
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    with torch.no_grad():
        for parameter in trained.values():
            parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(5))
    adapted = ours(model)
    for name, gradient in zip(trained, torch.autograd.grad(adapted.sum(), [*trained.values()]), strict=True):
        assert gradient.abs().max() > 0, f"{name} is read past"
    artifact = tmp_path / "sft" / "0"
    artifact.mkdir(parents=True)
    publish_policy(
        artifact, write_trained(tmp_path / "trained", trained), family.tokenizer, key="base",
        start=family.directory, settings=LOCAL, dtype=torch.float32, peft=LORA,
    )  # fmt: skip
    torch.testing.assert_close(
        ours(load_causal_lm(artifact, LOCAL, torch.float32)), adapted, atol=1e-4, rtol=1e-4
    )
    assert (adapted - theirs(family.model, *pairs())).abs().max() > 1e-3


def test_the_documents_table_has_all_families() -> None:
    lines = MODELS_PAGE.read_text().partition(SHOWN["BEGIN"])[2].partition(SHOWN["END"])[0].split("\n")[3:-1]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == sorted(FAMILIES)
    for name in REFUSED:
        assert SHOWN["line"](name, f"refused: {REFUSED[name]}") in lines


def test_sizes_are_counted_without_weights(family: Family) -> None:
    assert shape_of_model(skeleton(family.model.config)).parameters == count_parameters(family.model)[1]
