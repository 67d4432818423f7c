"""Spatiotemporal reward allocation for text-to-image post-training: the public names, nothing else."""

from star_kernels.allocation import allocation_map as allocation_map
from star_kernels.allocation import temporal_weights as temporal_weights
from star_kernels.attention import joint_attention as joint_attention
from star_kernels.attention.mass import attention_mass as attention_mass
from star_kernels.backends import available_backends as available_backends
from star_kernels.policy_loss import PolicyLoss as PolicyLoss
from star_kernels.policy_loss import policy_loss as policy_loss
from star_kernels.policy_loss import position_clip_range as position_clip_range
from star_kernels.recorder import AttentionRecorder as AttentionRecorder
from star_kernels.recorder import record_attention as record_attention
from star_kernels.text_units import TextUnits as TextUnits
from star_kernels.transition import TransitionCoefficients as TransitionCoefficients
from star_kernels.transition import TransitionStep as TransitionStep
from star_kernels.transition import transition_coefficients as transition_coefficients
from star_kernels.transition import transition_log_prob as transition_log_prob
from star_kernels.transition import transition_step as transition_step

__version__ = "0.1.0"
