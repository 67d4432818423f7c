"""Texts of unequal length in one batch: padding takes no part, and no row notices what it stands beside."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels import joint_attention
from star_kernels.attention import sdpa

IMAGE, TEXT = 41, 13
LENGTHS = (TEXT, 4, 0, 9)
ROWS = torch.ops.star_kernels.attention_by_rows.default
WAYS = {
    "sdpa": {"implementation": "sdpa"},
    "cpu": {"implementation": "fused", "backend": "cpu"},
    "reference": {"implementation": "fused", "backend": "reference"},
}
if os.environ.get("TRITON_INTERPRET") == "1":  # on a GPU test_joint_attention_triton.py, with tensors that are there
    WAYS["triton"] = {"implementation": "fused", "backend": "triton"}
every_way = pytest.mark.parametrize("way", list(WAYS))


def inputs(
    dtype: torch.dtype = torch.float32, image: int = IMAGE, heads: int = 2, dim: int = 16
) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(len(LENGTHS), image + TEXT, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for _ in range(3)
    ]
    return tensors, torch.rand(len(LENGTHS), TEXT, 5, generator=generator)


def own_tokens(length: int, text_first: bool) -> Tensor:
    text = torch.arange(TEXT) if text_first else IMAGE + torch.arange(TEXT)
    image = torch.arange(IMAGE) + (TEXT if text_first else 0)
    return torch.cat([text[:length], image] if text_first else [image, text[:length]])


def run(tensors: list[Tensor], grad: Tensor, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor, list[Tensor]]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    out, mass = joint_attention(*leaves, *arguments, num_image_tokens=IMAGE, **options)
    return out.detach(), mass, list(torch.autograd.grad(out, leaves, grad))


@every_way
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_what_it_is_alone_bit_for_bit(dtype: torch.dtype, text_first: bool, direction: str, way: str) -> None:
    """out, mass and gradients of a row's own tokens; what stands for nothing gives and gets no gradient."""
    tensors, unit_weights = inputs(dtype)
    options = {"text_first": text_first, "direction": direction, **WAYS[way]}
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    for row, length in enumerate(LENGTHS):
        padding = torch.ones(IMAGE + TEXT, dtype=torch.bool)
        padding[own_tokens(length, text_first)] = False
        grad[row, :, padding] = 0
    out, mass, gradients = run(tensors, grad, unit_weights, text_lengths=torch.tensor(LENGTHS), **options)
    # Triton's interpreter multiplies blocks by NumPy's BLAS. On some processors a row's last bits depend on its place
    # in the block, which text before the image moves.
    exact, rounding = {"rtol": 0.0, "atol": 0.0}, {"rtol": 2e-2, "atol": 1e-2}
    if dtype == torch.float32:
        rounding = {"rtol": 1e-5, "atol": 1e-5}
    same = partial(torch.testing.assert_close, **(rounding if way == "triton" and text_first else exact))
    for row, length in enumerate(LENGTHS):
        own = own_tokens(length, text_first)
        alone = [tensor[row : row + 1, :, own] for tensor in (*tensors, grad)]
        if length == 0:  # that an image stands alone is not said by a joint sequence
            expected = F.scaled_dot_product_attention(*(tensor.double() for tensor in alone[:3]))
            assert (out[row : row + 1, :, own].double() - expected).abs().max() < (
                1e-5 if dtype == torch.float32 else 2e-2
            )
            assert mass[row].count_nonzero() == 0
            continue
        row_out, row_mass, row_gradients = run(alone[:3], alone[3], unit_weights[row : row + 1, :length], **options)
        same(out[row : row + 1, :, own], row_out)
        same(mass[row : row + 1], row_mass)
        padding = torch.ones(IMAGE + TEXT, dtype=torch.bool)
        padding[own] = False
        for gradient, expected in zip(gradients, row_gradients, strict=True):
            same(gradient[row : row + 1, :, own], expected)
            assert gradient[row][:, padding].count_nonzero() == 0


@every_way
@pytest.mark.parametrize("text_first", [False, True])
def test_text_queries_that_stand_for_nothing_still_attend(text_first: bool, way: str) -> None:
    """And their gradients reach the keys that they attend to: a masked softmax, with its derivative."""
    tensors, unit_weights = inputs()
    grad = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(1))
    lengths = torch.tensor(LENGTHS)
    out, _, gradients = run(tensors, grad, unit_weights, text_first=text_first, text_lengths=lengths, **WAYS[way])
    mask = torch.zeros(len(LENGTHS), 1, 1, IMAGE + TEXT, dtype=torch.bool)
    for row, length in enumerate(LENGTHS):
        mask[row, ..., own_tokens(length, text_first)] = True
    wide = [tensor.double().requires_grad_() for tensor in tensors]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask)
    torch.testing.assert_close(out.double(), expected.detach(), rtol=1e-5, atol=1e-6)
    for gradient, wanted in zip(gradients, torch.autograd.grad(expected, wide, grad.double()), strict=True):
        torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-5)


