"""What joint_attention computes: the definition in float64, and the properties of docs/method.md, section 6."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import star_kernels as sk
from star_kernels.attention import reference

joint_attention = sk.joint_attention
ODD = settings(max_examples=30, deadline=None, derandomize=True)
SHAPES = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "heads": st.integers(1, 4),
        "image": st.integers(1, 19),
        "text": st.integers(1, 13),
        "dim": st.integers(1, 17),
        "units": st.integers(1, 5),
        "seed": st.integers(0, 2**16),
    }
)


@pytest.fixture(scope="module", params=["fused", "sdpa"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every property here is that of both implementations."""
    global joint_attention
    joint_attention = functools.partial(sk.joint_attention, implementation=request.param)
    yield request.param
    joint_attention = sk.joint_attention


def inputs(
    batch: int = 2,
    heads: int = 3,
    image: int = 33,
    text: int = 11,
    dim: int = 16,
    units: int = 4,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    unit_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value as a transformer makes them (tokens outside heads in memory), and unit weights."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, image + text, heads, dim)
    query, key, value = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(1, 2) for _ in range(3)
    )
    unit_weights = torch.rand(batch, text, units, generator=generator, dtype=torch.float64)
    return query, key, value, unit_weights.to(unit_dtype)


def probabilities(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """P in float64: the attention of PyTorch over an identity for value."""
    identity = torch.eye(key.shape[2], dtype=torch.float64).expand(*key.shape[:2], -1, -1)
    return F.scaled_dot_product_attention(query.double(), key.double(), identity, scale=scale)


def definition(
    query: Tensor, key: Tensor, unit_weights: Tensor, image: int, text_first: bool, direction: str
) -> Tensor:
    """M or T, letter by letter."""
    p = probabilities(query, key).mean(1)
    text = p.shape[1] - image
    images, texts = (slice(text, None), slice(0, text)) if text_first else (slice(0, image), slice(image, None))
    if direction == "image_to_text":
        return torch.einsum("bij,bjk->bik", p[:, images, texts], unit_weights.double())
    return torch.einsum("bji,bjk->bik", p[:, texts, images], unit_weights.double())


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(
    ("dtype", "out_error", "mass_error"),
    [(torch.float32, 1e-5, 1e-5), (torch.bfloat16, 1e-2, 5e-3), (torch.float16, 1e-2, 5e-3)],
)
def test_out_and_mass_agree_with_the_definition_in_float64(
    dtype: torch.dtype, out_error: float, mass_error: float, text_first: bool, direction: str
) -> None:
    query, key, value, unit_weights = inputs(image=75, text=29, heads=4, dim=24, dtype=dtype)
    out, mass = joint_attention(
        query, key, value, unit_weights, num_image_tokens=75, text_first=text_first, direction=direction
    )
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    assert out.dtype == dtype and mass.dtype == torch.float32
    assert relative_error(out, expected) < out_error
    assert relative_error(mass, definition(query, key, unit_weights, 75, text_first, direction)) < mass_error


@ODD
@given(shape=SHAPES, text_first=st.booleans(), direction=st.sampled_from(["image_to_text", "text_to_image"]))
def test_odd_shapes_agree_with_the_definition(shape: dict[str, int], text_first: bool, direction: str) -> None:
    query, key, value, unit_weights = inputs(**shape)
    image = shape["image"]
    out, mass = joint_attention(
        query, key, value, unit_weights, num_image_tokens=image, text_first=text_first, direction=direction
    )
    assert mass.shape == (shape["batch"], image, shape["units"])
    assert relative_error(out, F.scaled_dot_product_attention(query.double(), key.double(), value.double())) < 1e-5
    assert relative_error(mass, definition(query, key, unit_weights, image, text_first, direction)) < 1e-5


@ODD
@given(shape=SHAPES, text_first=st.booleans(), direction=st.sampled_from(["image_to_text", "text_to_image"]))
def test_strides_do_not_matter(shape: dict[str, int], text_first: bool, direction: str) -> None:
    query, key, value, unit_weights = inputs(**shape)
    options = {"num_image_tokens": shape["image"], "text_first": text_first, "direction": direction}
    # Slices of wider tensors with D outermost, and a unit axis that strides over the text axis.
    strided = [
        torch.stack([t, -t], dim=-1).permute(3, 0, 1, 2, 4).contiguous().permute(1, 2, 3, 0, 4)[..., 0]
        for t in (query, key, value)
    ]
    strided_units = unit_weights.transpose(1, 2).contiguous().transpose(1, 2)
    out, mass = joint_attention(*(t.contiguous() for t in (query, key, value, unit_weights)), **options)
    strided_out, strided_mass = joint_attention(*strided, strided_units, **options)
    torch.testing.assert_close(strided_out, out, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(strided_mass, mass, rtol=1e-5, atol=1e-6)


def test_masses_of_a_partition_of_the_text_sum_to_its_mass_and_the_rest_is_image_mass() -> None:
    image, text = 40, 12
    for text_first in (False, True):
        query, key, _, _ = inputs(image=image, text=text)
        owner = torch.randint(0, 5, (2, text), generator=torch.Generator().manual_seed(1))
        partition = F.one_hot(owner, 5).float()
        images = slice(text, None) if text_first else slice(0, image)
        is_image_key = torch.zeros_like(query)
        is_image_key[:, :, images] = 1
        options = {"num_image_tokens": image, "text_first": text_first}
        out, mass = joint_attention(query, key, is_image_key, partition, **options)
        _, text_mass = joint_attention(query, key, is_image_key, torch.ones(2, text, 1), **options)
        image_mass = out[:, :, images, 0].mean(1)
        torch.testing.assert_close(mass.sum(-1), text_mass[..., 0], rtol=0, atol=1e-6)
        torch.testing.assert_close(text_mass[..., 0] + image_mass, torch.ones(2, image), rtol=0, atol=1e-6)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_permuting_units_permutes_mass(direction: str) -> None:
    query, key, value, unit_weights = inputs(units=5)
    order = torch.tensor([3, 0, 4, 1, 2])
    options = {"num_image_tokens": 33, "direction": direction}
    _, mass = joint_attention(query, key, value, unit_weights, **options)
    _, permuted = joint_attention(query, key, value, unit_weights[..., order], **options)
    torch.testing.assert_close(permuted, mass[..., order], rtol=1e-6, atol=1e-8)


def test_text_first_is_the_same_mathematics_on_rolled_tokens() -> None:
    image, text = 33, 11
    tensors = inputs(image=image, text=text)
    rolled = [t.roll(text, dims=2) for t in tensors[:3]]
    for direction in ("image_to_text", "text_to_image"):
        out, mass = joint_attention(*tensors, num_image_tokens=image, direction=direction)
        rolled_out, rolled_mass = joint_attention(
            *rolled, tensors[3], num_image_tokens=image, text_first=True, direction=direction
        )
        torch.testing.assert_close(rolled_out, out.roll(text, dims=2), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(rolled_mass, mass, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("heads", "image", "text", "dim", "units"),
    [
        (1, 1, 1, 8, 1),
        (2, 7, 3, 13, 2),
        (3, 64, 33, 40, 3),
        (4, 81, 29, 64, 5),
        (1, 201, 19, 64, 17),
        (6, 128, 77, 24, 8),
    ],
)
def test_a_sample_does_not_depend_on_its_batch_bit_for_bit(
    heads: int, image: int, text: int, dim: int, units: int, dtype: torch.dtype, direction: str
) -> None:
    batch = 4
    query, key, value, unit_weights = inputs(batch, heads, image, text, dim, units, dtype=dtype)
    options = {"num_image_tokens": image, "direction": direction}
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    out, mass = joint_attention(*leaves, unit_weights, **options)
    gradients = torch.autograd.grad(out.square().sum(), leaves)
    for b in range(batch):
        for chosen in ([b], [b, (b + 1) % batch], [(b + 2) % batch, b, b]):
            position = chosen.index(b)
            alone = [t[chosen].clone().requires_grad_() for t in (query, key, value)]
            alone_out, alone_mass = joint_attention(*alone, unit_weights[chosen], **options)
            assert torch.equal(alone_out[position], out[b])
            assert torch.equal(alone_mass[position], mass[b])
            if heads == 1:
                continue  # PyTorch's backward pass of a single head leaves the cores to BLAS, which adds up otherwise
            for gradient, expected in zip(torch.autograd.grad(alone_out.square().sum(), alone), gradients, strict=True):
                assert torch.equal(gradient[position], expected[b])


def test_repeated_calls_are_equal_bit_for_bit() -> None:
    *tensors, unit_weights = inputs(image=120, text=31)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    first, second = (joint_attention(*leaves, unit_weights, num_image_tokens=120) for _ in range(2))
    gradients = (torch.autograd.grad(out.square().sum(), leaves) for out, _ in (first, second))
    for one, other in zip((*first, *next(gradients)), (*second, *next(gradients)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_huge_logits_do_not_overflow(dtype: torch.dtype) -> None:
    query, key, value, _ = inputs(dtype=dtype)
    out, mass = joint_attention(query * 200, key * 200, value, torch.ones(2, 11, 1), num_image_tokens=33)
    assert torch.isfinite(out).all() and torch.isfinite(mass).all()
    assert mass.min() >= 0 and mass.max() <= 1 + 1e-6


def test_non_finite_input_shows_where_it_reaches_and_nowhere_else() -> None:
    query, key, value, unit_weights = inputs()
    query[0, 1, 5, 2] = float("nan")
    key[1, 0, 40, 0] = float("nan")
    out, mass = joint_attention(query, key, value, unit_weights, num_image_tokens=33)
    untouched = torch.ones(33, dtype=torch.bool)
    untouched[5] = False
    assert out[0, 1, 5].isnan().all() and mass[0, 5].isnan().all()
    assert out[0, 0].isfinite().all() and mass[0, untouched].isfinite().all()
    assert not out[1, 0].isfinite().any() and not mass[1].isfinite().any()
    assert out[1, 1:].isfinite().all()


def test_without_units_there_is_no_mass_and_the_same_output() -> None:
    query, key, value, unit_weights = inputs()
    captured, _ = joint_attention(query, key, value, unit_weights, num_image_tokens=33)
    plain, mass = joint_attention(query, key, value, num_image_tokens=33)
    assert mass is None
    assert torch.equal(plain, captured)


def test_image_only_attention_needs_no_text() -> None:
    query, key, value, _ = inputs(image=20, text=1)
    out, mass = joint_attention(query, key, value, num_image_tokens=21)
    assert mass is None
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", [3, 16, 50])
def test_cross_attention_reads_every_key_as_text_also_when_lengths_agree(text: int) -> None:
    image = 16
    query = inputs(image=image - 1, text=1)[0]
    _, key, value, _ = inputs(image=1, text=text - 1, seed=1) if text > 1 else inputs()
    unit_weights = torch.rand(2, text, 3, generator=torch.Generator().manual_seed(2))
    for text_first in (False, True):
        out, mass = joint_attention(query, key, value, unit_weights, num_image_tokens=image, text_first=text_first)
        expected = torch.einsum("bij,bjk->bik", probabilities(query, key).mean(1), unit_weights.double())
        assert relative_error(mass, expected) < 1e-5
        torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value), rtol=1e-5, atol=1e-6)


def test_scale_is_the_factor_of_the_logits() -> None:
    query, key, value, unit_weights = inputs()
    out, mass = joint_attention(query, key, value, unit_weights, num_image_tokens=33, scale=0.7)
    p = probabilities(query, key, scale=0.7)
    assert relative_error(out, p @ value.double()) < 1e-5
    assert relative_error(mass, p.mean(1)[:, :33, 33:] @ unit_weights.double()) < 1e-5


def test_one_buffer_over_layers_holds_their_mean() -> None:
    layers = [inputs(seed=seed) for seed in range(4)]
    unit_weights = layers[0][3]
    buffer = torch.zeros(2, 33, 4)
    returned = [
        joint_attention(*layer[:3], unit_weights, num_image_tokens=33, mass=buffer, layer_weight=1 / len(layers))[1]
        for layer in layers
    ]
    single = [joint_attention(*layer[:3], unit_weights, num_image_tokens=33)[1] for layer in layers]
    assert all(mass is buffer for mass in returned)
    torch.testing.assert_close(buffer, torch.stack(single).mean(0), rtol=1e-6, atol=1e-8)


def test_layer_weight_counts_without_a_buffer_too() -> None:
    tensors = inputs()
    buffer = torch.zeros(2, 33, 4)
    joint_attention(*tensors, num_image_tokens=33, mass=buffer, layer_weight=0.3)
    _, mass = joint_attention(*tensors, num_image_tokens=33, layer_weight=0.3)
    torch.testing.assert_close(mass, buffer, rtol=1e-6, atol=0)


def test_the_buffer_may_be_a_view() -> None:
    tensors = inputs()
    wide = torch.zeros(2, 33, 9)
    joint_attention(*tensors, num_image_tokens=33, mass=wide[..., 1:9:2])
    _, mass = joint_attention(*tensors, num_image_tokens=33)
    assert torch.equal(wide[..., 1:9:2], mass)
    assert wide[..., ::2].count_nonzero() == 0


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@pytest.mark.parametrize("rows", [(0, 2), (2, 4), (1, 2)])
def test_rows_captures_those_rows_alone(rows: tuple[int, int], direction: str) -> None:
    query, key, value, unit_weights = inputs(batch=4)
    chosen = slice(*rows)
    options = {"num_image_tokens": 33, "direction": direction}
    out, mass = joint_attention(query, key, value, unit_weights, **options)
    part_out, part_mass = joint_attention(query, key, value, unit_weights[chosen], rows=rows, **options)
    assert torch.equal(part_out, out)
    assert torch.equal(part_mass, mass[chosen])


def test_mass_is_float64_only_if_every_floating_input_is() -> None:
    for dtype, unit_dtype, expected in [
        (torch.float64, torch.float64, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.float32, torch.float64, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ]:
        tensors = inputs(dtype=dtype, unit_dtype=unit_dtype)
        out, mass = joint_attention(*tensors, num_image_tokens=33)
        assert (out.dtype, mass.dtype) == (dtype, expected)


@ODD
@given(shape=SHAPES)
def test_log_sum_exp_of_the_reference(shape: dict[str, int]) -> None:
    query, key, value, _ = inputs(**shape)
    scale = 0.4
    _, _, log_sum_exp = reference.joint_attention(
        query, key, value, num_image_tokens=shape["image"], text_first=False, scale=scale, rows=(0, shape["batch"])
    )
    expected = torch.logsumexp(query.double() @ key.double().transpose(-1, -2) * scale, -1)
    torch.testing.assert_close(log_sum_exp.double(), expected, rtol=1e-5, atol=1e-5)


def test_autocast_casts_like_scaled_dot_product_attention() -> None:
    query, key, value, unit_weights = inputs()
    low = [t.bfloat16() for t in (query, key, value)]
    expected_out, expected_mass = joint_attention(*low, unit_weights, num_image_tokens=33)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, mass = joint_attention(query, key, low[2], unit_weights, num_image_tokens=33)
        assert F.scaled_dot_product_attention(query, key, low[2]).dtype == torch.bfloat16
    assert torch.equal(out, expected_out) and torch.equal(mass, expected_mass)
