"""record_attention in models whose prompts differ in length: Qwen-Image masks its text, Z-Image pads behind it.

The backend set in diffusers computes the output, and the mass is that of a softmax over the keys that take part.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel, ZImageTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_qwenimage, transformer_z_image
from peft import LoraConfig
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from star_kernels.recorder import record_attention, recorder

LENGTHS, UNITS, LAYERS = (5, 37), 3, 3
HEIGHT, WIDTH, CHANNELS, TEXT_DIM = 4, 5, 4, 12
IMAGE = HEIGHT * WIDTH
# What Z-Image fills image and text up to.
FILLED = 32
Registry = attention_dispatch._AttentionBackendRegistry


@dataclasses.dataclass(frozen=True)
class Case:
    """A model, how it is called for prompts of some lengths, and where its sequence has image and text."""

    module: ModuleType
    build: Callable[..., Any]
    call: Callable[..., Tensor]
    attention: Callable[[Any], list[Any]]
    image: slice
    text_begin: int


def with_random_norms(model: Any) -> Any:
    # Norm weights of one and pads of zero would hide that they are left out, or applied to the wrong tensor.
    for name, parameter in model.named_parameters():
        if "norm_" in name or "_norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
        elif "pad_token" in name:
            torch.nn.init.normal_(parameter)
    return model


def qwen_image(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    sizes = {"in_channels": 4 * CHANNELS, "out_channels": CHANNELS, "joint_attention_dim": TEXT_DIM}
    heads = {"attention_head_dim": 16, "num_attention_heads": 2, "axes_dims_rope": (4, 6, 6)}
    return with_random_norms(QwenImageTransformer2DModel(num_layers=layers, **sizes, **heads))


def z_image(layers: int = LAYERS) -> Any:
    torch.manual_seed(0)
    sizes = {"in_channels": CHANNELS, "dim": 32, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": TEXT_DIM}
    axes = {"axes_dims": [4, 6, 6], "axes_lens": [128, 32, 32]}
    return with_random_norms(ZImageTransformer2DModel(n_layers=layers, n_refiner_layers=1, **sizes, **axes))


def tensors(lengths: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Latents [B, C, 8, 10] and text [B, N_text, D]."""
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(lengths), CHANNELS, 2 * HEIGHT, 2 * WIDTH, generator=generator)
    return latents, torch.randn(len(lengths), max(lengths), TEXT_DIM, generator=generator)


def call_qwen_image(model: Any, lengths: tuple[int, ...] = LENGTHS, mask: Any = ...) -> Tensor:
    latents, text = tensors(lengths)
    packed = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).mT
    if mask is ...:
        mask = torch.arange(text.shape[1]) < torch.tensor(lengths)[:, None]
    shapes = [[(1, HEIGHT, WIDTH)]] * len(latents)
    time = torch.full((len(latents),), 0.5)
    return model(packed, text, mask, time, shapes, return_dict=False)[0]


def call_z_image(model: Any, lengths: tuple[int, ...] = LENGTHS) -> Tensor:
    latents, text = tensors(lengths)
    captions = [row[:length] for row, length in zip(text, lengths, strict=True)]
    time = torch.full((len(latents),), 0.5)
    return torch.stack(model(list(latents.unsqueeze(2).unbind()), time, captions, return_dict=False)[0])


def qwen_attention(model: Any) -> list[Any]:
    return [block.attn for block in model.transformer_blocks]


def z_attention(model: Any) -> list[Any]:
    return [block.attention for block in model.layers]


QWEN_IMAGE = Case(transformer_qwenimage, qwen_image, call_qwen_image, qwen_attention, slice(-IMAGE, None), 0)
Z_IMAGE = Case(transformer_z_image, z_image, call_z_image, z_attention, slice(0, IMAGE), FILLED)
CASES = pytest.mark.parametrize("case", [QWEN_IMAGE, Z_IMAGE], ids=["qwen_image", "z_image"])


@pytest.fixture(autouse=True)
def backend_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """model.set_attention_backend sets it as well, for every model."""
    monkeypatch.setattr(Registry, "_active_backend", Registry._active_backend)


