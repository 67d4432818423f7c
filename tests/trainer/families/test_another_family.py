"""A family that only the tests know trains through the whole trainer: the seam is all that it needs.

Its model has the text first, no pooled vector, no guidance and packed latents, and no class of it is diffusers'.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import star_trainer.families
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, ConfigMixin, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from safetensors.torch import load_file, save_file
from star_trainer.cli import main
from star_trainer.config import Model, load_config
from star_trainer.dry_run import plan
from star_trainer.families.conditioning import Conditioning, Guidance, GuidanceKind, Prediction, VelocityFunction
from star_trainer.families.family import Shapes, TextAxis
from star_trainer.families.noising import FLOW
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import star_kernels as sk
import star_kernels.recorder
from star_kernels.recorder import Attend, Layer
from tests.tiny_models import tiny_clip_tokenizer

TEXT, HEADS, WIDTH, PATCH = 12, 2, 16, 2


class JointAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_qkv, self.to_out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.processor: Any = Processor(lambda query, key, value, **_: scaled_dot_product_attention(query, key, value))

    def set_processor(self, processor: Any) -> None:
        self.processor = processor

    def forward(self, tokens: Tensor) -> Tensor:
        return self.processor(self, tokens)


class Processor:
    def __init__(self, attend: Any) -> None:
        self.attend = attend

    def __call__(self, attention: JointAttention, tokens: Tensor) -> Tensor:
        query, key, value = attention.to_qkv(tokens).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        out = self.attend(query, key, value, num_image_tokens=tokens.shape[1] - TEXT, text_first=True)
        return attention.to_out(out.transpose(1, 2).flatten(2))


class TextFirstTransformer(ModelMixin, ConfigMixin, PeftAdapterMixin):
    @register_to_config
    def __init__(self, channels: int = 4, size: int = 8, layers: int = 2) -> None:
        super().__init__()
        self.inside = nn.Linear(channels * PATCH**2, WIDTH)
        self.blocks = nn.ModuleList(JointAttention() for _ in range(layers))
        self.outside = nn.Linear(WIDTH, channels * PATCH**2)

    def forward(self, packed: Tensor, text: Tensor, timestep: Tensor) -> Tensor:
        """[B, h·w, C·4], [B, N_text, D] and [B] to the shape of the first."""
        tokens = torch.cat([text, self.inside(packed) + timestep.view(-1, 1, 1) / 1000], 1)
        for block in self.blocks:
            tokens = tokens + block(nn.functional.layer_norm(tokens, (WIDTH,)))
        return self.outside(tokens[:, TEXT:])


class TextFirstPipeline(DiffusionPipeline):
    vae_scale_factor = 8

    def __init__(self, transformer: Any, vae: Any, scheduler: Any, tokenizer: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, tokenizer=tokenizer)
        self.words = torch.randn(len(tokenizer), WIDTH, generator=torch.Generator().manual_seed(1))


class TextFirst:
    """The trainer's side: `star_trainer.families.family.Family`."""

    pipeline_class = "TextFirstPipeline"
    published: Mapping[str, Shapes] = {}
    model_part = "transformer"
    noising = FLOW
    encoder_parts = ()
    lora_targets = ("to_qkv", "to_out")
    model_class = TextFirstTransformer

    def load(self, source: str, dtype: torch.dtype, vae_dtype: torch.dtype) -> Any:
        torch.manual_seed(0)
        transformer, vae = self.build_models({})
        scheduler = FlowMatchEulerDiscreteScheduler(shift=2.0)
        tokenizer = tiny_clip_tokenizer(model_max_length=TEXT)
        return TextFirstPipeline(transformer.to(dtype), vae.to(vae_dtype), scheduler, tokenizer)

    def shapes(self, source: str) -> Shapes:
        return {}

    def build_models(self, shapes: Shapes) -> tuple[Any, Any]:
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        vae = AutoencoderKL(block_out_channels=(4, 4, 4, 4), norm_num_groups=2, latent_channels=4, **blocks)
        return TextFirstTransformer(), vae

    def build_encoders(self, shapes: Shapes) -> list[Any]:
        return []

    def random_pipeline(self, shapes: Shapes, tokenizer: Path) -> Any:
        return self.load("", torch.float32, torch.float32)

    def check(self, config: Model, shape: Any, vae_scale: int) -> None:
        pass

    def num_layers(self, shape: Any) -> int:
        return shape.layers

    def guidance_kind(self, shape: Any) -> GuidanceKind | None:
        return None

    def attention_heads(self, shape: Any) -> tuple[int, int]:
        return HEADS, WIDTH // HEADS

    def latent_shape(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int, int]:
        # Not square: rows and columns must not be taken for each other.
        return shape.channels, shape.size, shape.size + PATCH

    def grid(self, config: Model, shape: Any, vae_scale: int) -> tuple[int, int]:
        return shape.size // PATCH, shape.size // PATCH + 1

    def num_text_tokens(self, config: Model, shapes: Shapes) -> int:
        return TEXT

    def blocks(self, model: Any) -> Sequence[Any]:
        return model.blocks

    def unread(self, model: Any) -> list[Any]:
        return []

    def schedule(
        self, pipeline: Any, config: Model, steps: int, grid: tuple[int, int], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        pipeline.scheduler.set_timesteps(steps, device=device)
        return pipeline.scheduler.sigmas, pipeline.scheduler.timesteps

    def timesteps_at(self, pipeline: Any, levels: Tensor) -> Tensor:
        return 1000 * levels

    def encode(self, pipeline: Any, config: Model, text: str, device: torch.device) -> Conditioning:
        ids = pipeline.tokenizer(text, padding="max_length", truncation=True, return_tensors="pt").input_ids
        return Conditioning({"text": pipeline.words[ids].to(device, pipeline.transformer.dtype)})

    def text_units(
        self, pipeline: Any, config: Model, texts: Sequence[str], units: Sequence[Sequence[str]]
    ) -> sk.TextUnits:
        return sk.TextUnits.from_prompts(texts, units, tokenizers=[pipeline.tokenizer], max_lengths=[TEXT])

    def text_axis(self, source: str, max_sequence_length: int) -> TextAxis:
        return TextAxis([tiny_clip_tokenizer(model_max_length=TEXT)], (TEXT,), f"{TEXT} tokens")

    def velocity(self, model: Any, latents: Tensor, timestep: Tensor, conditioning: Conditioning) -> Tensor:
        packed = nn.functional.pixel_unshuffle(latents, PATCH)
        rows, columns = packed.shape[-2:]
        out = model(packed.flatten(2).mT, conditioning.tensors["text"], timestep.expand(len(latents)))
        return nn.functional.pixel_shuffle(out.mT.unflatten(2, (rows, columns)), PATCH)

    def predict(
        self,
        velocity: VelocityFunction,
        latents: Tensor,
        timestep: Tensor,
        conditioning: Conditioning,
        guidance: Guidance | None,
    ) -> Prediction:
        return Prediction(velocity(latents, timestep, conditioning))

    def pixels(self, pipeline: Any, latents: Tensor, decoder: Any) -> Tensor:
        return (pipeline.vae.decode(latents.to(pipeline.vae.dtype)).sample.float() / 2 + 0.5).clamp(0, 1)

    def save_adapter(self, folder: Path, layers: Mapping[str, Tensor], metadata: dict[str, Any]) -> None:
        folder.mkdir(exist_ok=True)
        save_file(dict(layers), folder / "adapter.safetensors")

    def read_adapter(self, source: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = load_file(Path(source) / "adapter.safetensors")
        return {f"transformer.{name}": value for name, value in tensors.items()}, {}


class TextFirstRecording:
    """The library's side: `star_kernels.recorder.Family`."""

    checkpointing = None

    def layers(self, model: TextFirstTransformer) -> list[Layer]:
        return [Layer(f"blocks.{i}", block, block) for i, block in enumerate(model.blocks)]

    def processor(self, layer: Layer, attend: Attend) -> Processor:
        return Processor(attend)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setitem(star_trainer.families.FAMILIES, "TextFirstPipeline", TextFirst())
    monkeypatch.setitem(star_kernels.recorder.FAMILIES, "TextFirstTransformer", TextFirstRecording())
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    AcceleratorState._reset_state(reset_partial_state=True)
    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "TextFirstPipeline"}))
    return [
        *(f"model.pipeline={tmp_path / 'pipeline'}", f"run.folder={tmp_path / 'run'}", "run.progress=false"),
        "model.lora.targets=null",
        *("train.iterations=2", "train.batch_size=4", "train.kl_weight=0.01", "rollout.prompts=2", "rollout.samples=4"),
        *("rollout.batch_size=4", "rollout.steps=3", "rollout.sde_steps=2", "evaluation.prompts=2"),
        *("evaluation.interim_prompts=2", "evaluation.steps=2", "evaluation.pictures=1"),
        "reward.terms={'reward_for_tests:brightness': 1.0}",
    ]


