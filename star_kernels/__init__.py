"""Spatiotemporal reward allocation for text-to-image post-training: the public names, nothing else."""

from star_kernels.attention import joint_attention as joint_attention

__version__ = "0.1.0"
