"""Gradients, registration and compilation of the transition operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import star_kernels as sk
from star_kernels.transition import reference

# The two operators as they are registered, for opcheck.
OPS = torch.ops.star_kernels


def problem(dtype: torch.dtype = torch.float64, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    v, u, x, noise = (torch.randn(batch, 3, 2, 5, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4))
    levels = torch.float64 if dtype == torch.float64 else torch.float32
    sigma = torch.linspace(0.9, 0.4, batch, dtype=levels)
    c = sk.transition_coefficients("flow_sde", sigma, 0.7 * sigma)
    return {"v": v, "u": u, "x": x, "noise": noise, "c": c}


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("kind", ["flow_sde", "cps", "ode"])
def test_gradcheck_through_the_next_sample(guided: bool, kind: str) -> None:
    p = problem()
    sigma = torch.tensor([0.9, 0.4], dtype=torch.float64)
    c = sk.transition_coefficients(kind, sigma, 0.7 * sigma, eta=torch.tensor([0.3, 0.9]))
    options = {"unconditional_velocity": p["u"], "guidance_scale": 3.5} if guided else {}

    def step(v: Tensor, x: Tensor) -> Tensor:
        return sk.transition_step(v, x, c, noise=p["noise"], **options).next_sample

    assert torch.autograd.gradcheck(step, (p["v"].requires_grad_(), p["x"].requires_grad_()))


@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_backend_differentiates_through_a_sampler(backend: str, dtype: torch.dtype) -> None:
    """R0 does: through two steps of a velocity that depends on the sample, each trajectory with its own noise."""

    def gradients(dtype: torch.dtype, **options: str) -> tuple[Tensor, ...]:
        p = problem(dtype)
        x, slope = p["x"].requires_grad_(), p["v"].requires_grad_()
        eta, latents = torch.tensor([0.2, 0.8]), x
        for sigma, after in ((0.9, 0.5), (0.5, 0.0)):
            c = sk.transition_coefficients("cps", sigma, after, eta=eta)
            latents = sk.transition_step(slope * latents, latents, c, noise=p["noise"], **options).next_sample
        return torch.autograd.grad((latents.double() ** 2).sum(), (x, slope))

    expected = gradients(torch.float64, backend="reference")
    for got, exact in zip(gradients(dtype, backend=backend), expected, strict=True):
        assert got.dtype == dtype
        assert (got.double() - exact).norm() / exact.norm() < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("guided", [False, True])
def test_gradcheck_through_the_log_prob(guided: bool) -> None:
    p = problem()
    options = {"unconditional_velocity": p["u"], "guidance_scale": 3.5} if guided else {}

    def log_prob(v: Tensor, x: Tensor, y: Tensor) -> Tensor:
        return sk.transition_log_prob(v, x, y, p["c"], **options)

    inputs = tuple(tensor.clone().requires_grad_() for tensor in (p["v"], p["x"], p["noise"]))
    assert torch.autograd.gradcheck(log_prob, inputs)


def test_the_log_prob_of_a_steps_own_draw_does_not_depend_on_velocity_and_sample() -> None:
    """This is why it carries no gradient: its true derivative is zero."""
    p = problem()
    step = sk.transition_step(p["v"].requires_grad_(), p["x"], p["c"], noise=p["noise"])
    assert step.log_prob is not None and not step.log_prob.requires_grad and step.next_sample.requires_grad
    moved = sk.transition_step(p["v"] + 1, p["x"] - 1, p["c"], noise=p["noise"]).log_prob
    torch.testing.assert_close(moved, step.log_prob, rtol=1e-12, atol=1e-12)


def test_only_what_requires_a_gradient_gets_one_and_the_unconditional_velocity_never_does() -> None:
    p = problem(torch.float32)
    v, u = p["v"].requires_grad_(), p["u"].requires_grad_()
    options = {"unconditional_velocity": u, "guidance_scale": 2.0}
    sk.transition_step(v, p["x"], p["c"], noise=p["noise"], **options).next_sample.sum().backward()
    sk.transition_log_prob(v, p["x"], p["noise"], p["c"], **options).sum().backward()
    assert v.grad is not None and u.grad is None and p["x"].grad is None


class Latents(TorchDispatchMode):
    """Counts the tensors of the size of a latent that are new."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.new = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.size:
            self.new += not any(isinstance(a, Tensor) and a.data_ptr() == result.data_ptr() for a in args)
        return result


def test_second_derivatives_are_those_of_the_definition_with_its_constants_held() -> None:
    p = problem()
    scalars = [getattr(p["c"], name).requires_grad_() for name in ("sample_drift", "velocity_scale", "std")]
    v, x, y, u = (p[name].requires_grad_() for name in ("v", "x", "noise", "u"))
    options = {"unconditional_velocity": u, "guidance_scale": 2.5}
    held = [tensor.detach() for tensor in (u, *scalars)]
    for output, defined in (
        (
            sk.transition_log_prob(v, x, y, p["c"], **options),
            reference.transition_log_prob(v, x, y, *held, guidance_scale=2.5),
        ),
        (
            sk.transition_step(v, x, p["c"], noise=p["noise"].detach(), **options).next_sample,
            reference.transition_step(v, x, p["noise"].detach(), *held, guidance_scale=2.5)[0],
        ),
    ):
        seconds = []
        for value in (output, defined):
            firsts = torch.autograd.grad(value.square().sum(), (v, x), create_graph=True)
            penalty = sum(gradient.square().sum() for gradient in firsts)
            seconds.append(torch.autograd.grad(penalty, (v, x, y, u, *scalars), allow_unused=True))
        for second, expected in zip(*seconds, strict=True):
            assert (second is None) == (expected is None)
            if second is not None:
                torch.testing.assert_close(second, expected, rtol=1e-12, atol=1e-12)


