"""The PPO loop and its knobs."""
