"""What a model is told of prompts, and how guidance uses it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from star_trainer.families.devices import send


@dataclass(frozen=True)
class Conditioning:
    """What a model is told of B prompts: tensors [B, ...] by name, as text tokens and a pooled vector.

    They are contiguous however they were made: a linear layer may round differently for a view that repeats a row.

    `lengths` [B], for models that take text of unequal length, says how many of the text tokens are a prompt's. It
    stays on the CPU wherever the tensors go: a model that is called with lists would have to wait for it elsewhere.
    """

    tensors: Mapping[str, Tensor]
    lengths: Tensor | None = None

    def __post_init__(self) -> None:
        contiguous = {name: tensor.contiguous() for name, tensor in self.tensors.items()}
        object.__setattr__(self, "tensors", contiguous)

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, rows: Any) -> Conditioning:
        if not isinstance(rows, Tensor):
            return self._each(lambda tensor: tensor[rows])
        # `lengths` are on the CPU, where rows on a device would have to be waited for.
        there = {device: send(rows, device) for device in {tensor.device for tensor in self.tensors.values()}}
        tensors = {name: tensor[there[tensor.device]] for name, tensor in self.tensors.items()}
        return Conditioning(tensors, None if self.lengths is None else self.lengths[rows.cpu()])

    def repeat(self, batch: int) -> Conditioning:
        """Those of one prompt for `batch` samples."""
        return self._each(lambda tensor: tensor.expand(batch, *tensor.shape[1:]))

    def repeat_interleave(self, repeats: int) -> Conditioning:
        """Each prompt's for `repeats` samples next to each other."""
        return self._each(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def to(self, device: str | torch.device) -> Conditioning:
        return Conditioning({name: tensor.to(device) for name, tensor in self.tensors.items()}, self.lengths)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @classmethod
    def joined(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The rows of all parts, one after the other."""
        lengths = [part.lengths for part in parts if part.lengths is not None]
        tensors = {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors}
        return cls(tensors, torch.cat(lengths) if lengths else None)

    def _each(self, change: Callable[[Tensor], Tensor]) -> Conditioning:
        lengths = None if self.lengths is None else change(self.lengths)
        return Conditioning({name: change(tensor) for name, tensor in self.tensors.items()}, lengths)


# How a guidance scale above 1 acts: by a second prediction, for the empty prompt, or as an input of the model.
GuidanceKind = Literal["two_predictions", "embedded"]


@dataclass(frozen=True)
class Guidance:
    """Guidance of B samples: its scale, and for two predictions the conditioning of the empty prompt for each of them.

    Two predictions come from two calls, the first without a prompt and without gradient: a rollout and its update then
    multiply matrices of the same shapes. One call of 2·B rows, which diffusers' pipelines make, may round otherwise.
    """

    scale: float
    empty: Conditioning | None

    @property
    def passes(self) -> int:
        """Calls of the model for a prediction; the last one sees the prompts."""
        return 1 if self.empty is None else 2


@dataclass(frozen=True)
class Prediction:
    """The velocity of B prompts [B, C, H, W], and under guidance the one without a prompt, and the scale of both."""

    velocity: Tensor
    unconditional: Tensor | None = None
    scale: float = 1.0

    @property
    def guided(self) -> Tensor:
        """v_u + g·(v_c − v_u) [B, C, H, W] (docs/method.md, section 2)."""
        if self.unconditional is None:
            return self.velocity
        return self.unconditional + self.scale * (self.velocity - self.unconditional)


def recorded_pass(guidance: Guidance | None) -> int | None:
    """Which of a step's calls of the model has the attention that maps are made of; None where there is one."""
    return None if guidance is None or guidance.passes == 1 else guidance.passes - 1


# One call of the model: latents [B, C, H, W], timestep (0-d, or [B]) and conditioning to the velocity [B, C, H, W].
VelocityFunction = Callable[[Tensor, Tensor, Conditioning], Tensor]


def guided_by_two_predictions(
    velocity: VelocityFunction, latents: Tensor, timestep: Tensor, conditioning: Conditioning, guidance: Guidance | None
) -> Prediction:
    """Classifier-free guidance, of families whose model knows nothing of the scale."""
    if guidance is None or guidance.empty is None:
        return Prediction(velocity(latents, timestep, conditioning))
    with torch.no_grad():
        unconditional = velocity(latents, timestep, guidance.empty)
    return Prediction(velocity(latents, timestep, conditioning), unconditional, guidance.scale)
