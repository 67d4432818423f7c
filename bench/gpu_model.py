"""The model in `bench/gpu.py`: what the trainer does with Stable Diffusion 3.5 medium, a rollout and an update step."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import star_kernels as sk
from bench.gpu_report import Report
from bench.harness import Member

# The transformer's configuration; its weights are random, since times do not depend on them.
SD35_MEDIUM: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
TOY: dict[str, Any] = SD35_MEDIUM | {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 32,
    "num_attention_heads": 1,
    "joint_attention_dim": 16,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 16,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
}
# As the preset for this model has it: adapters, guidance, KL to the model without them, the clip range of an image.
LORA_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"]
LORA_TARGETS += ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"]
GUIDANCE_SCALE, KL_WEIGHT, CLIP_RANGE, LARGEST_NORM = 4.5, 0.04, 1e-4, 1.0
IMPLEMENTATIONS = ("fused", "sdpa")


@dataclass(frozen=True)
class Size:
    """A picture size: pixels, text tokens, samples of a rollout step and of an update step."""

    pixels: int
    text: int
    batch: int
    update_batch: int


# The first is so small that the GPU waits for the host: its times are the host's.
SIZES = (Size(64, 205, 1, 1), Size(512, 205, 8, 8), Size(1024, 333, 8, 4))
TOY_SIZES = (Size(64, 5, 1, 1),)


@dataclass(frozen=True)
class Step:
    """What one denoising step of some samples is computed from."""

    transformer: Any
    sample: Tensor
    noise: Tensor
    text: Tensor  # [2, B, N_text, D], without and with a prompt
    pooled: Tensor  # [2, B, D]
    timestep: Tensor
    unit_weights: Tensor
    coefficients: sk.TransitionCoefficients
    backend: str

    @property
    def grid(self) -> tuple[int, int]:
        return self.sample.shape[2] // 2, self.sample.shape[3] // 2

    def velocity(self, *halves: int) -> Tensor:
        """The transformer's prediction without (0) or with a prompt (1), or of both in one call."""
        rows = len(halves) * len(self.sample)
        with torch.autocast(self.sample.device.type, torch.bfloat16):
            return self.transformer(
                hidden_states=self.sample.repeat(len(halves), 1, 1, 1),
                timestep=self.timestep.expand(rows),
                encoder_hidden_states=torch.cat([self.text[half] for half in halves]),
                pooled_projections=torch.cat([self.pooled[half] for half in halves]),
                return_dict=False,
            )[0].float()

    def recording(self, units: Tensor | None, implementation: str | None, **options: Any) -> Any:
        """Attention as `implementation` computes it, recorded with units; None is diffusers' own, as without STAR."""
        if implementation is None:
            return nullcontext()
        options |= {"implementation": implementation, "backend": self.backend}
        return sk.record_attention(self.transformer, units, **options)


def run(report: Report) -> None:
    """Rollout steps under guidance and update steps, uniform against STAR, in each implementation of attention."""
    for needed in ("diffusers", "peft"):
        if importlib.util.find_spec(needed) is None:
            report.leave_out("the model", f"{needed} is not installed")
            return
    transformer = _transformer(report.device, TOY if report.toy else SD35_MEDIUM)
    for size in TOY_SIZES if report.toy else SIZES:
        for part in (_check, _rollout, _update):
            what = f"{part.__name__[1:]} at {size.pixels} px"
            report.guard(what, functools.partial(part, report, transformer, size))


def _transformer(device: torch.device, shape: dict[str, Any]) -> Any:
    """Frozen weights in bfloat16 and adapters in float32, with gradient checkpointing, which is for training mode."""
    from diffusers import SD3Transformer2DModel
    from peft import LoraConfig

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            transformer = SD3Transformer2DModel(**shape)
    finally:
        torch.set_default_dtype(default)
    transformer.requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=32, lora_alpha=64, target_modules=LORA_TARGETS, init_lora_weights="gaussian"))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    transformer.enable_gradient_checkpointing()
    return transformer.eval()


def _step(report: Report, transformer: Any, size: Size, batch: int) -> Step:
    generator = torch.Generator(report.device).manual_seed(0)
    side, config = size.pixels // 8, transformer.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=report.device)

    unit_weights = torch.zeros(batch, size.text, 8, device=report.device)
    for unit in range(8):
        unit_weights[:, unit % size.text, unit] = 1.0
    coefficients = sk.transition_coefficients("flow_sde", torch.tensor([0.8]), torch.tensor([0.7]))
    return Step(
        transformer,
        sample=normal(batch, config.in_channels, side, side),
        noise=normal(batch, config.in_channels, side, side),
        text=normal(2, batch, size.text, config.joint_attention_dim).bfloat16(),
        pooled=normal(2, batch, config.pooled_projection_dim).bfloat16(),
        timestep=torch.tensor(800.0, device=report.device),
        unit_weights=unit_weights,
        coefficients=coefficients.to(report.device),
        backend=report.backend,
    )


