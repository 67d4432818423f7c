"""What attention_mass computes: the definition in float64, and the properties of docs/method.md, section 6.

The Triton kernels run on a GPU with their own tiles where there is one, elsewhere interpreted with small ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from star_kernels import attention_mass, joint_attention
from star_kernels.attention.table import Configuration

IMAGE, TEXT = 33, 21
OPERATOR = torch.ops.star_kernels.attention_mass.default
BACKENDS = ["reference", "cpu", "triton"]
DIRECTIONS = ["image_to_text", "text_to_image"]
MASS_ERROR = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


@pytest.fixture(autouse=True)
def _device_and_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    device = "cpu"
    if hasattr(request.node, "callspec") and request.node.callspec.params.get("backend") == "triton":
        mass_kernels = pytest.importorskip("star_kernels.attention.mass_kernels")
        if torch.cuda.is_available():
            device = "cuda"
        else:
            monkeypatch.setattr(mass_kernels, "configuration_for", lambda *_: Configuration(32, 16, 4, 2))
    with torch.device(device):
        yield


def sequence(
    image: int = IMAGE,
    text: int = TEXT,
    batch: int = 2,
    heads: int = 4,
    dim: int = 16,
    units: int = 4,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """query and key [B, heads, image + text, D] with their tokens outside their heads in memory, and unit weights."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    shape = (batch, image + text, heads, dim)
    query, key = (
        torch.randn(shape, generator=generator, device="cpu", dtype=torch.float64).to(device, dtype).transpose(1, 2)
        for _ in range(2)
    )
    unit_weights = torch.rand(batch, text, units, generator=generator, device="cpu", dtype=torch.float64)
    return query, key, unit_weights.to(device, torch.float64 if dtype == torch.float64 else torch.float32)


def log_sum_exps(query: Tensor, key: Tensor, scale: float | None = None) -> Tensor:
    """[B, heads, N], computed in float64, in float32 unless the queries are float64."""
    scale = query.shape[3] ** -0.5 if scale is None else scale
    log_sum_exp = (scale * query.double() @ key.double().transpose(-1, -2)).logsumexp(-1)
    return log_sum_exp if query.dtype == torch.float64 else log_sum_exp.float()


def sides(query: Tensor, key: Tensor, direction: str, image: int = IMAGE) -> tuple[Tensor, Tensor, Tensor]:
    """Those queries and keys of a sequence, image first, whose pairs the mass is made of, and their log-sum-exp."""
    images, texts = slice(0, image), slice(image, None)
    queries, keys = (images, texts) if direction == "image_to_text" else (texts, images)
    return query[:, :, queries], key[:, :, keys], log_sum_exps(query, key)[:, :, queries]


def definition(query: Tensor, key: Tensor, unit_weights: Tensor, direction: str, image: int = IMAGE) -> Tensor:
    """M or T of a sequence in float64, letter by letter: from the softmax over all keys."""
    scale = query.shape[3] ** -0.5
    p = (scale * query.double() @ key.double().transpose(-1, -2)).softmax(-1).mean(1)
    if direction == "image_to_text":
        return torch.einsum("bij,bjk->bik", p[:, :image, image:], unit_weights.double())
    return torch.einsum("bji,bjk->bik", p[:, image:, :image], unit_weights.double())