@every_way
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_attention_to_texts_of_unequal_length(dtype: torch.dtype, way: str) -> None:
    lengths = (TEXT, 1, 9, 5)
    (_, key, value), unit_weights = inputs(dtype, image=0)
    query = inputs(dtype, image=IMAGE - TEXT)[0][0]
    grad = torch.ones_like(query)
    out, mass, gradients = run([query, key, value], grad, unit_weights, text_lengths=torch.tensor(lengths), **WAYS[way])
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        alone = [query[part], key[part, :, :length], value[part, :, :length]]
        row_out, row_mass, row_gradients = run(alone, grad[part], unit_weights[part, :length], **WAYS[way])
        assert torch.equal(out[part], row_out) and torch.equal(mass[part], row_mass)
        for gradient, expected in zip(gradients, row_gradients, strict=True):
            assert torch.equal(gradient[part, :, : expected.shape[2]], expected)
            assert gradient[part, :, expected.shape[2] :].count_nonzero() == 0


@every_way
def test_what_padding_holds_does_not_matter(way: str) -> None:
    tensors, unit_weights = inputs()
    grad = torch.ones_like(tensors[0])
    options = {"text_lengths": torch.tensor([4] * len(LENGTHS)), **WAYS[way]}
    out, mass, gradients = run(tensors, grad, unit_weights, **options)
    # NaN times zero would show.
    spoilt = [tensor.clone() for tensor in tensors]
    for tensor in spoilt[1:]:
        tensor[:, :, IMAGE + 4 :] = torch.nan
    unit_weights[:, 4:] = 1e30
    other_out, other_mass, other_gradients = run(spoilt, grad, unit_weights, **options)
    assert torch.equal(out, other_out) and torch.equal(mass, other_mass)
    assert all(torch.equal(one, other) for one, other in zip(gradients, other_gradients, strict=True))


@every_way
def test_rows_and_whole_texts(way: str) -> None:
    """Lengths belong to the batch, also where some rows are captured; full ones change nothing, in either integer."""
    tensors, unit_weights = inputs()
    lengths, options = torch.tensor(LENGTHS), {"num_image_tokens": IMAGE, **WAYS[way]}
    out, mass = joint_attention(*tensors, unit_weights, text_lengths=lengths, **options)
    part_out, part_mass = joint_attention(*tensors, unit_weights[1:3], text_lengths=lengths, rows=(1, 3), **options)
    assert torch.equal(out, part_out) and torch.equal(mass[1:3], part_mass)
    full = torch.full((len(LENGTHS),), TEXT, dtype=torch.int32)
    for whole, expected in zip(
        joint_attention(*tensors, unit_weights, text_lengths=full, **options),
        joint_attention(*tensors, unit_weights, **options),
        strict=True,
    ):
        assert torch.equal(whole, expected)


def test_no_kernel_of_pytorchs_sees_a_single_key_that_it_refuses() -> None:
    one, two = torch.empty(1, 1, 1, 8), torch.empty(1, 1, 2, 8)
    assert [sdpa._for_keys(kernel, one) for kernel in ("cudnn", "flash", "efficient")] == [
        "flash",
        "flash",
        "efficient",
    ]
    assert sdpa._for_keys("cudnn", two) == "cudnn"


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("implementation", ["fused", "sdpa"])
def test_gradcheck_in_float64(implementation: str, text_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(2, 2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(3)]

    def attention(*arguments: Tensor) -> Tensor:
        return joint_attention(
            *arguments,
            num_image_tokens=3,
            text_first=text_first,
            text_lengths=torch.tensor([2, 0]),
            implementation=implementation,
        )[0]

    assert torch.autograd.gradcheck(attention, tensors)


@pytest.mark.parametrize("text_first", [False, True])
def test_opcheck_of_attention_by_rows(text_first: bool) -> None:
    tensors, _ = inputs(dim=8)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.library.opcheck(ROWS, (*leaves, torch.tensor(LENGTHS), IMAGE, text_first, 0.4, "flash"))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_opcheck_of_the_fused_operator(backend: str) -> None:
    tensors, unit_weights = inputs(dim=8)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    arguments = (*leaves, unit_weights, IMAGE, False, 0.4, 0, 4, "image_to_text", backend, torch.tensor(LENGTHS))
    torch.library.opcheck(torch.ops.star_kernels.joint_attention.default, arguments)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("implementation", ["fused", "sdpa"])
def test_lengths_compile_without_a_graph_break(implementation: str, dynamic: bool) -> None:
    """Other lengths are no reason to compile again."""
    torch._dynamo.reset()
    tensors, unit_weights = inputs()
    leaves = [tensor.requires_grad_() for tensor in tensors]

    def layer(lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        return joint_attention(
            *leaves, unit_weights, num_image_tokens=IMAGE, text_lengths=lengths, implementation=implementation
        )

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for lengths in (torch.tensor(LENGTHS), torch.tensor([1, 2, 3, 4])):
        with torch.compiler.set_stance("default" if lengths[0] == TEXT else "fail_on_recompile"):
            out, mass = compiled(lengths)
        expected, expected_mass = layer(lengths)
        assert torch.equal(out, expected) and torch.equal(mass, expected_mass)
        for gradient, wanted in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(expected.sum(), leaves), strict=True
        ):
            assert torch.equal(gradient, wanted)
