"""Where there is no GPU, Triton's interpreter runs the kernels; it has to be asked for before they are imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
