"""The C++ kernel of joint_attention, with each instruction set that this CPU has, against the reference in float64."""

from __future__ import annotations

import copy
import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import star_kernels as sk
from star_kernels import joint_attention
from star_kernels.attention import cpu, reference
from tests.tiny_models import tiny_transformer

LEVELS = ("default", "avx2", "avx512", "avx512_bf16")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DIRECTIONS = ("image_to_text", "text_to_image")
# Largest error of out and mass, relative to their largest value.
BOUNDS = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (1e-2, 5e-3), torch.float16: (1e-2, 5e-3)}


def has(level: str) -> bool:
    if sk.available_backends()["cpu"] is not None:
        return False
    capability = importlib.import_module("star_kernels._C").cpu_capability()
    return capability.get(level, True)


AVAILABLE = [level for level in LEVELS if has(level)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param not in AVAILABLE:
        pytest.skip(f"this CPU has no {request.param}")
    monkeypatch.setenv("STAR_KERNELS_CPU_CAPABILITY", request.param)
    return request.param


def inputs(
    image: int,
    text: int,
    *,
    batch: int = 2,
    heads: int = 2,
    dim: int = 32,
    units: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    keys: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value with the tokens outside the heads in memory, and unit weights; `keys` for cross-attention."""
    generator = torch.Generator().manual_seed(seed)
    tokens = image + text
    query, key, value = (
        torch.randn(batch, n, heads, dim, generator=generator).to(dtype).transpose(1, 2)
        for n in (tokens, keys or tokens, keys or tokens)
    )
    return query, key, value, torch.rand(batch, keys or text, units, generator=generator)


def run(tensors: tuple[Tensor, ...], direction: str = "image_to_text", **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    """out, mass and log-sum-exp of the kernel."""
    query = tensors[0]
    defaults = {"text_first": False, "scale": query.shape[-1] ** -0.5, "rows": (0, query.shape[0])}
    return cpu.joint_attention(*tensors, direction=direction, **{**defaults, **options})


def expected(
    tensors: tuple[Tensor, ...], direction: str = "image_to_text", **options: Any
) -> tuple[Tensor, Tensor | None, Tensor]:
    """The same of the reference in float64."""
    query, key, value, unit_weights = (t if t is None else t.double() for t in tensors)
    options = {"text_first": False, "scale": query.shape[-1] ** -0.5, "rows": (0, query.shape[0]), **options}
    return reference.joint_attention(query, key, value, unit_weights, direction=direction, **options)


def error(value: Tensor, wanted: Tensor) -> float:
    assert value.shape == wanted.shape
    return float((value.double() - wanted).abs().max() / wanted.abs().max())


def check(tensors: tuple[Tensor, ...], direction: str = "image_to_text", **options: Any) -> None:
    out, mass, log_sum_exp = run(tensors, direction, **options)
    wanted_out, wanted_mass, wanted_log_sum_exp = expected(tensors, direction, **options)
    out_bound, mass_bound = BOUNDS[tensors[0].dtype]
    assert out.dtype == tensors[0].dtype and log_sum_exp.dtype == torch.float32
    assert error(out, wanted_out) < out_bound
    torch.testing.assert_close(log_sum_exp.double(), wanted_log_sum_exp, rtol=1e-6, atol=1e-5)
    if wanted_mass is None:
        assert mass.numel() == 0
    else:
        assert mass.dtype == torch.float32
        assert error(mass, wanted_mass) < mass_bound


# image, text, and what else differs from `inputs`
SHAPES: dict[str, tuple[int, int, dict[str, int]]] = {
    "one image token": (1, 1, {}),
    "17 tokens": (16, 1, {"units": 1}),
    "one image token before much text": (1, 300, {"units": 16}),
    "one text token": (300, 1, {"units": 2}),
    "SD3.5 at 512 px": (1024, 205, {"batch": 1, "heads": 1, "dim": 64, "units": 8}),
    "whole blocks": (256, 256, {"units": 16}),
    "17 units": (70, 40, {"units": 17}),
    "32 units": (70, 40, {"units": 32}),
    "40 units": (70, 300, {"units": 40}),
    "D 1": (40, 9, {"dim": 1}),
    "D 7": (40, 9, {"dim": 7}),
    "D 8": (40, 9, {"dim": 8}),
    "D 24": (130, 21, {"dim": 24}),
    "D 64": (200, 33, {"dim": 64}),
    "D 96": (97, 31, {"dim": 96}),
    "D 128": (97, 15, {"dim": 128}),
    "D 160": (50, 47, {"dim": 160}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_awkward_shapes_agree_with_the_reference_in_float64(level: str, shape: str, dtype: torch.dtype) -> None:
    image, text, options = SHAPES[shape]
    tensors = inputs(image, text, dtype=dtype, **options)
    for direction in DIRECTIONS:
        check(tensors, direction, num_image_tokens=image)
        check(tensors, direction, num_image_tokens=image, text_first=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("keys", [1, 17, 50, 300])
def test_cross_attention(level: str, keys: int, dtype: torch.dtype) -> None:
    check(inputs(50, 0, keys=keys, dtype=dtype, units=3), num_image_tokens=50)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_units(level: str, dtype: torch.dtype) -> None:
    for image, text in ((290, 10), (10, 290), (300, 0)):
        check((*inputs(image, text, dtype=dtype)[:3], None), num_image_tokens=image)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(level: str, dtype: torch.dtype, direction: str) -> None:
    tensors = inputs(45, 19, dim=40, dtype=dtype)
    out, mass, log_sum_exp = run(tensors, direction, num_image_tokens=45)
    dense = tuple(t.contiguous() for t in tensors)
    slices = tuple(torch.stack([t, t.neg()], -2).flatten(-2)[..., : t.shape[-1]] for t in tensors)
    alternating = tuple(torch.stack([t, t.neg()], -1)[..., 0] for t in tensors)
    transposed = tuple(t.mT.contiguous().mT for t in tensors)
    for variant in (dense, slices, alternating, transposed):
        other_out, other_mass, other_log_sum_exp = run(variant, direction, num_image_tokens=45)
        assert other_out.transpose(1, 2).is_contiguous()
        assert torch.equal(other_out, out)
        assert torch.equal(other_mass, mass)
        assert torch.equal(other_log_sum_exp, log_sum_exp)


def test_expanded_keys_are_read_in_place(level: str) -> None:
    query, key, value, unit_weights = inputs(30, 11)
    shared = (query, key[:1, :1].expand_as(key), value[:1].expand_as(value), unit_weights[:1].expand_as(unit_weights))
    check(shared, num_image_tokens=30)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", [(0, 1), (1, 2), (1, 3)])
def test_rows_are_captured_alone_and_change_no_output(level: str, rows: tuple[int, int], direction: str) -> None:
    query, key, value, unit_weights = inputs(110, 21, batch=3)
    out, mass, _ = run((query, key, value, unit_weights), direction, num_image_tokens=110)
    part = (query, key, value, unit_weights[slice(*rows)])
    part_out, part_mass, _ = run(part, direction, num_image_tokens=110, rows=rows)
    assert torch.equal(part_out, out)
    assert torch.equal(part_mass, mass[slice(*rows)])


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    shape=st.fixed_dictionaries(
        {
            "batch": st.integers(1, 3),
            "heads": st.integers(1, 3),
            "dim": st.integers(1, 70),
            "units": st.integers(1, 35),
            "seed": st.integers(0, 2**16),
        }
    ),
    image=st.one_of(st.integers(1, 40), st.integers(80, 300)),
    text=st.one_of(st.integers(1, 40), st.integers(240, 270)),
    text_first=st.booleans(),
    direction=st.sampled_from(DIRECTIONS),
    dtype=st.sampled_from(DTYPES),
    chosen=st.sampled_from(AVAILABLE),
)
def test_odd_shapes_agree_with_the_reference_in_float64(
    monkeypatch: pytest.MonkeyPatch,
    shape: dict[str, int],
    image: int,
    text: int,
    text_first: bool,
    direction: str,
    dtype: torch.dtype,
    chosen: str,
) -> None:
    monkeypatch.setenv("STAR_KERNELS_CPU_CAPABILITY", chosen)
    check(inputs(image, text, dtype=dtype, **shape), direction, num_image_tokens=image, text_first=text_first)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_batch_threads_and_repetition_change_no_bit(level: str, dtype: torch.dtype, direction: str) -> None:
    tensors = inputs(290, 37, batch=4, heads=3, dtype=dtype, units=5)
    out, mass, log_sum_exp = run(tensors, direction, num_image_tokens=290)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            for value, wanted in zip(
                run(tensors, direction, num_image_tokens=290), (out, mass, log_sum_exp), strict=True
            ):
                assert torch.equal(value, wanted)
            for b in range(4):
                alone = run(tuple(t[b : b + 1] for t in tensors), direction, num_image_tokens=290)
                for value, wanted in zip(alone, (out, mass, log_sum_exp), strict=True):
                    assert torch.equal(value[0], wanted[b])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_ten_thousand_do_not_overflow(level: str, dtype: torch.dtype, direction: str) -> None:
    query, key, value, _ = inputs(280, 40, dim=16, dtype=dtype)
    # Rows whose logits are all near -10000, all near 10000, and of both signs; one key far ahead of all others.
    query[:, :, ::3], key[..., 0] = 0, 100
    query[:, :, ::3, 0], query[:, :, 1::3, 0] = -100, 100
    key[:, :, 200] *= 2
    unit_weights = torch.ones(2, 40, 1)
    out, mass, log_sum_exp = run((query, key, value, unit_weights), direction, num_image_tokens=280, scale=1.0)
    wanted_out, wanted_mass, wanted_log_sum_exp = expected(
        (query, key, value, unit_weights), direction, num_image_tokens=280, scale=1.0
    )
    assert wanted_log_sum_exp.max() > 1e4 and wanted_log_sum_exp.min() < -9e3
    # A float32 logit of 1e4 is known to 1e-3, so its exponential to a thousandth.
    torch.testing.assert_close(out.double(), wanted_out, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mass.double(), wanted_mass, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(log_sum_exp.double(), wanted_log_sum_exp, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("magnitude", [1e7, 3e9, 1e10, 1e30])
def test_exponents_do_not_exceed_zero_however_large_the_logits(level: str, magnitude: float) -> None:
    query, key, value, _ = inputs(270, 40)
    # Small whole numbers: the logits are exact in both formats, and often equal. Rows of one sign, too.
    query, key = (query * 2).round(), (key * 2).round()
    key[..., 0] = 1
    query[:, :, ::3, 0], query[:, :, 1::3, 0] = -400, 400
    tensors = query * 2.0 ** round(math.log2(magnitude)), key, value, torch.ones(2, 40, 1)
    out, mass, log_sum_exp = run(tensors, num_image_tokens=270, scale=0.125)
    wanted_out, wanted_mass, wanted_log_sum_exp = expected(tensors, num_image_tokens=270, scale=0.125)
    assert error(out, wanted_out) < 1e-5
    assert error(mass, wanted_mass) < 1e-5
    torch.testing.assert_close(log_sum_exp.double(), wanted_log_sum_exp, rtol=1e-6, atol=1e-5)
    _, received, _ = run(tensors, "text_to_image", num_image_tokens=270, scale=0.125)
    assert received.min() >= 0 and received.max() <= 40


def test_a_logit_of_minus_infinity_has_probability_zero(level: str) -> None:
    query, key, value, unit_weights = inputs(40, 24, dim=4)
    query, key = query.abs(), key.abs()
    key[:, :, [3, 50], 0] = -float("inf")
    out, mass, _ = run((query, key, value, unit_weights), num_image_tokens=40)
    wanted_out, wanted_mass, _ = expected((query, key, value, unit_weights), num_image_tokens=40)
    assert error(out, wanted_out) < 1e-5
    assert error(mass, wanted_mass) < 1e-5


def test_nan_in_a_query_stays_in_its_row(level: str) -> None:
    for dtype in DTYPES:
        query, key, value, unit_weights = inputs(100, 20, dtype=dtype)
        wanted, wanted_mass, _ = run((query, key, value, unit_weights), num_image_tokens=100)
        query[0, 1, 7, 3] = float("nan")
        out, mass, log_sum_exp = run((query, key, value, unit_weights), num_image_tokens=100)
        assert out[0, 1, 7].isnan().all() and mass[0, 7].isnan().all() and log_sum_exp[0, 1, 7].isnan()
        out[0, 1, 7], mass[0, 7] = wanted[0, 1, 7], wanted_mass[0, 7]
        assert torch.equal(out, wanted) and torch.equal(mass, wanted_mass)


def test_nan_in_the_last_key_reaches_its_head_alone(level: str) -> None:
    for dtype in DTYPES:
        query, key, value, unit_weights = inputs(100, 21, dtype=dtype)
        key[1, 0, 120, 0] = float("nan")
        out, mass, _ = run((query, key, value, unit_weights), num_image_tokens=100)
        assert out[1, 0].isnan().all() and mass[1].isnan().all()
        assert out[1, 1].isfinite().all() and out[0].isfinite().all() and mass[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_those_of_scaled_dot_product_attention(level: str, dtype: torch.dtype) -> None:
    *tensors, unit_weights = inputs(90, 20, dtype=dtype)
    leaves = [t.clone().requires_grad_() for t in tensors]
    out, _ = joint_attention(*leaves, unit_weights, num_image_tokens=90, backend="cpu")
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    wide = [t.double().requires_grad_() for t in tensors]
    wanted = torch.autograd.grad(F.scaled_dot_product_attention(*wide), wide, grad.double())
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for gradient, expected_gradient in zip(torch.autograd.grad(out, leaves, grad), wanted, strict=True):
        assert error(gradient, expected_gradient) < bound


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype, direction: str) -> None:
    *tensors, unit_weights = inputs(20, 7, dtype=dtype, dim=8)
    leaves = [t.clone().requires_grad_() for t in tensors]
    operator = torch.ops.star_kernels.joint_attention.default
    torch.library.opcheck(operator, (*leaves, unit_weights[1:], 20, True, 0.4, 1, 2, direction, "cpu"))
    # Whatever the strides of the inputs, out has those that the fake implementation promises.
    turned = [t.mT.contiguous().mT for t in tensors]
    torch.library.opcheck(operator, (*turned, unit_weights, 20, False, 0.4, 0, 2, direction, "cpu"))


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_padded_row_is_its_trimmed_self_bit_for_bit(
    level: str, dtype: torch.dtype, direction: str, text_first: bool
) -> None:
    image, text, lengths = 130, 290, [290, 0, 1, 261]
    query, key, value, unit_weights = inputs(image, text, batch=4, dtype=dtype, units=5)
    options: dict[str, Any] = {"num_image_tokens": image, "text_first": text_first}
    text_lengths = torch.tensor(lengths, dtype=torch.int32)
    for row, length in enumerate(lengths):
        first = (0 if text_first else image) + length
        key[row, :, first : first + text - length] = value[row, :, first : first + text - length] = float("nan")
    tensors = query, key, value, unit_weights
    out, mass, log_sum_exp = run(tensors, direction, text_lengths=text_lengths, **options)
    _, part_mass, _ = run(
        (query, key, value, unit_weights[2:]), direction, text_lengths=text_lengths, rows=(2, 4), **options
    )
    assert torch.equal(part_mass, mass[2:])
    assert mass[1].count_nonzero() == 0
    for row, length in enumerate(lengths):
        (keys, padding), one = reference.row_tokens(image + text, text, length, text_first), slice(row, row + 1)
        trimmed = [reference.take(t[one], keys) for t in (query, key, value)]
        if length:
            alone = run((*trimmed, unit_weights[one, :length]), direction, **options)
            assert torch.equal(alone[1][0], mass[row])
        else:
            alone = run((*trimmed, None), **options)
        assert torch.equal(alone[0], reference.take(out[one], keys))
        assert torch.equal(alone[2][..., None], reference.take(log_sum_exp[one, ..., None], keys))
        if padding:  # text queries that stand for nothing attend to the keys that count
            wanted = F.scaled_dot_product_attention(
                reference.take(query[one], padding).double(), *(t.double() for t in trimmed[1:])
            )
            assert error(reference.take(out[one], padding), wanted) < BOUNDS[dtype][0]


def test_a_compiled_function_has_no_graph_break_and_the_same_bits() -> None:
    torch._dynamo.reset()
    *tensors, unit_weights = inputs(20, 7)

    def attention(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
        out, mass = joint_attention(query, key, value, unit_weights, num_image_tokens=20, backend="cpu")
        return out * 2, mass

    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager")
    for value, wanted in zip(compiled(*tensors), attention(*tensors), strict=True):
        assert torch.equal(value, wanted)


def test_float64_is_computed_by_the_reference() -> None:
    *tensors, unit_weights = (t.double() for t in inputs(20, 7))
    options = {"num_image_tokens": 20}
    for value, wanted in zip(
        joint_attention(*tensors, unit_weights, **options, backend="cpu"),
        joint_attention(*tensors, unit_weights, **options, backend="reference"),
        strict=True,
    ):
        assert value.dtype == torch.float64 and torch.equal(value, wanted)


def test_the_compiled_operator_checks_what_it_is_given() -> None:
    query, key, value, unit_weights = inputs(20, 7)
    for name, tensors, options in [
        ("query", (query[0], key, value, None), {}),
        ("key", (query, key.bfloat16(), value, None), {}),
        ("key", (query, key[:, :1], value, None), {}),
        ("value", (query, key, value[:, :, 1:], None), {}),
        ("num_image_tokens", (query, key, value, None), {"num_image_tokens": 0}),
        ("num_image_tokens", (query, key[:, :, 1:], value[:, :, 1:], None), {}),
        ("rows", (query, key, value, None), {"rows": (1, 3)}),
        ("unit_weights", (query, key, value, unit_weights[:, 1:]), {}),
        ("unit_weights", (query, key, value, unit_weights[:1]), {}),
        ("direction", (query, key, value, unit_weights), {"num_image_tokens": 27, "direction": "text_to_image"}),
        ("text_lengths", (query, key, value, None), {"text_lengths": torch.tensor([7])}),
        ("text_lengths", (query, key, value, None), {"text_lengths": torch.tensor([7, 8])}),
        ("text_lengths", (query, key, value, None), {"text_lengths": torch.tensor([7.0, 3.0])}),
    ]:
        options = {"scale": 0.1, "rows": (0, 2), "num_image_tokens": 20, **options}
        with pytest.raises((ValueError, TypeError), match=f"^{name}: expected"):
            run(tensors, **options)


def step(dtype: torch.dtype, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": normal(2, 4, 8, 8),
        "encoder_hidden_states": normal(2, 7, 12),
        "pooled_projections": normal(2, 10),
        "timestep": torch.full((2,), 500.0),
    }


def test_a_recorded_transformer_gives_its_own_output_and_the_mass_of_the_reference(level: str) -> None:
    transformer = tiny_transformer().eval().requires_grad_(False)
    unit_weights = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(1))
    arguments = step(torch.float32)
    plain = transformer(**arguments).sample
    masses = []
    for backend in ("cpu", "reference"):
        with sk.record_attention(transformer, unit_weights, backend=backend) as recorder:
            output = transformer(**arguments).sample
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
        masses.append(recorder.mass)
    torch.testing.assert_close(*masses, rtol=1e-5, atol=1e-7)


def test_bfloat16_output_is_as_close_to_float64_as_that_of_scaled_dot_product_attention(level: str) -> None:
    for image, text, factor in ((40, 10, 1), (40, 10, 3), (390, 10, 1), (390, 10, 3)):
        query, key, value, unit_weights = inputs(image, text, dim=64, heads=4, dtype=torch.bfloat16)
        query = query * factor
        wanted = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
        out, _, _ = run((query, key, value, unit_weights), num_image_tokens=image)
        distances = [
            float((t.double() - wanted).square().mean().sqrt())
            for t in (out, F.scaled_dot_product_attention(query, key, value))
        ]
        assert distances[0] <= 1.01 * distances[1]


def test_a_recorded_bfloat16_transformer_is_as_close_to_float64_as_it_is_without_recording(level: str) -> None:
    transformer = tiny_transformer(attention_head_dim=32, num_attention_heads=4, caption_projection_dim=128)
    transformer = transformer.eval().requires_grad_(False).bfloat16()
    wide = copy.deepcopy(transformer).double()
    plain, recorded = [], []
    for seed in range(12):
        arguments = step(torch.bfloat16, seed)
        wanted = wide(**{name: t.double() for name, t in arguments.items()}).sample
        plain.append((transformer(**arguments).sample - wanted).square().mean())
        with sk.record_attention(transformer, torch.ones(2, 7, 1), backend="cpu"):
            recorded.append((transformer(**arguments).sample - wanted).square().mean())
    assert torch.stack(recorded).mean().sqrt() <= 1.02 * torch.stack(plain).mean().sqrt()
