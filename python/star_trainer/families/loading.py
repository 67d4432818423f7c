"""Models that are loaded whole, or refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def load_whole(kind: Any, source: str, **options: Any) -> Any:
    """``kind.from_pretrained(source)`` from safetensors, for a class of diffusers or transformers.

    That by itself would fill what a file lacks with random numbers and warn in a log.

    Raises:
        OSError, ValueError: it cannot be loaded, is a model of another kind, or lacks weights; the message says which.
    """
    part = options.get("subfolder", "")
    expected = getattr(kind, "config_class", None)
    if expected is not None:
        from transformers import AutoConfig

        found = AutoConfig.from_pretrained(source, subfolder=part).model_type
        if found != expected.model_type:
            raise ValueError(f"expected a model of the type {expected.model_type}, got {found}")
    try:
        model, loading = kind.from_pretrained(source, use_safetensors=True, output_loading_info=True, **options)
    except OSError as error:
        raise OSError(f"its {part}: {error}" if part else str(error)) from error
    except RuntimeError as error:
        # Weights of other shapes than the configuration has.
        raise ValueError(str(error)) from error
    # Buffers are made anew as they were, but for what a normalisation has measured.
    weights = {name for name, _ in model.named_parameters()}
    missing = sorted(name for name in loading["missing_keys"] if name in weights or ".running_" in name)
    if missing:
        others = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise ValueError(f"{f'its {part}' if part else 'it'} has no weights for {missing[0]}{others}")
    return model


def read_config(kind: Any, source: str, part: str) -> Any:
    """A configuration of transformers from a pipeline's folder `part`.

    Raises:
        OSError: there is none, where `from_pretrained` would give the sizes of a model of its own choice.
    """
    content, _ = kind.get_config_dict(source, subfolder=part)
    if not content:
        raise OSError(f"its {part} has no config.json")
    return kind.from_dict(content)


def parts_of(pipeline: Any, source: str) -> set[str]:
    """The parts that a pipeline of a class of diffusers has: some may have been left out."""
    index = pipeline.load_config(source)
    return {part for part, kind in index.items() if isinstance(kind, (list, tuple)) and all(kind)}


def load_parts(kinds: Mapping[str, Any], source: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> dict[str, Any]:
    """A pipeline's models by part, each whole: the pipeline itself would only warn of missing weights, and go on with
    random ones.

    Raises:
        OSError, ValueError: as `load_whole`.
    """
    return {
        part: load_whole(kind, source, subfolder=part, torch_dtype=vae_dtype if part == "vae" else dtype)
        for part, kind in kinds.items()
    }
