"""record_attention: the transformer's output stays what it was, and the mass is that of a materialised softmax."""

from __future__ import annotations

import contextlib
import copy
import itertools
import os
import types
from collections import Counter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from diffusers.models.attention_processor import JointAttnProcessor2_0, XFormersJointAttnProcessor
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

from star_kernels.recorder import record_attention
from star_kernels.text_units import TextUnits
from tests.tiny_models import tiny_clip_tokenizer, tiny_transformer

TEXT = 7
IMAGE = 16
UNITS = 3


def inputs(batch=2, dtype=torch.float32, text=TEXT, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    return {
        "hidden_states": normal(batch, 4, 8, 8),
        "encoder_hidden_states": normal(batch, text, 12),
        "pooled_projections": normal(batch, 10),
        "timestep": torch.full((batch,), 500.0),
    }


def unit_weights(rows=2, text=TEXT, seed=1):
    return torch.rand(rows, text, UNITS, generator=torch.Generator().manual_seed(seed))


class MaterialisedProcessor:
    """SD3's joint attention with the softmax written out: an independent account of output and mass."""

    def __init__(self, weights, direction="image_to_text"):
        self.weights, self.direction, self.mass = weights, direction, None

    def __call__(self, attn, hidden_states, encoder_hidden_states, **_):
        def project(names, norms):
            for states, name, norm in zip((hidden_states, encoder_hidden_states), names, norms, strict=True):
                projected = getattr(attn, name)(states)
                split = projected.reshape(*projected.shape[:2], attn.heads, -1).permute(0, 2, 1, 3)
                yield split if norm is None else norm(split)

        query = torch.cat([*project(("to_q", "add_q_proj"), (attn.norm_q, attn.norm_added_q))], 2)
        key = torch.cat([*project(("to_k", "add_k_proj"), (attn.norm_k, attn.norm_added_k))], 2)
        value = torch.cat([*project(("to_v", "add_v_proj"), (None, None))], 2)
        probabilities = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
        image = hidden_states.shape[1]
        if self.direction == "image_to_text":
            self.mass = torch.einsum("bnij,bjk->bik", probabilities[:, :, :image, image:], self.weights) / attn.heads
        else:
            self.mass = torch.einsum("bnji,bjk->bik", probabilities[:, :, image:, :image], self.weights) / attn.heads
        out = (probabilities @ value).permute(0, 2, 1, 3).flatten(2)
        text_out = out[:, image:] if attn.context_pre_only else attn.to_add_out(out[:, image:])
        return attn.to_out[0](out[:, :image]), text_out


def materialised_masses(transformer, weights, direction="image_to_text", **arguments):
    """Output and, per layer, the mass of a copy of the transformer that writes its softmax out."""
    transformer = copy.deepcopy(transformer)
    processors = [MaterialisedProcessor(weights, direction) for _ in transformer.transformer_blocks]
    for block, processor in zip(transformer.transformer_blocks, processors, strict=True):
        block.attn.set_processor(processor)
    with torch.no_grad():
        output = transformer(**arguments).sample
    return output, [processor.mass for processor in processors]


def processors_of(transformer):
    return list(transformer.attn_processors.values())


@pytest.fixture
def transformer():
    return tiny_transformer().eval()


@pytest.fixture
def untrained(transformer):
    return transformer.requires_grad_(False)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"dual_attention_layers": (), "qk_norm": None},
        {"dual_attention_layers": (0, 1, 2)},
        {"num_layers": 1},
    ],
    ids=["sd3.5", "sd3", "all dual", "last block alone"],
)
def test_output_is_unchanged_and_mass_is_that_of_a_materialised_softmax(config):
    transformer = tiny_transformer(**config)
    with torch.no_grad():
        plain = transformer(**inputs()).sample
        with record_attention(transformer, unit_weights()) as recorder:
            output = transformer(**inputs()).sample
    _, masses = materialised_masses(transformer, unit_weights(), **inputs())
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorder.mass, torch.stack(masses).mean(0), rtol=1e-5, atol=1e-6)
    assert recorder.mass.shape == (2, IMAGE, UNITS) and recorder.mass.dtype == torch.float32


