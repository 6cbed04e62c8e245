"""Which way to adapt the model, before anything trains: what each way needs, what rules it out, and a choice.

Reads   the model's config, without weights; the lengths of the prepared data, unless they are given.
Writes  plan.md (the table, with every figure's arithmetic) and experiment/planned.yaml, which does what is
        recommended: python -m rlhf --config-dir RUN/artifacts/plan +experiment=planned
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, PositiveFloat, PositiveInt, model_validator
from rich.markup import escape
from rich.table import Table

from rlhf.config import ConfigError, did_you_mean
from rlhf.costs.hardware import CUDA_CONTEXT, Machine, Speed, calibrated_speed, found_machine
from rlhf.costs.model_shape import ModelShape, counted
from rlhf.costs.setup import CostContext, Sizes, pads_rows
from rlhf.costs.stage_cost import StageCost
from rlhf.data.chat_template import exchange_ids, prompt_ids
from rlhf.data.prepared import LengthStats
from rlhf.data.roles import ROLES, training_roles
from rlhf.data.schema import PromptRow, Split
from rlhf.models.base import UnknownShapeError, skeleton
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.job import Job
from rlhf.pipeline.stage import Stage
from rlhf.planner.report import experiment_file, explanation, hardware_line, phases, recommendation, table
from rlhf.tracking.redaction import redacted
from rlhf.tracking.tables import Cells

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.planner.strategies import Strategy, Use

MEASURED_ROWS = 256
"""Whose prompts and answers are counted apart."""
HELD_OUT = 0.1
"""Of given rows."""


def _with_unit(unit: str) -> BeforeValidator:
    """80 would be 80 bytes."""

    def check(value: Any) -> Any:
        if isinstance(value, int | float) or re.fullmatch(r"[\d.]+", str(value).strip()):
            raise ValueError(f"a number without a unit. Write {value}{unit}")
        return value

    return BeforeValidator(check)


Gibibytes = Annotated[ByteSize, _with_unit("GiB")]
Terabytes = Annotated[ByteSize, _with_unit("TB")]


class PlanStage(Stage):
    """The keys `plan.*`. Values: conf/stages/plan.yaml."""

    name: ClassVar[str] = "plan"
    headlines: ClassVar[Mapping[str, tuple[str, str]]] = {
        "strategies": ("strategies", ".0f"),
        "hours": ("hours of the best", ".2g"),
    }
    random: ClassVar[bool] = False
    in_chain: ClassVar[bool] = False
    reads_weights: ClassVar[bool] = False
    cacheable: ClassVar[bool] = False

    trains: list[str] = Field(min_length=1)
    """The stages that are planned, of those that train (sft, reward, ppo, your own), with their data and
    settings in this config."""
    rows: PositiveInt | None
    """Training rows of each stage; null measures the prepared data."""
    prompt_tokens: PositiveInt | None
    """Mean prompt tokens of a row; give it together with `rows`."""
    answer_tokens: PositiveInt | None
    """Mean answer tokens of a row; give it together with `rows`."""
    gpus: PositiveInt | None
    """GPUs of each node, which need not be here; null plans for this machine."""
    nodes: PositiveInt
    """Number of nodes, with `gpus` GPUs each."""
    gpu_memory: Gibibytes
    """Memory of a GPU, such as 80GiB. This key and the next three are read only with `gpus`."""
    host_memory: Gibibytes
    """Memory of a node's host."""
    gpu_tflops: PositiveFloat
    """Dense bf16 TFLOP/s of a GPU, from its data sheet."""
    gpu_bandwidth: Terabytes
    """Bandwidth of a GPU's memory per second, such as 2.0TB."""
    hours: PositiveFloat | None
    """Longest training time, hours; null for no limit."""
    price_per_gpu_hour: PositiveFloat | None
    """Price of a GPU hour in any currency; without a GPU, of a rank hour."""
    max_added_latency: float | None = Field(ge=0)
    """How many seconds longer than the base model's an answer may take; null for no limit."""
    deploy: Literal["merged", "many_adapters", "api_only"]
    """One plain model; many tasks on one model in memory; or a model whose weights cannot be changed."""
    explain: bool
    """Show each figure's arithmetic on the terminal too."""

    @model_validator(mode="after")
    def _all_or_nothing(self) -> Self:
        given = (self.rows, self.prompt_tokens, self.answer_tokens)
        if None in given and any(given):
            raise ValueError(
                "Give KEY.rows, KEY.prompt_tokens and KEY.answer_tokens together; null measures all three"
            )
        if self.nodes > 1 and self.gpus is None:
            raise ValueError(f"KEY.nodes={self.nodes} needs KEY.gpus, the GPUs of each node. Set it")
        return self

    def datasets(self) -> tuple[str, ...]:
        """Their lengths."""
        return training_roles() if self.rows is None else ()

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """What the planned stages need; and sft.data, the task whose prompts and answers are measured."""
        if self.rows is not None:
            return ()
        planned = (chain[name] for name in self.trains if name in chain)
        return tuple(dict.fromkeys(("sft", *(role for stage in planned for role in stage.needs(chain)))))

    def check(self, chain: Mapping[str, Stage]) -> None:
        """What is planned trains.

        Raises:
            ConfigError: it does not, or is no stage.
        """
        known = [name for name, stage in chain.items() if stage.peft_config() is not None]
        for name in self.trains:
            if name not in known:
                raise ConfigError(
                    f"plan.trains={name}: no stage of that name trains.{did_you_mean(name, known)} "
                    f"Known: {', '.join(known)}."
                )

    def metrics(self) -> tuple[str, ...]:
        """What `run` publishes."""
        return ("strategies", "hours", "peak_gib")

    def reads_base_model(self) -> bool:
        """Its config."""
        return True

    def cost(self, on: CostContext, chain: Mapping[str, Stage]) -> StageCost:
        """It runs no model."""
        return StageCost()

    def run(self, job: Job) -> None:
        """Weigh every strategy, show the table, write the best one down."""
        from rlhf.planner.strategies import rank_strategies

        experiment = job.experiment
        assert experiment is not None
        chain = experiment.stages
        base, shape = self.base(job)
        on, use = self.setting(job, experiment, shape), self.use(job, experiment)
        ranked = rank_strategies([chain[name] for name in self.trains], experiment, base, on, use)
        best = ranked[0]
        cells = table(ranked, self.price_per_gpu_hour)
        reason = recommendation(best) if not best.against else "Nothing here can be done: each row says why."
        text = [
            f"# Plan\n\n{hardware_line(on)}\n",
            cells.markdown(),
            f"\n{reason}\n",
            phases(best).markdown(),
        ]
        if job.compute.is_main:
            content = "\n".join([*text, *explanation(ranked, self.price_per_gpu_hour)])
            (job.directory / "plan.md").write_text(f"{content}\n", encoding="utf-8")
            if not best.against:
                directory = job.directory / "experiment"
                directory.mkdir()
                content = experiment_file(redacted(experiment.resolved), best, reason)
                (directory / "planned.yaml").write_text(content, encoding="utf-8")
        self.show(job, on, ranked, cells, reason)
        job.publish({
            "strategies": sum(not strategy.against for strategy in ranked),
            "hours": best.hours,
            "peak_gib": best.cost.peak().size() / 2**30,
        })  # fmt: skip

    def base(self, job: Job) -> tuple[PreTrainedModel, ModelShape]:
        """The base model without weights, and its sizes.

        Raises:
            ConfigError: it is none that the formulas hold for.
        """
        try:
            base = skeleton(job.base.architecture, trust_remote_code=job.base.config.trust_remote_code)
            return base, counted(base)
        except UnknownShapeError as unknown:
            raise ConfigError(
                f"stage=plan: {unknown}, so its memory cannot be computed. Plan for another model."
            ) from None

    def setting(self, job: Job, experiment: Experiment, shape: ModelShape) -> CostContext:
        """The model on the hardware that is planned for."""
        settings = experiment.settings
        if self.gpus is None:
            speed = job.compute.main_only(lambda: calibrated_speed(job.compute, Path(settings.store_dir)))
            machine, dtype_bytes = found_machine(job.compute, speed), job.compute.dtype.itemsize
        else:
            machine = Machine(
                kind="cuda",
                name=f"planned: {self.nodes} nodes of {self.gpus} GPUs",
                memory=float(self.gpu_memory),
                host_memory=self.host_memory / self.gpus,
                used=CUDA_CONTEXT,
                ranks=self.gpus * self.nodes,
                speed=Speed(1000 * self.gpu_tflops, self.gpu_bandwidth / 1e9),
                ranks_here=self.gpus,
            )
            dtype_bytes = 4 if settings.precision == "fp32" else 2
        return CostContext(
            shape, dtype_bytes, settings.zero, machine, self.sizes(job),
            settings.vllm if settings.generation == "vllm" else None, pads_rows(settings.model, shape),
        )  # fmt: skip

    def sizes(self, job: Job) -> Sizes:
        """Of every role: the prepared ones, or those given."""
        if self.rows is None:
            return job.data.size
        num_rows, prompt, answer = self.rows, self.prompt_tokens or 0, self.answer_tokens or 0

        def given(role: str, split: Split) -> LengthStats:
            has_answer = not issubclass(ROLES[role].row_types[0], PromptRow)
            tokens = prompt + (answer if has_answer else 0)
            rows = num_rows if split == "train" else max(1, round(HELD_OUT * num_rows))
            return LengthStats(rows, float(tokens), 0.0, tokens)

        return given

    def use(self, job: Job, experiment: Experiment) -> Use:
        """The task and its limits."""
        from rlhf.planner.strategies import Use

        compare = experiment.resolved["compare"]
        rows, prompt, answer = self.rows, self.prompt_tokens, self.answer_tokens
        mean_prompt, mean_answer, has_questions = float(prompt or 0), float(answer or 0), True
        if rows is None:
            found = job.data.rows("sft", "train")
            rows, tokenizer = len(found), job.base.load_tokenizer()
            some, has_questions = found[:MEASURED_ROWS], any(row.prompt for row in found)
            mean_prompt = fmean(len(prompt_ids(tokenizer, row.prompt)) for row in some)
            both = fmean(len(exchange_ids(tokenizer, row.prompt, row.completion)[0]) for row in some)
            mean_answer = both - mean_prompt
        return Use(
            rows, mean_prompt, mean_answer,
            examples=compare["few_shot"]["examples"], passages=compare["retrieval"]["passages"],
            has_questions=has_questions, deploy=self.deploy, hours=self.hours,
            max_added_latency=self.max_added_latency,
        )  # fmt: skip

    def show(self, job: Job, on: CostContext, ranked: list[Strategy], cells: Cells, reason: str) -> None:
        """On the terminal."""
        console = job.progress.console
        console.print(escape(hardware_line(on)), highlight=False)
        for each in (cells, phases(ranked[0])):
            shown = Table(*each.headings, box=None, pad_edge=False, header_style="dim")
            for row in each.rows:
                shown.add_row(*map(escape, row))
            console.print(shown, highlight=False)
        if self.explain:
            console.print(escape("\n".join(explanation(ranked, self.price_per_gpu_hour))), highlight=False)
        console.print(escape(reason), highlight=False)
        if not ranked[0].against:
            directory = job.run_directory / "artifacts" / self.name
            command = f"python -m rlhf --config-dir {directory} +experiment=planned"
            console.print(command, highlight=False, soft_wrap=True, markup=False)
