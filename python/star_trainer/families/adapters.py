"""Adapters that were trained before: read from files, and put onto a transformer whole or not at all."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from star_trainer.config import ConfigError
from star_trainer.config.paths import folder_or_name
from star_trainer.families.family import Family

# What `PeftModel.save_pretrained` writes, and the prefix that it gives to names.
_PEFT_CONFIG, _PEFT_WEIGHTS, _PEFT_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# What of a configuration of peft decides which layers have what adapter.
_SHAPING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules",
            "layers_to_transform", "layers_pattern", "use_rslora", "use_dora", "lora_bias")  # fmt: skip
_DOWN = ".lora_A.weight"


@dataclass(frozen=True)
class SavedAdapter:
    """LoRA weights by their names in the transformer, and what the files say of peft's configuration."""

    layers: dict[str, Tensor]
    metadata: dict[str, Any]
    # The setting and the place that they come from, for messages.
    origin: str


def read_adapter(source: str, family: Family, key: str) -> SavedAdapter:
    """Read LoRA weights in the family's diffusers format or as ``PeftModel.save_pretrained`` leaves them.

    Args:
        source: a folder, a file, or a name on a hub.
        family: knows diffusers' format.
        key: the setting that names `source`, for messages.

    Raises:
        ConfigError: nothing there, files that cannot be read, or weights of anything but the transformer.
    """
    path, origin = Path(source).expanduser(), f"{key}: {source}"
    try:
        if (path / _PEFT_CONFIG).is_file():
            found = json.loads((path / _PEFT_CONFIG).read_text(encoding="utf-8"))
            if found.get("peft_type") != "LORA":
                raise ValueError(f"expected an adapter of the type LORA, got {found.get('peft_type')!r}")
            return SavedAdapter(_within(load_file(path / _PEFT_WEIGHTS), _PEFT_PREFIX, origin), found, origin)
        layers, metadata = family.read_adapter(str(path) if path.is_file() else folder_or_name(source, key))
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{origin} cannot be loaded: {error}") from error
    prefix = f"{family.model_part}."
    said = {name.removeprefix(prefix): value for name, value in metadata.items()}
    return SavedAdapter(_within(layers, prefix, origin), said, origin)


def _within(tensors: dict[str, Tensor], prefix: str, origin: str) -> dict[str, Tensor]:
    others = [name for name in tensors if not name.startswith(prefix)]
    if others:
        raise ConfigError(f"{origin} holds weights of more than the transformer's layers: {_some(others)}")
    return {name.removeprefix(prefix): value for name, value in tensors.items()}


def add_saved_adapter(transformer: Any, saved: SavedAdapter) -> None:
    """Add the adapter to a transformer, in float32 as it was trained.

    Raises:
        ConfigError: weights that no layer takes, that are missing, or of other shapes; the message names them.
    """
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    ranks = {name.removesuffix(_DOWN): len(value) for name, value in saved.layers.items() if name.endswith(_DOWN)}
    if not ranks:
        raise ConfigError(f"{saved.origin} holds no LoRA weights ({_some(saved.layers) or 'none at all'})")
    # Files without a configuration tell the ranks by their shapes, and mean alpha to be the same.
    usual = Counter(ranks.values()).most_common(1)[0][0]
    others = {name: rank for name, rank in ranks.items() if rank != usual}
    shaping = {"r": usual, "lora_alpha": usual, "rank_pattern": others, "alpha_pattern": others}
    shaping |= {"target_modules": sorted(ranks)}
    shaping |= {name: value for name, value in saved.metadata.items() if name in _SHAPING and value is not None}
    try:
        transformer.add_adapter(LoraConfig(**shaping))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{saved.origin} does not fit the transformer: {error}") from error
    expected = get_peft_model_state_dict(transformer)
    shapes = [
        name for name in expected.keys() & saved.layers.keys() if expected[name].shape != saved.layers[name].shape
    ]
    wrong = {
        "lacks": expected.keys() - saved.layers.keys(),
        "has weights that no layer takes": saved.layers.keys() - expected.keys(),
        "has other shapes": shapes,
    }
    problems = [f"{what}: {_some(names)}" for what, names in wrong.items() if names]
    if problems:
        raise ConfigError(f"{saved.origin} does not fit the transformer; it {'; it '.join(problems)}")
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    set_peft_model_state_dict(transformer, saved.layers)


def _some(names: Collection[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return f"{shown} and {len(names) - 3} others" if len(names) > 3 else shown