def relative_error(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("units", [1, 8, 17, 40])
def test_mass_agrees_with_the_softmax_in_float64(units: int, dtype: torch.dtype, direction: str, backend: str) -> None:
    query, key, unit_weights = sequence(units=units, dtype=dtype)
    queries, keys, log_sum_exp = sides(query, key, direction)
    mass = attention_mass(queries, keys, unit_weights, log_sum_exp, direction=direction, backend=backend)
    assert mass.dtype == torch.float32 and mass.shape == (2, IMAGE, units)
    assert relative_error(mass, definition(query, key, unit_weights, direction)) < MASS_ERROR[dtype]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_float64_stays_float64(direction: str) -> None:
    query, key, unit_weights = sequence(dtype=torch.float64)
    queries, keys, log_sum_exp = sides(query, key, direction)
    for backend in ("auto", "reference"):
        mass = attention_mass(queries, keys, unit_weights, log_sum_exp, direction=direction, backend=backend)
        assert mass.dtype == torch.float64
        assert relative_error(mass, definition(query, key, unit_weights, direction)) < MASS_ERROR[torch.float64]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_mass_is_that_of_joint_attention(direction: str, backend: str) -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, direction)
    mass = attention_mass(queries, keys, unit_weights, log_sum_exp, direction=direction, backend=backend)
    _, expected = joint_attention(query, key, key, unit_weights, num_image_tokens=IMAGE, direction=direction)
    torch.testing.assert_close(mass, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", BACKENDS)
def test_masses_of_a_partition_of_the_text_sum_to_its_mass_and_the_rest_is_image_mass(backend: str) -> None:
    query, key, _ = sequence()
    queries, keys, log_sum_exp = sides(query, key, "image_to_text")
    owner = torch.arange(2 * TEXT).view(2, TEXT) % 5
    mass = attention_mass(queries, keys, F.one_hot(owner, 5).float(), log_sum_exp, backend=backend)
    image = attention_mass(queries, key[:, :, :IMAGE], torch.ones(2, IMAGE, 1), log_sum_exp, backend=backend)
    torch.testing.assert_close(mass.sum(-1) + image[..., 0], torch.ones(2, IMAGE), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_any_strides_of_the_log_sum_exp_give_the_same_bits(direction: str, backend: str) -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, direction)
    options: dict[str, Any] = {"direction": direction, "backend": backend}
    expected = attention_mass(queries, keys, unit_weights, log_sum_exp.contiguous(), **options)
    of_cudnn = log_sum_exp.contiguous()[..., None].squeeze(-1)
    of_diffusers = log_sum_exp.transpose(1, 2).contiguous().transpose(1, 2)
    every_other = torch.stack([log_sum_exp, -log_sum_exp], -1)[..., 0]
    for view in (log_sum_exp, of_cudnn, of_diffusers, every_other):
        assert torch.equal(attention_mass(queries, keys, unit_weights, view, **options), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_strides_of_the_other_tensors_do_not_matter(direction: str, backend: str) -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, direction)
    options: dict[str, Any] = {"direction": direction, "backend": backend}
    strided = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (queries, keys)]
    units_first = unit_weights.transpose(1, 2).contiguous().transpose(1, 2)
    expected = attention_mass(queries.contiguous(), keys.contiguous(), unit_weights, log_sum_exp, **options)
    mass = attention_mass(*strided, units_first, log_sum_exp, **options)
    torch.testing.assert_close(mass, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_padding_behind_text_lengths_changes_no_bit(
    direction: str, lengths_dtype: torch.dtype, dtype: torch.dtype, backend: str
) -> None:
    lengths = [TEXT, 0, 1, 17]
    query, key, unit_weights = sequence(batch=4, dtype=dtype)
    queries, keys, log_sum_exp = (t.clone() for t in sides(query, key, direction))
    options: dict[str, Any] = {"direction": direction, "backend": backend}
    text_sides = (keys,) if direction == "image_to_text" else (queries, log_sum_exp)
    for row, length in enumerate(lengths):
        for tensor in text_sides:
            tensor[row, :, length:] = float("nan")
    text_lengths = torch.tensor(lengths, dtype=lengths_dtype)
    mass = attention_mass(queries, keys, unit_weights, log_sum_exp, text_lengths=text_lengths, **options)
    every_other = torch.stack([text_lengths, TEXT - text_lengths], -1)[:, 0]
    assert torch.equal(
        attention_mass(queries, keys, unit_weights, log_sum_exp, text_lengths=every_other, **options), mass
    )
    assert mass[1].count_nonzero() == 0
    for row in (0, 2, 3):
        length = lengths[row]
        alone = [t[row : row + 1] for t in (queries, keys, log_sum_exp)]
        trimmed = [t[:, :, :length] if t.shape[2] == TEXT else t for t in alone]
        query, key, normaliser = (t.clone() for t in trimmed)
        one = attention_mass(query, key, unit_weights[row : row + 1, :length], normaliser, **options)
        assert torch.equal(one[0], mass[row])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "image", "text", "dim", "units"), [(1, 1, 1, 8, 1), (4, 40, 19, 24, 17)])
