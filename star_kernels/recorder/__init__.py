"""Recording attention mass while a model runs (docs/method.md, section 3).

`recorder.py` records, whatever the model. What it must know of a family of models stands in a file of its own, found
through `FAMILIES` by the name of the model's class: `sd3.py` for diffusers' SD3Transformer2DModel, `flux.py` for
FluxTransformer2DModel, `unet.py` for UNet2DConditionModel, and so on. `dispatcher.py` serves families whose attention
goes through diffusers' dispatcher.
"""

from star_kernels.recorder.family import Attend as Attend
from star_kernels.recorder.family import Family as Family
from star_kernels.recorder.family import Layer as Layer
from star_kernels.recorder.family import OwnAttention as OwnAttention
from star_kernels.recorder.recorder import FAMILIES as FAMILIES
from star_kernels.recorder.recorder import AttentionRecorder as AttentionRecorder
from star_kernels.recorder.recorder import record_attention as record_attention