SD3_CONFIGS = {
    "sd3.5": {},
    "sd3": {"qk_norm": None},
    "head dim 64": {"attention_head_dim": 64, "caption_projection_dim": 128},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config", SD3_CONFIGS.values(), ids=SD3_CONFIGS)
def test_with_pytorchs_attention_output_and_gradients_are_those_without_recording_bit_for_bit(config, dtype):
    transformer = tiny_transformer(**config).to(dtype)
    plain = transformer(**inputs(dtype=dtype)).sample
    plain.float().square().mean().backward()
    expected = gradients_of(transformer)
    with record_attention(transformer, unit_weights(), implementation="sdpa") as recorder:
        output = transformer(**inputs(dtype=dtype)).sample
    output.float().square().mean().backward()
    with record_attention(transformer, None, implementation="sdpa"), torch.no_grad():
        update = transformer(**inputs(dtype=dtype)).sample
    assert torch.equal(output, plain) and torch.equal(update, plain)
    for gradient, reference in zip(gradients_of(transformer), expected, strict=True):
        assert torch.equal(gradient, reference) if reference is not None else gradient is None
    precise = transformer.double()
    _, masses = materialised_masses(precise, unit_weights().double(), **inputs(dtype=torch.float64))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(recorder.mass.double(), torch.stack(masses).mean(0), rtol=tolerance, atol=tolerance / 10)


@pytest.mark.parametrize(
    ("implementation", "backend", "name"),
    [
        ("auto", "auto", "fused"),
        ("fused", "auto", "fused"),
        ("sdpa", "auto", "sdpa:flash"),
        ("sdpa", "reference", "sdpa:flash"),
    ],
)
@pytest.mark.parametrize("units", [None, unit_weights()], ids=["without units", "with units"])
@torch.no_grad()
def test_the_recorder_says_what_computed_the_attention(untrained, implementation, backend, name, units):
    options = {"implementation": implementation, "backend": backend}
    with record_attention(untrained, units, **options) as recorder:
        assert recorder.implementation is None
        untrained(**inputs())
        assert recorder.implementation == name
    assert recorder.implementation == name


class Copies(TorchDispatchMode):
    """Counts what copies a tensor of at least `size` elements."""

    def __init__(self, size):
        super().__init__()
        self.size, self.counts = size, Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **kwargs or {})
        name = operator.overloadpacket.__name__
        if name in ("cat", "clone", "copy_", "_to_copy") and result.numel() >= self.size:
            self.counts[name] += 1
        return result


@pytest.mark.parametrize("implementation", ["fused", "sdpa"])
@pytest.mark.parametrize("training", [False, True])
def test_a_block_copies_values_and_the_image_rows_of_its_output_alone(implementation, training):
    """Queries and keys are normed into one buffer, and attention's output has its tokens outside its heads."""
    transformer = tiny_transformer()
    image, text = torch.randn(2, IMAGE, 16, requires_grad=training), torch.randn(2, TEXT, 16)
    attention = transformer.transformer_blocks[0].attn

    def copies():
        with torch.set_grad_enabled(training), Copies(image.numel()) as copies:
            image_out, text_out = attention(image, text)
            forward = copies.counts.copy()
            if training:
                (image_out.sum() + text_out.sum()).backward()
        return forward, copies.counts - forward

    before, before_backward = copies()
    with record_attention(transformer, unit_weights(), implementation=implementation):
        forward, backward = copies()
    assert before == {"cat": 3, "clone": 2} and forward == {"cat": 1, "clone": 1}
    assert before_backward == backward == ({"clone": 1} if training else {})


def test_a_norm_with_hooks_or_of_another_kind_runs_as_a_module(untrained):
    seen = []
    norms = [untrained.transformer_blocks[0].attn.norm_q, untrained.transformer_blocks[1].attn.norm_added_k]
    norms[0].register_forward_hook(lambda *_: seen.append("hook"))
    untrained.transformer_blocks[1].attn.norm_added_k = nn.Sequential(norms[1])
    untrained.transformer_blocks[2].attn.norm_k.forward = types.MethodType(
        lambda norm, x: seen.append("forward") or type(norm).forward(norm, x),
        untrained.transformer_blocks[2].attn.norm_k,
    )
    plain = untrained(**inputs()).sample
    assert seen == ["hook", "forward"]
    with record_attention(untrained, unit_weights(), implementation="sdpa"):
        output = untrained(**inputs()).sample
    assert seen == ["hook", "forward"] * 2 and torch.equal(output, plain)


@pytest.mark.parametrize("layers", [[1], [0, 2], (2, 0, 2), range(3), {1, 2}], ids=str)
def test_mass_is_the_mean_over_the_chosen_layers(untrained, layers):
    with record_attention(untrained, unit_weights(), layers=layers) as recorder:
        untrained(**inputs())
    _, masses = materialised_masses(untrained, unit_weights(), **inputs())
    chosen = torch.stack([masses[i] for i in sorted(set(layers))])
    torch.testing.assert_close(recorder.mass_by_layer, chosen)
    torch.testing.assert_close(recorder.mass, chosen.mean(0))
    assert recorder.layers == sorted(set(layers))


