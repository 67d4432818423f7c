"""The two models that are compared: the base, and the base with what was trained."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from star_trainer.config import Config, ConfigError, Lora
from star_trainer.families import family_of
from star_trainer.families.adapters import add_saved_adapter, read_adapter
from star_trainer.families.policy import Policy, load_pipeline, load_policy
from star_trainer.run.checkpoint import load_latest

_WHOLE = "diffusion_pytorch_model.safetensors"


def connect(config: Config) -> Accelerator:
    """This process's device and the others, in the precision that the trainer samples in."""
    precision = "no" if config.model.dtype == "float32" else "bf16"
    return Accelerator(mixed_precision=precision, cpu=not torch.cuda.is_available())


def load_base(config: Config) -> Policy:
    """The pipeline as it is."""
    pipeline = load_pipeline(config.model)
    return _ready(Policy(pipeline, _model(pipeline), config.model), config)


def load_adapted(config: Config, source: str, key: str) -> tuple[Policy, str]:
    """The pipeline with an adapter and a digest of its weights; `base_weights` gives the pipeline without it.

    Args:
        config: the model section says which pipeline.
        source: LoRA weights in diffusers' or peft's format, a folder, a file or a name on a hub; or a folder with a
            whole transformer, as full training leaves it.
        key: the option or setting that names `source`, for messages.

    Raises:
        ConfigError: nothing there, or weights that do not fit the pipeline.
    """
    pipeline = load_pipeline(config.model)
    try:
        if (Path(source) / _WHOLE).is_file():
            base = _model(pipeline)
            trained = type(base).from_pretrained(source, torch_dtype=base.dtype, use_safetensors=True)
            whole = config.model.model_copy(update={"lora": None})
            policy = Policy(pipeline, trained.requires_grad_(False).eval(), whole, base)
            return _ready(policy, config), _digest(trained.state_dict())
    except (OSError, RuntimeError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{key}: {source} cannot be loaded: {error}") from error
    saved = read_adapter(source, family_of(pipeline), key)
    model = _model(pipeline)
    add_saved_adapter(model, saved)
    section = config.model.model_copy(update={"lora": config.model.lora or Lora()})
    policy = Policy(pipeline, model.requires_grad_(False).eval(), section)
    return _ready(policy, config), _digest(saved.layers)


def load_trained(config: Config, run: Path) -> tuple[Policy, str]:
    """The averaged weights of a run's newest whole checkpoint, as the run evaluates and exports them, and a digest.

    Raises:
        ConfigError: there is no checkpoint, or it does not fit the run's own settings.
        CheckpointError: every checkpoint is damaged.
    """
    found = load_latest(run / "checkpoints")
    if found is None:
        raise ConfigError(f"{run}: no checkpoint in {run / 'checkpoints'}; name an adapter with --adapter")
    policy = load_policy(config.model, keep_reference=True)
    parameters, average = policy.trainable(), found.tensors["average"]
    if {name: tensor.shape for name, tensor in average.items()} != {n: p.shape for n, p in parameters.items()}:
        raise ConfigError(f"model: the weights in {found.path} are not those of these settings")
    for name, parameter in parameters.items():
        parameter.data = average[name].to(parameter.dtype)
    return _ready(policy, config), _digest(average)


def _model(pipeline: Any) -> Any:
    return getattr(pipeline, family_of(pipeline).model_part)


def _ready(policy: Policy, config: Config) -> Policy:
    """On its device, and in the precision that the trainer samples in."""
    accelerator = connect(config)
    torch.backends.cuda.matmul.allow_tf32 = config.model.tf32
    policy.check(config)
    policy.pipeline.vae.to(accelerator.device)
    policy.transformer = accelerator.prepare_model(policy.transformer, evaluation_mode=True)
    if policy.frozen_copy is not None:
        policy.frozen_copy = accelerator.prepare_model(policy.frozen_copy, evaluation_mode=True)
    return policy


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
