"""What a run would need and do, from configuration files alone: no weight is loaded, nothing is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from star_trainer.config import Config
from star_trainer.families import read_shapes
from star_trainer.families.family import Family
from star_trainer.families.pipelines.latents import vae_scale
from star_trainer.families.policy import check_against_model, check_layers, set_trainable
from star_trainer.prompts import read_prompts
from star_trainer.rewards import CONVERTED, check_differentiable, check_reward
from star_trainer.run.inputs import check_backend, check_prompts, check_trackers, units_not_found

_MIB, _GIB = 1 << 20, 1 << 30
# How many times its input a transformer block keeps for its backward pass, attention maps aside: 34 bytes where a
# number has two (Korthikanti et al. 2022, arXiv 2205.05198).
_ACTIVATION_COPIES = 17


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device; the models of rewards are not counted.

    The text encoders are there while prompts are encoded, samples and activations during rollout and update.
    """

    weights: float
    trained: float
    rollout: float
    activations: float
    encoders: float

    @property
    def total(self) -> float:
        """At the fullest moment."""
        return self.weights + self.trained + max(self.rollout + self.activations, self.encoders)


@dataclass(frozen=True)
class Plan:
    """What a run would need and do. Calls are those that one process makes per iteration; images are of all."""

    parameters: dict[str, int]
    trainable: int
    # Text encoders that the pipeline does without.
    absent: list[str]
    memory: Memory
    latent: tuple[int, int, int]
    tokens: int
    images: int
    rollout_calls: int
    update_calls: int
    backward_calls: int
    reward_calls: int


def plan(config: Config, processes: int = 1) -> Plan:
    """Build the pipeline's models on the meta device and count.

    Raises:
        ConfigError: configurations that cannot be read, or settings that the models do not suit.
    """
    family, shapes = read_shapes(config.model.pipeline)
    with torch.device("meta"):
        transformer, vae, encoders = *family.build_models(shapes), family.build_encoders(shapes)
    scale = vae_scale(vae)
    check_against_model(config, family, transformer.config, scale)
    check_layers(config, transformer)
    frozen = {
        family.model_part: _count(transformer),
        "autoencoder": _count(vae),
        "text encoders": sum(_count(encoder) for encoder in encoders),
    }
    set_trainable(transformer.requires_grad_(False), config.model, family)
    trainable = sum(value.numel() for value in transformer.parameters() if value.requires_grad)

    latent = family.latent_shape(config.model, transformer.config, scale)
    grid = family.grid(config.model, transformer.config, scale)
    tokens = grid[0] * grid[1] + family.num_text_tokens(config.model, shapes)
    images = config.rollout.prompts * config.rollout.samples
    samples = math.ceil(images / processes)
    if config.trains_by_reward_gradient:
        calls = _reward_gradient_calls(config, samples)
    else:
        kind = family.guidance_kind(transformer.config)
        guided = config.rollout.guidance_scale > 1.0 and kind == "two_predictions"
        calls = _policy_gradient_calls(config, samples, guided)
    return Plan(
        parameters=frozen,
        trainable=trainable,
        absent=[part for part in family.encoder_parts if part not in shapes],
        memory=_memory(config, family, transformer.config, frozen, trainable, tokens, samples, latent, grid, processes),
        latent=latent,
        tokens=tokens,
        images=images,
        **calls,
    )


def _batches(config: Config, samples: int) -> list[int]:
    """How many samples each backward pass of an iteration has."""
    size = config.train.batch_size
    parts = [len(part) for part in np.array_split(np.arange(samples), config.train.updates)]
    return [min(size, part - first) for part in parts for first in range(0, part, size)]