def test_blocks_that_the_call_skips_do_not_dilute_the_mean(untrained):
    with record_attention(untrained, unit_weights()) as recorder:
        untrained(**inputs(), skip_layers=[1])
    _, (first, _, last) = materialised_masses(untrained, unit_weights(), **inputs(), skip_layers=[1])
    torch.testing.assert_close(recorder.mass, (first + last) / 2)


def test_text_to_image_mass_is_that_of_a_materialised_softmax(untrained):
    with record_attention(untrained, unit_weights(), direction="text_to_image") as recorder:
        untrained(**inputs())
    _, masses = materialised_masses(untrained, unit_weights(), "text_to_image", **inputs())
    torch.testing.assert_close(recorder.mass, torch.stack(masses).mean(0))


def test_image_only_attention_of_dual_blocks_keeps_its_processor(untrained):
    before = [block.attn2.processor for block in untrained.transformer_blocks if block.attn2 is not None]
    with record_attention(untrained, unit_weights()):
        during = [block.attn2.processor for block in untrained.transformer_blocks if block.attn2 is not None]
        assert len(before) == 1 and during[0] is before[0]


def test_layers_that_are_not_chosen_keep_their_processors(untrained):
    before = processors_of(untrained)
    with record_attention(untrained, unit_weights(), layers=[1]):
        changed = [a is not b for a, b in zip(before, processors_of(untrained), strict=True)]
    assert sum(changed) == 1


def test_leaving_restores_the_processors(untrained):
    before, checkpointing = processors_of(untrained), untrained._gradient_checkpointing_func
    with record_attention(untrained, unit_weights()):
        assert sum(a is not b for a, b in zip(before, processors_of(untrained), strict=True)) == 3
    assert all(a is b for a, b in zip(before, processors_of(untrained), strict=True))
    assert untrained._gradient_checkpointing_func is checkpointing


def test_an_exception_in_the_block_restores_the_processors(untrained):
    untrained.enable_gradient_checkpointing()
    before, checkpointing = processors_of(untrained), untrained._gradient_checkpointing_func
    with pytest.raises(ZeroDivisionError), record_attention(untrained, unit_weights()):
        untrained(**inputs())
        raise ZeroDivisionError
    assert all(a is b for a, b in zip(before, processors_of(untrained), strict=True))
    assert untrained._gradient_checkpointing_func is checkpointing
    with record_attention(untrained, unit_weights()) as recorder:
        untrained(**inputs())
    assert recorder.mass.shape == (2, IMAGE, UNITS)


def test_bad_arguments_leave_the_processors_alone(untrained):
    before = processors_of(untrained)
    with pytest.raises(ValueError), record_attention(untrained, unit_weights(), layers=[0, 7]):
        pass
    assert all(a is b for a, b in zip(before, processors_of(untrained), strict=True))


def test_each_step_has_its_own_mass(untrained):
    steps = [inputs(seed=seed) for seed in range(3)]
    with record_attention(untrained, unit_weights()) as recorder:
        for step in steps:
            untrained(**step)
            recorder.next_step()
    assert len(recorder.history) == 3
    for step, mass in zip(steps, recorder.history, strict=True):
        torch.testing.assert_close(mass, torch.stack(materialised_masses(untrained, unit_weights(), **step)[1]).mean(0))


def test_mass_stays_readable_after_leaving_and_reading_does_not_change_it(untrained):
    with record_attention(untrained, unit_weights()) as recorder:
        untrained(**inputs())
        inside = recorder.mass
    assert torch.equal(recorder.mass, inside) and torch.equal(recorder.mass, inside)
    recorder.mass.zero_()
    assert torch.equal(recorder.mass, inside)


def test_reading_before_a_forward_pass_is_an_error(untrained):
    with record_attention(untrained, unit_weights()) as recorder:
        with pytest.raises(RuntimeError, match="^mass"):
            _ = recorder.mass
        with pytest.raises(RuntimeError, match="^mass"):
            recorder.next_step()
        untrained(**inputs())
        recorder.next_step()
        with pytest.raises(RuntimeError, match="^mass"):
            _ = recorder.mass


def test_a_second_forward_pass_in_one_step_is_an_error(untrained):
    with record_attention(untrained, unit_weights()) as recorder:
        untrained(**inputs())
        mass = recorder.mass
        with pytest.raises(RuntimeError, match=r"^transformer_blocks\.0\.attn.*next_step"):
            untrained(**inputs())
        assert torch.equal(recorder.mass, mass)


def test_a_discarded_step_leaves_no_trace(untrained):
    with record_attention(untrained, unit_weights()) as recorder:
        untrained(**inputs(seed=5))
        recorder.discard_step()
        untrained(**inputs())
    with record_attention(untrained, unit_weights()) as alone:
        untrained(**inputs())
    assert torch.equal(recorder.mass, alone.mass) and recorder.history == []