def units_of(lengths: tuple[int, ...] = LENGTHS, tokens: int | None = None) -> Tensor:
    """Weights as TextUnits has them, of `tokens` text tokens: nothing behind a row's own prompt."""
    tokens = max(lengths) if tokens is None else tokens
    weights = torch.rand(len(lengths), tokens, UNITS, generator=torch.Generator().manual_seed(1))
    return weights * (torch.arange(tokens) < torch.tensor(lengths)[:, None])[..., None]


@contextlib.contextmanager
def dispatched(module: ModuleType) -> Iterator[list[tuple[Tensor, Tensor, Tensor | None]]]:
    """Within this context the list gets queries, keys and mask of every attention of a model that is not recorded."""
    found: list[tuple[Tensor, Tensor, Tensor | None]] = []

    def spy(query: Tensor, key: Tensor, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        found.append((query.transpose(1, 2).double(), key.transpose(1, 2).double(), attn_mask))
        return attention_dispatch.dispatch_attention_fn(query, key, *args, attn_mask=attn_mask, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "dispatch_attention_fn", spy)
        yield found


def exact_masses(
    case: Case, model: Any, units: Tensor, lengths: tuple[int, ...] = LENGTHS, direction: str = "image_to_text"
) -> Tensor:
    """Per layer the mass from a softmax in float64, of the model's own queries, keys and masks, of the last rows."""
    with dispatched(case.module) as found, torch.no_grad():
        case.call(model, lengths)
    masses = []
    text = slice(case.text_begin, case.text_begin + units.shape[1])
    for query, key, mask in found[-len(case.attention(model)) :]:  # Z-Image's refiners come first
        logits = query @ key.mT / query.shape[-1] ** 0.5
        if mask is not None:
            logits = logits.masked_fill(~mask.view(len(lengths), 1, 1, -1), -torch.inf)
        probabilities = logits.softmax(-1).mean(1)[-len(units) :]
        if direction == "image_to_text":
            masses.append(probabilities[:, case.image, text] @ units.double())
        else:
            masses.append(probabilities[:, text, case.image].mT @ units.double())
    return torch.stack(masses)


def assert_mass(mass: Tensor, exact: Tensor) -> None:
    assert mass.dtype == torch.float32 and not mass.requires_grad
    torch.testing.assert_close(mass.double(), exact.mean(0), rtol=1e-5, atol=1e-7)


# The log-sum-exp of the first comes from PyTorch's operator; math has none.
@CASES
@pytest.mark.parametrize("backend", ["native", "_native_math"])
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
@torch.no_grad()
def test_prompts_of_unequal_lengths_keep_the_output_bit_for_bit_and_give_the_mass_of_a_softmax(
    case: Case, monkeypatch: pytest.MonkeyPatch, backend: str, direction: Any
) -> None:
    model, units = case.build(), units_of()
    own = [attention.processor for attention in case.attention(model)]
    with attention_dispatch.attention_backend(backend):
        expected = case.call(model)
        exact = exact_masses(case, model, units, direction=direction)
        if backend == "native":
            monkeypatch.setattr(recorder, "joint_attention", None)  # a pass of our own would call it
        with record_attention(model, units, direction=direction) as recording:
            output = case.call(model)
    assert torch.equal(output, expected) and recording.implementation == f"diffusers:{backend}"
    assert_mass(recording.mass, exact)
    assert all(a.processor is b for a, b in zip(case.attention(model), own, strict=True))


@CASES
@pytest.mark.parametrize("lengths", [(37, 37), (5,), (20, 32)], ids=str)
@torch.no_grad()
def test_prompts_of_like_lengths_are_recorded(case: Case, lengths: tuple[int, ...]) -> None:
    """With a mask of Qwen-Image that leaves nothing out, and none of Z-Image."""
    model, units = case.build(), units_of(lengths)
    expected = case.call(model, lengths)
    with record_attention(model, units) as recording:
        assert torch.equal(case.call(model, lengths), expected)
    assert_mass(recording.mass, exact_masses(case, model, units, lengths))


@torch.no_grad()
def test_text_without_a_mask_takes_part_as_a_whole() -> None:
    model, units, plain = qwen_image(), units_of((37, 37)), functools.partial(call_qwen_image, mask=None)
    case = dataclasses.replace(QWEN_IMAGE, call=plain)
    with record_attention(model, units) as recording:
        plain(model)
    assert_mass(recording.mass, exact_masses(case, model, units))


@CASES
@torch.no_grad()
def test_rows_and_layers_are_those_that_are_asked_for(case: Case) -> None:
    """Of four rows the last two, as under guidance; a prompt of the others is the longest."""
    lengths, tokens = (70, 3, *LENGTHS), 70 if case is QWEN_IMAGE else 37
    model, units = case.build(), units_of(LENGTHS, tokens)
    with record_attention(model, units, rows=slice(2, None), layers=[2, 0]) as recording:
        case.call(model, lengths)
    assert_mass(recording.mass, exact_masses(case, model, units, lengths)[[0, 2]])


@torch.no_grad()
def test_units_may_have_places_behind_the_longest_prompt_of_z_image() -> None:
    model, units = z_image(), units_of(tokens=512)
    with record_attention(model, units) as recording:
        call_z_image(model)
    assert_mass(recording.mass, exact_masses(Z_IMAGE, model, units[:, :37]))


@CASES
def test_units_of_other_prompts_are_named(case: Case) -> None:
    message = "^units: expected weights for the 37 text tokens.*got 36"
    model = case.build()
    with record_attention(model, torch.ones(2, 36, UNITS)), pytest.raises(ValueError, match=message):
        case.call(model)


def output_and_gradients(case: Case, model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    output = case.call(model)
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return output.detach(), gradients


@CASES
@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_gradients_are_those_without_recording(case: Case, lora: bool, checkpointing: bool) -> None:
    model = case.build()
    if lora:
        model.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False))
    _, gradients = output_and_gradients(case, model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    with record_attention(model, units_of()) as recording:
        output = case.call(model)
        recording.next_step()
    # After the recording, when blocks that checkpointing runs again have their own processors back.
    output.square().mean().backward()
    assert gradients and all(torch.equal(model.get_parameter(name).grad, grad) for name, grad in gradients.items())
    assert_mass(recording.history[0], exact_masses(case, model, units_of()))


@CASES
@pytest.mark.exhaustive
@torch.no_grad()
def test_blocks_compiled_one_by_one_need_as_many_graphs_as_without_recording(case: Case) -> None:
    model, units = case.build(), units_of()
    plain = case.call(model)
    with record_attention(model, units) as expected:
        case.call(model)

    def compiled(context: Any) -> tuple[int, Any]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        for block in model.transformer_blocks if case is QWEN_IMAGE else model.layers:
            block.compile(backend=counter, fullgraph=True)
        with context as recording:
            assert torch.equal(case.call(model), plain)
        return counter.frame_count, recording

    without, _ = compiled(contextlib.nullcontext())
    graphs, recording = compiled(record_attention(model, units))
    assert graphs == without and torch.equal(recording.mass, expected.mass)


def test_a_mask_that_recording_cannot_follow_is_an_error_that_names_it() -> None:
    model = qwen_image()
    with record_attention(model, units_of()), pytest.raises(ValueError, match="^attention_mask: .*gaps"):
        call_qwen_image(model, mask=torch.arange(37).expand(2, -1) % 2 == 0)


def test_calls_of_z_image_that_recording_cannot_follow_are_errors_that_name_them() -> None:
    model = z_image()
    time, captions = torch.full((2,), 0.5), [torch.zeros(3, TEXT_DIM)] * 2
    latents = [torch.zeros(CHANNELS, 1, 8, width) for width in (8, 10)]
    with record_attention(model, units_of((3, 3))), pytest.raises(ValueError, match="^x: .*one size"):
        model(latents, time, captions)
    with record_attention(model, units_of((3, 3))), pytest.raises(ValueError, match="^x: .*several"):
        model([latents, latents], time, captions)
