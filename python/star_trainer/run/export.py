"""What was learnt, in the formats that diffusers reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from star_trainer.families.family import Family
from star_trainer.run.processes import full_tensor, is_sharded
from star_trainer.run.state import TrainingState


def export(state: TrainingState, folder: Path) -> None:
    """Save LoRA weights for `load_lora_weights` in ``adapter/``, or the whole model in ``transformer/`` (or ``unet/``).

    They are the policy's present ones. Every process must call it; the main one writes.
    """
    whole = state.policy.config.lora is None
    export_to(state, folder / (state.policy.family.model_part if whole else "adapter"))


def export_to(state: TrainingState, path: Path) -> None:
    """`export` into `path` itself."""
    policy = state.policy
    model: Any = policy.model
    weights = None
    if is_sharded(model):
        weights = {}
        for name, tensor in model.state_dict().items():
            value = full_tensor(tensor.detach())
            if state.accelerator.is_main_process:
                weights[name] = value.cpu()
    if state.accelerator.is_main_process:
        save_weights(policy.family, model, path, weights)


def save_weights(family: Family, model: Any, path: Path, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write a transformer's adapters, or all of it where it has none.

    `weights` by the names of its state take the place of its own, which may then be on the meta device.
    """
    if not getattr(model, "peft_config", None):
        if weights is not None:
            with torch.device("meta"):
                model = family.model_class.from_config(model.config)
            model.load_state_dict(weights, assign=True)
        model.save_pretrained(path, safe_serialization=True)
        return
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, state_dict=weights)
    # The rank can be read off the weights; alpha, without which they load at another strength, only off this.
    (adapter,) = model.peft_config.values()
    family.save_adapter(path, layers, adapter.to_dict())