def test_a_row_does_not_depend_on_its_batch_bit_for_bit(
    heads: int, image: int, text: int, dim: int, units: int, dtype: torch.dtype, direction: str, backend: str
) -> None:
    query, key, unit_weights = sequence(image, text, 3, heads, dim, units, dtype)
    tensors = sides(query, key, direction, image)
    options: dict[str, Any] = {"direction": direction, "backend": backend}
    queries, keys, log_sum_exp = tensors
    mass = attention_mass(queries, keys, unit_weights, log_sum_exp, **options)
    for chosen in ([0], [1], [2, 0], [1, 2, 1]):
        part = [t[chosen].clone() for t in (queries, keys, unit_weights, log_sum_exp)]
        assert torch.equal(attention_mass(*part, **options), mass[chosen])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_buffer_over_layers_holds_their_weighted_sum(backend: str) -> None:
    layers = []
    for seed in range(3):
        query, key, unit_weights = sequence(seed=seed)
        queries, keys, log_sum_exp = sides(query, key, "image_to_text")
        layers.append((queries, keys, unit_weights, log_sum_exp))
    wide = torch.zeros(2, IMAGE, 9)
    buffer = wide[..., 1:9:2]
    for layer in layers:
        assert attention_mass(*layer, mass=buffer, layer_weight=0.25, backend=backend) is buffer
    single = [attention_mass(*layer, layer_weight=0.25, backend=backend) for layer in layers]
    torch.testing.assert_close(buffer, torch.stack(single).sum(0), rtol=1e-6, atol=0)
    assert wide[..., ::2].count_nonzero() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_log_sum_exp_that_rounding_has_lowered_gives_no_probability_above_one(direction: str, backend: str) -> None:
    query, key, _ = sequence()
    queries, keys, log_sum_exp = sides(300 * query, 300 * key, direction)
    lowered = log_sum_exp - 1e-4 * log_sum_exp.abs()
    mass = attention_mass(queries, keys, torch.ones(2, TEXT, 1), lowered, direction=direction, backend=backend)
    assert torch.isfinite(mass).all() and mass.min() >= 0 and mass.max() <= TEXT


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_input_shows_where_it_reaches_and_nowhere_else(backend: str) -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, "image_to_text")
    queries, keys, log_sum_exp = queries.clone(), keys.clone(), log_sum_exp.clone()
    queries[0, 1, 5, 2] = float("nan")
    log_sum_exp[0, 2, 7] = float("nan")
    keys[1, 0, 4, 0] = float("nan")
    mass = attention_mass(queries, keys, unit_weights, log_sum_exp, backend=backend)
    touched = torch.zeros(2, IMAGE, dtype=torch.bool)
    touched[0, [5, 7]] = True
    touched[1] = True
    assert torch.equal(mass.isnan().all(-1), touched) and torch.equal(mass.isnan().any(-1), touched)


def test_autocast_casts_queries_and_keys() -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, "image_to_text")
    expected = attention_mass(queries.bfloat16(), keys.bfloat16(), unit_weights, log_sum_exp)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(attention_mass(queries, keys, unit_weights, log_sum_exp), expected)


def test_mass_carries_no_gradient() -> None:
    query, key, unit_weights = sequence()
    tensors = [t.clone().requires_grad_() for t in sides(query, key, "image_to_text")]
    buffer = torch.zeros(2, IMAGE, 4)
    mass = attention_mass(*tensors[:2], unit_weights.requires_grad_(), tensors[2], mass=buffer)
    assert mass is buffer and not mass.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("lengths", [None, [21, 4]])
def test_opcheck(lengths: list[int] | None, direction: str, backend: str) -> None:
    query, key, unit_weights = sequence()
    queries, keys, log_sum_exp = sides(query, key, direction)
    text_lengths = None if lengths is None else torch.tensor(lengths)
    arguments = (queries, keys, unit_weights, log_sum_exp, 0.25, direction, text_lengths, backend)
    torch.library.opcheck(OPERATOR, arguments)
    leaves = (queries.clone().requires_grad_(), *arguments[1:])
    torch.library.opcheck(OPERATOR, leaves)


def test_torch_compile_traces_it_without_a_graph_break() -> None:
    def model(query: Tensor, key: Tensor, unit_weights: Tensor, lengths: Tensor, buffer: Tensor) -> Tensor:
        log_sum_exp = (0.25 * query @ key.transpose(-1, -2)).logsumexp(-1)
        return attention_mass(
            query[:, :, :IMAGE],
            key[:, :, IMAGE:],
            unit_weights,
            log_sum_exp[:, :, :IMAGE],
            text_lengths=lengths,
            mass=buffer,
            layer_weight=0.5,
        )

    query, key, unit_weights = sequence()
    lengths = torch.tensor([21, 4])
    eager, compiled = torch.zeros(2, IMAGE, 4), torch.zeros(2, IMAGE, 4)
    model(query, key, unit_weights, lengths, eager)
    torch.compile(model, fullgraph=True, backend="aot_eager")(query, key, unit_weights, lengths, compiled)
    torch.testing.assert_close(compiled, eager)
