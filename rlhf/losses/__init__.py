"""Losses as pure functions: tensors and global counts in, a scalar and sums for the metrics out."""
