"""The analytic gradient against autograd, registration, and compilation of a model that trains through the loss."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import star_kernels as sk
from star_kernels.policy_loss import reference
from tests.policy_loss.cases import make_case


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 999),
    channels=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    granularity=st.sampled_from(["position", "image"]),
    move=st.sampled_from([0.0, 1e-2, 1.0]),
    masked=st.booleans(),
    weighted=st.booleans(),
    kl=st.sampled_from(["none", "variance", "std_dev", "velocity"]),
    guidance=st.sampled_from([None, 1.0, 4.5]),
    objective=st.sampled_from([None, *reference.OBJECTIVES]),
)
def test_the_analytic_gradient_is_that_of_autograd(
    seed: int,
    channels: int,
    grid: tuple[int, int],
    granularity: str,
    move: float,
    masked: bool,
    weighted: bool,
    kl: str,
    guidance: float | None,
    objective: str | None,
) -> None:
    shape: dict[str, Any] = {"seed": seed, "channels": channels, "grid": grid, "masked": masked}
    case = make_case(**shape, dtype=torch.float64, move=move, objective=objective)
    options: dict[str, Any] = {"granularity": granularity}
    if not weighted:
        options["weights"] = None
    if kl == "none":
        options |= {"reference_velocity": None, "kl_weight": 0.0}
    else:
        options["kl_scale"] = kl
    if guidance is not None:
        options |= {"unconditional_velocity": case["velocity"] + 0.01, "guidance_scale": guidance}
    inputs = reference.Inputs(**(case | options))
    velocity = inputs.velocity.clone().requires_grad_()
    defined, _ = reference.policy_loss(inputs._replace(velocity=velocity))
    (by_autograd,) = torch.autograd.grad(defined, velocity)
    loss, _, gradient = reference.policy_loss_and_gradient(inputs)
    assert torch.equal(loss, defined.detach())
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("granularity", ["position", "image"])
@pytest.mark.parametrize("guidance", [None, 2.5])
@pytest.mark.parametrize("objective", [None, *reference.OBJECTIVES[1:]])
def test_gradcheck(granularity: str, guidance: float | None, objective: str | None) -> None:
    case = make_case(batch=2, channels=2, grid=(2, 2), dtype=torch.float64, move=0.3, objective=objective)
    case |= {"granularity": granularity, "kl_scale": "std_dev", "clip_range": 0.05}
    if guidance is not None:
        case |= {"unconditional_velocity": case["velocity"] + 0.1, "guidance_scale": guidance}

    def loss(velocity: Tensor) -> Tensor:
        return sk.policy_loss(**(case | {"velocity": velocity})).loss

    assert torch.autograd.gradcheck(loss, case["velocity"].requires_grad_(), eps=1e-7)


def test_the_upstream_gradient_scales_the_saved_one() -> None:
    case = make_case()
    velocity = case["velocity"].requires_grad_()
    (plain,) = torch.autograd.grad(sk.policy_loss(**case).loss, velocity)
    (scaled,) = torch.autograd.grad(-8 * sk.policy_loss(**case).loss, velocity)
    assert plain.any() and torch.equal(scaled, -8 * plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, -0.3])
def test_backward_hands_on_the_saved_gradient_without_a_second_one(dtype: torch.dtype, scale: float) -> None:
    case = make_case(dtype=dtype)
    velocity = case["velocity"].requires_grad_()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor):
        loss = scale * sk.policy_loss(**case).loss
    (expected,) = (tensor.double() * scale for tensor in saved if tensor.shape == velocity.shape)
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert gradient.data_ptr() in [tensor.data_ptr() for tensor in saved] and gradient.dtype == dtype
    torch.testing.assert_close(gradient.double(), expected, rtol=8e-3 if dtype == torch.bfloat16 else 1e-6, atol=0)


class Operators(TorchDispatchMode):
    """Notes which operators run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_plain_call_gives_what_the_registered_operator_gives(dtype: torch.dtype) -> None:
    case = make_case(dtype=dtype)
    velocity = case["velocity"].requires_grad_()
    results = []
    for mode in (contextlib.nullcontext(), Operators()):
        with mode:
            loss, metrics = sk.policy_loss(**case)
        assert not any(value.requires_grad for value in metrics.values())
        results.append([loss.detach(), *metrics.values(), *torch.autograd.grad(-0.5 * loss, velocity)])
    assert "star_kernels::policy_loss" in mode.names
    assert results[0][-1].any() and all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_kept_graph_can_be_run_again() -> None:
    case = make_case()
    velocity = case["velocity"].requires_grad_()
    loss = sk.policy_loss(**case).loss
    first, second, third = (
        torch.autograd.grad(loss, velocity, torch.tensor(scale), retain_graph=keep)[0]
        for scale, keep in ((2.0, True), (1.0, True), (-4.0, False))
    )
    assert second.any() and torch.equal(first, 2 * second) and torch.equal(third, -4 * second)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("registered", [False, True])
