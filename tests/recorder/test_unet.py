"""record_attention in U-Nets: cross-attention at several resolutions, whose masses come to one grid."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models import attention_processor
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from star_kernels.recorder import record_attention

TEXT, UNITS, ROWS, COLUMNS = 7, 3, 8, 12
# Of the seven layers below: two down, one in the middle, two of the coarse stage up and two of the fine one.
GRIDS = [(8, 12), (4, 6), (2, 3), (4, 6), (4, 6), (8, 12), (8, 12)]


def unet(**config: Any) -> Any:
    """Of Stable Diffusion's kind: attention at all resolutions but the coarsest, which has it in the middle alone."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        **{
            "block_out_channels": (8, 16, 16),
            "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            "layers_per_block": 1,
            "norm_num_groups": 4,
            "attention_head_dim": 2,
            "cross_attention_dim": 12,
            **config,
        }
    )


@pytest.fixture(scope="module")
def model() -> Any:
    found = unet().requires_grad_(False)
    # A factor that no published block has, and diffusers' processor heeds.
    found.mid_block.attentions[0].transformer_blocks[0].attn2.rescale_output_factor = 2.0
    return found


def inputs(batch: int = 2, size: tuple[int, int] = (ROWS, COLUMNS)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "sample": torch.randn(batch, 4, *size, generator=generator),
        "timestep": torch.tensor(501),
        # Far from zero, so that attention is far from even.
        "encoder_hidden_states": 4 * torch.randn(batch, TEXT, 12, generator=generator),
    }


