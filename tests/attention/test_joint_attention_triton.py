"""The Triton kernels of joint_attention against the reference in float64: on a GPU with the shipped table, elsewhere
in Triton's interpreter."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels import joint_attention
from star_kernels.attention import reference

pytest.importorskip("triton")
from star_kernels.attention import mass_kernels, triton_kernels  # noqa: E402
from star_kernels.attention.triton_kernels import Configuration  # noqa: E402

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Two bytes take one path, whatever they stand for.
DTYPES = [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.exhaustive)]
DIRECTIONS = ["image_to_text", "text_to_image"]
OUT_ERROR = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
MASS_ERROR = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}
OPERATOR = torch.ops.star_kernels.joint_attention.default


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles of queries and keys also at the sizes that the interpreter can do."""
    if DEVICE.type == "cpu":
        for module in (triton_kernels, mass_kernels):
            monkeypatch.setattr(module, "configuration_for", lambda *_: Configuration(32, 16, 4, 2))


def inputs(
    image: int,
    text: int,
    units: int = 3,
    dim: int = 32,
    heads: int = 2,
    batch: int = 1,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """query, key, value with their tokens outside their heads in memory, and unit weights that bfloat16 cannot hold."""
    generator = torch.Generator().manual_seed(image * 1000 + text)
    shape = (batch, image + text, heads, dim)
    query, key, value = (torch.randn(shape, generator=generator).to(DEVICE, dtype).transpose(1, 2) for _ in range(3))
    return query, key, value, torch.rand(batch, text, units, generator=generator).to(DEVICE)


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


def check(
    query: Tensor, key: Tensor, value: Tensor, unit_weights: Tensor | None, *, num_image_tokens: int, **options: Any
) -> None:
    """Every output of the kernels against the reference in float64."""
    options = {"text_first": False, "scale": query.shape[3] ** -0.5, "rows": (0, query.shape[0]), **options}
    out, mass, log_sum_exp = triton_kernels.joint_attention(
        query, key, value, unit_weights, num_image_tokens=num_image_tokens, **options
    )
    wide = [None if tensor is None else tensor.double() for tensor in (query, key, value, unit_weights)]
    expected_out, expected_mass, expected_log_sum_exp = reference.joint_attention(
        *wide, num_image_tokens=num_image_tokens, **options
    )
    assert out.dtype == query.dtype and out.transpose(1, 2).is_contiguous()
    assert relative_error(out, expected_out) < OUT_ERROR[query.dtype]
    assert log_sum_exp.dtype == torch.float32
    torch.testing.assert_close(log_sum_exp.double(), expected_log_sum_exp, rtol=1e-5, atol=1e-5)
    if unit_weights is None:
        assert mass is None
        return
    assert mass is not None and expected_mass is not None and mass.dtype == torch.float32
    assert relative_error(mass, expected_mass) < MASS_ERROR[query.dtype]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(("image", "text"), [(1, 1), (16, 1), (1, 16), (21, 11), (33, 32), (48, 19)])
def test_awkward_lengths_agree_with_the_reference(image: int, text: int, text_first: bool, direction: str) -> None:
    check(*inputs(image, text, heads=1), num_image_tokens=image, text_first=text_first, direction=direction)


@pytest.mark.parametrize("text_first", [False, True])
def test_the_length_of_a_real_prompt_and_image(text_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_kernels, "configuration_for", lambda *_: Configuration(256, 256, 4, 2))
    check(*inputs(1024, 205, heads=1, units=8), num_image_tokens=1024, text_first=text_first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 17])
def test_image_only_attention_agrees_with_the_reference(tokens: int, dtype: torch.dtype) -> None:
    query, key, value, _ = inputs(tokens, 0, dtype=dtype)
    check(query, key, value, None, num_image_tokens=tokens)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("units", [1, pytest.param(8, marks=pytest.mark.exhaustive), 16, 17, 33])
def test_any_number_of_units_agrees_with_the_reference(units: int, dtype: torch.dtype, direction: str) -> None:
    query, key, value, unit_weights = inputs(35, 18, units=units, dtype=dtype, heads=1)
    check(query, key, value, unit_weights, num_image_tokens=35, direction=direction)


def test_more_units_than_one_program_holds() -> None:
    check(*inputs(20, 6, units=70, heads=2), num_image_tokens=20)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [13, 32, 64, 96, 128])
def test_every_head_dimension_agrees_with_the_reference(dim: int, dtype: torch.dtype) -> None:
    for direction in DIRECTIONS:
        check(*inputs(33, 5, dim=dim, dtype=dtype, heads=1), num_image_tokens=33, direction=direction)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("text", [1, 16, 37])