def test_a_second_derivative_by_the_velocity_is_refused_and_not_wrong(backend: str, registered: bool) -> None:
    if (reason := sk.available_backends()[backend]) is not None:
        pytest.skip(reason)
    case = make_case() | {"backend": backend}
    velocity, scale = case["velocity"].requires_grad_(), torch.tensor(0.5, requires_grad=True)
    with Operators() if registered else contextlib.nullcontext():
        loss = sk.policy_loss(**case).loss
    (gradient,) = torch.autograd.grad(scale * loss, velocity, create_graph=True)
    (total,) = torch.autograd.grad(gradient.sum(), scale, retain_graph=True)
    torch.testing.assert_close(total, 2 * gradient.detach().sum())
    for penalty in (gradient.square().sum(), gradient.square().sum() + loss):
        with pytest.raises(NotImplementedError, match="^policy_loss: second derivatives"):
            torch.autograd.grad(penalty, velocity, retain_graph=True)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_a_batch_of_incoming_gradients(backend: str) -> None:
    if (reason := sk.available_backends()[backend]) is not None:
        pytest.skip(reason)
    case = make_case() | {"backend": backend}
    velocity, scales = case["velocity"].requires_grad_(), torch.tensor([1.0, -3.0])
    (plain,) = torch.autograd.grad(sk.policy_loss(**case).loss, velocity)
    (batched,) = torch.autograd.grad(sk.policy_loss(**case).loss, velocity, scales, is_grads_batched=True)
    assert plain.any() and torch.equal(batched, scales[:, None, None, None, None] * plain)
    loss = sk.policy_loss(**case).loss
    (mapped,) = torch.func.vmap(lambda scale: torch.autograd.grad(loss, velocity, scale))(scales)
    assert torch.equal(mapped, batched)


def test_a_loss_changed_in_place_keeps_its_gradient() -> None:
    case = make_case()
    velocity = case["velocity"].requires_grad_()
    (plain,) = torch.autograd.grad(sk.policy_loss(**case).loss, velocity)
    loss = sk.policy_loss(**case).loss
    loss *= 0.25
    loss.backward()
    assert velocity.grad is not None and not velocity.grad.requires_grad and not plain.requires_grad
    assert torch.equal(velocity.grad, 0.25 * plain)


def test_a_loss_scale_saves_float16_gradients_from_underflow() -> None:
    case = make_case(batch=2, dtype=torch.float16, channels=16, grid=(64, 64)) | {"kl_weight": 0.0}
    velocity = case["velocity"].requires_grad_()
    scale = 2.0**14
    (scaled,) = torch.autograd.grad(scale * sk.policy_loss(**case).loss, velocity)
    case["velocity"] = velocity.detach().float().requires_grad_()
    (exact,) = torch.autograd.grad(scale * sk.policy_loss(**case).loss, case["velocity"])
    assert scaled.dtype == torch.float16
    unscaled = (exact / scale).half().float() * scale
    assert (scaled.float() - exact).norm() <= 1e-3 * exact.norm() < 0.1 * (unscaled - exact).norm()


def test_only_the_velocity_gets_a_gradient() -> None:
    case = make_case()
    case["unconditional_velocity"], case["guidance_scale"] = case["velocity"] * 0.5, 2.0
    tensors = {name: value for name, value in case.items() if isinstance(value, Tensor) and name != "mask"}
    for value in tensors.values():
        value.requires_grad_()
    sk.policy_loss(**case).loss.backward()
    assert [name for name, value in tensors.items() if value.grad is not None] == ["velocity"]


def test_the_loss_without_a_gradient_is_the_same() -> None:
    case = make_case()
    with torch.no_grad():
        untracked = sk.policy_loss(**case)
    case["velocity"].requires_grad_()
    tracked = sk.policy_loss(**case)
    assert not untracked.loss.requires_grad and tracked.loss.requires_grad
    assert torch.equal(untracked.loss, tracked.loss)


