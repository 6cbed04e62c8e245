"""Which way to adapt the model, before anything trains: what each way needs, what rules it out, and a choice.

Reads   the model's config, without weights; the lengths of the prepared data, unless they are given.
Writes  plan.md (the table, with every figure's arithmetic) and experiment/planned.yaml, which does what is
        recommended: python -m rlhf --config-dir RUN/artifacts/plan +experiment=planned
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
    found_machine,
)
from rlhf.costs.model_shape import ModelShape, counted
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
    recommendation,
    speeds,
    table,
)
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
Gigabytes = Annotated[ByteSize, _with_unit("GB")]
Terabytes = Annotated[ByteSize, _with_unit("TB")]
OF_GPUS = ("gpu_memory", "host_memory", "gpu_tflops", "gpu_bandwidth", "gpu_link", "network", "disk")
"""Keys that are read only with `plan.gpus`."""
ASSUMED = {"rows": 10_000, "prompt_tokens": 512, "answer_tokens": 512}
"""For GPUs that are not here, where the data need not be either."""


class PlanStage(TellsOfRuns):
    """The keys `plan.*`. Values: conf/stages/plan.yaml."""

    metrics: ClassVar[Mapping[str, Metric]] = {
        "strategies": Metric("strategies", ".0f"),
        "peak_gib": Metric("GiB of the best", ".1f"),
        **named("hours"),
    }

    trains: list[str] | None = Field(min_length=1)
    """The stages that are planned, of those that train (sft, reward, ppo, your own), with their data and
    settings in this config. null plans sft; with `gpus` all three."""
    methods: list[MethodName] | None
    """The only ways of tuning to weigh, such as [none] for all parameters; null weighs all, and those that
    leave the weights as they are."""
    rows: PositiveInt | Literal["prepared"] | None
    """Training rows of each stage. null measures the prepared data, or with `gpus` takes 10000; `prepared`
    measures in any case."""
    prompt_tokens: PositiveInt | None
    """Mean prompt tokens of a row; with `gpus` null takes 512, else give it together with `rows`."""
    answer_tokens: PositiveInt | None
    """Mean answer tokens of a row and of PPO's answers; null as of `prompt_tokens`."""
    longest_answer: PositiveInt | None
    """Tokens of PPO's longest answers; null takes twice `answer_tokens`. Read with `gpus`, where the lengths
    are given or assumed."""
    gpus: PositiveInt | None
    """GPUs of each node, which need not be here; null plans for this machine."""
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
    """What a GPU gets from the others of its node per second, such as 300GB."""
    network: Gigabytes
    """What a GPU gets from other nodes per second, such as 50GB."""
    disk: Gigabytes
    """What a node reads or writes per second, such as 1GB."""
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
        """Whether the prepared data's lengths are planned for, not given or assumed ones."""
        return self.rows == "prepared" or (self.rows is None and self.gpus is None)

    @property
    def lengths(self) -> dict[str, int]:
        """Rows and tokens that are planned for where they are not measured."""
        given = {"rows": self.rows, "prompt_tokens": self.prompt_tokens, "answer_tokens": self.answer_tokens}
        return {key: ASSUMED[key] if value is None else int(value) for key, value in given.items()}

    @property
    def plans_answers(self) -> bool:
        """Whether PPO's answers are as long as the plan says, whatever ppo.max_new_tokens says."""
        return self.gpus is not None and not self.measures

    @property
    def longest(self) -> int:
        """Tokens of PPO's longest answers."""
        return self.longest_answer or 2 * self.lengths["answer_tokens"]

    def planned(self, chain: Mapping[str, Stage]) -> list[str]:
        """The stages that are planned, in the chain's order."""
        names = self.trains or (["sft"] if self.gpus is None else ["sft", "reward", "ppo"])
        return [name for name in chain if name in names]

    def reads(self) -> Reads:
        """The base model's config, and the lengths of what trains."""
        return Reads(roles=training_roles(self.mount.roles) if self.measures else (), base=True)

    def needs(self, chain: Mapping[str, Stage]) -> tuple[str, ...]:
        """What the planned stages need; and sft.data, the task whose prompts and answers are measured."""
        if not self.measures:
            return ()
        planned = (chain[name] for name in self.planned(chain))
        return tuple(dict.fromkeys(("sft", *(role for stage in planned for role in stage.needs(chain)))))

    def complaints(self, view: View) -> Iterator[Complaint]:
        """What is planned trains."""
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
        """Weigh every strategy, show the table, write the best one down."""
        from rlhf.planner.strategies import out_of_reach, rank_strategies

        experiment = job.experiment
        assert experiment is not None
        self.check_read(experiment)
        chain = experiment.stages
        base, shape = self.base(job)
        on, use = self.setting(job, experiment, shape), self.use(job, experiment)
        planned = [chain[name] for name in self.planned(chain)]
        ranked = rank_strategies(planned, experiment, base, on, use, self.methods)
        best = ranked[0]
        cells = table(ranked, self.price_per_gpu_hour)
        reason = recommendation(best)
        if best.against:
            instead = [*out_of_reach(planned, experiment, base, on, use)]
            reason = f"Nothing here can be done: each row says why. {'; '.join(instead)}".rstrip()
        text = [
            f"# Plan\n\n{hardware_line(on)}\n",
            cells.markdown(),
            f"\n{reason}\n",
            speeds(best).markdown(),
            "",
            *(f"{line}\n" for line in assumptions(best, self.said_lengths())),
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
        figures = {"strategies": float(sum(not strategy.against for strategy in ranked))}
        if best.against:
            return figures
        return figures | {"hours": best.most_hours, "peak_gib": peak_memory(best.cost, best.on)[1] / GIB}

    def check_read(self, experiment: Experiment) -> None:
        """Refuse keys of GPUs where none are planned for.

        Raises:
            ConfigError: with those that were set.
        """
        set_by_user = [change["key"] for change in changed_keys(experiment.composed)]
        of_gpus = [f"plan.{key}" for key in OF_GPUS if f"plan.{key}" in set_by_user]
        if self.gpus is None and of_gpus:
            raise ConfigError(
                f"{', '.join(of_gpus)}: read only with plan.gpus, the GPUs of each node. Set it; without it "
                "this machine is planned for."
            )

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
        mean = float(self.lengths["answer_tokens"]) if self.plans_answers else None
        return CostContext(
            shape, dtype_bytes, settings.zero, machine, self.sizes(job),
            settings.vllm if settings.generation in (("vllm", "auto") if self.gpus else ("vllm",)) else None,
            pads_rows(settings.model, shape), answer_tokens=mean,
        )  # fmt: skip

    def sizes(self, job: Job) -> Sizes:
        """Of every role: the prepared ones, or those given."""
        if self.measures:
            return job.data.size
        num_rows, prompt, answer = self.lengths.values()

        def given(role: str, split: Split) -> LengthStats:
            has_answer = not issubclass(self.mount.roles[role].row_types[0], PromptRow)
            tokens = prompt + (answer if has_answer else 0)
            rows = num_rows if split == "train" else max(1, round(HELD_OUT * num_rows))
            return LengthStats(rows, float(tokens), 0.0, tokens)

        return given

    def said_lengths(self) -> str:
        """What is planned for."""
        if self.measures:
            return "Lengths: those of the prepared data."
        values = {key: f"plan.{key}={value}" for key, value in self.lengths.items()}
        assumed = [said for key, said in values.items() if getattr(self, key) is None]
        given = [said for said in values.values() if said not in assumed]
        parts = {"given": ", ".join(given), "assumed, as nothing was given": ", ".join(assumed)}
        return f"Lengths {'; '.join(f'{how}: {which}' for how, which in parts.items() if which)}."

    def use(self, job: Job, experiment: Experiment) -> Use:
        """The task and its limits."""
        from rlhf.planner.strategies import Use

        compare = experiment.resolved["compare"]
        rows, mean_prompt, mean_answer, has_questions = *map(float, self.lengths.values()), True
        if self.measures:
            found = job.data.rows("sft", "train")
            rows, tokenizer = len(found), job.base.load_tokenizer()
            some, has_questions = found[:MEASURED_ROWS], any(row.prompt for row in found)
            mean_prompt = fmean(len(prompt_ids(tokenizer, row.prompt)) for row in some)
            both = fmean(len(exchange_ids(tokenizer, row.prompt, row.completion)[0]) for row in some)
            mean_answer = both - mean_prompt
        return Use(
            round(rows), mean_prompt, mean_answer, longest=self.longest if self.plans_answers else None,
            wants_vllm=experiment.settings.generation == "vllm",
            examples=compare["few_shot"]["examples"], passages=compare["retrieval"]["passages"],
            has_questions=has_questions, deploy=self.deploy, hours=self.hours,
            max_added_latency=self.max_added_latency,
        )  # fmt: skip

    def show(self, job: Job, on: CostContext, ranked: list[Strategy], cells: Cells, reason: str) -> None:
        """On the terminal."""
        console = job.progress.console
        console.print(escape(hardware_line(on)), highlight=False)
        for each in (cells, phases(ranked[0]), *([speeds(ranked[0])] if ranked[0].costs else [])):
            shown = Table(*each.headings, box=None, pad_edge=False, header_style="dim")
            for row in each.rows:
                shown.add_row(*map(escape, row))
            console.print(shown, highlight=False)
        if self.explain:
            console.print(escape("\n".join(explanation(ranked, self.price_per_gpu_hour))), highlight=False)
        for line in assumptions(ranked[0], self.said_lengths()):
            console.print(escape(line), highlight=False)
        console.print(escape(reason), highlight=False, soft_wrap=True)
        if not ranked[0].against:
            directory = job.run_directory / "artifacts" / self.name
            command = f"python -m rlhf --config-dir {directory} +experiment=planned"
            console.print(command, highlight=False, soft_wrap=True, markup=False)
