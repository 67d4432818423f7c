"""The section of `bench/gpu.py` at model size: a rollout step and an update step of Stable Diffusion 3.5 medium."""

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
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
GUIDANCE_SCALE = 4.5


@dataclass(frozen=True)
class Size:
    """A picture size: pixels, text tokens, samples of a rollout step and of an update step."""

    pixels: int
    text: int
    batch: int
    update_batch: int


SIZES = (Size(512, 205, 8, 8), Size(1024, 333, 8, 2))
TOY_SIZES = (Size(64, 9, 1, 2),)


@dataclass(frozen=True)
class Step:
    """What one denoising step of `batch` samples is computed from."""

    transformer: Any
    sample: Tensor
    noise: Tensor
    text: Tensor
    pooled: Tensor
    timestep: Tensor
    unit_weights: Tensor
    coefficients: sk.TransitionCoefficients
    backend: str

    @property
    def grid(self) -> tuple[int, int]:
        return self.sample.shape[2] // 2, self.sample.shape[3] // 2

    def velocity(self, copies: int = 1) -> Tensor:
        """The transformer's prediction for the samples, `copies` times over."""
        rows = copies * len(self.sample)
        return self.transformer(
            hidden_states=self.sample.repeat(copies, 1, 1, 1).to(self.text.dtype),
            timestep=self.timestep.expand(rows),
            encoder_hidden_states=self.text.repeat(copies, 1, 1),
            pooled_projections=self.pooled.repeat(copies, 1),
            return_dict=False,
        )[0]


def run(report: Report) -> None:
    """Rollout steps under guidance with and without capture, then update steps with and without weights."""
    if importlib.util.find_spec("diffusers") is None:
        report.leave_out("the model", "diffusers is not installed")
        return
    transformer = _transformer(report)
    for size in TOY_SIZES if report.toy else SIZES:
        report.guard(f"rollout at {size.pixels} px", functools.partial(_rollout, report, transformer, size))
    if importlib.util.find_spec("peft") is None:
        report.leave_out("update steps", "peft is not installed")
        return
    _add_adapters(transformer)
    for size in TOY_SIZES if report.toy else SIZES:
        report.guard(f"update at {size.pixels} px", functools.partial(_update, report, transformer, size))


def _transformer(report: Report) -> Any:
    from diffusers import SD3Transformer2DModel

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(report.device):
            transformer = SD3Transformer2DModel(**(TOY if report.toy else SD35_MEDIUM))
    finally:
        torch.set_default_dtype(default)
    transformer.requires_grad_(False)
    transformer.eval()
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    report.figure("parameters of the transformer, millions", parameters / 1e6)
    return transformer


def _add_adapters(transformer: Any) -> None:
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=32, lora_alpha=64, target_modules=LORA_TARGETS, init_lora_weights="gaussian"))


def _step(report: Report, transformer: Any, size: Size, batch: int) -> Step:
    generator = torch.Generator(report.device).manual_seed(0)
    side, config = size.pixels // 8, transformer.config

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=report.device)

    text = normal(batch, size.text, config.joint_attention_dim).bfloat16()
    unit_weights = torch.zeros(batch, size.text, 8, device=report.device)
    for unit in range(8):
        unit_weights[:, unit % size.text, unit] = 1.0
    coefficients = sk.transition_coefficients("flow_sde", torch.tensor([0.8]), torch.tensor([0.7]))
    return Step(
        transformer,
        sample=normal(batch, config.in_channels, side, side),
        noise=normal(batch, config.in_channels, side, side),
        text=text,
        pooled=normal(batch, config.pooled_projection_dim).bfloat16(),
        timestep=torch.tensor(800.0, device=report.device),
        unit_weights=unit_weights,
        coefficients=coefficients.to(report.device),
        backend=report.backend,
    )


@torch.no_grad()
def _roll_out(step: Step, capture: bool) -> object:
    """One step under guidance, both halves in one call: the velocity, the map where captured, the next sample."""
    batch = len(step.sample)
    recording: Any = nullcontext()
    if capture:
        rows = (batch, 2 * batch)
        recording = sk.record_attention(step.transformer, step.unit_weights, rows=rows, backend=step.backend)
    with recording as recorder:
        unconditional, conditional = step.velocity(copies=2).chunk(2)
        weights = sk.allocation_map(recorder.mass, step.grid, backend=step.backend) if capture else None
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
    members = [
        Member("uniform, no capture", functools.partial(_roll_out, step, capture=False), baseline=True),
        Member("STAR, capture", functools.partial(_roll_out, step, capture=True)),
    ]
    tokens = step.grid[0] * step.grid[1]
    name = f"rollout step, {size.pixels} px, B {size.batch} with guidance, {tokens} + {size.text} tokens, bfloat16"
    report.measure(name, members, budget=15.0)


def _update(report: Report, transformer: Any, size: Size) -> None:
    step = _step(report, transformer, size, size.update_batch)
    with torch.no_grad():
        drawn = sk.transition_step(
            step.velocity(), step.sample, step.coefficients, noise=step.noise, backend=step.backend
        )
    assert drawn.log_prob is not None
    old_log_prob = drawn.log_prob
    advantage = torch.linspace(-1, 1, size.update_batch, device=report.device)
    weights = torch.rand(size.update_batch, *step.grid, device=report.device) + 0.5
    weights = weights / weights.mean((1, 2), keepdim=True)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6)

    def update(**options: Any) -> None:
        result = sk.policy_loss(
            step.velocity(),
            step.sample,
            drawn.next_sample,
            old_log_prob,
            advantage,
            step.coefficients,
            clip_range=1e-4,
            backend=step.backend,
            **options,
        )
        result.loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    calls: dict[str, Callable[[], None]] = {
        "uniform, image-level ratio": functools.partial(update, granularity="image"),
        "STAR, weights per position": functools.partial(update, weights=weights),
    }
    members = [Member(name, call, baseline=name.startswith("uniform")) for name, call in calls.items()]
    name = f"update step, {size.pixels} px, B {size.update_batch}, adapters of rank 32, bfloat16"
    report.measure(name, members, budget=15.0)
