"""Floating-point operations of a call, counted from shapes alone.

`FlopCounterMode` counts matrix products, convolutions and attention, a multiplication and an addition as two, and
nothing else; what it does not know of the library's operators is registered here. Element-wise operators (allocation
map, transition, policy loss) count as nothing, which their time does not hang on: it is bound by the bytes they move.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

import star_kernels as sk
from star_kernels.attention import sdpa
from star_kernels.attention.reference import num_text_keys
from star_trainer.algorithms.policy_gradient import Batch, plan_steps, step_loss, take
from star_trainer.algorithms.rollout import Rollout
from star_trainer.families.conditioning import recorded_pass
from star_trainer.sampling import Trajectory, text_units
from star_trainer.studies.cost.attention import flash_with_log_sum_exp
from star_trainer.studies.cost.cases import UNIFORM, Arm, Case, attention_of, one_pass

Shape = tuple[int, ...]


@register_flop_formula(torch.ops.star_kernels.joint_attention)
def attention_flops(
    query: Shape,
    key: Shape,
    value: Shape,
    unit_weights: Shape | None,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    first_row: int,
    end_row: int,
    direction: str,
    *_: Any,
    **__: Any,
) -> int:
    """Two products of size N x N x D per head; with capture, one of size image x text x K per head of a captured row.

    The text rows of the direction ``text_to_image`` are computed once more: a product of size text x image x D.
    """
    batch, heads, queries, head_dim = query
    keys = key[2]
    count = 4 * batch * heads * queries * keys * head_dim
    if unit_weights is None:
        return count
    text = num_text_keys(queries, keys, num_image_tokens)
    captured = (end_row - first_row) * heads * num_image_tokens * text
    again = 2 * captured * head_dim if direction == "text_to_image" else 0
    return count + 2 * captured * unit_weights[2] + again


@register_flop_formula(torch.ops.star_kernels.joint_attention_backward)
def attention_backward_flops(grad_out: Shape, query: Shape, key: Shape, *_: Any, **__: Any) -> int:
    """Five products of size N x N x D per head: the logits once more, and the gradients of P, V, Q and K."""
    batch, heads, queries, head_dim = query
    return 10 * batch * heads * queries * key[2] * head_dim


@register_flop_formula(torch.ops.star_kernels.attention_mass)
def attention_mass_flops(query: Shape, key: Shape, unit_weights: Shape, *_: Any, **__: Any) -> int:
    """The logits of image and text tokens, of size image x text x D per head, and their product with the weights."""
    rows, heads, queries, head_dim = query
    return 2 * rows * heads * queries * key[2] * (head_dim + unit_weights[2])


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Within this context SDPA is the operator that it runs on a device: on meta it falls apart into products.

    One product would be missing: flash attention computes the logits once more in the backward pass.
    """
    functional: Any = torch.nn.functional
    original, preferred = functional.scaled_dot_product_attention, sdpa.kernel_for

    def flash(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return flash_with_log_sum_exp(query, key, value)[0]

    functional.scaled_dot_product_attention = flash
    sdpa.kernel_for = lambda *_, **__: "flash"
    try:
        yield
    finally:
        functional.scaled_dot_product_attention, sdpa.kernel_for = original, preferred


def count(call: Callable[[], object]) -> int:
    """The operations of a call on the meta device."""
    with _flash_attention(), FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


class Counts:
    """Operations of what the trainer does, by arm, of a case on the meta device."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._known: dict[tuple[str, Arm], int] = {}

    def rollout_step(self, arm: Arm) -> int:
        """One denoising step of a batch of the rollout."""
        return self._once("rollout", arm, lambda: _rollout_step(self._case, arm))

    def update(self, arm: Arm) -> int:
        """One backward pass of the samples that `one_pass` takes, with all that comes before it."""
        return self._once("update", arm, lambda: _update(self._case, arm))

    def iteration(self, arm: Arm) -> int:
        """All denoising steps, the decoding and all backward passes, as if every group of samples were trained on."""
        config, policy = self._case.state.config, self._case.state.policy
        section, latent = config.rollout, torch.empty(1, *policy.latent_shape, device="meta")
        samples = section.prompts * section.samples
        trained_steps = max(1, round(config.train.step_fraction * section.noisy_steps))
        decode = torch.no_grad()(lambda: policy.pixels(latent))
        decoding = samples * self._once("decoding", UNIFORM, lambda: count(decode))
        sampling = samples * section.steps * self.rollout_step(arm) // self._case.rollout_batch
        prompts, of_each = self._case.update_groups
        return decoding + sampling + samples * trained_steps * self.update(arm) // (prompts * of_each)

    def _once(self, what: str, arm: Arm, counted: Callable[[], int]) -> int:
        if (what, arm) not in self._known:
            self._known[what, arm] = counted()
        return self._known[what, arm]


def _rollout_step(case: Case, arm: Arm) -> int:
    config, policy = case.of(arm).config, case.state.policy
    rows = torch.arange(case.rollout_batch) // config.rollout.samples
    prompts = case.prompts[: int(rows[-1]) + 1]
    conditioning = policy.encode([prompt.text for prompt in prompts])[rows]
    guidance = policy.guidance(len(rows), config.rollout.guidance_scale)
    latents = torch.empty(len(rows), *policy.latent_shape, device="meta")
    timestep = torch.empty((), device="meta")

    @torch.no_grad()
    def call() -> None:
        if not config.uses_maps:
            policy.predict(latents, timestep, conditioning, guidance)
            return
        units = text_units(policy, prompts)[rows]
        options = {"backend": config.backend, "record_pass": recorded_pass(guidance), **config.allocation.recorded}
        with attention_of(arm.variant), sk.record_attention(policy.transformer, units, **options):
            policy.predict(latents, timestep, conditioning, guidance)

    return count(call)


def _update(case: Case, arm: Arm) -> int:
    small = one_pass(case)
    state, policy = small.of(arm), small.state.policy
    section, (channels, height, width) = state.config.rollout, policy.latent_shape
    samples = section.prompts * section.samples

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, device="meta")

    noising = policy.family.noising
    levels = (noising.level_of(torch.tensor([sigma])) for sigma in (0.8, 0.7))
    row = noising.step(section.sampler, *levels, eta=section.eta)
    log_prob = empty(1, samples, height, width)
    weights = empty(1, samples, *policy.grid) if state.config.uses_maps else None
    velocity = empty(1, samples, channels, height, width) if state.config.needs_old_velocity else None
    latents = empty(2, samples, channels, height, width)
    trajectory = Trajectory(latents, log_prob, weights, [row.to("meta")], velocity)
    conditioning = policy.encode([prompt.text for prompt in small.prompts])
    places = np.arange(samples)
    prompts = list(small.prompts)
    rollout = Rollout(trajectory, empty(1), conditioning, np.zeros(samples), prompts, places, section.samples, {})
    # Weights and clip ranges are numbers, which the meta device has none of.
    batch = Batch(rollout, np.zeros(samples), log_prob, velocity, plan_steps(state, [row], [0]))

    def call() -> None:
        with attention_of(arm.variant):
            _, prediction = step_loss(state, take(state, batch, places), 0)
            # The loss is element-wise, its backward pass as well: what is counted comes before it.
            prediction.velocity.backward(torch.empty_like(prediction.velocity))

    return count(call)