def test_gradients_that_nobody_asked_for_are_not_built() -> None:
    p = problem(torch.float32)
    built = {}
    for wanted in ("v", "x", "noise", "all"):
        v, x, y = (p[name].clone().requires_grad_(wanted in (name, "all")) for name in ("v", "x", "noise"))
        log_prob = sk.transition_log_prob(v, x, y, p["c"])
        with Latents(v.numel()) as latents:
            log_prob.backward(torch.ones_like(log_prob))
        built[wanted] = latents.new
    assert built["v"] == built["x"] == built["noise"] == built["all"] - 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_come_in_the_dtype_of_their_input(dtype: torch.dtype) -> None:
    p = problem(dtype)
    v, x, y = (p[name].clone().requires_grad_() for name in ("v", "x", "noise"))
    exact = [tensor.detach().double().requires_grad_() for tensor in (v, x, y)]
    sk.transition_log_prob(v, x, y, p["c"]).sum().backward()
    c64 = sk.TransitionCoefficients(*(getattr(p["c"], n).double() for n in ("sample_drift", "velocity_scale", "std")))
    sk.transition_log_prob(*exact, c64).sum().backward()
    for got, wanted in zip((v, x, y), exact, strict=True):
        assert got.grad is not None and wanted.grad is not None and got.grad.dtype == dtype
        assert (got.grad.double() - wanted.grad).abs().max() <= 1e-2 * wanted.grad.abs().max()


@pytest.mark.parametrize("operator", ["transition_step", "transition_log_prob"])
def test_torch_func_and_forward_mode_are_refused(operator: str) -> None:
    p = problem(torch.float32)

    def output(v: Tensor) -> Tensor:
        if operator == "transition_step":
            return sk.transition_step(v, p["x"], p["c"], noise=p["noise"]).next_sample.sum()
        return sk.transition_log_prob(v, p["x"], p["noise"], p["c"]).sum()

    for transformed in (
        lambda: torch.func.grad(output)(p["v"]),
        lambda: torch.func.vmap(output)(p["v"][None]),
        lambda: torch.func.jvp(output, (p["v"],), (p["u"],)),
    ):
        with pytest.raises(NotImplementedError, match=f"^{operator}: torch.func transforms are out of scope"):
            transformed()
    with forward_ad.dual_level():
        assert output(p["v"]).isfinite()
        with pytest.raises(NotImplementedError, match=f"^{operator}: forward-mode derivatives are out of scope"):
            output(forward_ad.make_dual(p["v"], p["u"]))


@pytest.mark.parametrize(("dtype", "guided"), [(torch.bfloat16, True), (torch.float64, False)])
def test_opcheck(dtype: torch.dtype, guided: bool) -> None:
    p = problem(dtype)
    v, x, y = (p[name].clone().requires_grad_() for name in ("v", "x", "noise"))
    u = p["u"] if guided else None
    scalars = p["c"].sample_drift, p["c"].velocity_scale, p["c"].std
    for noise in (p["noise"], None):
        torch.library.opcheck(OPS.transition_step.default, (v, x, noise, u, *scalars, 2.5, "reference"))
    torch.library.opcheck(OPS.transition_log_prob.default, (v, x, y, u, *scalars, 2.5, "reference"))


class Denoiser(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, y: Tensor, c: sk.TransitionCoefficients, noise: Tensor, scale: float) -> Tensor:
        v = self.layer(x)
        step = sk.transition_step(v, x, c, noise=noise)
        log_prob = sk.transition_log_prob(
            self.layer(step.next_sample), x, y, c, unconditional_velocity=v, guidance_scale=scale
        )
        assert step.log_prob is not None
        return step.next_sample.square().mean() - log_prob.mean() + step.log_prob.mean()


def test_a_model_compiles_without_a_graph_break() -> None:
    torch.manual_seed(0)
    model = Denoiser()
    p = problem(torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for scale in (1.0, 4.5):
        results = []
        for function in (model, compiled):
            model.zero_grad()
            loss = function(p["x"], p["v"], p["c"], p["noise"], scale)
            loss.backward()
            results.append([loss.detach(), *(parameter.grad.clone() for parameter in model.parameters())])
        for eager, other in zip(*results, strict=True):
            torch.testing.assert_close(other, eager, rtol=1e-4, atol=1e-5)


def test_a_compiled_step_takes_other_batch_sizes() -> None:
    compiled = torch.compile(
        lambda p: sk.transition_log_prob(p["v"], p["x"], p["noise"], p["c"]), fullgraph=True, backend="aot_eager"
    )
    for batch in (2, 3, 5, 1):
        p = problem(torch.float32, batch)
        torch.testing.assert_close(compiled(p), sk.transition_log_prob(p["v"], p["x"], p["noise"], p["c"]))