def test_masses_of_a_partition_of_the_text_add_up_to_its_mass(untrained):
    partition = torch.eye(TEXT)[None, :, :].expand(2, TEXT, TEXT)
    with record_attention(untrained, partition) as recorder:
        untrained(**inputs())
    with record_attention(untrained, torch.ones(2, TEXT, 1)) as whole:
        untrained(**inputs())
    torch.testing.assert_close(recorder.mass.sum(-1), whole.mass[..., 0])
    assert (whole.mass > 0).all() and (whole.mass < 1).all()


def test_rows_without_units_have_no_mass(untrained):
    weights = unit_weights()
    weights[1] = 0
    with record_attention(untrained, weights) as recorder:
        untrained(**inputs())
    assert (recorder.mass[0] > 0).all() and (recorder.mass[1] == 0).all()


def test_text_units_are_taken_as_they_are(untrained):
    tokenizer = tiny_clip_tokenizer(model_max_length=9)
    units = TextUnits.from_prompts(["a red circle", ""], [["red circle", "cow"], []], tokenizers=tokenizer)
    with record_attention(untrained, units) as recorder:
        untrained(**inputs(text=9))
    assert recorder.mass.shape == (2, IMAGE, 2)
    assert (recorder.mass[0, :, 0] > 0).all() and recorder.mass[0, :, 1].sum() == recorder.mass[1].sum() == 0


@pytest.mark.parametrize("layers", [None, [0]])
@torch.no_grad()
def test_without_units_the_output_is_that_of_a_recorded_pass_bit_for_bit(untrained, layers):
    arguments = inputs(batch=4)
    with record_attention(untrained, unit_weights(), layers=layers, rows=(2, 4)):
        recorded = untrained(**arguments).sample
    with record_attention(untrained, None, layers=layers) as recorder:
        first, second = untrained(**arguments).sample, untrained(**arguments).sample
        with pytest.raises(RuntimeError, match="units=None"):
            _ = recorder.mass
    assert torch.equal(first, recorded) and torch.equal(second, recorded)
    assert all(type(processor) is JointAttnProcessor2_0 for processor in processors_of(untrained))


@pytest.mark.parametrize(
    "rows", [slice(2, None), slice(2, 4), slice(-2, None), (2, 4), [2, 4]], ids=["2:", "2:4", "-2:", "(2, 4)", "[2, 4]"]
)
def test_rows_record_the_conditional_half_of_a_guidance_batch(untrained, rows):
    with record_attention(untrained, unit_weights(4)) as whole:
        expected = untrained(**inputs(4)).sample
    with record_attention(untrained, unit_weights(4)[2:], rows=rows) as recorder:
        output = untrained(**inputs(4)).sample
    assert torch.equal(recorder.mass, whole.mass[2:])
    assert torch.equal(output, expected)


@pytest.mark.parametrize(
    ("rows", "name"),
    [((0, 3), "units"), (slice(3, None), "units"), ((2, 5), "rows"), (slice(7, None), "rows"), (None, "units")],
)
def test_rows_that_do_not_fit_the_batch_are_named(untrained, rows, name):
    with pytest.raises(ValueError, match=f"^{name}"), record_attention(untrained, unit_weights(2), rows=rows):
        untrained(**inputs(4))


def test_units_for_another_number_of_text_tokens_are_named(untrained):
    with (
        pytest.raises(ValueError, match=f"^units: expected weights for the {TEXT} text tokens.*got 5"),
        record_attention(untrained, unit_weights(text=5)),
    ):
        untrained(**inputs())


@pytest.mark.parametrize("mode", ["peft", "add_adapter"])
def test_lora_wrapped_projections_are_recorded_and_trained(mode):
    from peft import LoraConfig, get_peft_model

    names = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]
    config = LoraConfig(r=4, target_modules=names, init_lora_weights=False)
    transformer = tiny_transformer()
    base = transformer(**inputs()).sample
    torch.manual_seed(3)
    if mode == "peft":
        wrapped = get_peft_model(transformer, config)
    else:
        transformer.add_adapter(config)
        wrapped = transformer

    plain = wrapped(**inputs()).sample
    plain.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in wrapped.named_parameters() if p.grad is not None}
    wrapped.zero_grad()
    with record_attention(wrapped, unit_weights()) as recorder:
        output = wrapped(**inputs()).sample
    output.square().mean().backward()

    assert not torch.allclose(plain, base)
    torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
    _, masses = materialised_masses(transformer, unit_weights(), **inputs())
    torch.testing.assert_close(recorder.mass, torch.stack(masses).mean(0))
    assert gradients and all("lora" in name for name in gradients)
    for name, parameter in wrapped.named_parameters():
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_lora_scale_of_a_call_reaches_the_projections():
    from peft import LoraConfig

    transformer = tiny_transformer().requires_grad_(False)
    transformer.add_adapter(LoraConfig(r=4, target_modules=["to_k", "add_k_proj"], init_lora_weights=False))
    masses = []
    for scale in (0.0, 1.0):
        plain = transformer(**inputs(), joint_attention_kwargs={"scale": scale}).sample
        with record_attention(transformer, unit_weights()) as recorder:
            output = transformer(**inputs(), joint_attention_kwargs={"scale": scale}).sample
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
        masses.append(recorder.mass)
    assert not torch.allclose(*masses)


