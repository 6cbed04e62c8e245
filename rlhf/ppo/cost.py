"""Costs of the policy-gradient stages.

PPO has four models, of which one engine trains two (policy and critic). Without a critic there are three
models, of which one trains.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from rlhf.costs.memory import (
    FP32,
    SAMPLING,
    Allocation,
    MemoryPhase,
    Trained,
    activations,
    folded,
    frozen_runs,
    frozen_weights,
    loading,
    logits,
    reading,
    sampling,
    with_vllm,
)
from rlhf.costs.model_shape import ModelShape
from rlhf.costs.peft_costs import COSTS
from rlhf.costs.setup import CostContext
from rlhf.costs.stage_cost import StageCost, Task, ThroughputModel, joined
from rlhf.costs.training import artifact_bytes, publishing_memory
from rlhf.data.prepared import LengthStats
from rlhf.models.peft.methods import METHODS
from rlhf.models.start import directory_of
from rlhf.ppo.config import PolicyConfig, PpoConfig
from rlhf.rewards.kinds import RewardPart, models_of, stage_of

FOLDED_METHODS = ("lora", "dora", "ia3")
"""Methods whose adapters are merged into copies of the weights while the policy samples."""


def policy_cost(
    config: PolicyConfig, on: CostContext, *, reward_method: str | None, reward_init: str | None = None
) -> StageCost:
    """Cost of a policy-gradient stage.

    All models read each episode; policy and critic learn from it. Three models read each evaluated answer.

    Args:
        reward_method: tuning method of the reward stage; None if another model or a rule scores.
        reward_init: the reward stage's initial model; None if it is the policy's.
    """
    base, same_start = on, reward_init in (None, config.init)
    on = on.starting(directory_of(config.init)).tuned(config.peft)
    scorer = own_scorer(config, on)
    if reward_method is not None:
        scorer = on if same_start else base.starting(directory_of(reward_init or config.init))
    prompts = on.sizes("ppo", "train")
    length = joined(prompts, on.answers(config.max_new_tokens))
    batch, minibatch, max_tokens = config.batch_episodes, config.minibatch_episodes, config.micro_batch_tokens
    scored = on.pass_tokens(batch, length, max_tokens)
    once = minibatch == batch and on.passes(batch, length, max_tokens) == 1
    passes = on.passes(minibatch, length, max_tokens)

    method = METHODS[config.peft.method]
    shares = method.shares and on.zero == "none"
    folds = shares and reward_method == "lora" and same_start
    """Whether the reward model is the policy's initial model with an adapter."""
    own_reward = scorer is not None and not folds
    with_critic = config if isinstance(config, PpoConfig) else None
    critic_on_reward = own_reward and with_critic is not None and with_critic.critic_on_reward
    critic = None
    if with_critic is not None:
        critic = scorer if scorer is not None and critic_on_reward else on
    trained = Trained(on, config.peft)
    if critic is not None:
        sets = 1 + (critic_on_reward if shares else 1)
        trained = Trained(on, config.peft, models=2, weight_sets=sets, scalars=1, scalar=critic.shape)
    name = "policy" if critic is None else "policy and critic"
    states = [*trained.weights(name), trained.optimizer(), *trained.buffers()]
    placement = config.placement(shards_weights=on.shards_weights)
    of_reference, of_reward = [], []
    if config.shares_reference(shards_weights=on.shards_weights):
        # only the gathered layers: the weights are the policy's
        of_reference = frozen_runs(on, "reference")[1:]
    elif not shares:
        weights, *of_reference = frozen_runs(on, "reference", placement)
        states.append(weights)
    others = []
    if scorer is not None and own_reward and not (shares and critic_on_reward):
        weights, *of_reward = frozen_runs(scorer, "reward model", placement, is_scalar=True)
        states.append(weights)
        read_as = "sharded" if placement == "sharded" else "replicated"
        others = [frozen_weights(scorer, "reward model", read_as, is_scalar=True)]
    for extra in more_scorers(config, on):
        states.append(frozen_runs(extra, "reward model", placement, is_scalar=True)[0])
        others.append(frozen_weights(extra, "reward model", "replicated", is_scalar=True))
    best_policy_bytes = on.dtype_bytes * trained.parameters_per_model
    """Size of the best policy so far, which is stored on disk."""

    running = [*states, *trained.gathered()]
    learned = on.pass_tokens(minibatch, length, max_tokens)

    def graph(of: CostContext, second_shape: ModelShape | None = None) -> Allocation:
        return activations(
            of, learned, length.longest, config.peft, checkpointing=config.activation_checkpointing,
            second_shape=second_shape,
        )  # fmt: skip

    keeps_both = once or on.sharding.library == "deepspeed"
    graphs = graph(on)
    if critic is not None:
        graphs = (
            graph(on, critic.shape) if keeps_both else max(graphs, graph(critic), key=lambda part: part.size)
        )
    rows = decoded_rows(config, on, max(batch, config.evaluate_prompts))
    decoding = sampling(
        on, rows, prompts.longest, config.max_new_tokens, folds=config.peft.method in FOLDED_METHODS,
        gathers=on.shards_weights,
    )  # fmt: skip
    mix = list(mix_activations(with_critic, on, once=once)) if with_critic is not None else []
    phases = [
        loading(on, trained, *others),
        MemoryPhase(SAMPLING, [*states, *decoding]),
        MemoryPhase(
            "reward model",
            [*states, *of_reward, *([folded(on)] if folds else []), reading(scorer or on, scored)],
        ),
        MemoryPhase("reference", [*states, *of_reference, reading(on, scored), logits(on, learns=False)]),
        MemoryPhase(
            "learning",
            [
                *running,
                *trained.gradients(passes=passes, together=once),
                graphs,
                *mix,
                logits(on, learns=True),
            ],
        ),
        MemoryPhase(
            "optimizer step", [*states, *trained.gradients(passes=passes, at_step=True, together=once)]
        ),
        MemoryPhase("publishing", [*states, *publishing_memory(on, trained.parameters_per_model)]),
    ]
    return StageCost(
        with_vllm(on, phases), policy_work(config, on, scorer, critic, trained, once=once),
        artifact=artifact_bytes(on, config.peft),
        checkpoint=3 * FP32 * trained.parameters + best_policy_bytes,
        longest=length.longest + COSTS[config.peft.method].added_tokens(on.shape, config.peft),
        sampled=length.longest, context=on.shape.context,
        tokens=config.steps * batch * length.mean,
    )  # fmt: skip


