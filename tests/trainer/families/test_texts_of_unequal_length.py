"""Qwen-Image and Z-Image: prompts that differ in length in one batch, and what their families refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage
from star_trainer.config import ConfigError, load_config
from star_trainer.dry_run import plan
from star_trainer.families.conditioning import Conditioning
from star_trainer.families.policy import Policy, freeze, load_policy
from star_trainer.prompts import Prompt
from star_trainer.run.randomness import stream
from star_trainer.sampling import denoise, text_units

import star_kernels as sk
from tests.trainer.families.small_pipelines import PIPELINES

SHORT, LONG = "a cat", "a photo of a red circle and a blue square with three cats"
UNITS = {SHORT: ("cat",), LONG: ("red circle", "blue square")}
LONGER = 64


@pytest.fixture(scope="module", params=["qwen_image", "z_image"])
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def policy(name: str) -> Policy:
    torch.manual_seed(0)
    pipeline = PIPELINES[name].build()
    freeze(pipeline)
    settings = ["model.resolution=[32, 48]", f"model.max_sequence_length={LONGER}", "model.lora.targets=null"]
    return load_policy(load_config("tiny", settings).model, pipeline=pipeline)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_a_prompts_image_and_map_do_not_depend_on_the_other_prompts_of_a_batch(
    name: str, policy: Policy, guidance_scale: float
) -> None:
    allocation = load_config("tiny", []).allocation

    def sampled(texts: list[str]) -> Any:
        generators = [stream(0, "test", len(text)) for text in texts]
        options = {"steps": 2, "kind": "flow_sde", "eta": 0.7, "guidance_scale": guidance_scale}
        units = text_units(policy, [Prompt(text, {}, UNITS[text]) for text in texts])
        conditioning = policy.encode(texts)
        return denoise(policy, conditioning, generator=generators, units=units, allocation=allocation, **options)

    both = sampled([SHORT, LONG])
    for row, text in enumerate((SHORT, LONG)):
        alone = sampled([text])
        torch.testing.assert_close(both.latents[:, [row]], alone.latents, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both.weights[:, [row]], alone.weights, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(both.weights[:, 0], both.weights[:, 1], atol=1e-3)
    if name == "qwen_image":
        # In a batch of as many prompts, all of one length, by no bit.
        short = sampled([SHORT, SHORT])
        assert torch.equal(both.latents[:, 0], short.latents[:, 0])
        assert torch.equal(both.weights[:, 0], short.weights[:, 0])


@torch.no_grad()
def test_units_of_a_pipeline_fit_what_its_own_call_gives_its_model(name: str, policy: Policy) -> None:
    pipeline, prompts, small = policy.pipeline, [SHORT, LONG], PIPELINES[name]
    units = sk.TextUnits.from_pipeline(pipeline, prompts, [list(UNITS[text]) for text in prompts])
    encoded = pipeline.encode_prompt(list(prompts))[0]
    lengths = [len(row) for row in encoded]
    assert units.weights.shape[1] == max(lengths) and units.missing == [[], []]
    # Behind the shorter prompt is nothing, and only its last word and the long one's phrases count.
    assert units.weights.sum((1, 2)).tolist() == [1.0, 4.0]
    masses = []

    def end_of_step(pipe: Any, *_: Any) -> dict[str, Any]:
        masses.append(recorder.mass)
        recorder.discard_step()
        return {}

    options = {"num_inference_steps": 2, "output_type": "latent", "height": 32, "width": 48}
    if name == "qwen_image":
        options |= small.guided(3.0) | {"negative_prompt": ["", ""]}
        record = sk.record_attention(pipeline.transformer, units, record_pass=0)
    else:
        # Both halves in one call, the prompts' first.
        options |= small.guided(3.0)
        record = sk.record_attention(pipeline.transformer, units, rows=slice(0, 2))
    with record as recorder:
        pipeline(prompts, callback_on_step_end=end_of_step, **options)
    mass, _ = masses
    assert mass.shape == (2, 4 * 6, 2) and float(mass[0, :, 0].min()) > 0.0 == float(mass[0, :, 1].max())


def test_lengths_go_with_their_rows_and_stay_where_they_are_read() -> None:
    first, second = (Conditioning({"text": torch.full((2, 3, 1), float(i))}, torch.tensor([i, 3])) for i in (1, 2))
    both = Conditioning.joined([first, second]).to("meta")
    assert both.tensors["text"].is_meta and both.lengths is not None and both.lengths.tolist() == [1, 3, 2, 3]
    picked = Conditioning.joined([first, second])[torch.tensor([2, 0])].repeat_interleave(2)
    assert picked.lengths is not None and picked.lengths.tolist() == [2, 2, 1, 1]
    assert picked.tensors["text"][:, 0, 0].tolist() == [2.0, 2.0, 1.0, 1.0]
    single = first[:1].repeat(3)
    assert single.lengths is not None and single.lengths.tolist() == [1, 1, 1]


def test_what_qwen_images_pipeline_drops_is_what_stands_before_the_prompt() -> None:
    """With its own vocabulary as well, to whose tokens the small one keeps."""
    pipeline = PIPELINES["qwen_image"].build()
    before, _ = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx


def test_a_release_of_diffusers_that_masks_no_text_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    PIPELINES["qwen_image"].save(tmp_path)
    monkeypatch.delattr(transformer_qwenimage, "compute_text_seq_len_from_mask")
    with pytest.raises(ConfigError, match=r"model\.pipeline: .*expected diffusers 0\.37 or newer"):
        load_policy(load_config("tiny", [f"model.pipeline={tmp_path}"]).model)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_sequence_length=1025", "model.max_sequence_length: expected at most 1024 for a QwenImagePipeline"),
        ("resolution=520", "model.resolution: expected multiples of 16, got 520"),
    ],
)
def test_what_qwen_image_cannot_take_is_refused(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        plan(load_config("qwen_image_pickscore", [f"model.{setting}"]))