def test_a_distributed_wrapper_is_seen_through(untrained, tmp_path):
    with record_attention(untrained, unit_weights()) as expected:
        untrained(**inputs())
    untrained.proj_out.requires_grad_(True)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(untrained)
        with record_attention(wrapped, unit_weights()) as recorder:
            wrapped(**inputs())
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(recorder.mass, expected.mass)


def test_a_compiled_transformer_is_compiled_once_for_all_steps_and_recordings(untrained):
    with record_attention(untrained, unit_weights()) as expected, torch.no_grad():
        untrained(**inputs())
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(untrained, backend=counter, fullgraph=True)
    for _ in range(2):
        with record_attention(compiled, unit_weights()) as recorder, torch.no_grad():
            for _ in range(3):
                compiled(**inputs())
                recorder.next_step()
        for mass in recorder.history:
            torch.testing.assert_close(mass, expected.mass)
    assert counter.frame_count == 1 and len(recorder.history) == 3


@pytest.mark.parametrize("num_layers", [4, 10])
def test_blocks_compiled_one_by_one_share_their_graphs_however_many_they_are(num_layers):
    """The last block, which returns no text, has a graph of its own; with fullgraph, torch refuses the ninth graph."""
    transformer = tiny_transformer(num_layers=num_layers, dual_attention_layers=()).requires_grad_(False)
    with record_attention(transformer, unit_weights()) as expected:
        transformer(**inputs())

    def compiled(context, passes=1):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        for block in transformer.transformer_blocks:
            block.compile(backend=counter, fullgraph=True)
        with context as recorder:
            for seed in range(passes):
                transformer(**inputs(seed=seed))
        return counter.frame_count, recorder

    assert compiled(contextlib.nullcontext())[0] == 2
    assert compiled(record_attention(transformer, None))[0] == 2
    graphs, recorder = compiled(record_attention(transformer, unit_weights()))
    assert graphs == 2 and torch.equal(recorder.mass, expected.mass)
    graphs, recorder = compiled(record_attention(transformer, unit_weights(), implementation="sdpa"))
    assert graphs == 2 and recorder.implementation == "sdpa:flash"
    torch.testing.assert_close(recorder.mass, expected.mass)
    # With the chosen pass and without capture.
    graphs, recorder = compiled(record_attention(transformer, unit_weights(), record_pass=0), passes=3)
    assert graphs == 4 and torch.equal(recorder.mass, expected.mass)


def gradients_of(transformer):
    gradients = [parameter.grad for parameter in transformer.parameters()]
    transformer.zero_grad()
    return gradients


def reentrant(module, *args):
    return checkpoint(module.__call__, *args, use_reentrant=True)


