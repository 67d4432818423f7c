"""The spatially resolved objectives and their gradient (docs/method.md, section 5)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import backends
from .._checks import check_reverse_mode
from .._gaussian import TransitionCoefficients
from .._operators import apply_of, is_traced
from . import cpu, reference
from .checks import checked, with_rows
from .clip_range import position_clip_range

__all__ = ["PolicyLoss", "policy_loss", "position_clip_range"]

KERNELS = ("triton", "cpu")
_PIECE = 2**16  # entries of a gradient that are scaled at a time


class PolicyLoss(NamedTuple):
    """The loss, a differentiable scalar, and the metrics by name, scalars on the device of the loss."""

    loss: Tensor
    metrics: dict[str, Tensor]


def policy_loss(
    velocity: Tensor,
    sample: Tensor,
    next_sample: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    coefficients: TransitionCoefficients,
    *,
    weights: Tensor | None = None,
    mask: Tensor | None = None,
    objective: str = "clip",
    old_velocity: Tensor | None = None,
    clip_range: float | Sequence[float] = 1e-4,
    divergence_limit: float | None = None,
    granularity: str = "position",
    reference_velocity: Tensor | None = None,
    kl_weight: float = 0.0,
    kl_scale: str = "variance",
    unconditional_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    backend: str = "auto",
) -> PolicyLoss:
    """Policy objective with a ratio, a weight and a KL at every latent position (docs/method.md, section 5).

    With ratio ρ, weight w, mask m and advantage A the loss is the mean over samples of

        Σ_i m_i·w_i·max(−A·ρ_i, −A·clip(ρ_i, 1−ε_low, 1+ε_high)) / Σ_i m_i  +  kl_weight·Σ_i m_i·kl_i / Σ_i m_i

    At ``granularity="image"`` the policy term is max(−A·ρ, −A·clip(ρ, 1−ε_low·ω, 1+ε_high·ω)) with the image's ratio
    ρ = exp(Σ_i m_i·w_i·log ρ_i / Σ_i m_i) and ω = √(Σ_i m_i·w_i² / Σ_i m_i): with w = 1 that is Flow-GRPO's loss.

    That is `objective` ``clip``. ``none`` is −A·ρ. ``guard`` clips, with Σ_c (x'−μ_old)·Δ/(s·C) for the log-ratio and
    Δ = μ − μ_old. ``dppo`` is −A·ρ, and leaves out a position whose divergence Σ_c Δ²/(2·s²·C) has reached
    `divergence_limit` and that goes further, (ρ−1)·A > 0; at image level an image, by the mean of its valid positions'
    divergences, which no weight multiplies.

    Only `velocity` gets a gradient, computed together with the loss. Every other input is a constant, also when it
    requires a gradient; the unconditional velocity is one by the method's choice. Log-ratios are clamped to ±20, and
    where the clamp acts the gradient is zero. The gradient can be differentiated with respect to the incoming one;
    second derivatives with respect to `velocity` are not implemented and raise NotImplementedError. torch.func and
    forward-mode derivatives are out of scope and raise it too.

    Forward and backward allocate the gradient in the velocity's dtype and little else, and backward passes over it only
    to scale it by an incoming gradient that is not 1. Two cases take more: that of a float16 velocity is kept in the
    dtype of the loss until it has been scaled, for its range, and is then cast, which is three times its size at most;
    and a graph that is kept keeps its gradient beside the one that is handed on.

    A position where the log-ratio, the advantage times the weight, the KL or the divergence is not finite adds nothing
    to the loss or the gradient and is counted in `non_finite`; the divisor Σm still counts it, so that the other
    positions keep their gradient. So is a position whose advantage times weight reaches 2⁶⁴, because sums of such terms
    overflow. An image whose weighted log-ratio or squared weights are not finite, because a sum of large numbers
    overflowed, is left out with all its positions; ω is taken over the positions that are not left out. Positions
    outside the mask are not looked at. A sample without valid positions adds zero.

    Args:
        velocity: predicted velocity v_c [B, C, H, W]; float32, bfloat16, float16 or float64, as all floating inputs.
        sample: x, same shape.
        next_sample: x' that was drawn in the rollout, same shape.
        old_log_prob: log-prob from the rollout [B, H, W], at either granularity; guard does not read it.
        advantage: [B].
        coefficients: from `transition_coefficients`, with B rows, or one row for all samples, which may be on the CPU
            wherever the latents are; must have noise.
        weights: allocation map on the token grid [B, h, w], H and W multiples of h and w, w ≥ 0 (checked for tensors
            on the CPU). Each position reads its token's weight. None is w = 1.
        mask: valid positions [B, H, W], bool or floating 0/1 (non-zero is valid). None is all.
        objective: ``clip``, ``none``, ``guard`` or ``dppo``.
        old_velocity: velocity in the rollout (guidance already applied), same shape as `velocity`; needed by guard and
            dppo. With it the divergence is reported under every objective.
        clip_range: ε, or (ε_low, ε_high), each in [0, 1); an image's is multiplied by ω, a position's is as given
            (`position_clip_range` makes it from an image's). Not used by none and dppo.
        divergence_limit: of dppo, at least 0; not used by the others.
        granularity: ``position`` or ``image``.
        reference_velocity: final velocity of the reference model (guidance already applied), same shape as `velocity`.
            With it the KL is reported even if `kl_weight` is 0.
        kl_weight: β ≥ 0.
        kl_scale: ``variance`` divides the squared distance of the means by 2·s², which is the Gaussian KL;
            ``std_dev`` by 2·q², as Flow-GRPO's code does, for coefficients with a noise rate; ``velocity`` is the mean
            over channels of (v − v_ref)².
        unconditional_velocity: v_u for guidance, same shape as `velocity`, or None.
        guidance_scale: g ≥ 0 in v = v_u + g·(v_c − v_u); must be 1 without `unconditional_velocity`.
        backend: ``auto``, ``triton``, ``cpu`` (the C++ kernel; a float64 latent runs on the reference) or
            ``reference``.

    Returns:
        PolicyLoss: `loss`, a scalar in float32 (float64 when every floating input is float64), and `metrics`, scalars
        of the same dtype that need no synchronisation:

        - policy_loss, kl: the two parts, loss = policy_loss + kl_weight·kl;
        - clip_fraction: share of ratios outside their clip range, or with dppo that are left out;
        - ratio_mean, ratio_min, ratio_max: of the ratios, 1 if there is none;
        - approx_kl: half the mean squared log-ratio;
        - non_finite: the number of valid positions that were left out;
        - divergence, with `old_velocity`: the mean over samples of that over valid positions, without weights.

        Ratios are those of positions or of images, by granularity, over all samples.

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape, device or range, an empty one, coefficients
            without noise, `kl_weight` without `reference_velocity`, ``std_dev`` without a noise rate, guidance without
            an unconditional velocity, guard or dppo without `old_velocity`, or dppo without a limit.
        RuntimeError: a backend that cannot run here, with the reason.
    """
    # The arguments in their order, while nothing else has a name; the last one is the backend.
    arguments = [*locals().values()][:-1]
    is_plain = _is_plain(velocity, coefficients)
    chosen = _resolve(velocity.device, backend) if is_plain else None
    if chosen == "cpu":
        plain = cpu.plain_policy_loss(*arguments)
        if plain is not None:
            return PolicyLoss(plain[0], _by_name(plain[1:], old_velocity))
    inputs = with_rows(reference.Inputs._make(arguments))
    if not (chosen == "triton" and _is_described_by_metadata(inputs)):
        inputs = checked(inputs)
        check_reverse_mode("policy_loss", inputs.flat())
    with_gradient = torch.is_grad_enabled() and velocity.requires_grad
    if not is_plain and is_traced((velocity,)):
        loss, metrics, _ = _policy_loss(*inputs.flat(), with_gradient, backend)
    elif (chosen := chosen if chosen == "triton" else _chosen_backend(inputs, backend)) == "cpu":
        loss, metrics, _ = cpu.policy_loss(inputs, with_gradient)
    elif with_gradient:
        loss, metrics, _ = _differentiable(velocity, inputs, chosen)
    else:
        loss, metrics, _ = _compute(inputs, False, chosen)
    return PolicyLoss(loss, _by_name(metrics.unbind(), old_velocity))


def _by_name(metrics: Iterable[Tensor], old_velocity: Tensor | None) -> dict[str, Tensor]:
    named = dict(zip(reference.METRICS, metrics, strict=True))
    if old_velocity is None:
        del named["divergence"]
    return named


def _resolve(device: torch.device, backend: str) -> str:
    return backends.resolve_backend("policy_loss", backend, device, KERNELS)


def _chosen_backend(inputs: reference.Inputs, backend: str) -> str:
    chosen = _resolve(inputs.velocity.device, backend)
    return "reference" if chosen == "cpu" and not cpu.supports(inputs) else chosen


def _compute(inputs: reference.Inputs, with_gradient: bool, chosen: str) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and, if asked for, the gradient with respect to the velocity (else an empty tensor)."""
    if chosen == "cpu":
        return cpu.policy_loss(inputs, with_gradient)
    if inputs.weights is not None and inputs.weights.device.type == "cpu" and bool((inputs.weights < 0).any()):
        raise ValueError(f"weights: expected numbers of at least 0, got {inputs.weights.min().item()}")
    if chosen == "triton":
        from . import triton_kernels

        return triton_kernels.policy_loss(inputs, with_gradient)
    if not with_gradient:
        loss, metrics = reference.policy_loss(inputs)
        return loss, metrics, loss.new_empty(0)
    loss, metrics, gradient = reference.policy_loss_and_gradient(inputs)
    return loss, metrics, reference.empty_gradient(inputs.velocity, loss.dtype).copy_(gradient)


def _is_plain(velocity: object, coefficients: object) -> bool:
    """Whether the checks may be left to C++: nobody looks at the operators that run or transforms them."""
    return (
        isinstance(coefficients, TransitionCoefficients)
        and isinstance(velocity, Tensor)
        and not is_traced((velocity,))
        and torch._C._len_torch_function_stack() == 0
        and forward_ad._current_level < 0
    )


def _is_described_by_metadata(inputs: reference.Inputs) -> bool:
    """Whether the Triton kernels may check the arguments, which they do where they have not met their like before."""
    mask, clip_range = inputs.mask, inputs.clip_range
    is_bool = mask is None or (isinstance(mask, Tensor) and mask.dtype == torch.bool)
    return (
        is_bool
        and isinstance(clip_range, (float, tuple))
        and {Tensor, type(None)}.issuperset(map(type, inputs.tensors()))
    )


class _LossAndGradient(torch.autograd.Function):
    """What the operator below and its backward do, without the 0.15 ms that its registration in Python costs."""

    @staticmethod
    def forward(ctx: Any, _: Tensor, inputs: reference.Inputs, backend: str) -> tuple[Tensor, Tensor, Tensor]:
        output = _compute(inputs, True, backend)
        _keep_gradient(ctx, output, inputs.velocity.dtype, backend)
        return output

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        return _gradient(ctx, grad_loss), None, None


_differentiable = apply_of(_LossAndGradient)


_ROWS = "Tensor sample_drift, Tensor velocity_scale, Tensor std, Tensor? noise_rate"


def _schema() -> str:
    """The operator takes what `Inputs` lists, and two more."""
    types = {Tensor: "Tensor", Tensor | None: "Tensor?", float: "float", str: "str", Sequence[float]: "float[]"}
    fields = (
        _ROWS if kind is TransitionCoefficients else f"{types[kind]} {name}"
        for name, kind in get_type_hints(reference.Inputs).items()
    )
    return f"({', '.join(fields)}, bool with_gradient, str backend) -> (Tensor, Tensor, Tensor)"


@torch.library.custom_op("star_kernels::policy_loss", mutates_args=(), schema=_schema())
def _policy_loss(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, metrics and, if asked for, the gradient with respect to the velocity (else an empty tensor)."""
    *given, with_gradient, backend = arguments
    inputs = reference.Inputs.from_flat(given)
    inputs = inputs._replace(clip_range=tuple(inputs.clip_range))
    return _compute(inputs, with_gradient, _chosen_backend(inputs, backend))


@_policy_loss.register_fake
def _(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, with_gradient, _backend = arguments
    inputs = reference.Inputs.from_flat(given)
    loss = inputs.velocity.new_empty((), dtype=inputs.dtype())
    gradient = reference.empty_gradient(inputs.velocity, loss.dtype) if with_gradient else loss.new_empty(0)
    return loss, loss.new_empty(len(reference.METRICS)), gradient


class _Undifferentiable(torch.autograd.Function):
    """The identity, with an error for whoever differentiates it."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise NotImplementedError(
            "policy_loss: second derivatives are not implemented, its gradient cannot be differentiated with respect "
            "to the velocity"
        )


def _keep_gradient(ctx: Any, output: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype, backend: str) -> None:
    _, metrics, grad_velocity = output
    # Not the gradient: as a differentiable output it leads back to the velocity, which a second derivative runs into.
    ctx.mark_non_differentiable(metrics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(grad_velocity)
    ctx.dtype = dtype
    ctx.backend = backend


def _gradient(ctx: Any, grad_loss: Tensor | None) -> Tensor | None:
    """The saved gradient times that of the loss, in the velocity's dtype."""
    if grad_loss is None or not ctx.needs_input_grad[0]:
        return None
    (grad_velocity,) = ctx.saved_tensors
    if torch.is_grad_enabled():
        grad_velocity = _Undifferentiable.apply(grad_velocity)
    elif type(grad_velocity) is Tensor and not _is_batched(grad_loss):
        return _scaled(ctx, grad_velocity.detach(), grad_loss)
    return _product(grad_velocity, grad_loss, ctx.dtype)


def _product(grad_velocity: Tensor, grad_loss: Tensor, dtype: torch.dtype) -> Tensor:
    # With the scale in its own dtype: as a tensor without dimensions it would be rounded to that of the gradient.
    return (grad_loss * grad_velocity.to(grad_loss.dtype)).to(dtype)


def _scaled(ctx: Any, saved: Tensor, grad_loss: Tensor) -> Tensor:
    """The product without a tensor of the latents' size beside the saved one and the result.

    Unless the graph is kept for another backward, nothing reads the saved tensor after this one: it can be scaled in
    place and handed on. PyTorch's own compiler asks the engine like this before it reuses memory.
    """
    is_ours = not torch._C._autograd._get_current_graph_task_keep_graph()
    if _resolve(saved.device, ctx.backend) == "triton":
        from . import triton_kernels

        in_place = is_ours and saved.dtype == ctx.dtype
        scaled = saved if in_place else torch.empty_like(saved, dtype=ctx.dtype)
        return triton_kernels.scale_gradient(saved, grad_loss, scaled)
    if saved.device.type == "cpu":
        return _scaled_on_cpu(saved, grad_loss.item(), ctx.dtype, is_ours)
    return _product(saved, grad_loss, ctx.dtype)


def _is_batched(tensor: Tensor) -> bool:
    """Whether `tensor` stands for a batch of tensors: in autograd.grad(is_grads_batched=True) or torch.func.vmap."""
    return torch._C._functorch.is_legacy_batchedtensor(tensor) or torch._C._functorch.is_batchedtensor(tensor)


def _scaled_on_cpu(saved: Tensor, scale: float, dtype: torch.dtype, is_ours: bool) -> Tensor:
    if is_ours:
        return (saved if scale == 1 else saved.mul_(scale)).to(dtype)
    scaled = torch.empty_like(saved, dtype=dtype)
    # Piece by piece: for a result of another dtype PyTorch makes a product in the first one.
    pieces = (_in_order_of_memory(tensor).split(_PIECE) for tensor in (saved, scaled))
    for piece, scaled_piece in zip(*pieces, strict=True):
        torch.mul(piece, scale, out=scaled_piece)
    return scaled


def _in_order_of_memory(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    _keep_gradient(ctx, output, inputs[0].dtype, inputs[-1])


def _backward(ctx: Any, grad_loss: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, grad_loss), *(None,) * (len(ctx.needs_input_grad) - 1)


torch.library.register_autograd("star_kernels::policy_loss", _backward, setup_context=_setup_context)