def own_scorer(config: PolicyConfig, on: CostContext) -> CostContext | None:
    """Context with the shape of the first `model:DIR` that scores.

    None if the reward stage's model scores, or if only rules score.
    """
    models = models_of(config.reward)
    if not models or any(stage_of(part.source) for part in models):
        return None
    return _shape(models[0], on)


def more_scorers(config: PolicyConfig, on: CostContext) -> list[CostContext]:
    """Contexts with the shapes of an ensemble's further models."""
    models = models_of(config.reward)
    first = next((part for part in models if stage_of(part.source)), models[0] if models else None)
    return [_shape(part, on) for part in models if part is not first]


def _shape(part: RewardPart, on: CostContext) -> CostContext:
    """Context with the shape of a reward model; the policy's shape if the model's config does not tell."""
    return on if stage_of(part.source) else on.starting(Path(part.source.removeprefix("model:")))


def decoded_rows(config: PolicyConfig, on: CostContext, rows: int) -> float:
    """Rows that one rank decodes together.

    Args:
        rows: rows of all ranks.
    """
    return min(config.batch_rows or rows, rows / on.ranks)


def mix_activations(config: PpoConfig, on: CostContext, *, once: bool) -> Iterator[Allocation]:
    """Activations of the pretraining mix that are in memory in addition to those of PPO's own losses.

    One pass of the mix if the rollout's pass is kept; all its passes under DeepSpeed. Else the two are not in
    memory together: only the part by which the mix is larger.
    """
    if not config.ptx.coef:
        return
    lengths = mix_lengths(config, on)
    tokens = on.pass_tokens(config.ptx.rows, lengths, config.micro_batch_tokens)
    if on.sharding.library == "deepspeed":
        tokens = max(tokens, config.ptx.rows / on.ranks * lengths.mean)
    elif not once:
        length = joined(on.sizes("ppo", "train"), on.answers(config.max_new_tokens))
        own = on.pass_tokens(config.minibatch_episodes, length, config.micro_batch_tokens)
        tokens = max(0.0, tokens - own)
    yield activations(on, tokens, lengths.longest, config.peft, checkpointing=config.activation_checkpointing)


