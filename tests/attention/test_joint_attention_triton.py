"""The Triton kernels of joint_attention in Triton's interpreter against the reference in float64."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels import joint_attention
from star_kernels.attention import reference

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

from star_kernels.attention import triton_kernels  # noqa: E402
from star_kernels.attention.triton_kernels import Configuration  # noqa: E402

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["image_to_text", "text_to_image"]
OUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MASS_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of queries and keys also at the sizes that the interpreter can do."""
    monkeypatch.setattr(triton_kernels, "configuration_for", lambda *_: Configuration(32, 16, 4, 2))


def inputs(
    image: int, text: int, units: int = 3, dim: int = 32, heads: int = 2, batch: int = 1, dtype: torch.dtype = DTYPES[0]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value with their tokens outside their heads in memory, and unit weights that bfloat16 cannot hold."""
    generator = torch.Generator().manual_seed(image * 1000 + text)
    shape = (batch, image + text, heads, dim)
    query, key, value = (torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for _ in range(3))
    return query, key, value, torch.rand(batch, text, units, generator=generator)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


def check(
    query: Tensor, key: Tensor, value: Tensor, unit_weights: Tensor | None, *, num_image_tokens: int, **options: Any
) -> None:
    """Every output of the kernels against the reference in float64."""
    options = {"text_first": False, "scale": query.shape[3] ** -0.5, "rows": (0, query.shape[0]), **options}
    direction = options.pop("direction", "image_to_text")
    out, mass, log_sum_exp = triton_kernels.joint_attention(
        query, key, value, unit_weights, num_image_tokens=num_image_tokens, direction=direction, **options
    )
    wide = [tensor.double() for tensor in (query, key, value)]
    wide_units = None if unit_weights is None else unit_weights.double()
    expected_out, expected_mass, expected_log_sum_exp = reference.joint_attention(
        *wide, wide_units, num_image_tokens=num_image_tokens, **options
    )
    assert out.dtype == query.dtype and out.stride() == torch.empty_like(query).stride()
    assert relative_error(out, expected_out) < OUT_ERROR[query.dtype]
    assert log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(log_sum_exp.double(), expected_log_sum_exp, rtol=1e-5, atol=1e-5)
    if wide_units is None:
        assert mass is None
        return
    if direction == "text_to_image":
        captured = slice(*options.pop("rows"))
        expected_mass = reference.text_to_image_mass(
            wide[0][captured], wide[1][captured], wide_units, num_image_tokens=num_image_tokens, **options
        )
    assert mass is not None and expected_mass is not None and mass.dtype == torch.float32
    assert relative_error(mass, expected_mass) < MASS_ERROR[query.dtype]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(("image", "text"), [(1, 1), (16, 1), (1, 16), (37, 11), (33, 32), (48, 19)])
def test_awkward_lengths_agree_with_the_reference(image: int, text: int, text_first: bool, direction: str) -> None:
    check(*inputs(image, text), num_image_tokens=image, text_first=text_first, direction=direction)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [1, 16, 17, 33])
def test_any_number_of_units_agrees_with_the_reference(units: int, dtype: torch.dtype, direction: str) -> None:
    check(*inputs(35, 18, units=units, dtype=dtype), num_image_tokens=35, direction=direction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_every_head_dimension_agrees_with_the_reference(dim: int, dtype: torch.dtype) -> None:
    check(*inputs(33, 5, dim=dim, dtype=dtype, heads=1), num_image_tokens=33)


def test_gradients_are_those_of_scaled_dot_product_attention() -> None:
    query, key, value, unit_weights = inputs(21, 12)
    tensors = [tensor.requires_grad_() for tensor in (query, key, value)]
    out, _ = joint_attention(*tensors, unit_weights, num_image_tokens=21, backend="triton")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*tensors), tensors, grad)
    for gradient, wanted in zip(torch.autograd.grad(out, tensors, grad), expected, strict=True):
        assert relative_error(gradient, wanted) < 1e-5
