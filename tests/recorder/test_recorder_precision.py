"""record_attention in a transformer with SD3.5's parts: how far it is from float64, and that the batch is no matter."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from star_kernels.attention import joint_attention
from star_kernels.recorder import recorder
from tests.tiny_models import tiny_transformer

IMAGE, TEXT, UNITS = 16, 7, 3
BACKENDS = ["reference", "cpu"]


class Call(NamedTuple):
    tensors: list[Tensor]  # query, key, value
    options: dict[str, Any]
    out: Tensor


@pytest.fixture(scope="module")
def transformer() -> Any:
    return tiny_transformer(attention_head_dim=64, caption_projection_dim=128).requires_grad_(False).eval()


def inputs(seed: int, dtype: torch.dtype, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"hidden_states": (4, 8, 8), "encoder_hidden_states": (TEXT, 12), "pooled_projections": (10,)}
    tensors = {name: torch.randn(batch, *shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return tensors | {"timestep": torch.full((batch,), 500.0)}


def run(transformer: Any, arguments: dict[str, Tensor], backend: str) -> Tensor:
    batch = len(arguments["timestep"])
    units = torch.rand(batch, TEXT, UNITS, generator=torch.Generator().manual_seed(1))
    with recorder.record_attention(transformer, units, backend=backend):
        return transformer(**arguments).sample


def attentions(
    monkeypatch: pytest.MonkeyPatch, transformer: Any, arguments: dict[str, Tensor], backend: str
) -> list[Call]:
    """What the transformer's joint attentions are called with, and return."""
    calls: list[Call] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, unit_weights: Tensor, **options: Any) -> Any:
        out, mass = joint_attention(query, key, value, unit_weights, **options)
        calls.append(Call([query, key, value], {"unit_weights": unit_weights, **options}, out))
        return out, mass

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "joint_attention", spy)
        run(transformer, arguments, backend)
    assert len(calls) == 3
    return calls


def squared_error(value: Tensor, exact: Tensor) -> float:
    return (value.double() - exact).square().sum().item()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_output_in_bfloat16_is_no_further_from_float64_than_that_of_diffusers(
    transformer: Any, backend: str
) -> None:
    half = copy.deepcopy(transformer).bfloat16()
    exact = copy.deepcopy(half).double()
    ours = theirs = 0.0
    for seed in range(24):
        arguments = inputs(seed, torch.bfloat16)
        wanted = exact(**{name: value.double() for name, value in arguments.items()}).sample
        ours += squared_error(run(half, arguments, backend), wanted)
        theirs += squared_error(half(**arguments).sample, wanted)
    # Nearly all of either is the rounding of the other layers, which any changed bit of attention reshuffles.
    assert ours**0.5 <= 1.01 * theirs**0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_attention_is_exact_to_rounding_and_in_bfloat16_no_worse_than_that_of_pytorch(
    monkeypatch: pytest.MonkeyPatch, transformer: Any, backend: str, dtype: torch.dtype
) -> None:
    model = copy.deepcopy(transformer).to(dtype)
    ours = theirs = norm = 0.0
    for seed in range(4):
        for tensors, _, out in attentions(monkeypatch, model, inputs(seed, dtype), backend):
            exact = scaled_dot_product_attention(*(tensor.double() for tensor in tensors))
            ours += squared_error(out, exact)
            theirs += squared_error(scaled_dot_product_attention(*tensors), exact)
            norm += exact.square().sum().item()
    if dtype == torch.float32:
        assert ours**0.5 <= 5e-7 * norm**0.5
    else:
        assert ours**0.5 <= 1.01 * theirs**0.5


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_attention_of_a_batch_gives_the_bits_of_its_samples_alone(
    monkeypatch: pytest.MonkeyPatch, transformer: Any, backend: str, dtype: torch.dtype
) -> None:
    calls = attentions(monkeypatch, copy.deepcopy(transformer).to(dtype), inputs(0, dtype, batch=5), backend)
    for tensors, options, out in calls:
        together = joint_attention(*tensors, **options)
        assert torch.equal(together[0], out)
        for b in range(5):
            one = slice(b, b + 1)
            own = options | {"unit_weights": options["unit_weights"][one], "rows": (0, 1)}
            alone_out, alone_mass = joint_attention(*(tensor[one] for tensor in tensors), **own)
            assert torch.equal(alone_out, out[one]) and torch.equal(alone_mass, together[1][one])