def unit_weights(rows: int = 2) -> Tensor:
    return torch.rand(rows, TEXT, UNITS, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def attended() -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within this context the list gets the queries and keys of every cross-attention of an unrecorded model."""
    tensors: list[tuple[Tensor, Tensor]] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if key.shape[2] == TEXT:
            tensors.append((query.double(), key.double()))
        return plain(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_processor.F, "scaled_dot_product_attention", spy)
        yield tensors


def exact_masses(model: Any, weights: Tensor, **arguments: Any) -> list[Tensor]:
    """Per layer the mass from a softmax in float64, of the model's own queries and keys, of the last rows."""
    with attended() as tensors, torch.no_grad():
        model(**inputs(**arguments))
    probabilities = [(query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1) for query, key in tensors]
    return [each[-len(weights) :] @ weights.double() for each in probabilities]


def brought_to_one_grid(masses: list[Tensor], grids: list[tuple[int, int]]) -> Tensor:
    """The mean on the finest grid, whose tokens repeat those of the coarser ones."""
    rows, columns = max(grids)
    brought = []
    for mass, (height, width) in zip(masses, grids, strict=True):
        image = mass.unflatten(1, (height, width))
        image = image.repeat_interleave(rows // height, 1).repeat_interleave(columns // width, 2)
        brought.append(image.flatten(1, 2))
    return torch.stack(brought).mean(0)


def assert_mass(mass: Tensor, exact: Tensor) -> None:
    assert mass.dtype == torch.float32 and not mass.requires_grad
    torch.testing.assert_close(mass.double(), exact, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("implementation", ["sdpa", "fused"])
@torch.no_grad()
def test_the_output_is_the_models_and_masses_of_all_resolutions_come_to_the_finest(
    model: Any, implementation: Any
) -> None:
    expected, own = model(**inputs()).sample, dict(model.attn_processors)
    with record_attention(model, unit_weights(), implementation=implementation) as recording:
        during = dict(model.attn_processors)
        output = model(**inputs()).sample
    if implementation == "sdpa":
        assert torch.equal(output, expected)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    masses = exact_masses(model, unit_weights())
    assert [mass.shape[1] for mass in masses] == [rows * columns for rows, columns in GRIDS]
    assert_mass(recording.mass, brought_to_one_grid(masses, GRIDS))
    assert recording.grid == (ROWS, COLUMNS) and float(masses[0].std(1).min()) > 1e-3
    # Self-attention keeps its processors, and cross-attention gets its own back.
    assert all((during[name] is own[name]) == ("attn1" in name) for name in own)
    assert all(model.attn_processors[name] is own[name] for name in own)


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        ([2], [2]),
        ([3, 1], [1, 3]),
        (["mid_block"], [2]),
        (["up_blocks.1", "down_blocks.0.attentions.0.transformer_blocks.0.attn2"], [0, 3, 4]),
        (["up_blocks", 0], [0, 3, 4, 5, 6]),
    ],
    ids=str,
)
@torch.no_grad()
def test_layers_are_chosen_by_index_or_name_and_come_to_the_finest_of_those(
    model: Any, layers: list[int | str], chosen: list[int]
) -> None:
    masses = exact_masses(model, unit_weights())
    with record_attention(model, unit_weights(), layers=layers) as recording:
        model(**inputs())
    grids = [GRIDS[layer] for layer in chosen]
    assert recording.layers == chosen and recording.grid == max(grids)
    assert_mass(recording.mass, brought_to_one_grid([masses[layer] for layer in chosen], grids))


@torch.no_grad()
def test_several_blocks_of_one_transformer_are_layers_of_their_own() -> None:
    deep = unet(transformer_layers_per_block=(1, 3, 1), use_linear_projection=True).requires_grad_(False)
    masses, grids = exact_masses(deep, unit_weights()), [*GRIDS[:1], *GRIDS[1:2] * 3, GRIDS[2], *GRIDS[3:4] * 6]
    grids += GRIDS[5:]
    with record_attention(deep, unit_weights()) as recording:
        deep(**inputs())
    assert len(masses) == len(recording.layers) == 13
    assert_mass(recording.mass, brought_to_one_grid(masses, grids))


@torch.no_grad()
def test_sides_that_cannot_be_halved_again_and_again_have_the_share_of_the_token_that_they_lie_in(model: Any) -> None:
    """9 rows become 5 and then 3; the U-Net itself spreads them over the finer rows the same way."""
    size, grids = (9, 12), [(9, 12), (5, 6), (3, 3), (5, 6), (5, 6), (9, 12), (9, 12)]
    masses = exact_masses(model, unit_weights(), size=size)
    with record_attention(model, unit_weights()) as recording:
        model(**inputs(size=size))
    places = [torch.arange(9) * height // 9 for height, _ in grids]
    brought = [
        mass.unflatten(1, grid)[:, rows].repeat_interleave(12 // grid[1], 2).flatten(1, 2)
        for mass, grid, rows in zip(masses, grids, places, strict=True)
    ]
    assert_mass(recording.mass, torch.stack(brought).mean(0))


@torch.no_grad()
def test_rows_record_the_conditional_half_of_a_guidance_batch(model: Any) -> None:
    with record_attention(model, unit_weights(), rows=slice(2, None)) as recording:
        model(**inputs(batch=4))
    assert_mass(recording.mass, brought_to_one_grid(exact_masses(model, unit_weights(), batch=4), GRIDS))


def output_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(**inputs()).sample
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return output.detach(), gradients


def test_lora_is_recorded_and_its_gradients_are_those_without_recording() -> None:
    from peft import LoraConfig

    model = unet().requires_grad_(False)
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    model.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    expected, gradients = output_and_gradients(model)
    with record_attention(model, unit_weights(), implementation="sdpa") as recording:
        output, recorded = output_and_gradients(model)
    assert torch.equal(output, expected) and len(gradients) == 2 * 7 * 2 * len(names)
    assert all(torch.equal(recorded[name], gradient) for name, gradient in gradients.items())
    assert_mass(recording.mass, brought_to_one_grid(exact_masses(model, unit_weights()), GRIDS))


@pytest.mark.parametrize("when", ["in the step", "after next_step", "after the recording"])
def test_blocks_that_checkpointing_runs_again_give_the_gradients_without_and_are_not_counted_twice(when: str) -> None:
    model = unet()
    _, gradients = output_and_gradients(model)
    model.enable_gradient_checkpointing()
    # What the blocks' own attention keeps for its backward pass is not what this one keeps.
    with record_attention(model, unit_weights(), implementation="fused") as recording:
        loss = model(**inputs()).sample.square().mean()
        if when == "in the step":
            loss.backward()
        recording.next_step()
        if when == "after next_step":
            loss.backward()
            with pytest.raises(RuntimeError, match="^mass"):
                _ = recording.mass
            assert recording.grid is None
    if when == "after the recording":
        loss.backward()
    assert_mass(recording.history[0], brought_to_one_grid(exact_masses(model, unit_weights()), GRIDS))
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_blocks_compiled_one_by_one_need_as_many_graphs_as_without_recording() -> None:
    def compiled(context: Any) -> tuple[int, Any]:
        model = unet().requires_grad_(False)
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        with context(model) as recording:
            output = model(**inputs()).sample
        torch.testing.assert_close(output, unet()(**inputs()).sample, rtol=1e-5, atol=1e-5)
        return counter.frame_count, recording

    without, _ = compiled(lambda model: contextlib.nullcontext())
    graphs, recording = compiled(lambda model: record_attention(model, unit_weights()))
    assert graphs == without
    assert_mass(recording.mass, brought_to_one_grid(exact_masses(unet(), unit_weights()), GRIDS))


@pytest.mark.exhaustive
@torch.no_grad()
def test_a_model_compiled_as_a_whole_is_recorded_without_a_graph_break() -> None:
    model = unet().requires_grad_(False)
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with record_attention(whole, unit_weights()) as recording:
        whole(**inputs())
    assert recording.grid == (ROWS, COLUMNS)
    assert_mass(recording.mass, brought_to_one_grid(exact_masses(model, unit_weights()), GRIDS))


def test_what_recording_cannot_follow_is_an_error_that_names_it() -> None:
    model = unet()
    with record_attention(model, unit_weights()), pytest.raises(ValueError, match="^encoder_attention_mask: expected"):
        model(**inputs(), encoder_attention_mask=torch.ones(2, TEXT))
    with record_attention(model, unit_weights()[:, :5]), pytest.raises(ValueError, match=f"^units: .*{TEXT} text.*5"):
        model(**inputs())
    with (
        record_attention(model, unit_weights(), direction="text_to_image"),
        pytest.raises(ValueError, match="^direction: expected image_to_text"),
    ):
        model(**inputs())
    for layers, message in (([7], "indices from 0 to 6, got 7"), (["mid"], "names of layers .* got 'mid'")):
        with pytest.raises(ValueError, match=f"^layers: expected {message}"):
            record_attention(model, unit_weights(), layers=layers).__enter__()  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^layers: expected ints or names, got 1\.5"):
        record_attention(model, unit_weights(), layers=[1.5]).__enter__()  # type: ignore[list-item]

    class Own(attention_processor.AttnProcessor2_0):
        pass

    cross = model.mid_block.attentions[0].transformer_blocks[0].attn2
    own = cross.processor
    for other, got in (
        (attention_processor.AttnProcessor(), "AttnProcessor"),
        (Own(), "Own"),
        (attention_processor.FusedAttnProcessor2_0(), r"FusedAttnProcessor2_0; call unfuse_qkv_projections\(\) first"),
    ):
        cross.set_processor(other)
        with pytest.raises(TypeError, match=rf"^mid_block\.attentions\.0\.transformer_blocks\.0\.attn2: .*got {got}$"):
            record_attention(model, unit_weights()).__enter__()
    cross.set_processor(own)
    # Self-attention may have any.
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(Own())
    with record_attention(model, unit_weights()) as recording:
        model(**inputs())
    assert recording.grid == (ROWS, COLUMNS)


def test_models_that_attend_to_text_elsewhere_or_nowhere_are_refused() -> None:
    simple = {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D", "DownBlock2D")}
    with pytest.raises(
        TypeError, match=r"^down_blocks\.0\.attentions\.0: expected a Transformer2DModel.*got Attention"
    ):
        record_attention(unet(**simple), unit_weights()).__enter__()
    plain = {"down_block_types": ("DownBlock2D",) * 3, "up_block_types": ("UpBlock2D",) * 3, "mid_block_type": None}
    with pytest.raises(TypeError, match="^transformer: expected a UNet2DConditionModel with cross-attention"):
        record_attention(unet(**plain), unit_weights()).__enter__()
