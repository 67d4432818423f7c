"""record_attention in FLUX.1 and FLUX.2: diffusers' backend computes the output, and the mass is that of a softmax."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel
from diffusers.models import attention_dispatch
from diffusers.models.transformers import transformer_flux, transformer_flux2
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from star_kernels.recorder import dispatcher, record_attention, recorder

TEXT, IMAGE, UNITS, DUAL, SINGLE = 7, 40, 3, 2, 3
BLOCKS = DUAL + SINGLE
Registry = attention_dispatch._AttentionBackendRegistry


CLASSES = [FluxTransformer2DModel, Flux2Transformer2DModel]


def flux(kind: type = FluxTransformer2DModel, **config: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6)}
    if kind is Flux2Transformer2DModel:
        sizes |= {"axes_dims_rope": (4, 4, 4, 4)}
    else:
        sizes |= {"pooled_projection_dim": 10}
    layers = {"num_layers": DUAL, "num_single_layers": SINGLE, "attention_head_dim": 16, "num_attention_heads": 2}
    model = kind(**{**sizes, **layers, **config})
    # Norm weights of one would hide a norm that is left out, or applied to the wrong tensor.
    for name, parameter in model.named_parameters():
        if ".norm_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 2.0)
    return model


@pytest.fixture(params=CLASSES)
def kind(request: pytest.FixtureRequest) -> type:
    return request.param


@pytest.fixture
def model(kind: type) -> Any:
    return flux(kind).requires_grad_(False)


@pytest.fixture(autouse=True)
def backend_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """model.set_attention_backend sets it as well, for every model."""
    monkeypatch.setattr(Registry, "_active_backend", Registry._active_backend)


def inputs(model: Any, batch: int = 2, text: int = TEXT) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    inner = getattr(model, "base_model", model)
    of_two = isinstance(getattr(inner, "model", inner), Flux2Transformer2DModel)
    named = {
        "hidden_states": torch.randn(batch, IMAGE, 4, generator=generator),
        "encoder_hidden_states": torch.randn(batch, text, 12, generator=generator),
        "pooled_projections": torch.randn(batch, 10, generator=generator),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(8.0), torch.arange(5.0)),
        "txt_ids": torch.zeros(text, 3),
    }
    if of_two:
        named["guidance"] = named.pop("pooled_projections")[:, 0]
        named["img_ids"] = torch.nn.functional.pad(named["img_ids"], (0, 1))
        named["txt_ids"] = torch.cartesian_prod(*[torch.zeros(1)] * 3, torch.arange(float(text)))
    return named


def unit_weights(rows: int = 2) -> Tensor:
    return torch.rand(rows, TEXT, UNITS, generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def dispatched(model: Any) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Within this context the list gets the queries and keys of every attention of a model that is not recorded."""
    tensors: list[tuple[Tensor, Tensor]] = []

    def spy(query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tensors.append((query.transpose(1, 2).double(), key.transpose(1, 2).double()))
        return attention_dispatch.dispatch_attention_fn(query, key, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        for module in (transformer_flux, transformer_flux2):
            patch.setattr(module, "dispatch_attention_fn", spy)
        yield tensors


def exact_masses(model: Any, weights: Tensor, direction: str = "image_to_text", **arguments: Tensor) -> list[Tensor]:
    """Per layer the mass from a softmax in float64, of the model's own queries and keys, of the last rows."""
    with dispatched(model) as tensors, torch.no_grad():
        model(**arguments)
    assert len(tensors) == len(model.transformer_blocks) + len(model.single_transformer_blocks)
    masses = []
    for query, key in tensors:
        probabilities = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1).mean(1)[-len(weights) :]
        if direction == "image_to_text":
            masses.append(probabilities[:, TEXT:, :TEXT] @ weights.double())
        else:
            masses.append(probabilities[:, :TEXT, TEXT:].mT @ weights.double())
    return masses


def by_model(model: Any, backend: str) -> contextlib.AbstractContextManager[None]:
    model.set_attention_backend(backend)
    return contextlib.nullcontext()


def by_processors(model: Any, backend: str) -> contextlib.AbstractContextManager[None]:
    for processor in model.attn_processors.values():
        processor._attention_backend = attention_dispatch.AttentionBackendName(backend)
    return contextlib.nullcontext()


def by_context(model: Any, backend: str) -> contextlib.AbstractContextManager[None]:
    return attention_dispatch.attention_backend(backend)


# The log-sum-exp of the first two comes from PyTorch's operator; math has none.
@pytest.mark.parametrize("backend", ["native", "_native_flash", "_native_math"])
@pytest.mark.parametrize("setting", [by_model, by_processors, by_context])
@pytest.mark.parametrize("where", ["before", "within"])
@torch.no_grad()
def test_the_backend_that_is_set_gives_the_output_bit_for_bit_and_the_mass_is_that_of_a_softmax(
    model: Any, monkeypatch: pytest.MonkeyPatch, setting: Any, backend: str, where: str
) -> None:
    native = model(**inputs(model)).sample
    with monkeypatch.context() as patch:
        patch.setattr(Registry, "_active_backend", Registry._active_backend)
        other = copy.deepcopy(model)
        with setting(other, backend):
            expected = other(**inputs(model)).sample
    own = list(model.attn_processors.values())
    if backend != "_native_math":
        monkeypatch.setattr(recorder, "joint_attention", None)  # a pass of our own would call it
    with contextlib.ExitStack() as stack:
        if where == "before":
            stack.enter_context(setting(model, backend))
        recording = stack.enter_context(record_attention(model, unit_weights()))
        if where == "within":
            stack.enter_context(setting(model, backend))
        output = model(**inputs(model)).sample
    assert torch.equal(output, expected) and torch.equal(output, native) == (backend != "_native_math")
    assert recording.implementation == f"diffusers:{backend}"
    assert_masses(recording.mass, exact_masses(model, unit_weights(), **inputs(model)))
    assert all(a is b for a, b in zip(model.attn_processors.values(), own, strict=True))


def assert_masses(mass: Tensor, exact: list[Tensor]) -> None:
    assert mass.dtype == torch.float32 and not mass.requires_grad
    torch.testing.assert_close(mass.double(), torch.stack(exact).mean(0), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@torch.no_grad()
def test_text_to_image_mass_is_that_of_a_softmax(model: Any, backend: str) -> None:
    direction = "text_to_image"
    with by_context(model, backend), record_attention(model, unit_weights(), direction=direction) as recording:
        model(**inputs(model))
    assert_masses(recording.mass, exact_masses(model, unit_weights(), direction, **inputs(model)))


def flash_attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Any:
    """Like the functions of flash-attn, of which none runs on a CPU: [B, N, heads, D]; log-sum-exp [B, heads, N]."""
    query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2)
    if not (options.get("return_attn_probs") or options.get("return_lse")):
        return out
    return out, (query @ key.mT / query.shape[-1] ** 0.5).logsumexp(-1), None


@pytest.mark.parametrize("backend", ["flash", "flash_hub", "_flash_3", "_flash_3_hub", "aiter_fa2_hub"])
@torch.no_grad()
def test_the_log_sum_exp_that_a_backend_gives_is_read_as_it_lays_it_out(
    model: Any, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    if backend not in {name.value for name in Registry.list_backends()}:
        pytest.skip(f"this version of diffusers has no {backend}")
    monkeypatch.setattr(attention_dispatch, "flash_attn_func", flash_attention)
    # Its first builds returned it unasked, and the oldest diffusers expects that.
    unasked = {"return_attn_probs": True}
    monkeypatch.setattr(attention_dispatch, "flash_attn_3_func", lambda **options: flash_attention(**options | unasked))
    monkeypatch.setattr(attention_dispatch, "_wrapped_flash_attn_3", attention_dispatch._wrapped_flash_attn_3._init_fn)
    for kernel in attention_dispatch._HUB_KERNELS_REGISTRY.values():
        monkeypatch.setattr(kernel, "kernel_fn", flash_attention)
    by_processors(model, backend)
    expected = model(**inputs(model)).sample
    masses = exact_masses(model, unit_weights(), **inputs(model))
    monkeypatch.setattr(recorder, "joint_attention", None)
    with record_attention(model, unit_weights()) as recording:
        output = model(**inputs(model)).sample
    assert torch.equal(output, expected) and recording.implementation == f"diffusers:{backend}"
    assert_masses(recording.mass, masses)


@pytest.mark.parametrize("layers", [[0], [DUAL], [1, DUAL + 1, BLOCKS - 1]], ids=str)
@torch.no_grad()
def test_layers_count_the_dual_blocks_and_then_the_single_ones(model: Any, layers: list[int]) -> None:
    with record_attention(model, unit_weights(), layers=layers) as recording:
        model(**inputs(model))
    masses = exact_masses(model, unit_weights(), **inputs(model))
    assert_masses(recording.mass, [masses[layer] for layer in layers])


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@torch.no_grad()
def test_rows_record_the_conditional_half_of_a_guidance_batch(model: Any, backend: str) -> None:
    with by_context(model, backend), record_attention(model, unit_weights(), rows=slice(2, None)) as recording:
        model(**inputs(model, batch=4))
    assert_masses(recording.mass, exact_masses(model, unit_weights(), **inputs(model, batch=4)))


def test_lora_is_recorded_and_its_gradients_are_those_without_recording(kind: type) -> None:
    model = flux(kind)
    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    if kind is Flux2Transformer2DModel:
        names += ["to_qkv_mlp_proj", "single_transformer_blocks.0.attn.to_out"]
    model.add_adapter(LoraConfig(r=4, target_modules=names, init_lora_weights=False))
    expected, gradients = output_and_gradients(model)
    with record_attention(model, unit_weights()) as recording:
        output, recorded = output_and_gradients(model)
    assert torch.equal(output, expected) and len(gradients) >= 2 * len(names)
    assert all(torch.equal(recorded[name], gradient) for name, gradient in gradients.items())
    assert_masses(recording.mass, exact_masses(model, unit_weights(), **inputs(model)))


@torch.no_grad()
def test_fused_projections_are_recorded(model: Any) -> None:
    model.fuse_qkv_projections()
    expected = model(**inputs(model)).sample
    with record_attention(model, unit_weights()) as recording:
        output = model(**inputs(model)).sample
    assert torch.equal(output, expected)
    assert_masses(recording.mass, exact_masses(model, unit_weights(), **inputs(model)))


def output_and_gradients(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(**inputs(model)).sample
    output.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad()
    return output.detach(), gradients


@pytest.mark.parametrize("backend", ["native", "_native_math"])
@pytest.mark.parametrize("when", ["in the step", "after next_step", "after the recording"])
def test_blocks_that_checkpointing_runs_again_give_the_gradients_without_and_are_not_counted_twice(
    kind: type, backend: str, when: str
) -> None:
    model = flux(kind)
    by_processors(model, backend)
    _, gradients = output_and_gradients(model)
    model.enable_gradient_checkpointing()
    with record_attention(model, unit_weights()) as recording:
        loss = model(**inputs(model)).sample.square().mean()
        if when == "in the step":
            loss.backward()
        recording.next_step()
        if when == "after next_step":
            loss.backward()
            with pytest.raises(RuntimeError, match="^mass"):
                _ = recording.mass
    if when == "after the recording":
        loss.backward()
    assert_masses(recording.history[0], exact_masses(model, unit_weights(), **inputs(model)))
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]) if name in gradients else parameter.grad is None


@pytest.mark.parametrize("backend", ["native", pytest.param("_native_math", marks=pytest.mark.exhaustive)])
@torch.no_grad()
def test_blocks_compiled_one_by_one_need_as_many_graphs_as_without_recording(kind: type, backend: str) -> None:
    """With fullgraph, torch refuses the ninth graph of a block's code."""
    model = flux(kind, num_layers=9, num_single_layers=9).requires_grad_(False)
    by_processors(model, backend)
    plain = model(**inputs(model)).sample
    with record_attention(model, unit_weights()) as expected:
        model(**inputs(model))

    def compiled(context: Any) -> tuple[int, Any]:
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.compile(backend=counter, fullgraph=True)
        with context as recording:
            assert torch.equal(model(**inputs(model)).sample, plain)
        return counter.frame_count, recording

    without, _ = compiled(contextlib.nullcontext())
    assert compiled(record_attention(model, None))[0] == without
    graphs, recording = compiled(record_attention(model, unit_weights()))
    assert graphs == without and torch.equal(recording.mass, expected.mass)
    assert recording.implementation == f"diffusers:{backend}"


@pytest.mark.parametrize("layers", [None, [DUAL], [BLOCKS - 1]], ids=str)
@pytest.mark.parametrize("tokens", [TEXT - 2, TEXT + 1, TEXT + IMAGE, TEXT + IMAGE + 1])
def test_units_of_another_length_are_named_though_a_single_block_cannot_tell_text_from_image(
    kind: type, layers: list[int] | None, tokens: int
) -> None:
    message = f"^units: expected weights for the {TEXT} text tokens.*got {tokens};"
    units = torch.ones(2, tokens, UNITS)
    for model in (flux(kind), get_peft_model(flux(kind), LoraConfig(target_modules=["to_q", "context_embedder"]))):
        with record_attention(model, units, layers=layers), pytest.raises(ValueError, match=message):
            model(**inputs(model))


@torch.no_grad()
def test_a_model_of_single_blocks_alone_is_recorded(kind: type) -> None:
    model = flux(kind, num_layers=0)
    with record_attention(model, unit_weights(), record_pass=1) as recording:
        model(**inputs(model, text=TEXT + 2))  # only the pass that is recorded has to fit
        model(**inputs(model))
    assert_masses(recording.mass, exact_masses(model, unit_weights(), **inputs(model)))


@pytest.mark.parametrize("option", [{"dropout_p": 0.1}, {"is_causal": True}])
def test_attention_of_another_kind_is_refused(option: dict[str, Any]) -> None:
    """As a later diffusers, or a user's fork of it, might ask for in a processor."""
    with pytest.raises(ValueError, match="^dropout_p: expected 0 and is_causal False"):
        dispatcher._attend_instead(*[torch.zeros(1, 2, 1, 4)] * 3, backend=None, parallel_config=None, **option)


def test_what_recording_cannot_follow_is_an_error_that_names_it(model: Any) -> None:
    with record_attention(model, unit_weights()), pytest.raises(ValueError, match="^attention_mask: expected None"):
        model(**inputs(model), joint_attention_kwargs={"attention_mask": torch.ones(2, TEXT + IMAGE, dtype=torch.bool)})
    with (
        record_attention(model, None, implementation="sdpa"),
        pytest.raises(ValueError, match="^implementation: .*native"),
    ):
        model(**inputs(model))
    model.single_transformer_blocks[0].attn.processor._parallel_config = object()
    with pytest.raises(ValueError, match=r"^single_transformer_blocks\.0\.attn.*context parallel"):
        record_attention(model, unit_weights(), layers=[DUAL]).__enter__()
    of_others = {
        "transformer_blocks.1": transformer_flux.FluxIPAdapterAttnProcessor(32, 12),
        "single_transformer_blocks.1": transformer_flux.FluxAttnProcessor(),
    }
    if isinstance(model, FluxTransformer2DModel):
        del of_others["single_transformer_blocks.1"]
    for name, other in of_others.items():
        model.get_submodule(f"{name}.attn").set_processor(other)
        with pytest.raises(TypeError, match=rf"^{name}\.attn.*got {type(other).__name__}"):
            record_attention(model, unit_weights(), layers=[1 if name.startswith("tr") else DUAL + 1]).__enter__()
