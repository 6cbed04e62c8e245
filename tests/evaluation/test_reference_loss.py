"""How likely a policy finds answers that people wrote."""

from __future__ import annotations

from pathlib import Path

from helpers.jobs import TINY, on_cpu, user
from rlhf.evaluation.reference_loss import reference_losses
from rlhf.generation.policy_model import PolicyModel


def test_a_prompt_that_fills_the_context_leaves_nothing_to_measure(tiny_model: Path) -> None:
    policy = PolicyModel.load(tiny_model, TINY, on_cpu())
    short, full = (user("a" * size) for size in (5, policy.context_length))
    alone = reference_losses(policy, [short], ["yes"], 4096)
    nats_B, tokens_B = reference_losses(policy, [full, short, full], ["no", "yes", "no"], 4096)
    assert nats_B.tolist() == [0.0, alone[0].item(), 0.0]
    assert tokens_B.tolist() == [0, len("yes") + 1, 0]
    assert reference_losses(policy, [full], ["no"], 4096)[1].tolist() == [0]
