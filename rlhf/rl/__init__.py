"""The tensors of an episode and what reinforcement learning computes from them."""