def mix_lengths(config: PpoConfig, on: CostContext) -> LengthStats:
    """Lengths of the mix's rows, cut to the context without virtual tokens."""
    max_tokens = on.shape.context - COSTS[config.peft.method].added_tokens(on.shape, config.peft)
    return on.sizes("sft" if config.ptx.data is None else "ptx", "train").cut(max_tokens)


def grouped_prompts(prompts: LengthStats, size: int) -> LengthStats:
    """Lengths of prompts with `size` answers each: all but one answer of a group share the full prompt."""
    unshared = prompts.mean - prompts.shared_prefix
    return prompts._replace(shared_prefix=prompts.mean - unshared / size)


def policy_work(
    config: PolicyConfig,
    on: CostContext,
    scorer: CostContext | None,
    critic: CostContext | None,
    trained: Trained,
    *,
    once: bool,
) -> list[Task]:
    """The tasks of all steps and evaluations.

    Args:
        once: one pass covers the whole batch, so the pass that scores a rollout is the one that learns.
    """
    worker, answers = ThroughputModel(on), on.answers(config.max_new_tokens)
    new = answers.mean
    single_prompts = on.sizes("ppo", "train")
    prompts = grouped_prompts(single_prompts, config.group_size)
    both = joined(prompts, answers)
    length, computed = both.mean, on.computed(both.mean, both)
    """Mean tokens of a row, and how many of them go through a model."""
    episodes = config.steps * config.batch_episodes
    evaluations = 1 + math.ceil(config.steps / config.evaluate_every)
    evaluated = evaluations * min(config.evaluate_prompts, on.sizes("ppo", "held_out").rows)
    scored_rows = episodes + 2 * evaluated  # the reference reads all; the policy also reads evaluations
    scored_rows += 0 if once else episodes  # policies score before they learn
    learned = config.epochs * episodes
    updates = config.steps * config.epochs * math.ceil(config.batch_episodes / config.minibatch_episodes)
    mixed_in = []
    if isinstance(config, PpoConfig) and config.ptx.coef:
        mix = mix_lengths(config, on)
        tokens = updates * config.ptx.rows * mix.mean
        mixed_in = [worker.train(
            tokens, mix.mean, config.peft.method, predicted=tokens,
            checkpointing=config.activation_checkpointing, what="pretraining mix",
        )]  # fmt: skip
    scorers = [*([scorer] if scorer is not None else []), *more_scorers(config, on)]
    tokens = (episodes + evaluated) * computed
    scores = [ThroughputModel(each).read(tokens, length, what="scores") for each in scorers]
    passes = config.steps * on.passes(config.batch_episodes, both, config.micro_batch_tokens)
    updating = updates * on.passes(config.minibatch_episodes, both, config.micro_batch_tokens)
    readings = [
        worker.read(
            scored_rows * computed, length, predicted=scored_rows * new, what="log-probabilities"
        ),
    ]  # fmt: skip
    learning = [
        worker.train(
            learned * computed, length, config.peft.method, predicted=learned * new,
            checkpointing=config.activation_checkpointing, what="policy",
        ),
    ]  # fmt: skip
    loads = [ThroughputModel(each).load(1, what="reward model") for each in scorers]
    if critic is not None:
        model = ThroughputModel(critic)
        readings.append(model.read(0 if once else episodes * computed, length, what="values"))
        learning.append(model.train(
            learned * computed, length, config.peft.method, checkpointing=config.activation_checkpointing,
            what="critic",
        ))  # fmt: skip
        loads.insert(0, model.load(1, what="critic"))
    num_trained = 1 if critic is None else 2
    models = 1 + len(scorers) + (0 if once else num_trained)  # reference and reward models; policy and critic
    return [
        worker.load(3, what="policy, reference, published model"),
        *loads,
        *scores,
        *worker.decode(
            episodes, decoded_rows(config, on, config.batch_episodes), prompts, answers, what="episodes"
        ),
        *worker.decode(
            evaluated, decoded_rows(config, on, config.evaluate_prompts), single_prompts, answers,
            what="evaluations",
        ),
        *worker.rollouts(config.steps + evaluations, episodes + evaluated, what="episodes"),
        *readings,
        *worker.gathering(models * passes, what="scoring"),
        *worker.gathering(
            config.steps * on.gathers_a_rollout(answers.longest), what="weights to sample from"
        ),
        *learning,
        *worker.exchanging(
            num_trained * updating, updates, trained.parameters / num_trained, what="learning"
        ),
        *mixed_in,
        worker.optimize(trained.parameters, updates),
    ]  # fmt: skip
