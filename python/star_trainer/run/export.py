"""What was learnt, in the formats that diffusers reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from star_trainer.run.processes import full_tensor, is_sharded
from star_trainer.run.state import TrainingState


def export(state: TrainingState, folder: Path) -> None:
    """Save LoRA weights for `load_lora_weights` in ``adapter/``, or the whole transformer in ``transformer/``.

    They are the policy's present ones. Every process must call it; the main one writes.
    """
    policy = state.policy
    model: Any = policy.model
    weights = None
    if is_sharded(model):
        weights = {}
        for name, tensor in model.state_dict().items():
            value = full_tensor(tensor.detach())
            if state.accelerator.is_main_process:
                weights[name] = value.cpu()
    if not state.accelerator.is_main_process:
        return
    if policy.config.lora is None:
        if weights is not None:
            with torch.device("meta"):
                model = policy.family.model_class.from_config(model.config)
            model.load_state_dict(weights, assign=True)
        model.save_pretrained(folder / "transformer", safe_serialization=True)
        return
    from peft.utils import get_peft_model_state_dict

    layers = get_peft_model_state_dict(model, state_dict=weights)
    # The rank can be read off the weights; alpha, without which they load at another strength, only off this.
    (adapter,) = model.peft_config.values()
    policy.family.save_adapter(policy.pipeline, folder / "adapter", layers, adapter.to_dict())