def _policy_gradient_calls(config: Config, samples: int, guided: bool) -> dict[str, int]:
    batches = len(_batches(config, samples))
    trained_steps = max(1, round(config.train.step_fraction * config.rollout.noisy_steps))
    # Guidance runs the unconditional half by itself, and the KL asks the model without adapters for each of the two.
    forward = (2 if guided else 1) * (2 if config.train.kl_weight > 0.0 else 1)
    if config.train.old_log_prob == "recompute":
        forward += 2 if guided else 1
    rollout_batches = math.ceil(samples / config.rollout.batch_size)
    return {
        "rollout_calls": rollout_batches * config.rollout.steps * (2 if guided else 1),
        "update_calls": batches * trained_steps * forward,
        "backward_calls": batches * trained_steps,
        "reward_calls": rollout_batches * len(config.reward.terms),
    }


def _reward_gradient_calls(config: Config, samples: int) -> dict[str, int]:
    batches, section, steps = _batches(config, samples), config.r0, config.rollout.steps
    trained_steps = section.gradient_steps or steps
    plus = config.method == "r0_plus"
    supervised = trained_steps if plus and section.intermediate_weight > 0.0 else 1
    guided = 2 if plus and section.guidance_weight > 0.0 else 0
    chunks = sum(math.ceil(size / section.decode_batch_size) for size in batches)
    # Steps that keep their activations run once, for both.
    sampled_alone = steps if section.checkpointing else steps - trained_steps
    return {
        "rollout_calls": len(batches) * sampled_alone,
        "update_calls": len(batches) * (trained_steps + guided),
        "backward_calls": len(batches) * trained_steps,
        "reward_calls": chunks * supervised * len(config.reward.terms),
    }


def report(config: Config, processes: int = 1) -> str:
    """What `plan` found, for a reader, after checking what can be checked before weights load.

    Raises:
        ConfigError: what `plan` refuses, a backend that cannot run here, a reward that cannot be had, or prompt files
            that are there and cannot be used.
    """
    check_backend(config.backend)
    check_trackers(config.run.trackers)
    (check_differentiable if config.trains_by_reward_gradient else check_reward)(config.reward)
    prompts = _prompts(config)
    found = plan(config, processes)
    channels, height, width = found.latent
    memory = found.memory
    each = "" if processes == 1 else f" on each of {processes} processes"
    size = config.train.batch_size if config.trains_by_reward_gradient else config.rollout.batch_size
    images = f"{found.images:,} ({config.rollout.prompts} prompts x {config.rollout.samples})"
    lines = [
        ("pipeline", config.model.pipeline),
        ("method", f"{config.method}, {_sampler(config)}, rewards {', '.join(config.reward.terms)}"),
        *prompts,
        *_missing_rewards(config),
        *((f"parameters, {name}", f"{count:,}") for name, count in found.parameters.items()),
        ("trainable parameters", f"{found.trainable:,}"),
        *((f"without {part}", "as the pipeline's own index says") for part in found.absent),
        ("latent", f"{channels} x {height} x {width}; {found.tokens:,} tokens, text included"),
        ("images per iteration", images + (f", {math.ceil(found.images / processes):,}{each}" if each else "")),
        ("model calls, rollout", f"{found.rollout_calls:,} of up to {size} samples{each}"),
        ("model calls, update", f"{found.update_calls:,}{each}, {found.backward_calls:,} of them with a backward pass"),
        ("reward calls", f"{found.reward_calls:,}{each}"),
        (
            "estimated GPU memory",
            f"{_bytes(memory.total)}{each}: frozen weights {_bytes(memory.weights)}, trained ones, gradients, "
            f"optimiser and averages {_bytes(memory.trained)}, samples of an iteration {_bytes(memory.rollout)}, "
            f"activations of one backward pass {_bytes(memory.activations)}, or instead of the last two the text "
            f"encoders, {_bytes(memory.encoders)}, while prompts are encoded; models of rewards come on top"
            + (", and what the decoder keeps for its backward pass" if config.trains_by_reward_gradient else ""),
        ),
    ]
    width_of_names = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width_of_names}}  {value}" for name, value in lines)


def _sampler(config: Config) -> str:
    if not config.trains_by_reward_gradient:
        return config.rollout.sampler
    trained = config.r0.gradient_steps or config.rollout.steps
    return f"gradients through {trained} of {config.rollout.steps} steps"