@pytest.mark.parametrize("method", ["star", "uniform"])
def test_it_trains_through_the_whole_trainer(method: str, settings: list[str], tmp_path: Path) -> None:
    assert main(["tiny", *settings, f"method={method}"]) == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "reward/mean" in record]
    assert [record["iteration"] for record in trained] == [1, 2]
    assert all(record["train/log_ratio_max"] == 0.0 and record["train/gradient_norm"] > 0.0 for record in trained)
    assert trained[1]["train/kl"] > 0.0
    assert (tmp_path / "run" / "allocation_maps.png").exists() == (method == "star")
    layers = load_file(tmp_path / "run" / "adapter" / "adapter.safetensors")
    assert len(layers) == 8 and any(
        float(value.abs().max()) > 0.0 for name, value in layers.items() if "lora_B" in name
    )


def test_its_rollouts_have_maps_of_its_grid_and_the_plan_counts_its_tokens(settings: list[str], tmp_path: Path) -> None:
    from star_trainer.families.policy import load_policy
    from star_trainer.prompts import Prompt
    from star_trainer.sampling import denoise, text_units

    config = load_config("tiny", settings)
    policy = load_policy(config.model)
    prompts = [Prompt("a red circle and a blue square", {}, ("red circle", "blue square"))]
    maps = denoise(
        policy,
        policy.encode([prompts[0].text]),
        steps=2,
        kind="ode",
        generator=torch.Generator().manual_seed(0),
        units=text_units(policy, prompts),
        allocation=config.allocation,
    ).weights
    assert maps is not None and maps.shape == (2, 1, 4, 5)
    torch.testing.assert_close(maps.mean((-2, -1)), torch.ones(2, 1))
    assert float(maps.std()) > 1e-3
    found = plan(config)
    assert found.latent == (4, 8, 10) and found.tokens == 4 * 5 + TEXT
    assert found.trainable == sum(int(np.prod(value.shape)) for value in policy.trainable().values())


def test_guidance_is_refused_where_the_family_has_none(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tiny", *settings, "rollout.guidance_scale=2.0"]) == 2
    assert "rollout.guidance_scale: expected 1 for a model without guidance, got 2.0" in capsys.readouterr().err


def test_a_pipeline_of_no_known_family_is_refused_with_those_that_are(
    settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps({"_class_name": "CogView4Pipeline"}))
    assert main(["tiny", *settings]) == 2
    error = capsys.readouterr().err
    assert "StableDiffusion3Pipeline" in error and "CogView4Pipeline" in error
