"""Compare the ways to adapt the model before any training: what each needs and what rules it out.

Reads   the model's config, without weights; the lengths of the prepared data, unless they are given.
Writes  plan.md (the table, with every figure's calculation) and experiment/planned.yaml, which runs the
        fastest one that fits: python -m rlhf --config-dir RUN/artifacts/plan +experiment=planned
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, ByteSize, Field, PositiveFloat, PositiveInt, model_validator
from rich.markup import escape
from rich.table import Table

from rlhf.config import Complaint, ConfigError, did_you_mean
from rlhf.costs.hardware import (
    CUDA_CONTEXT,
    CUDA_PROCESS,
    GIB,
    NCCL_BUFFERS,
    Machine,
    Speed,
    calibrated_speed,
    local_machine,
)
from rlhf.costs.model_shape import ModelShape, shape_of_model
from rlhf.costs.setup import CostContext, Sizes, pads_rows
from rlhf.data.chat_template import exchange_ids, prompt_ids
from rlhf.data.prepared import LengthStats
from rlhf.data.roles import training_roles
from rlhf.data.schema import PromptRow, Split
from rlhf.models.base import UnknownShapeError, skeleton
from rlhf.models.peft.methods import MethodName
from rlhf.pipeline.abilities import TellsOfRuns
from rlhf.pipeline.defaults import changed_keys
from rlhf.pipeline.experiment import Experiment
from rlhf.pipeline.fields import Reads, peft_of
from rlhf.pipeline.job import Job
from rlhf.pipeline.metrics import Metric, named
from rlhf.pipeline.preflight import peak_memory
from rlhf.pipeline.stage import Stage, View
from rlhf.planner.report import (
    assumptions,
    experiment_file,
    explanation,
    hardware_line,
    phases,
    proposal,
    speeds,
    table,
)
from rlhf.tracking.redaction import redacted
from rlhf.tracking.tables import Cells

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf.planner.strategies import Strategy, UseCase

MEASURED_ROWS = 256
"""Rows whose prompt and answer tokens are measured."""
HELD_OUT_FRACTION = 0.1
"""Held-out share of given rows."""


def _with_unit(unit: str) -> BeforeValidator:
    """Refuse a number without a unit: pydantic reads 80 as 80 bytes."""

    def check(value: Any) -> Any:
        if isinstance(value, int | float) or re.fullmatch(r"[\d.]+", str(value).strip()):
            raise ValueError(f"a number without a unit. Write {value}{unit}")
        size = re.fullmatch(r"(\d+\.?\d*|\.\d+)\s*[kmgtp]?i?b", str(value).strip(), re.IGNORECASE)
        if size is None or float(size[1]) == 0:
            raise ValueError(f"no size above 0. Write a number and a unit, such as 80{unit}")
        return value

    return BeforeValidator(check)


Gibibytes = Annotated[ByteSize, _with_unit("GiB")]
Gigabytes = Annotated[ByteSize, _with_unit("GB")]
Terabytes = Annotated[ByteSize, _with_unit("TB")]
GPU_KEYS = ("gpu_memory", "host_memory", "gpu_tflops", "gpu_bandwidth", "gpu_link", "network", "disk")
"""Keys that are read only with `plan.gpus`."""
ASSUMED_LENGTHS = {"rows": 10_000, "prompt_tokens": 512, "answer_tokens": 512}
"""Lengths for planned GPUs if none are given: the data need not exist then."""


class PlanStage(TellsOfRuns):
    """The keys `plan.*`. Values: conf/stages/plan.yaml."""

    metrics: ClassVar[Mapping[str, Metric]] = {
        "strategies": Metric("strategies", ".0f"),
        "peak_gib": Metric("GiB of the fastest", ".1f"),
        **named("hours"),
    }

    trains: list[str] | None = Field(min_length=1)
    """The training stages to plan (sft, reward, ppo, your own), with their data and settings in this config.
    null plans sft; with `gpus` all three."""
    methods: list[MethodName] | None = Field(min_length=1)
    """The only tuning methods to compare, such as [none] for all parameters. null compares all, and the ways
    that leave the weights as they are."""
    rows: PositiveInt | Literal["prepared"] | None
    """Training rows of each stage. null measures the prepared data, or takes 10000 with `gpus`; `prepared`
    always measures."""
    prompt_tokens: PositiveInt | None
    """Mean prompt tokens of a row. With `gpus` null takes 512; else give it together with `rows`."""
    answer_tokens: PositiveInt | None
    """Mean answer tokens of a row and of PPO's answers; null as for `prompt_tokens`."""
    longest_answer: PositiveInt | None
    """Tokens of PPO's longest answers; null takes twice `answer_tokens`, or what the model's context has room
    for. Read only with `gpus`, if lengths are not measured."""
    gpus: PositiveInt | None
    """GPUs of each node, which need not exist here; null plans for this machine."""
    nodes: PositiveInt
    """Number of nodes, with `gpus` GPUs each."""
    gpu_memory: Gibibytes
    """Memory of a GPU, such as 80GiB. This key and the next six are read only with `gpus`."""
    host_memory: Gibibytes
    """Memory of a node's host."""
    gpu_tflops: PositiveFloat
    """Dense bf16 TFLOP/s of a GPU, from its data sheet."""
    gpu_bandwidth: Terabytes
    """Bandwidth of a GPU's memory per second, such as 2.0TB."""
    gpu_link: Gigabytes
    """Bytes per second that a GPU receives from other GPUs of its node, such as 300GB."""
    network: Gigabytes
    """Bytes per second that a GPU receives from other nodes, such as 50GB."""
    disk: Gigabytes
    """Bytes per second that a node reads from or writes to disk, such as 1GB."""
    hours: PositiveFloat | None
    """Longest training time, hours; null for no limit."""
    price_per_gpu_hour: PositiveFloat | None
    """Price of a GPU hour in any currency; without a GPU, of a rank hour."""
    max_added_latency: float | None = Field(ge=0)
    """Most seconds that an answer may take longer than the base model's; null for no limit."""
    deploy: Literal["merged", "many_adapters", "api_only"]
    """How the model is served: as one plain model; with many tasks on one model in memory; or behind an API,
    where its weights cannot be changed."""
    explain: bool
    """Show each figure's calculation on the terminal too."""

    @model_validator(mode="after")
    def _check_lengths(self) -> Self:
        given = (self.rows, self.prompt_tokens, self.answer_tokens)
        if self.gpus is None and None in given and any(given) and self.rows != "prepared":
            raise ValueError(
                "Give KEY.rows, KEY.prompt_tokens and KEY.answer_tokens together; null measures all three"
            )
        if self.rows == "prepared" and any(given[1:]):
            raise ValueError(
                "KEY.rows=prepared measures KEY.prompt_tokens and KEY.answer_tokens too. Leave them out"
            )
        if self.nodes > 1 and self.gpus is None:
            raise ValueError(f"KEY.nodes={self.nodes} needs KEY.gpus, the GPUs of each node. Set it")
        if self.longest_answer is not None and not self.plans_answers:
            raise ValueError(
                f"KEY.longest_answer={self.longest_answer} is read only with KEY.gpus and lengths that are "
                "not measured. Leave it out"
            )
        if self.longest_answer is not None and self.longest_answer < (mean := self.lengths["answer_tokens"]):
            raise ValueError(
                f"KEY.longest_answer={self.longest_answer} is less than the mean, KEY.answer_tokens={mean}. "
                f"Use {mean} or more, or lower KEY.answer_tokens"
            )
        return self

    @property
    def measures(self) -> bool:
        """Whether the plan uses the lengths of the prepared data, not given or assumed ones."""
        return self.rows == "prepared" or (self.rows is None and self.gpus is None)

    @property
    def lengths(self) -> dict[str, int]:
        """Given or assumed rows and mean tokens, for plans that do not measure."""
        given = {"rows": self.rows, "prompt_tokens": self.prompt_tokens, "answer_tokens": self.answer_tokens}
        return {key: ASSUMED_LENGTHS[key] if value is None else int(value) for key, value in given.items()}

    @property
    def plans_answers(self) -> bool:
        """Whether the plan, not ppo.max_new_tokens, sets the length of PPO's answers."""
        return self.gpus is not None and not self.measures

    def lengths_in(self, context: int) -> dict[str, int]:
        """`lengths`, with those that are assumed limited to what a context has room for."""
        return {
            key: min(value, context // 2) if key != "rows" and getattr(self, key) is None else value
            for key, value in self.lengths.items()
        }

    def longest_in(self, context: int) -> int:
        """Tokens of PPO's longest answers: without `longest_answer` what the context has room for."""
        _, prompt, answer = self.lengths_in(context).values()
        return self.longest_answer or max(answer, min(2 * answer, context - prompt))

    def planned(self, chain: Mapping[str, Stage]) -> list[str]:
        """Names of the planned stages, in the chain's order."""
        names = self.trains or (["sft"] if self.gpus is None else ["sft", "reward", "ppo"])
        return [name for name in chain if name in names]

    def reads(self) -> Reads:
        """The base model's config, and the lengths of the training data."""
        return Reads(roles=training_roles(self.mount.roles) if self.measures else (), base=True)

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """The roles that the planned stages need, and sft, whose prompts and answers are measured."""
        if not self.measures:
            return ()
        planned = (chain[name] for name in self.planned(chain))
        return tuple(dict.fromkeys(("sft", *(role for stage in planned for role in stage.needs(chain)))))

    def complaints(self, view: View) -> Iterator[Complaint]:
        """Refuse planned stages that do not train."""
        known = [name for name, stage in view.chain.items() if peft_of(stage) is not None]
        for name in self.trains or ():
            if name not in known:
                near = did_you_mean(name, known)
                yield Complaint(
                    f"plan.trains={name}",
                    f"no stage of that name trains.{near}",
                    f"Known: {', '.join(known)}.",
                )

    def run(self, job: Job) -> Mapping[str, float]:
        """Compare all strategies, show the table, write the plan and the fastest strategy's experiment."""
        from rlhf.planner.strategies import compare_strategies, equally_fast, fastest, fitting_alternatives

        experiment = job.experiment
        assert experiment is not None
        self.check_gpu_keys(experiment)
        chain = experiment.stages
        base, shape = self.base(job)
        on, use = self.cost_context(job, experiment, shape), self.use_case(job, experiment, shape.context)
        planned = [chain[name] for name in self.planned(chain)]
        ways = compare_strategies(planned, experiment, base, on, use, self.methods)
        chosen = fastest(ways)
        cells = table(ways, self.price_per_gpu_hour)
        reason = proposal(chosen, [each.name for each in equally_fast(ways)])
        if chosen.objections:
            instead = [*fitting_alternatives(planned, experiment, base, on, use, self.methods)]
            reason = "No strategy is possible: the last column of each row says why."
            reason += f" But {'; '.join(instead)}." if instead else ""
        text = [
            f"# Plan\n\n{hardware_line(on)}\n",
            cells.markdown(),
            f"\n{reason}\n",
            speeds(chosen).markdown(),
            "",
            *(f"{line}\n" for line in assumptions(chosen, self.lengths_line(shape.context))),
            phases(chosen).markdown(),
        ]
        if job.compute.is_main:
            content = "\n".join([*text, *explanation(ways, self.price_per_gpu_hour)])
            (job.directory / "plan.md").write_text(f"{content}\n", encoding="utf-8")
            if not chosen.objections:
                directory = job.directory / "experiment"
                directory.mkdir()
                content = experiment_file(redacted(experiment.resolved), chosen, reason)
                (directory / "planned.yaml").write_text(content, encoding="utf-8")
        self.show(job, ways, chosen, cells, reason)
        figures = {"strategies": float(sum(not way.objections for way in ways))}
        if chosen.objections:
            return figures
        return figures | {"hours": chosen.max_hours, "peak_gib": peak_memory(chosen.cost, chosen.on)[1] / GIB}

    def check_gpu_keys(self, experiment: Experiment) -> None:
        """Refuse GPU keys without `plan.gpus`.

        Raises:
            ConfigError: such a key was set.
        """
        set_by_user = [change["key"] for change in changed_keys(experiment.composed)]
        of_gpus = [f"plan.{key}" for key in GPU_KEYS if f"plan.{key}" in set_by_user]
        if self.gpus is None and of_gpus:
            raise ConfigError(
                f"{', '.join(of_gpus)}: read only with plan.gpus, the GPUs of each node. Set it; without it "
                "this machine is planned for."
            )

    def base(self, job: Job) -> tuple[PreTrainedModel, ModelShape]:
        """The base model without weights, and its shape.

        Raises:
            ConfigError: the formulas do not hold for it.
        """
        try:
            base = skeleton(job.base.architecture, trust_remote_code=job.base.config.trust_remote_code)
            return base, shape_of_model(base)
        except UnknownShapeError as unknown:
            raise ConfigError(
                f"stage=plan: {unknown}, so its memory cannot be computed. Plan for another model."
            ) from None

    def cost_context(self, job: Job, experiment: Experiment, shape: ModelShape) -> CostContext:
        """The context of all costs: the model on the planned hardware."""
        settings = experiment.settings
        if self.gpus is None:
            speed = job.compute.main_only(lambda: calibrated_speed(job.compute, Path(settings.store_dir)))
            machine, dtype_bytes = local_machine(job.compute, speed), job.compute.dtype.itemsize
        else:
            nodes, gpus = "node" + "s" * (self.nodes > 1), "GPU" + "s" * (self.gpus > 1)
            machine = Machine(
                kind="cuda",
                name=f"planned: {self.nodes} {nodes} of {self.gpus} {gpus}",
                memory=float(self.gpu_memory),
                host_memory=self.host_memory / self.gpus,
                used=CUDA_CONTEXT + (NCCL_BUFFERS if self.gpus * self.nodes > 1 else 0.0),
                ranks=self.gpus * self.nodes,
                speed=Speed(1000 * self.gpu_tflops, self.gpu_bandwidth / 1e9),
                ranks_here=self.gpus,
                host_used=CUDA_PROCESS,
                disk=float(self.disk),
                link=float(self.gpu_link),
                network=float(self.network),
            )
            dtype_bytes = 4 if settings.precision == "fp32" else 2
        mean = float(self.lengths_in(shape.context)["answer_tokens"]) if self.plans_answers else None
        return CostContext(
            shape, dtype_bytes, settings.zero, machine, self.sizes(job, shape.context),
            settings.vllm if settings.generation in (("vllm", "auto") if self.gpus else ("vllm",)) else None,
            pads_rows(settings.model, shape), answer_tokens=mean,
        )  # fmt: skip

    def sizes(self, job: Job, context: int) -> Sizes:
        """Rows and lengths by role: prepared, given or assumed."""
        if self.measures:
            return job.data.size
        num_rows, prompt, answer = self.lengths_in(context).values()

        def given(role: str, split: Split) -> LengthStats:
            has_answer = not issubclass(self.mount.roles[role].row_types[0], PromptRow)
            tokens = prompt + (answer if has_answer else 0)
            rows = num_rows if split == "train" else max(1, round(HELD_OUT_FRACTION * num_rows))
            return LengthStats(rows, float(tokens), 0.0, tokens)

        return given

    def lengths_line(self, context: int) -> str:
        """The plan's line about lengths."""
        if self.measures:
            return "Lengths: those of the prepared data."
        lengths = self.lengths_in(context)
        values = {key: f"plan.{key}={value}" for key, value in lengths.items()}
        assumed = [text for key, text in values.items() if getattr(self, key) is None]
        given = [text for text in values.values() if text not in assumed]
        parts = {"given": ", ".join(given), "assumed, as nothing was given": ", ".join(assumed)}
        limited = [values[key] for key in lengths if lengths[key] < self.lengths[key]]
        longest = self.longest_in(context)
        if self.plans_answers and self.longest_answer is None and longest < 2 * lengths["answer_tokens"]:
            limited.append(f"plan.longest_answer={longest}")
        line = f"Lengths {'; '.join(f'{source}: {keys}' for source, keys in parts.items() if keys)}."
        return line + (
            f" Limited to the model's context of {context} tokens: {', '.join(limited)}." if limited else ""
        )

    def use_case(self, job: Job, experiment: Experiment, context: int) -> UseCase:
        """The task's lengths and the plan's limits."""
        from rlhf.planner.strategies import UseCase

        compare = experiment.resolved["compare"]
        rows, mean_prompt, mean_answer = map(float, self.lengths_in(context).values())
        longest, has_questions = self.longest_in(context) if self.plans_answers else None, True
        if self.measures:
            sft_rows = job.data.rows("sft", "train")
            rows, tokenizer = len(sft_rows), job.base.load_tokenizer()
            sample, has_questions = sft_rows[:MEASURED_ROWS], any(row.prompt for row in sft_rows)
            mean_prompt = fmean(len(prompt_ids(tokenizer, row.prompt)) for row in sample)
            both = fmean(len(exchange_ids(tokenizer, row.prompt, row.completion)[0]) for row in sample)
            mean_answer = both - mean_prompt
        return UseCase(
            round(rows), mean_prompt, mean_answer, longest=longest,
            wants_vllm=experiment.settings.generation == "vllm",
            examples=compare["few_shot"]["examples"], passages=compare["retrieval"]["passages"],
            has_questions=has_questions, deploy=self.deploy, hours=self.hours,
            max_added_latency=self.max_added_latency,
        )  # fmt: skip

    def show(self, job: Job, ways: list[Strategy], chosen: Strategy, cells: Cells, reason: str) -> None:
        """Print the plan on the terminal."""
        console = job.progress.console
        console.print(escape(hardware_line(chosen.on)), highlight=False)
        for each in (cells, phases(chosen), *([speeds(chosen)] if chosen.costs else [])):
            rich_table = Table(*each.headings, box=None, pad_edge=False, header_style="dim")
            for row in each.rows:
                rich_table.add_row(*map(escape, row))
            console.print(rich_table, highlight=False)
        if self.explain:
            console.print(escape("\n".join(explanation(ways, self.price_per_gpu_hour))), highlight=False)
        for line in assumptions(chosen, self.lengths_line(chosen.on.shape.context)):
            console.print(escape(line), highlight=False)
        console.print(escape(reason), highlight=False, soft_wrap=True)
        if not chosen.objections:
            directory = job.run_directory / "artifacts" / self.name
            command = f"To run it: python -m rlhf --config-dir {directory} +experiment=planned"
            console.print(command, highlight=False, soft_wrap=True, markup=False)
