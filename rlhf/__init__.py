"""From a base model to an aligned one: prepare, sft, reward, generate, ppo, evaluate."""

__version__ = "0.1.0"