def _prompts(config: Config) -> list[tuple[str, str]]:
    """A line per file of prompts; those that are there are checked.

    Raises:
        ConfigError: a file that is there cannot be used.
    """
    section = config.prompts
    if section.source == "scenes":
        check_prompts(config)
        return [("prompts", "drawn from the scenes world")]
    files = {"training": ("prompts.source", section.source), "held out": ("prompts.held_out", str(section.held_out))}
    lines = []
    for what, (key, name) in files.items():
        if not Path(name).is_file():
            lines.append((f"prompts, {what}", f"not found yet, needed at {name}"))
            continue
        prompts = read_prompts(name, key)
        units = "" if config.units.source != "file" else f", {sum(bool(p.units) for p in prompts):,} with units"
        lines.append((f"prompts, {what}", f"{len(prompts):,} in {name}{units}"))
    if all(Path(name).is_file() for _, name in files.values()):
        check_prompts(config)
        if (line := units_not_found(config)) is not None:
            lines.append(("text units", line))
    elif section.origin:
        lines.append(("prompts come from", section.origin))
    return lines


def _missing_rewards(config: Config) -> list[tuple[str, str]]:
    """A line for each reward whose model has to be written yet by `star-convert-reward`."""
    folders = {name: str(getattr(config.reward.models, name)) for name in config.reward.terms if name in CONVERTED}
    return [
        (f"reward, {name}", f"model not found yet, needed at {folder}: star-convert-reward {name}")
        for name, folder in folders.items()
        if folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir()
    ]


def _bytes(count: float) -> str:
    return f"{count / _GIB:.1f} GiB" if count >= _GIB else f"{count / _MIB:.0f} MiB"


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _memory(
    config: Config,
    family: Family,
    shape: Any,
    frozen: dict[str, int],
    trainable: int,
    tokens: int,
    samples: int,
    latent: tuple[int, int, int],
    grid: tuple[int, int],
    processes: int,
) -> Memory:
    itemsize = 4 if config.model.dtype == "float32" else 2
    of_vae = 4 if config.model.dtype_of_vae == "float32" else 2
    copies = 2 if config.model.lora is None and config.needs_first_weights else 1
    model = frozen[family.model_part]
    held = 0 if config.model.lora is None else model
    shares = processes if config.model.sharded else 1
    weights = itemsize * (held / shares + (copies - 1) * model) + of_vae * frozen["autoencoder"]
    # In float32 whatever the model's dtype: weight, gradient, two moments of AdamW and the moving average.
    trained = 4 * 5 * trainable / shares
    per_block = tokens * math.prod(family.attention_heads(shape)) * config.train.batch_size * itemsize
    blocks = family.num_layers(shape)
    if config.model.gradient_checkpointing:
        activations = per_block * (blocks + _ACTIVATION_COPIES)
    else:
        activations = per_block * blocks * _ACTIVATION_COPIES
    if config.trains_by_reward_gradient:
        # Samples live from one backward pass to the next, and without checkpointing all steps keep their activations.
        kept = config.train.batch_size
        activations *= 1 if config.r0.checkpointing else (config.r0.gradient_steps or config.rollout.steps)
    else:
        kept = 0 if config.rollout.keep_on_host else samples
    rollout = 4 * kept * _kept_numbers(config, math.prod(latent), math.prod(grid), latent[1] * latent[2])
    return Memory(weights, trained, rollout, activations, itemsize * frozen["text encoders"])


def _kept_numbers(config: Config, numbers: int, tokens: int, positions: int) -> int:
    """Numbers of one sample that wait for the update, in float32: latents, log-probs, maps and perhaps velocities."""
    steps = config.rollout.steps
    if config.trains_by_reward_gradient:
        # Latents and noise of each step, what it predicts, and gradients.
        return 4 * steps * numbers + (steps * tokens if config.uses_maps else 0)
    log_probs = config.rollout.noisy_steps * positions
    velocities = config.rollout.noisy_steps * numbers if config.needs_old_velocity else 0
    maps = steps * tokens if config.uses_maps or config.method == "oracle" else 0
    return (steps + 1) * numbers + log_probs + velocities + maps
