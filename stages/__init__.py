"""The stages of the chain; one file each, read top to bottom."""