@pytest.mark.parametrize(("dtype", "full"), [(torch.float32, True), (torch.bfloat16, False), (torch.float64, True)])
def test_opcheck(dtype: torch.dtype, full: bool) -> None:
    case = make_case(dtype=dtype, objective="guard" if full else None)
    inputs = reference.Inputs(**case, granularity="position" if full else "image")
    inputs = inputs._replace(velocity=inputs.velocity.requires_grad_())
    if not full:
        inputs = inputs._replace(weights=None, mask=None, reference_velocity=None, kl_weight=0.0)
    op = torch.ops.star_kernels.policy_loss.default
    torch.library.opcheck(op, (*inputs.flat(), True, "reference"))
    inputs = inputs._replace(velocity=inputs.velocity.detach())
    torch.library.opcheck(op, (*inputs.flat(), False, "reference"))


class Denoiser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, case: dict[str, Any], noise: Tensor, guidance: float) -> sk.PolicyLoss:
        arguments = dict(case)
        sample, coefficients = arguments["sample"], arguments["coefficients"]
        velocity = self.layer(sample)
        step = sk.transition_step(velocity.detach(), sample, coefficients, noise=noise)
        old = sk.transition_log_prob(velocity.detach(), sample, step.next_sample, coefficients)
        return sk.policy_loss(
            **(arguments | {"velocity": velocity, "next_sample": step.next_sample, "old_log_prob": old}),
            unconditional_velocity=arguments["reference_velocity"],
            guidance_scale=guidance,
        )


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)])
def test_a_model_that_trains_through_the_loss_compiles_without_a_graph_break(compiler: str) -> None:
    torch.manual_seed(0)
    model = Denoiser()
    case = make_case()
    del case["velocity"], case["old_log_prob"], case["next_sample"]
    noise = torch.randn_like(case["sample"])
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    for guidance in (1.0, 4.5) if compiler == "aot_eager" else (4.5,):
        results = []
        for function in (model, compiled):
            model.zero_grad()
            result = function(case, noise, guidance)
            result.loss.backward()
            gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
            results.append([result.loss.detach(), *result.metrics.values(), *gradients])
        assert len(results[0]) == 1 + 8 + 2
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def test_a_compiled_loss_takes_other_batch_sizes_clip_ranges_and_granularities() -> None:
    compiled = torch.compile(sk.policy_loss, fullgraph=True, backend="aot_eager")
    for batch, clip, granularity in ((2, 1e-4, "position"), (3, (1e-3, 2e-3), "image"), (5, 0.1, "position")):
        case = make_case(batch=batch) | {"clip_range": clip, "granularity": granularity}
        torch.testing.assert_close(compiled(**case).loss, sk.policy_loss(**case).loss)


def channels_last(latent: Tensor) -> Tensor:
    return latent.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [1, 5, 16])
def test_the_gradient_lies_in_memory_like_the_velocity_so_that_autograd_keeps_it(
    backend: str, dtype: torch.dtype, channels: int
) -> None:
    if (reason := sk.available_backends()[backend]) is not None:
        pytest.skip(reason)
    case = make_case(channels=channels, grid=(5, 7), dtype=dtype) | {"backend": backend}
    gradients = []
    for layout in (Tensor.contiguous, channels_last):
        velocity = layout(case["velocity"].detach()).requires_grad_()
        handed: list[int] = []
        velocity.register_hook(lambda gradient, handed=handed: handed.append(gradient.data_ptr()))
        sk.policy_loss(**(case | {"velocity": velocity})).loss.backward()
        assert velocity.grad is not None and velocity.grad.data_ptr() == handed[0]
        gradients.append(velocity.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compiled_autograd_gives_the_same_gradient(backend: str) -> None:
    case = make_case(batch=2, channels=4, grid=(4, 4), seed=5)
    gradients = []
    for compiled in (False, True):
        velocity = case["velocity"].clone().requires_grad_()
        loss = sk.policy_loss(**{**case, "velocity": velocity}, backend=backend).loss
        enabled = torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager"))
        with enabled if compiled else contextlib.nullcontext():
            loss.backward()
        gradients.append(velocity.grad)
    assert torch.equal(*gradients)