@pytest.mark.parametrize(
    ("how", "when"),
    [
        *itertools.product(
            ["non-reentrant", "reentrant"],
            ["in the step", "after next_step", "after the block", "in another recording"],
        ),
        ("compiled blocks", "after next_step"),
    ],
)
def test_a_recomputed_block_is_not_counted_twice(how, when):
    """Under gradient checkpointing the mass and the gradients are those without, whenever the backward pass comes."""
    transformer = tiny_transformer()
    arguments = inputs()
    transformer(**arguments).sample.square().mean().backward()
    expected = gradients_of(transformer)
    with record_attention(transformer, unit_weights()) as plain, torch.no_grad():
        transformer(**arguments)

    transformer.enable_gradient_checkpointing(reentrant if how == "reentrant" else None)
    if how == "compiled blocks":
        torch._dynamo.reset()
        for block in transformer.transformer_blocks:
            block.compile(backend="eager")
    # By default torch ends the second run by an exception when it has the tensors, before compiled code has written to
    # the recorder.
    early_stop = set_checkpoint_early_stop(how != "compiled blocks")
    with early_stop, record_attention(transformer, unit_weights()) as recorder:
        loss = transformer(**arguments).sample.square().mean()
        if when == "in the step":
            loss.backward()
        torch.testing.assert_close(recorder.mass, plain.mass)
        recorder.next_step()
        if when == "after next_step":
            loss.backward()
            # The blocks that ran again belong to no step: the next one starts empty.
            with pytest.raises(RuntimeError, match="^mass"):
                _ = recorder.mass
            transformer(**arguments)
            torch.testing.assert_close(recorder.mass, plain.mass)
    if when == "in another recording":
        with record_attention(transformer, 2 * unit_weights()) as other:
            transformer(**arguments)
            loss.backward()
        torch.testing.assert_close(other.mass, 2 * plain.mass)
    elif when == "after the block":
        loss.backward()
        assert all(type(processor) is JointAttnProcessor2_0 for processor in processors_of(transformer))
    torch.testing.assert_close(recorder.history, [plain.mass])
    for gradient, reference in zip(gradients_of(transformer), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


def test_a_user_checkpoint_around_the_transformer_is_not_counted_twice():
    transformer = tiny_transformer()
    arguments = inputs()
    with record_attention(transformer, unit_weights()) as plain, torch.no_grad():
        transformer(**arguments)
    with record_attention(transformer, unit_weights()) as recorder:
        output = checkpoint(lambda: transformer(**arguments).sample, use_reentrant=False)
        recorder.next_step()
        output.square().mean().backward()
        with pytest.raises(RuntimeError, match="^mass"):
            _ = recorder.mass
    torch.testing.assert_close(recorder.history, [plain.mass])


def test_gradients_without_checkpointing_are_unchanged_and_the_mass_has_none():
    transformer = tiny_transformer()
    transformer(**inputs()).sample.square().mean().backward()
    expected = gradients_of(transformer)
    with record_attention(transformer, unit_weights()) as recorder:
        loss = transformer(**inputs()).sample.square().mean()
    assert not recorder.mass.requires_grad
    loss.backward()
    for gradient, reference in zip(gradients_of(transformer), expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_give_a_float32_mass(untrained, dtype):
    transformer = untrained.to(dtype)
    plain = transformer(**inputs(dtype=dtype)).sample
    with record_attention(transformer, unit_weights()) as recorder:
        output = transformer(**inputs(dtype=dtype)).sample
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-6
    assert output.dtype == dtype and recorder.mass.dtype == torch.float32
    torch.testing.assert_close(output, plain, rtol=tolerance, atol=tolerance)
    _, masses = materialised_masses(transformer.double(), unit_weights().double(), **inputs(dtype=torch.float64))
    torch.testing.assert_close(recorder.mass.double(), torch.stack(masses).mean(0), rtol=5 * tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "backend",
    [
        "reference",
        "cpu",
        pytest.param(
            "triton",
            marks=pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter"),
        ),
    ],
)
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_every_backend_records_the_same_and_is_as_precise_as_diffusers(untrained, backend, direction):
    half = copy.deepcopy(untrained).bfloat16()
    precise = copy.deepcopy(half).double()
    arguments = inputs(dtype=torch.bfloat16)
    wide = {name: value.double() for name, value in arguments.items()}
    with torch.no_grad():
        expected, masses = materialised_masses(precise, unit_weights().double(), direction, **wide)
        plain = half(**arguments).sample
        with record_attention(half, unit_weights(), direction=direction, backend=backend) as low:
            output = half(**arguments).sample
        with record_attention(untrained, unit_weights(), direction=direction, backend=backend) as single:
            single_output = untrained(**inputs()).sample
        single_expected, single_masses = materialised_masses(untrained, unit_weights(), direction, **inputs())
    error = (output.double() - expected).square().mean().sqrt()
    # Most of either error is the rounding of the model's other layers, which any changed bit of attention reshuffles.
    assert error <= 1.2 * (plain.double() - expected).square().mean().sqrt()
    mean = torch.stack(masses).mean(0)
    assert (low.mass.double() - mean).abs().max() < 2e-2 * mean.max()
    torch.testing.assert_close(single_output, single_expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single.mass, torch.stack(single_masses).mean(0), rtol=1e-5, atol=1e-6)


def test_autocast_computes_in_the_dtypes_that_it_does_without_recording(untrained):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = untrained(**inputs()).sample
        with record_attention(untrained, unit_weights()) as recorder:
            output = untrained(**inputs()).sample
    assert output.dtype == plain.dtype and recorder.mass.dtype == torch.float32
    torch.testing.assert_close(output, plain, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("config", [{}, {"qk_norm": None}], ids=["sd3.5", "sd3"])
def test_with_pytorchs_attention_autocast_gives_what_it_does_without_recording_bit_for_bit(config):
    transformer = tiny_transformer(**config)
    results = []
    for recording in (False, True):
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.autocast("cpu", dtype=torch.bfloat16))
            if recording:
                stack.enter_context(record_attention(transformer, unit_weights(), implementation="sdpa"))
            output = transformer(**inputs()).sample
        output.float().square().mean().backward()
        results.append([output, *(gradient for gradient in gradients_of(transformer) if gradient is not None)])
    for recorded, plain in zip(*results, strict=True):
        assert torch.equal(recorded, plain)


def test_a_row_does_not_depend_on_the_others(untrained):
    arguments = inputs(3)
    with record_attention(untrained, unit_weights(3)) as whole:
        untrained(**arguments)
    # The projections of a row are not the same bits in every batch size, so the batch stays and its other rows change.
    changed = {name: value.clone() for name, value in arguments.items()}
    for value in changed.values():
        value[1:] += 1
    weights = unit_weights(3)
    weights[1:] += 1
    with record_attention(untrained, weights) as other:
        untrained(**changed)
    assert torch.equal(whole.mass[0], other.mass[0]) and not torch.equal(whole.mass[1], other.mass[1])


def test_recording_a_transformer_that_is_being_recorded_is_an_error(untrained):
    before = processors_of(untrained)
    with record_attention(untrained, unit_weights(), layers=[0]) as recorder:
        with pytest.raises(RuntimeError, match="^transformer"), record_attention(untrained, unit_weights(), layers=[1]):
            pass
        untrained(**inputs())
        assert recorder.mass.shape == (2, IMAGE, UNITS)
    assert all(a is b for a, b in zip(before, processors_of(untrained), strict=True))


class OwnProcessor(JointAttnProcessor2_0):
    """A subclass may compute something else, so it is as unknown as any other class."""


def test_an_unknown_processor_is_an_error_that_names_its_layer(untrained):
    untrained.transformer_blocks[1].attn.set_processor(OwnProcessor())
    with pytest.raises(TypeError, match=r"^transformer_blocks\.1\.attn.*OwnProcessor"):
        record_attention(untrained, unit_weights()).__enter__()
    with record_attention(untrained, unit_weights(), layers=[0, 2]) as recorder:
        untrained(**inputs())
    assert recorder.layers == [0, 2]


def test_other_joint_processors_of_diffusers_are_errors(untrained):
    untrained.transformer_blocks[2].attn.set_processor(XFormersJointAttnProcessor())
    with pytest.raises(TypeError, match=r"^transformer_blocks\.2\.attn.*XFormersJointAttnProcessor"):
        record_attention(untrained, unit_weights()).__enter__()


def test_fused_projections_are_an_error_that_says_how_to_undo_them(untrained):
    untrained.fuse_qkv_projections()
    with pytest.raises(TypeError, match=r"^transformer_blocks\.0\.attn.*unfuse_qkv_projections"):
        record_attention(untrained, unit_weights()).__enter__()
    untrained.unfuse_qkv_projections()
    with record_attention(untrained, unit_weights()) as recorder:
        untrained(**inputs())
    assert recorder.mass.shape == (2, IMAGE, UNITS)


@pytest.mark.parametrize(
    ("error", "name", "arguments"),
    [
        (TypeError, "transformer", {"transformer": nn.Linear(2, 2)}),
        (TypeError, "transformer", {"transformer": None}),
        (TypeError, "transformer", {"transformer": nn.Sequential(nn.Linear(2, 2))}),
        (TypeError, "units", {"units": [[1.0]]}),
        (ValueError, "units", {"units": torch.zeros(2, TEXT)}),
        (TypeError, "units", {"units": torch.zeros(2, TEXT, 1, dtype=torch.int64)}),
        (TypeError, "layers", {"layers": 1}),
        (TypeError, "layers", {"layers": "01"}),
        (TypeError, "layers", {"layers": [0.0]}),
        (TypeError, "layers", {"layers": [True]}),
        (ValueError, "layers", {"layers": []}),
        (ValueError, "layers", {"layers": [0, 3]}),
        (ValueError, "layers", {"layers": [-1]}),
        (TypeError, "rows", {"rows": 2}),
        (TypeError, "rows", {"rows": (0, 1, 2)}),
        (TypeError, "rows", {"rows": (0, 2.0)}),
        (ValueError, "rows", {"rows": (2, 2)}),
        (ValueError, "rows", {"rows": (-2, 2)}),
        (ValueError, "rows", {"rows": slice(0, 4, 2)}),
        (ValueError, "direction", {"direction": "text"}),
        (ValueError, "implementation", {"implementation": "flash"}),
        (ValueError, "backend", {"backend": "fast"}),
        (ValueError, "backend", {"units": None, "backend": "fast"}),
        (TypeError, "record_pass", {"record_pass": True}),
        (TypeError, "record_pass", {"record_pass": 0.0}),
        (ValueError, "record_pass", {"record_pass": -1}),
    ],
    ids=str,
)
def test_bad_arguments_are_named(untrained, error, name, arguments):
    with pytest.raises(error, match=f"^{name}"):
        record_attention(**{"transformer": untrained, "units": unit_weights(), **arguments}).__enter__()


def test_a_negative_unit_weight_is_named(untrained):
    with pytest.raises(ValueError, match="unit_weights"), record_attention(untrained, -unit_weights()):
        untrained(**inputs())


def pipeline_call(transformer):
    """A StableDiffusion3Pipeline without text encoders, and the arguments of a call under guidance."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = ["vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3"]
    pipe = StableDiffusion3Pipeline(transformer=transformer, scheduler=scheduler, **dict.fromkeys(parts))
    pipe.set_progress_bar_config(disable=True)
    embeddings = inputs(4)
    return pipe, {
        "prompt_embeds": embeddings["encoder_hidden_states"][:2],
        "negative_prompt_embeds": embeddings["encoder_hidden_states"][2:],
        "pooled_prompt_embeds": embeddings["pooled_projections"][:2],
        "negative_pooled_prompt_embeds": embeddings["pooled_projections"][2:],
        "latents": embeddings["hidden_states"][:2],
        "height": 64,
        "width": 64,
        "guidance_scale": 4.0,
        "num_inference_steps": 3,
        "output_type": "latent",
    }


def next_step_of(recorder):
    def store(pipe, step, timestep, tensors):
        recorder.next_step()
        return {}

    return store


def test_a_pipeline_run_under_guidance_is_recorded_step_by_step(untrained):
    pipe, arguments = pipeline_call(untrained)
    plain = pipe(**arguments).images
    with record_attention(pipe.transformer, unit_weights(), rows=slice(2, None)) as recorder:
        output = pipe(**arguments, callback_on_step_end=next_step_of(recorder)).images
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-4)
    assert [mass.shape for mass in recorder.history] == [(2, IMAGE, UNITS)] * 3
    assert not torch.equal(recorder.history[0], recorder.history[2])


# The layer that the second pass skips is the only one recorded in the last case: that pass runs none.
@pytest.mark.parametrize(
    ("record_pass", "rows", "layers"), [(0, slice(2, None), None), (1, None, None), (0, slice(2, None), [1])], ids=str
)
def test_skip_layer_guidance_is_recorded_by_choice_of_the_pass(untrained, record_pass, rows, layers):
    pipe, arguments = pipeline_call(untrained)
    # A second pass in every step: it has the conditional rows alone and skips a layer.
    arguments |= {"skip_guidance_layers": [1], "skip_layer_guidance_start": -1, "skip_layer_guidance_stop": 2}
    options = {"rows": rows, "layers": layers}
    passes = []
    hook = untrained.register_forward_pre_hook(lambda _, __, kwargs: passes.append(kwargs), with_kwargs=True)
    plain = pipe(**arguments).images
    hook.remove()
    with record_attention(pipe.transformer, unit_weights(), record_pass=record_pass, **options) as recorder:
        output = pipe(**arguments, callback_on_step_end=next_step_of(recorder)).images
    torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-4)
    assert len(passes) == 6 and not untrained._forward_pre_hooks
    # The first step has the same inputs in both runs; later latents differ by the rounding of another attention.
    with record_attention(untrained, unit_weights(), **options) as alone, torch.no_grad():
        for arguments_of_pass in passes[record_pass::2]:
            untrained(**arguments_of_pass)
            alone.next_step()
    assert torch.equal(recorder.history[0], alone.history[0])
    torch.testing.assert_close(recorder.history, alone.history, rtol=1e-3, atol=1e-4)


def test_a_second_pass_of_a_pipelines_step_is_an_error_that_names_record_pass(untrained):
    pipe, arguments = pipeline_call(untrained)
    with record_attention(pipe.transformer, unit_weights(), rows=slice(2, None)) as recorder:
        store = next_step_of(recorder)
        with pytest.raises(RuntimeError, match=r"record_pass=0"):
            pipe(**arguments, skip_guidance_layers=[1], skip_layer_guidance_stop=2, callback_on_step_end=store)


@torch.no_grad()
def test_a_step_without_the_chosen_pass_is_an_error(untrained):
    with record_attention(untrained, unit_weights(), record_pass=1) as recorder:
        untrained(**inputs(batch=3, text=2))
        with pytest.raises(RuntimeError, match=r"^mass.*pass 1 .*got 1 passes"):
            recorder.next_step()
        untrained(**inputs())
        recorder.next_step()
        # A discarded step does not count.
        untrained(**inputs(seed=5))
        recorder.discard_step()
        for seed in (5, 0):
            untrained(**inputs(seed=seed))
    assert torch.equal(recorder.mass, recorder.history[0])
