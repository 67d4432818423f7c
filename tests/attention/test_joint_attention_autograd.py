"""joint_attention as a PyTorch operator: gradients, what it saves, torch.library's own checks, torch.compile."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import forward_ad

import star_kernels as sk
from star_kernels.attention import reference

joint_attention = sk.joint_attention
OPERATOR = torch.ops.star_kernels.joint_attention.default
BACKWARD = torch.ops.star_kernels.joint_attention_backward.default


@pytest.fixture(scope="module", params=["fused", "sdpa"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """For what holds of both implementations."""
    global joint_attention
    joint_attention = functools.partial(sk.joint_attention, implementation=request.param)
    yield request.param
    joint_attention = sk.joint_attention


both = pytest.mark.usefixtures("implementation")


def leaves(
    batch: int = 2,
    heads: int = 3,
    tokens: int = 17,
    dim: int = 8,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    key_tokens: int | None = None,
) -> list[Tensor]:
    """query, key and value that require gradients, with their tokens outside their heads in memory."""
    generator = torch.Generator().manual_seed(seed)
    lengths = (tokens, key_tokens or tokens, key_tokens or tokens)
    return [
        torch.randn(batch, length, heads, dim, generator=generator, dtype=torch.float64)
        .to(dtype)
        .transpose(1, 2)
        .requires_grad_()
        for length in lengths
    ]


@both
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("key_tokens", [None, 9])
def test_gradients_are_those_of_scaled_dot_product_attention(
    key_tokens: int | None, dtype: torch.dtype, error: float
) -> None:
    tensors = leaves(dtype=dtype, key_tokens=key_tokens)
    unit_weights = torch.rand(2, key_tokens or 7, 2)
    image = 17 if key_tokens else 10
    out, mass = joint_attention(*tensors, unit_weights, num_image_tokens=image, scale=0.5)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*wide, scale=0.5), wide, grad.double())
    for gradient, wanted in zip(torch.autograd.grad(out, tensors, grad), expected, strict=True):
        assert gradient.dtype == dtype
        assert (gradient.double() - wanted).abs().max() < error * wanted.abs().max()


@both
def test_the_gradient_of_a_sum_which_has_no_strides() -> None:
    tensors = leaves()
    out, _ = joint_attention(*tensors, num_image_tokens=10)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*tensors).sum(), tensors)
    for gradient, wanted in zip(torch.autograd.grad(out.sum(), tensors), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


@both
def test_gradients_where_the_head_dimension_is_not_innermost() -> None:
    tensors = [t.detach().transpose(2, 3).contiguous().transpose(2, 3).requires_grad_() for t in leaves()]
    out, _ = joint_attention(*tensors, num_image_tokens=10)
    grad = torch.randn(2, 3, 8, 17, generator=torch.Generator().manual_seed(9)).transpose(2, 3)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*tensors), tensors, grad)
    for gradient, wanted in zip(torch.autograd.grad(out, tensors, grad), expected, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_gradcheck_in_float64(direction: str, text_first: bool) -> None:
    tensors = leaves(heads=2, tokens=6, dim=3, dtype=torch.float64)
    unit_weights = torch.rand(2, 2, 2, dtype=torch.float64)

    def attention(*arguments: Tensor) -> Tensor:
        return joint_attention(
            *arguments, unit_weights, num_image_tokens=4, text_first=text_first, direction=direction
        )[0]

    assert torch.autograd.gradcheck(attention, tensors)


@both
def test_gradcheck_of_cross_attention_in_float64() -> None:
    tensors = leaves(batch=1, heads=2, tokens=4, key_tokens=7, dim=3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *a: joint_attention(*a, num_image_tokens=4)[0], tensors)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 40),
    key_tokens=st.integers(1, 40),
    dim=st.integers(1, 20),
)
def test_both_backward_passes_agree_on_odd_shapes(
    batch: int, heads: int, tokens: int, key_tokens: int, dim: int
) -> None:
    tensors = [t.detach() for t in leaves(batch, heads, tokens, dim, key_tokens=key_tokens)]
    out, _, log_sum_exp = reference.joint_attention(
        *tensors, num_image_tokens=tokens, text_first=False, scale=0.3, rows=(0, batch)
    )
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    materialised = reference.attention_backward(grad, *tensors, out, log_sum_exp, 0.3)
    flash = BACKWARD(grad, *tensors, out, log_sum_exp, None, tokens, False, 0.3, None)
    for gradient, expected in zip(flash, materialised, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


@both
def test_mass_carries_no_gradient() -> None:
    tensors = leaves()
    unit_weights = torch.rand(2, 7, 2, requires_grad=True)
    out, mass = joint_attention(*tensors, unit_weights, num_image_tokens=10)
    assert out.requires_grad and not mass.requires_grad
    out.sum().backward()
    assert unit_weights.grad is None
    buffer = torch.zeros(2, 10, 2)
    joint_attention(*tensors, unit_weights, num_image_tokens=10, mass=buffer)
    assert not buffer.requires_grad


@both
def test_nothing_of_size_tokens_squared_is_saved() -> None:
    tokens = 64
    tensors = leaves(tokens=tokens)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        joint_attention(*tensors, torch.rand(2, 7, 2), num_image_tokens=57)
    assert len(saved) == 5
    assert max(saved) == tensors[0].numel() < 2 * 3 * tokens * tokens


@both
def test_a_second_derivative_is_refused_and_not_wrong() -> None:
    tensors = leaves()
    out, _ = joint_attention(*tensors, num_image_tokens=10)
    (gradient,) = torch.autograd.grad(out.square().sum(), tensors[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(gradient.sum(), tensors[:1])


@both
def test_torch_func_and_forward_mode_are_refused() -> None:
    query, key, value = (t.detach() for t in leaves())

    def attention(query: Tensor) -> Tensor:
        return joint_attention(query, key, value, torch.ones(2, 7, 2), num_image_tokens=10)[0].sum()

    for transformed in (
        lambda: torch.func.grad(attention)(query),
        lambda: torch.func.vmap(attention)(query[None]),
        lambda: torch.func.jvp(attention, (query,), (key,)),
    ):
        with pytest.raises(NotImplementedError, match="^joint_attention: torch.func transforms are out of scope"):
            transformed()
    with forward_ad.dual_level():
        assert attention(query).isfinite()
        with pytest.raises(NotImplementedError, match="^joint_attention: forward-mode derivatives are out of scope"):
            attention(forward_ad.make_dual(query, key))


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_with_units(requires_grad: bool, direction: str) -> None:
    tensors = [t.detach().requires_grad_(requires_grad) for t in leaves()]
    arguments = (*tensors, torch.rand(1, 7, 2), 10, False, 0.4, 1, 2, direction, "reference")
    torch.library.opcheck(OPERATOR, arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_opcheck_without_units(dtype: torch.dtype) -> None:
    arguments = (*leaves(dtype=dtype), None, 10, True, 0.4, 0, 2, "image_to_text", "auto")
    torch.library.opcheck(OPERATOR, arguments)


def test_opcheck_of_the_backward_pass() -> None:
    query, key, value = (t.detach() for t in leaves(key_tokens=9))
    out, _, log_sum_exp = OPERATOR(query, key, value, None, 17, False, 0.4, 0, 2, "image_to_text", "reference")
    arguments = (torch.randn_like(out), query, key, value, out, log_sum_exp, None, 17, False, 0.4, None)
    torch.library.opcheck(BACKWARD, arguments)


class Block(torch.nn.Module):
    """Two layers of joint attention that fill one buffer."""

    def __init__(self, dim: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.projections = torch.nn.ModuleList(torch.nn.Linear(dim, 3 * dim) for _ in range(2))

    def forward(self, tokens: Tensor, unit_weights: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
        for projection in self.projections:
            split = projection(tokens).unflatten(-1, (3, self.heads, -1))
            query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
            out, mass = joint_attention(
                query, key, value, unit_weights, num_image_tokens=mass.shape[1], mass=mass, layer_weight=0.5
            )
            tokens = tokens + out.transpose(1, 2).flatten(2)
        return tokens, mass


def run(call: Any, model: Block, seed: int, batch: int = 2, image: int = 9, text: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(batch, image + text, 12, generator=generator, requires_grad=True)
    buffer = torch.zeros(batch, image, 2)
    out, mass = call(tokens, torch.rand(batch, text, 2, generator=generator), buffer)
    model.zero_grad()
    out.square().sum().backward()
    assert torch.equal(mass, buffer) and not mass.requires_grad
    return [out.detach(), buffer, tokens.grad, *(p.grad.clone() for p in model.parameters())]


@both
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_model_compiles_without_a_graph_break(dynamic: bool) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    model = Block()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    shapes = [{}, {"batch": 3, "image": 11, "text": 4}] if dynamic else [{}]
    for seed, shape in enumerate(shapes):
        for value, expected in zip(run(compiled, model, seed, **shape), run(model, model, seed, **shape), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@both
@pytest.mark.exhaustive
def test_a_captured_layer_compiles_with_inductor() -> None:
    torch._dynamo.reset()
    tensors = leaves()
    unit_weights = torch.rand(2, 7, 2)

    # The op alone: each C++ kernel that inductor has to build around it takes seconds.
    def attention(*arguments: Tensor) -> tuple[Tensor, Tensor | None]:
        return joint_attention(*arguments, unit_weights, num_image_tokens=10)

    out, mass = torch.compile(attention, fullgraph=True)(*tensors)
    expected_out, expected_mass = attention(*tensors)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    assert torch.equal(out, expected_out) and torch.equal(mass, expected_mass)
    for gradient, expected in zip(
        torch.autograd.grad(out, tensors, grad), torch.autograd.grad(expected_out, tensors, grad), strict=True
    ):
        assert torch.equal(gradient, expected)


@both
def test_autocast_inside_a_compiled_model() -> None:
    torch._dynamo.reset()
    query, key, value = leaves()

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return joint_attention(query, key, value.bfloat16(), num_image_tokens=10)[0]

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value), attention(query, key, value))


@both
def test_a_bad_unit_weight_is_caught_inside_a_compiled_model() -> None:
    torch._dynamo.reset()
    query, key, value = (t.detach() for t in leaves())

    # With the mass: the compiler drops what nobody reads.
    def attention(unit_weights: Tensor) -> tuple[Tensor, Tensor | None]:
        return joint_attention(query, key, value, unit_weights, num_image_tokens=10)

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(2, 7, 2))
    with pytest.raises(ValueError, match="^unit_weights: expected"):
        compiled(-torch.ones(2, 7, 2))
