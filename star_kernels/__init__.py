"""Spatiotemporal reward allocation for text-to-image post-training: the public names, nothing else."""

__version__ = "0.1.0"