def test_cross_attention_agrees_with_the_reference(text: int, dtype: torch.dtype) -> None:
    query = inputs(37, 0, dtype=dtype)[0]
    _, key, value, unit_weights = inputs(0, text, dtype=dtype)
    for units in (unit_weights, torch.cat([unit_weights] * 6, dim=2), None):
        check(query, key, value, units, num_image_tokens=37)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("unit_dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_unit_weights_of_any_dtype_and_size(unit_dtype: torch.dtype, direction: str) -> None:
    query, key, value, unit_weights = inputs(18, 7, units=4, dtype=torch.float16, heads=1)
    scaled = (unit_weights.double() * torch.tensor([1e-4, 1.0, 6e4, 0.3], dtype=torch.float64, device=DEVICE)).to(
        unit_dtype
    )
    options: dict[str, Any] = {"num_image_tokens": 18, "text_first": False, "scale": 0.2}
    _, mass, _ = triton_kernels.joint_attention(query, key, value, scaled, rows=(0, 1), direction=direction, **options)
    wide = [tensor.double() for tensor in (query, key, value, scaled)]
    _, expected, _ = reference.joint_attention(*wide, rows=(0, 1), direction=direction, **options)
    assert mass is not None and expected is not None
    for k in range(4):
        assert relative_error(mass[..., k], expected[..., k]) < MASS_ERROR[query.dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_strides_are_read_and_written_in_place(dtype: torch.dtype) -> None:
    tensors = inputs(21, 11, units=8, dtype=dtype)
    fused = torch.stack(tensors[:3], dim=2).permute(0, 3, 1, 2, 4).contiguous().permute(3, 0, 2, 1, 4)
    units_last = tensors[3].transpose(1, 2).contiguous().transpose(1, 2)
    wide_units = torch.cat([tensors[3], tensors[3]], dim=2)[..., :8]
    dim_first = [tensor.transpose(1, 3).contiguous().transpose(1, 3) for tensor in tensors[:3]]
    every_other = [torch.stack([tensor, -tensor], dim=-1)[..., 0] for tensor in tensors[:3]]
    for qkv, units in (
        (fused.unbind(0), units_last),
        (dim_first, wide_units),
        (every_other, tensors[3][:, :, ::2]),
        ([tensor.contiguous() for tensor in tensors[:3]], tensors[3]),
    ):
        check(*qkv, units, num_image_tokens=21)
    check(*dim_first, units_last, num_image_tokens=21, direction="text_to_image")


@pytest.mark.parametrize("far", range(4), ids=["query", "key", "value", "unit weights"])
def test_strides_beyond_32_bits_are_read(far: int) -> None:
    """Of the memory between the tokens none is touched, so none is used."""
    tensors = list(inputs(10, 10, units=17, heads=1, dtype=torch.bfloat16))
    dense = tensors[far].to(torch.bfloat16)
    stride = 2**28
    memory = torch.empty((dense.shape[-2] - 1) * stride + dense.shape[-1], dtype=torch.bfloat16, device=DEVICE)
    tensors[far] = memory.as_strided(dense.shape, (0,) * (dense.dim() - 2) + (stride, 1)).copy_(dense)
    for direction in DIRECTIONS:
        check(*tensors, num_image_tokens=10, direction=direction)


def test_an_expanded_batch_is_read_through_its_strides() -> None:
    query, key, value, unit_weights = inputs(21, 11)
    expanded = [tensor.expand(2, -1, -1, -1) for tensor in (query, key, value)]
    check(*expanded, unit_weights.expand(2, -1, -1), num_image_tokens=21)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("rows", [(0, 1), (1, 3), pytest.param((2, 3), marks=pytest.mark.exhaustive)])
def test_rows_without_units_have_the_same_output_and_no_mass(rows: tuple[int, int], direction: str) -> None:
    query, key, value, unit_weights = inputs(21, 11, batch=3)
    options = {"num_image_tokens": 21, "direction": direction, "backend": "triton"}
    check(query, key, value, unit_weights[slice(*rows)], num_image_tokens=21, rows=rows, direction=direction)
    plain, _ = joint_attention(query, key, value, num_image_tokens=21, backend="triton")
    out, mass = joint_attention(query, key, value, unit_weights, **options)
    part_out, part_mass = joint_attention(query, key, value, unit_weights[slice(*rows)], rows=rows, **options)
    assert torch.equal(out, plain) and torch.equal(part_out, plain)
    assert torch.equal(part_mass, mass[slice(*rows)])


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_masses_of_a_partition_sum_to_the_mass_of_the_text(dtype: torch.dtype, text_first: bool) -> None:
    query, key, value, _ = inputs(21, 19, dtype=dtype)
    partition = F.one_hot(torch.arange(19, device=DEVICE) % 16, 16).float()[None]
    options = {"num_image_tokens": 21, "text_first": text_first, "backend": "triton"}
    _, mass = joint_attention(query, key, value, partition, **options)
    _, text_mass = joint_attention(query, key, value, torch.ones(1, 19, 1, device=DEVICE), **options)
    torch.testing.assert_close(mass.sum(-1, keepdim=True), text_mass, rtol=1e-5, atol=1e-6)
    _, transposed = joint_attention(
        query, key, value, torch.ones(1, 19, 1, device=DEVICE), direction="text_to_image", **options
    )
    total = float(transposed.sum())
    assert 0 < total < 19


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_does_not_depend_on_its_batch_bit_for_bit(dtype: torch.dtype, direction: str) -> None:
    query, key, value, unit_weights = inputs(19, 9, batch=3, units=5, dtype=dtype)
    options = {"num_image_tokens": 19, "direction": direction, "backend": "triton"}
    out, mass = joint_attention(query, key, value, unit_weights, **options)
    for chosen in ([1], [2, 0]):
        part_out, part_mass = joint_attention(
            query[chosen], key[chosen], value[chosen], unit_weights[chosen], **options
        )
        assert torch.equal(part_out, out[chosen]) and torch.equal(part_mass, mass[chosen])


def own_tokens(tensor: Tensor, num_text: int, length: int, text_first: bool) -> Tensor:
    """[heads, N, D] of a sample without the text tokens from `length` on."""
    if text_first:
        return torch.cat([tensor[:, :length], tensor[:, num_text:]], dim=1)
    return tensor[:, : tensor.shape[1] - num_text + length]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("block_n", "direction", "units", "text_first"),
    [
        (64, "image_to_text", 17, False),
        (64, "image_to_text", 3, True),
        (64, "text_to_image", 3, False),
        pytest.param(16, "image_to_text", 3, False, marks=pytest.mark.exhaustive),
        pytest.param(16, "text_to_image", 3, True, marks=pytest.mark.exhaustive),
    ],
)
def test_rows_of_unequal_length_are_the_rows_alone_bit_for_bit(
    block_n: int, direction: str, units: int, text_first: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(triton_kernels, "configuration_for", lambda *_: Configuration(32, block_n, 4, 2))
    image, text, lengths = 36, 100, [100, 0, 83, 5]
    query, key, value, unit_weights = inputs(image, text, dim=16, heads=1, batch=4, units=units, dtype=dtype)
    options: dict[str, Any] = {"num_image_tokens": image, "text_first": text_first}
    captured: dict[str, Any] = {**options, "scale": 0.3, "direction": direction}
    limited = {"text_lengths": torch.tensor(lengths, device=DEVICE), "rows": (1, 4)}
    check(query, key, value, unit_weights[1:], **captured, **limited)
    out, mass, log_sum_exp = triton_kernels.joint_attention(query, key, value, unit_weights[1:], **captured, **limited)
    # The interpreter multiplies blocks by NumPy's BLAS. On some processors a row's last bits depend on its place in the
    # block, which text before the image moves.
    exact = {} if DEVICE.type == "cpu" and text_first else {"rtol": 0, "atol": 0}
    same = partial(torch.testing.assert_close, **exact)
    for row, length in enumerate(lengths):
        own = [own_tokens(tensor[row], text, length, text_first)[None] for tensor in (query, key, value)]
        weights = unit_weights[row : row + 1, :length] if row and length else None
        alone = triton_kernels.joint_attention(*own, weights, **captured, rows=(0, 1))
        same(own_tokens(out[row], text, length, text_first), alone[0][0])
        same(own_tokens(log_sum_exp[row, ..., None], text, length, text_first)[..., 0], alone[2][0])
        if row:
            assert mass is not None
            same(mass[row - 1], torch.zeros_like(mass[0]) if alone[1] is None else alone[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_attention_of_rows_of_unequal_length(dtype: torch.dtype) -> None:
    query = inputs(37, 0, batch=2, dtype=dtype)[0]
    _, key, value, unit_weights = inputs(0, 40, batch=2, dtype=dtype)
    lengths = torch.tensor([[40, 0], [21, 0]], dtype=torch.int32, device=DEVICE)[:, 0]
    check(query, key, value, unit_weights, num_image_tokens=37, text_lengths=lengths)
    for units in (unit_weights, None):
        out, _ = joint_attention(
            query,
            key,
            value,
            units,
            num_image_tokens=37,
            text_lengths=lengths,
            implementation="fused",
            backend="triton",
        )
        alone, _ = joint_attention(
            query[1:], key[1:, :, :21], value[1:, :, :21], num_image_tokens=37, implementation="fused", backend="triton"
        )
        assert torch.equal(out[1:], alone)


@pytest.mark.parametrize("dtype", DTYPES)
def test_huge_logits_do_not_overflow(dtype: torch.dtype) -> None:
    query, key, value, _ = inputs(21, 11, dtype=dtype)
    for direction in DIRECTIONS:
        out, mass = joint_attention(
            query * 200,
            key * 200,
            value,
            torch.ones(1, 11, 1, device=DEVICE),
            num_image_tokens=21,
            direction=direction,
            backend="triton",
        )
        assert torch.isfinite(out).all() and torch.isfinite(mass).all()
        assert mass.min() >= 0 and mass.max() <= (1 if direction == "image_to_text" else 11) * 1.004


def large_logits(magnitude: float, dtype: torch.dtype) -> tuple[tuple[Tensor, ...], float]:
    """query, key, value of logits that are exact in every format and often equal, some rows of one sign; a scale."""
    query, key, value, _ = inputs(40, 11)
    query, key = (query * 2).round(), (key * 2).round()
    key[..., 0] = 1
    query[:, :, ::3, 0], query[:, :, 1::3, 0], query[:, :, 2] = -400, 400, 0
    # In the numbers as far as float16 goes, and in the scale.
    times = 2.0**4 if dtype == torch.float16 else magnitude
    return ((query * times).to(dtype), key.to(dtype), value.to(dtype)), 0.125 * magnitude / times


@pytest.mark.parametrize("magnitude", [2.0**23, 2.0**32, 2.0**33, 2.0**100])
def test_attention_in_float32_is_exact_however_large_the_logits(magnitude: float) -> None:
    qkv, scale = large_logits(magnitude, torch.float32)
    check(*qkv, torch.ones(1, 11, 1, device=DEVICE), num_image_tokens=40, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES[1:])
@pytest.mark.parametrize("magnitude", [2.0**20, 2.0**23, 2.0**33, 2.0**100])
def test_attention_in_16_bits_is_exact_or_nan_by_the_row_however_large_the_logits(
    magnitude: float, dtype: torch.dtype
) -> None:
    """Triton's interpreter rounds a fused multiply-add once, as GPUs do, from version 3.9 on."""
    qkv, scale = large_logits(magnitude, dtype)
    units = torch.ones(1, 11, 1, device=DEVICE)
    options: dict[str, Any] = {"num_image_tokens": 40, "text_first": False, "scale": scale, "rows": (0, 1)}
    outputs = triton_kernels.joint_attention(*qkv, units, **options)
    out, mass, log_sum_exp = reference.joint_attention(*(tensor.double() for tensor in (*qkv, units)), **options)
    # A sum of at most 51 ones beside so large a maximum is nothing.
    shown = log_sum_exp.abs() / math.log(2) >= triton_kernels.LARGEST_LOGIT.value
    assert shown.any() == (magnitude > 2.0**20) and not shown.all()
    rows = [(outputs[0], out, shown), (outputs[1], mass, shown[:, :, :40].any(1)), (outputs[2], log_sum_exp, shown)]
    for (found, expected, hidden), error in zip(rows, (OUT_ERROR[dtype], MASS_ERROR[dtype], 1e-5), strict=True):
        assert found[hidden].isnan().all() and found[~hidden].isfinite().all()
        assert relative_error(found[~hidden], expected[~hidden]) < error


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("magnitude", [2.0**23, 2.0**28, 2.0**33, 2.0**100])
def test_probabilities_from_a_log_sum_exp_do_not_overflow(magnitude: float, direction: str) -> None:
    query, key, value, _ = inputs(40, 11)
    query[:, :, ::3, 0], query[:, :, 1::3, 0], key[..., 0] = -400, 400, 1
    units = torch.ones(1, 11, triton_kernels.MAX_FUSED_UNITS + 1, device=DEVICE)
    _, mass = joint_attention(
        query * magnitude, key, value, units, num_image_tokens=40, direction=direction, backend="triton"
    )
    assert mass.min() >= 0 and mass.max() <= (1 if direction == "image_to_text" else 11)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("units", [3, 17])
def test_logits_far_below_zero_keep_padding_out(units: int, direction: str) -> None:
    query, key, value, unit_weights = inputs(21, 11, units=units, heads=1)
    check(query + 2, key - 2, value, unit_weights, num_image_tokens=21, direction=direction)


def test_non_finite_input_shows_where_it_reaches_and_nowhere_else() -> None:
    query, key, value, unit_weights = inputs(21, 11, batch=2)
    query[0, 1, 5, 2] = float("nan")
    key[1, 0, 25, 0] = float("nan")
    out, mass = joint_attention(query, key, value, unit_weights, num_image_tokens=21, backend="triton")
    untouched = torch.arange(21, device=DEVICE) != 5
    assert out[0, 1, 5].isnan().all() and mass[0, 5].isnan().all()
    assert out[0, 0].isfinite().all() and mass[0, untouched].isfinite().all()
    assert not out[1, 0].isfinite().any() and not mass[1].isfinite().any()
    assert out[1, 1].isfinite().all()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_gradients_are_those_of_scaled_dot_product_attention(dtype: torch.dtype, error: float) -> None:
    query, key, value, unit_weights = inputs(21, 11, dtype=dtype)
    leaves = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
    out, mass = joint_attention(*leaves, unit_weights, num_image_tokens=21, scale=0.3, backend="triton")
    assert not mass.requires_grad
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(DEVICE)
    wide = [tensor.detach().double().requires_grad_() for tensor in leaves]
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*wide, scale=0.3), wide, grad.double())
    for gradient, wanted in zip(torch.autograd.grad(out, leaves, grad.to(dtype)), expected, strict=True):
        assert gradient.dtype == dtype
        assert relative_error(gradient, wanted) < error


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("units", [0, 3])
def test_opcheck(units: int, direction: str) -> None:
    query, key, value, unit_weights = inputs(6, 3, batch=2, dim=8, heads=1)
    leaves = [tensor.requires_grad_() for tensor in (query, key, value)]
    chosen = unit_weights[1:] if units else None
    arguments = (*leaves, chosen, 6, False, 0.4, 1 if units else 0, 2, direction, "triton")
    torch.library.opcheck(OPERATOR, arguments)


def test_a_layer_compiles_without_a_graph_break() -> None:
    torch._dynamo.reset()
    query, key, value, unit_weights = inputs(6, 3, dim=8, heads=1)

    def layer(query: Tensor, mass: Tensor) -> tuple[Tensor, Tensor | None]:
        return joint_attention(query, key, value, unit_weights, num_image_tokens=6, mass=mass, backend="triton")

    compiled, plain = torch.zeros(2, 1, 6, 3, device=DEVICE)
    out, _ = torch.compile(layer, fullgraph=True, backend="aot_eager")(query, compiled)
    expected, _ = layer(query, plain)
    assert torch.equal(out, expected) and torch.equal(compiled, plain) and plain.count_nonzero() > 0


def test_one_buffer_over_layers_holds_their_weighted_sum() -> None:
    layers = [inputs(21, 11 + seed) for seed in range(2)]
    options = {"num_image_tokens": 21, "backend": "triton"}
    buffer = torch.zeros(1, 21, 9, device=DEVICE)
    view = buffer[..., 1:7:2]
    for layer in layers:
        _, returned = joint_attention(*layer, mass=view, layer_weight=0.25, **options)
        assert returned is view
    single = [joint_attention(*layer, layer_weight=0.25, **options)[1] for layer in layers]
    torch.testing.assert_close(view, single[0] + single[1], rtol=1e-6, atol=0)
    assert buffer[..., ::2].count_nonzero() == 0


def test_float64_is_computed_by_the_reference() -> None:
    query, key, value, unit_weights = (tensor.double() for tensor in inputs(9, 4))
    outputs = [
        joint_attention(query, key, value, unit_weights, num_image_tokens=9, backend=backend)
        for backend in ("triton", "reference")
    ]
    assert torch.equal(outputs[0][0], outputs[1][0]) and torch.equal(outputs[0][1], outputs[1][1])


def test_a_head_dimension_beyond_the_table_says_so() -> None:
    query, key, value, _ = inputs(5, 2, dim=129)
    with pytest.raises(RuntimeError, match="joint_attention with head dimension 129 has no triton kernel"):
        joint_attention(query, key, value, num_image_tokens=5, backend="triton")