@torch.no_grad()
def _check(report: Report, transformer: Any, size: Size) -> None:
    """Recording changes no prediction, so that the update sees what the rollout saw."""
    step = _step(report, transformer, size, size.update_batch)
    for implementation in IMPLEMENTATIONS:
        velocities = []
        for units in (step.unit_weights, None):
            with step.recording(units, implementation):
                velocities.append(step.velocity(1))
        report.check_equal(f"{size.pixels} px, {implementation}, velocity while recording and not", *velocities)


@torch.no_grad()
def _roll_out(step: Step, implementation: str | None) -> object:
    """One step under guidance, both halves in one call: the velocity, the map where recorded, the next sample."""
    batch = len(step.sample)
    with step.recording(step.unit_weights, implementation, rows=(batch, 2 * batch)) as recorder:
        unconditional, conditional = step.velocity(0, 1).chunk(2)
        weights = None if recorder is None else sk.allocation_map(recorder.mass, step.grid, backend=step.backend)
    result = sk.transition_step(
        conditional,
        step.sample,
        step.coefficients,
        noise=step.noise,
        unconditional_velocity=unconditional,
        guidance_scale=GUIDANCE_SCALE,
        backend=step.backend,
    )
    return result, weights


def _rollout(report: Report, transformer: Any, size: Size) -> None:
    step = _step(report, transformer, size, size.batch)
    tokens = f"{step.grid[0] * step.grid[1]} + {size.text} tokens"
    name = f"rollout step, {size.pixels} px, B {size.batch} with guidance, {tokens}, bfloat16"
    report.measure(name, _members(functools.partial(_roll_out, step)), budget=8.0)


def _members(call: Callable[[str | None], object]) -> list[Member]:
    star = [Member(f"STAR, {name}", functools.partial(call, name)) for name in IMPLEMENTATIONS]
    return [Member("uniform", functools.partial(call, None), baseline=True), *star]


def _update(report: Report, transformer: Any, size: Size) -> None:
    step = _step(report, transformer, size, size.update_batch)
    with torch.no_grad():
        drawn = sk.transition_step(step.noise, step.sample, step.coefficients, noise=step.noise, backend=step.backend)
    old_log_prob = drawn.log_prob
    assert old_log_prob is not None
    advantage = torch.linspace(-1, 1, size.update_batch, device=report.device)
    weights = torch.rand(size.update_batch, *step.grid, device=report.device) + 0.5
    weights = weights / weights.mean((1, 2), keepdim=True)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-12)
    adapted = [module for module in transformer.modules() if hasattr(module, "_disable_adapters")]

    def update(implementation: str | None) -> Tensor:
        """On one backward pass: the reference model's prediction, this one's, the loss, its gradient, the step."""
        star = implementation is not None
        transformer.train()
        with step.recording(None, implementation):
            with torch.no_grad():
                for layer in adapted:
                    layer._disable_adapters = True
                reference = torch.lerp(step.velocity(0), step.velocity(1), GUIDANCE_SCALE)
                for layer in adapted:
                    layer._disable_adapters = False
                unconditional = step.velocity(0)
            velocity = step.velocity(1)
        result = sk.policy_loss(
            velocity,
            step.sample,
            drawn.next_sample,
            old_log_prob,
            advantage,
            step.coefficients,
            weights=weights if star else None,
            clip_range=CLIP_RANGE,
            granularity="image",
            reference_velocity=reference,
            kl_weight=KL_WEIGHT,
            unconditional_velocity=unconditional,
            guidance_scale=GUIDANCE_SCALE,
            backend=step.backend,
        )
        result.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
        optimizer.step()
        optimizer.zero_grad()
        transformer.eval()
        return norm

    for name in (None, *IMPLEMENTATIONS):
        norm = float(update(name))
        report.hold(
            f"{size.pixels} px, {name or 'uniform'}, norm of the gradient", 0.0 < norm < float("inf"), f"{norm:.2e}"
        )
    name = f"update step, {size.pixels} px, B {size.update_batch}, guidance, KL, adapters of rank 32, bfloat16"
    report.measure(name, _members(update), budget=8.0)
