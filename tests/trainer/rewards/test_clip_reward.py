"""CLIP score and PickScore on a small CLIP of random weights, and their differentiable preparation of images."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from star_trainer.config import ConfigError
from star_trainer.prompts import Prompt
from star_trainer.rewards.models.clip import ClipModel, ClipReward
from transformers import CLIPProcessor, SiglipConfig, SiglipModel

from tests.tiny_models import tiny_clip_tokenizer
from tests.tiny_reward_models import CLIPImageProcessor, save_clip

PROMPTS = [Prompt(text, {}) for text in ("a red circle", "a blue square", "a photo of three cats")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip") / "model")


@pytest.fixture(scope="module")
def clip(folder: Path) -> ClipModel:
    return ClipModel(str(folder), key="reward.models.clip")


def images(height: int, width: int, count: int = 3) -> np.ndarray:
    """Pictures with edges, gradients and noise."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[0:height, 0:width]
    waves = 127 + 127 * np.sin(rows / 9)[..., None] * np.cos(columns / np.array([5, 7, 11])[:, None, None]).transpose(
        1, 2, 0
    )
    noise = generator.normal(0, 20, (count, height, width, 3))
    pictures = np.clip(waves + noise, 0, 255).astype(np.uint8)
    pictures[:, height // 3 : height // 2, width // 3 : width // 2] = (255, 0, 64)
    return pictures


def as_tensor(pictures: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 255


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (48, 80), (97, 61), (32, 32), (20, 24)])
def test_the_differentiable_preparation_agrees_with_the_processor(clip: ClipModel, size: tuple[int, int]) -> None:
    pictures = images(*size)
    expected = clip.processor.image_processor(
        images=[Image.fromarray(picture) for picture in pictures], return_tensors="pt"
    )["pixel_values"]
    torch.testing.assert_close(clip.pixels(as_tensor(pictures)), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("size", [(64, 64), (48, 80)])
def test_the_differentiable_reward_is_the_reward(clip: ClipModel, size: tuple[int, int]) -> None:
    pictures = images(*size)
    reward = ClipReward(clip, scale="percent")
    differentiable = reward.differentiable(as_tensor(pictures), [prompt.text for prompt in PROMPTS])
    np.testing.assert_allclose(differentiable.numpy(), reward(pictures, PROMPTS), atol=1e-3)


def test_rewards_are_transformers_own_logits(clip: ClipModel) -> None:
    pictures = images(64, 64)
    inputs = clip.processor(
        text=[prompt.text for prompt in PROMPTS],
        images=[Image.fromarray(picture) for picture in pictures],
        return_tensors="pt",
        padding=True,
    )
    logits = clip.model(**inputs).logits_per_image.diagonal().detach().double().numpy()
    np.testing.assert_allclose(ClipReward(clip, scale="logit")(pictures, PROMPTS), logits, rtol=1e-5)
    percent = ClipReward(clip, scale="percent")(pictures, PROMPTS)
    np.testing.assert_allclose(percent * clip.logit_scale / 100, logits, rtol=1e-5)


def test_the_gradient_points_uphill(clip: ClipModel) -> None:
    start = as_tensor(images(48, 48)).requires_grad_()
    reward = ClipReward(clip, scale="percent")
    texts = [prompt.text for prompt in PROMPTS]
    before = reward.differentiable(start, texts)
    (gradient,) = torch.autograd.grad(before.sum(), start)
    assert torch.isfinite(gradient).all() and (gradient != 0).any(dim=(1, 2, 3)).all()
    after = reward.differentiable(start + 0.05 * gradient.sign(), texts)
    assert (after > before).all()


@pytest.mark.parametrize("size", [(64, 64), (512, 512), (48, 80), (97, 61), (20, 24)])
def test_the_gradient_is_that_of_the_same_resizing_without_rounding(clip: ClipModel, size: tuple[int, int]) -> None:
    start = as_tensor(images(*size, 1)).requires_grad_()
    smooth, exact = clip.preparation.without_rounding(start), clip.pixels(start)
    # Bytes are rounded around and between the two passes of the resizing, and cut off between them at a hard edge.
    apart = (smooth - exact).abs() * clip.preparation.std * 255
    assert apart.mean() < 0.5 and (apart < 1.5).float().mean() > 0.98
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(0))
    gradients = [torch.autograd.grad((pixels * weights).sum(), start)[0] for pixels in (smooth, exact)]
    torch.testing.assert_close(*gradients)


def test_no_weight_gets_a_gradient(clip: ClipModel) -> None:
    start = as_tensor(images(40, 40)).requires_grad_()
    ClipReward(clip, scale="logit").differentiable(start, [prompt.text for prompt in PROMPTS]).sum().backward()
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_a_batch_larger_than_one_pass(clip: ClipModel) -> None:
    pictures, prompts = np.repeat(images(32, 32), 20, axis=0), [p for p in PROMPTS for _ in range(20)]
    scores = ClipReward(clip, scale="percent")(pictures, prompts)
    assert scores.shape == (60,)
    np.testing.assert_allclose(scores.reshape(3, 20), scores[::20, None].repeat(20, 1), rtol=1e-4)


def test_a_long_prompt_is_cut_and_not_an_error(clip: ClipModel) -> None:
    score = ClipReward(clip, scale="percent")(images(32, 32, 1), [Prompt("a red circle " * 1000, {})])
    assert np.isfinite(score).all()


def test_a_model_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"reward.models.clip: {tmp_path}"):
        ClipModel(str(tmp_path), key="reward.models.clip")


def test_a_processor_that_prepares_images_otherwise_is_refused(folder: Path, tmp_path: Path) -> None:
    processor = CLIPProcessor(
        image_processor=CLIPImageProcessor(do_center_crop=False, resample=2), tokenizer=tiny_clip_tokenizer()
    )
    processor.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="do_center_crop"):
        ClipModel(str(folder), str(tmp_path), key="reward.models.clip")


def test_a_siglip_is_refused_in_one_line(folder: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 8}
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    SiglipModel(SiglipConfig(text_config={**sizes, "vocab_size": 100}, vision_config=vision)).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match=r"^reward\.models\.clip: .*type clip, got siglip$"):
        ClipModel(str(tmp_path), key="reward.models.clip")


def test_weights_of_another_size_are_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "projection_dim": 8}))
    with pytest.raises(ConfigError, match=r"reward\.models\.clip"):
        ClipModel(str(tmp_path), key="reward.models.clip")


def test_a_folder_that_is_not_there_is_asked_of_no_hub() -> None:
    with pytest.raises(ConfigError, match=r"reward\.models\.pickscore: no such folder: \./nowhere"):
        ClipModel("./nowhere", key="reward.models.pickscore")
    with pytest.raises(ConfigError, match=r"reward\.models\.pickscore_processor: no such folder"):
        ClipModel("tiny", "./nowhere", key="reward.models.pickscore")
