"""record_attention in a family of its own: text before the image, no diffusers class, found by the model's name."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import star_kernels.recorder
from star_kernels.recorder import Attend, Layer, record_attention

TEXT, IMAGE, HEADS, WIDTH, UNITS = 5, 9, 2, 16, 3


class Processor:
    """Attention over text and image together, in that order."""

    def __init__(self, attend: Attend, **options: Any) -> None:
        self.attend = attend
        self.options = {"num_image_tokens": IMAGE, "text_first": True, **options}

    def __call__(self, attention: TextFirstAttention, tokens: Tensor) -> Tensor:
        query, key, value = attention.qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = self.attend(query, key, value, **self.options)
        return attention.out(out.transpose(1, 2).flatten(2))


def plain(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
    return scaled_dot_product_attention(query, key, value)


class TextFirstAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.processor: Any = Processor(plain)

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, tokens: Tensor) -> Tensor:
        return self.processor(self, tokens)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), TextFirstAttention()

    def forward(self, tokens: Tensor) -> Tensor:
        return tokens + self.attention(4 * self.norm(tokens))


class TextFirstTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.checkpoint: Any = None

    def forward(self, text: Tensor, image: Tensor) -> Tensor:
        tokens = torch.cat([text, image], 1)
        for block in self.blocks:
            tokens = block(tokens) if self.checkpoint is None else self.checkpoint(block, tokens)
        return tokens[:, TEXT:]


class TextFirst:
    def __init__(self, checkpointing: str | None) -> None:
        self.checkpointing = checkpointing

    def layers(self, model: TextFirstTransformer) -> list[Layer]:
        return [Layer(f"blocks.{i}", block.attention, block) for i, block in enumerate(model.blocks)]

    def processor(self, layer: Layer, attend: Attend) -> Processor:
        return Processor(attend)


@pytest.fixture(autouse=True)
def family(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(star_kernels.recorder.FAMILIES, "TextFirstTransformer", TextFirst("checkpoint"))


@pytest.fixture
def model() -> TextFirstTransformer:
    torch.manual_seed(0)
    return TextFirstTransformer()


def inputs() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, TEXT, WIDTH, generator=generator), torch.randn(2, IMAGE, WIDTH, generator=generator)


def unit_weights() -> Tensor:
    return torch.rand(2, TEXT, UNITS, generator=torch.Generator().manual_seed(2))


def exact_mass(model: TextFirstTransformer, text_lengths: Tensor | None = None) -> Tensor:
    """The mean over layers of P U, from the softmax P written out in float64."""
    masses = []

    def materialised(query: Tensor, key: Tensor, value: Tensor, **_: Any) -> Tensor:
        logits = query @ key.mT / query.shape[-1] ** 0.5
        if text_lengths is not None:
            logits = logits.masked_fill(~valid(text_lengths), -torch.inf)
        probabilities = logits.softmax(-1)
        masses.append(probabilities[:, :, TEXT:, :TEXT].mean(1) @ unit_weights().double())
        return probabilities @ value

    model = copy.deepcopy(model).double()
    for block in model.blocks:
        block.attention.set_processor(Processor(materialised))
    with torch.no_grad():
        model(*(tensor.double() for tensor in inputs()))
    return torch.stack(masses).mean(0)


def valid(text_lengths: Tensor) -> Tensor:
    """Which keys take part, [B, 1, 1, N]."""
    text = torch.arange(TEXT) < text_lengths[:, None]
    return torch.cat([text, text.new_ones(len(text_lengths), IMAGE)], 1)[:, None, None]


class Masked:
    """A model's own attention with masked text, of the queries, keys and values that it is called with last."""

    name = "masked"

    def __init__(self, text_lengths: Tensor, gives_log_sum_exp: bool) -> None:
        self.text_lengths, self.gives_log_sum_exp = text_lengths, gives_log_sum_exp

    def __call__(self, wants_log_sum_exp: bool) -> tuple[Tensor, Tensor | None]:
        query, key, value = self.tensors
        mask = valid(self.text_lengths)
        out = scaled_dot_product_attention(query, key, value, attn_mask=mask)
        if not (wants_log_sum_exp and self.gives_log_sum_exp):
            return out, None
        return out, (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("own", [None, "with its log-sum-exp", "without"])
@pytest.mark.parametrize("rows", [(0, 2), (1, 2)])
@torch.no_grad()
def test_text_that_is_masked_takes_no_part_whatever_computes_the_attention(
    model: TextFirstTransformer, monkeypatch: pytest.MonkeyPatch, own: str | None, rows: tuple[int, int]
) -> None:
    lengths = torch.tensor([2, 4])
    attention = None if own is None else Masked(lengths, own == "with its log-sum-exp")

    def processor(layer: Layer, attend: Attend) -> Processor:
        def attend_masked(*tensors: Tensor, **options: Any) -> Tensor:
            if attention is not None:
                attention.tensors = tensors
            return attend(*tensors, **options)

        return Processor(attend_masked, text_lengths=lengths, own=attention)

    family = TextFirst("checkpoint")
    family.processor = processor
    monkeypatch.setitem(star_kernels.recorder.FAMILIES, "TextFirstTransformer", family)
    with record_attention(model, unit_weights()[slice(*rows)], rows=rows) as recorder:
        model(*inputs())
    exact = exact_mass(model, lengths)[slice(*rows)]
    torch.testing.assert_close(recorder.mass.double(), exact, rtol=1e-5, atol=1e-6)
    assert recorder.implementation == ("fused" if own is None else "masked")


@torch.no_grad()
def test_output_is_unchanged_and_mass_is_that_of_a_materialised_softmax(model: TextFirstTransformer) -> None:
    own = [block.attention.processor for block in model.blocks]
    expected = model(*inputs())
    with record_attention(model, unit_weights()) as recorder:
        recorded = model(*inputs())
        with pytest.raises(RuntimeError, match=r"^blocks\.0: expected one forward pass"):
            model(*inputs())
    with record_attention(model, None):
        unrecorded = model(*inputs())
    torch.testing.assert_close(recorded, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(unrecorded, recorded)
    torch.testing.assert_close(recorder.mass.double(), exact_mass(model), rtol=1e-5, atol=1e-6)
    assert all(block.attention.processor is before for block, before in zip(model.blocks, own, strict=True))


@pytest.mark.parametrize(("checkpointing", "when"), [("checkpoint", "after the recording"), (None, "in the recording")])
def test_a_block_that_runs_again_keeps_its_gradients_and_is_not_counted_twice(
    model: TextFirstTransformer, monkeypatch: pytest.MonkeyPatch, checkpointing: str | None, when: str
) -> None:
    monkeypatch.setitem(star_kernels.recorder.FAMILIES, "TextFirstTransformer", TextFirst(checkpointing))
    model(*inputs()).square().mean().backward()
    expected = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    model.checkpoint = non_reentrant = lambda block, *args: checkpoint(block, *args, use_reentrant=False)
    with record_attention(model, unit_weights()) as recorder:
        loss = model(*inputs()).square().mean()
        recorder.next_step()
        if when == "in the recording":
            loss.backward()
            with pytest.raises(RuntimeError, match="^mass"):
                _ = recorder.mass
    if when == "after the recording":
        loss.backward()
    assert model.checkpoint is non_reentrant
    torch.testing.assert_close(recorder.history[0].double(), exact_mass(model), rtol=1e-5, atol=1e-6)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)


def test_a_class_made_from_the_models_class_is_of_its_family_also_in_a_wrapper(model: TextFirstTransformer) -> None:
    model.__class__ = type("ShardedTransformer", (TextFirstTransformer,), {})
    with record_attention(nn.DataParallel(model), unit_weights()) as recorder, torch.no_grad():
        model(*inputs())
    torch.testing.assert_close(recorder.mass.double(), exact_mass(model), rtol=1e-5, atol=1e-6)


def test_a_model_of_no_family_is_an_error_that_lists_the_known_classes() -> None:
    known = ", ".join(star_kernels.recorder.FAMILIES)
    assert known.startswith("SD3Transformer2DModel, ") and known.endswith("TextFirstTransformer")
    with pytest.raises(TypeError, match=f"^transformer: expected a model of class {known}, .*, got Linear"):
        record_attention(nn.Linear(2, 2), unit_weights()).__enter__()
