"""HPS, ImageReward and the aesthetic score from published checkpoints in small: values, gradients, what is refused."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from star_trainer.config import ConfigError, Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards import NotDifferentiable, RewardError, check_differentiable, check_reward, load_terms
from star_trainer.rewards.models.clip import ClipModel, ClipReward
from star_trainer.rewards.models.convert import convert_aesthetic, convert_hps, convert_image_reward, main
from star_trainer.rewards.models.heads import AestheticReward
from star_trainer.rewards.models.image_reward import ImageReward
from torch import Tensor

from tests import tiny_checkpoints as published
from tests.tiny_reward_models import save_clip

PROMPTS = [Prompt(text, {}) for text in ("a photo of a red circle", "a cat", "a blue square of a cat")]
TEXTS = [prompt.text for prompt in PROMPTS]
NAMES = ("hps", "image_reward", "aesthetic")


@dataclass
class Case:
    """A reward's folder, how it is loaded, and its formula on the published weights: of what is prepared and texts."""

    folder: Path
    load: Callable[..., Any]
    formula: Callable[[Tensor, list[str]], Tensor]


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    root = tmp_path_factory.mktemp("published")
    like, bert, clip = published.save_like(root / "like"), published.save_bert_tokenizer(root / "bert"), root / "clip"
    save_clip(clip)
    hps = published.open_clip_checkpoint(root / "hps.pt")
    convert_hps(root / "hps.pt", root / "hps", str(like))
    blip = published.image_reward_checkpoint(root / "blip.pt")
    convert_image_reward(root / "blip.pt", root / "image_reward", str(bert), head_width=8)
    head = published.head_checkpoint(root / "head.pth", 16)
    convert_aesthetic(root / "head.pth", root / "aesthetic")

    def load_hps(**options: Any) -> ClipReward:
        return ClipReward(
            ClipModel(str(root / "hps"), key="reward.models.hps", rounding=False, **options), scale="cosine"
        )

    def load_aesthetic(**options: Any) -> AestheticReward:
        model = ClipModel(str(clip), key="reward.models.aesthetic_clip", **options)
        return AestheticReward(model, str(root / "aesthetic"))

    def hps_formula(pixels: Tensor, texts: list[str]) -> Tensor:
        tokenizer = load_hps().model.processor.tokenizer
        ends = [tokenizer(text).input_ids for text in texts]
        tokens = torch.zeros(len(texts), 77, dtype=torch.long)
        for row, ids in zip(tokens, ends, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return published.hps_value(hps, pixels, tokens)

    def image_reward_formula(pixels: Tensor, texts: list[str]) -> Tensor:
        tokenizer = ImageReward(str(root / "image_reward")).tokenizer
        tokens = tokenizer(texts, padding="max_length", max_length=35, truncation=True, return_tensors="pt")
        return published.image_reward_value(blip, pixels, tokens.input_ids, tokens.attention_mask)

    def aesthetic_formula(pixels: Tensor, texts: list[str]) -> Tensor:
        model = ClipModel(str(clip), key="clip", dtype=torch.float64).model
        features = model.get_image_features(pixel_values=pixels.double())
        features = getattr(features, "pooler_output", features)
        return published.head_value(head, features / features.norm(dim=-1, keepdim=True))

    return {
        "hps": Case(root / "hps", load_hps, hps_formula),
        "image_reward": Case(
            root / "image_reward",
            lambda **options: ImageReward(str(root / "image_reward"), **options),
            image_reward_formula,
        ),
        "aesthetic": Case(root / "aesthetic", load_aesthetic, aesthetic_formula),
    }


def pictures(side: int = 48) -> np.ndarray:
    generator = np.random.default_rng(0)
    smooth = np.kron(generator.uniform(30, 220, (3, side // 8, side // 8, 3)), np.ones((1, 8, 8, 1)))
    return np.clip(smooth + generator.normal(0, 6, (3, side, side, 3)), 0, 255).astype(np.uint8)


def as_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def preparation(reward: Any) -> Any:
    holder = getattr(reward, "clip", None) or getattr(reward, "model", None)
    return getattr(reward, "preparation", None) or holder.preparation


@pytest.mark.parametrize("name", NAMES)
def test_a_converted_reward_is_the_published_formula_on_the_published_weights(
    cases: dict[str, Case], name: str
) -> None:
    images, case = pictures(), cases[name]
    reward = case.load()
    if name == "hps":
        pixels = published.published_pixels(as_tensor(images))
    else:
        processor = preparation(reward).processor
        pixels = processor(images=[Image.fromarray(image) for image in images], return_tensors="pt")["pixel_values"]
    expected = case.formula(pixels, TEXTS).detach().numpy()
    assert np.ptp(expected) > 0.01, "the formula tells images apart"
    np.testing.assert_allclose(reward(images, PROMPTS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(48, 48), (40, 64)])
def test_the_differentiable_value_is_the_value(cases: dict[str, Case], name: str, size: tuple[int, int]) -> None:
    images = pictures(64)[:, : size[0], : size[1]]
    reward = cases[name].load()
    with torch.no_grad():
        found = reward.differentiable(as_tensor(images), TEXTS)
    np.testing.assert_allclose(found.numpy(), reward(images, PROMPTS), atol=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_finite_differences(cases: dict[str, Case], name: str) -> None:
    reward = cases[name].load(dtype=torch.float64)
    preparation(reward).rounding = False
    start = (0.1 + 0.8 * as_tensor(pictures()).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(reward.differentiable(start, TEXTS).sum(), start)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    measured = published.central_differences(
        lambda at: reward.differentiable(at, TEXTS), start.detach(), direction, 1e-5
    )
    slopes = (gradient * direction).sum((1, 2, 3))
    assert slopes.abs().min() > 1e-6
    torch.testing.assert_close(slopes, measured, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_rounding_to_bytes_does_not_change_the_gradients_direction(cases: dict[str, Case], name: str) -> None:
    reward, start = cases[name].load(), as_tensor(pictures()).requires_grad_()
    (with_rounding,) = torch.autograd.grad(reward.differentiable(start, TEXTS).sum(), start)
    preparation(reward).rounding = False
    (without,) = torch.autograd.grad(reward.differentiable(start, TEXTS).sum(), start)
    assert torch.nn.functional.cosine_similarity(with_rounding.flatten(1), without.flatten(1)).min() > 0.95


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_weights_give_nearly_the_same(cases: dict[str, Case], name: str) -> None:
    images = pictures()
    full, half = (cases[name].load(dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    values = full(images, PROMPTS)
    np.testing.assert_allclose(half(images, PROMPTS), values, rtol=0.05, atol=0.05 * np.abs(values).max())
    start = as_tensor(images).requires_grad_()
    (gradient,) = torch.autograd.grad(half.differentiable(start, TEXTS).sum(), start)
    assert gradient.dtype == torch.float32 and torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_bfloat16_keeps_heads_and_the_scale_of_logits_as_they_are(cases: dict[str, Case]) -> None:
    heads = [cases["image_reward"].load(dtype=dtype).model.mlp for dtype in (torch.float32, torch.bfloat16)]
    for full, half in zip(*(head.parameters() for head in heads), strict=True):
        assert half.dtype == torch.float32 and torch.equal(full, half)
    scales = [cases["hps"].load(dtype=dtype).model.logit_scale for dtype in (torch.float32, torch.bfloat16)]
    assert scales[0] == scales[1] == pytest.approx(100.0, rel=1e-5)


def test_the_rewards_load_by_name_and_share_a_clip(cases: dict[str, Case], monkeypatch: pytest.MonkeyPatch) -> None:
    clip = str(cases["aesthetic"].folder.parent / "clip")
    models = {name: str(case.folder) for name, case in cases.items()} | {"clip": clip, "aesthetic_clip": clip}
    config = Reward.model_validate({"terms": {**dict.fromkeys(NAMES, 1.0), "clip_score": 1.0}, "models": models})
    check_differentiable(config)
    loaded = []
    whole = ClipModel.__init__
    monkeypatch.setattr(ClipModel, "__init__", lambda self, *a, **k: (loaded.append(a[0]), whole(self, *a, **k))[1])
    terms = load_terms(config)
    assert loaded.count(clip) == 1
    images = pictures()
    for name, case in cases.items():
        np.testing.assert_allclose(terms[name](images, PROMPTS), case.load()(images, PROMPTS), rtol=1e-6)


def test_the_command_writes_what_the_setting_reads(cases: dict[str, Case], tmp_path: Path, capsys: Any) -> None:
    root = cases["hps"].folder.parent
    assert main(["hps", str(root / "hps.pt"), str(tmp_path / "out"), "--like", str(root / "like")]) == 0
    assert capsys.readouterr().out == f"reward.models.hps={tmp_path / 'out'}\n"
    first, second = (load_file(folder / "model.safetensors") for folder in (cases["hps"].folder, tmp_path / "out"))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def _without(tensors: dict[str, Any], *ends: str) -> dict[str, Any]:
    return {name: value for name, value in tensors.items() if not name.endswith(ends)}


@pytest.mark.parametrize(
    ("reward", "broken", "said"),
    [
        ("hps", lambda root: _without(torch.load(root / "hps.pt")["state_dict"], "ln_final.bias"), "lacks 1 weights"),
        ("hps", lambda root: torch.load(root / "blip.pt"), "lacks .* weights of this model"),
        ("hps", lambda root: {"state_dict": {**torch.load(root / "hps.pt")["state_dict"], "extra": torch.ones(1)}},
         "has 1 weights that this model has not, such as extra"),
        ("hps", lambda root: torch.load(root / "hps.pt")["state_dict"] | {"visual.proj": torch.ones(32, 8)},
         r"visual_projection.weight: expected \[16, 32\], got \[8, 32\]: another model"),
        ("image_reward", lambda root: torch.load(root / "hps.pt")["state_dict"], "expected ImageReward, got weights"),
        ("image_reward", lambda root: _without(torch.load(root / "blip.pt"), "crossattention.self.key.weight"),
         "lacks 2 weights"),
        ("aesthetic", lambda root: torch.load(root / "hps.pt")["state_dict"], "lacks .* weights of this model"),
        ("aesthetic", lambda root: {}, "expected tensors by name"),
        ("aesthetic", lambda root: [1, 2], "expected tensors by name, got list"),
    ],
)  # fmt: skip
def test_a_checkpoint_of_another_model_is_refused(
    cases: dict[str, Case], tmp_path: Path, capsys: Any, reward: str, broken: Callable[[Path], Any], said: str
) -> None:
    root = cases["hps"].folder.parent
    torch.save(broken(root), tmp_path / "broken.pt")
    like = {"hps": ["--like", str(root / "like")], "image_reward": ["--like", str(root / "bert")]}.get(reward, [])
    assert main([reward, str(tmp_path / "broken.pt"), str(tmp_path / "out"), *like]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and not (tmp_path / "out").exists()
    assert re.search(said, printed), printed


class Malicious:
    def __reduce__(self) -> Any:
        return (print, ("run",))


def test_a_file_that_would_run_code_is_refused(tmp_path: Path, capsys: Any) -> None:
    torch.save({"state_dict": Malicious()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Malicious(), protocol=2))
    for name in ("evil.pt", "plain.pt", "missing.pt"):
        assert main(["aesthetic", str(tmp_path / name), str(tmp_path / "out")]) == 2
        captured = capsys.readouterr()
        assert "cannot be read as tensors alone" in captured.err and "run\n" not in captured.out


@pytest.mark.parametrize("name", NAMES)
def test_a_reward_without_its_folder_says_how_to_make_it(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"reward\.models\.{name}: .*`star-convert-reward {name}`"):
        check_reward(Reward(terms={name: 1.0}))
    with pytest.raises(ConfigError) as caught:
        check_differentiable(Reward(terms={name: 1.0}))
    assert not isinstance(caught.value, NotDifferentiable)


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_that_is_not_there_says_so_too(name: str) -> None:
    config = Reward.model_validate({"terms": {name: 1.0}, "models": {name: "./nowhere", "aesthetic_clip": "tiny"}})
    check_reward(config)
    with pytest.raises(
        ConfigError, match=rf"reward\.models\.{name}: no such folder: \./nowhere; .*star-convert-reward"
    ):
        load_terms(config)


def test_a_head_for_another_clip_is_refused(cases: dict[str, Case], tmp_path: Path) -> None:
    published.head_checkpoint(tmp_path / "head.pth", 24)
    convert_aesthetic(tmp_path / "head.pth", tmp_path / "head")
    clip = ClipModel(str(cases["aesthetic"].folder.parent / "clip"), key="clip")
    with pytest.raises(ConfigError, match=r"reward\.models\.aesthetic: .*embeddings of width 16"):
        AestheticReward(clip, str(tmp_path / "head"))
    with pytest.raises(ConfigError, match=r"reward\.models\.aesthetic: .*nowhere"):
        AestheticReward(clip, str(tmp_path / "nowhere"))


def test_a_folder_of_another_model_is_refused(cases: dict[str, Case]) -> None:
    with pytest.raises(ConfigError, match=r"^reward\.models\.image_reward: .*type blip, got clip"):
        ImageReward(str(cases["hps"].folder))
    with pytest.raises(ConfigError, match=r"^reward\.models\.hps: .*type clip, got blip"):
        ClipModel(str(cases["image_reward"].folder), key="reward.models.hps")


@pytest.mark.parametrize("name", NAMES)
def test_an_image_that_is_too_small_is_named(cases: dict[str, Case], name: str) -> None:
    reward, images = cases[name].load(), pictures()[:, :7]
    with pytest.raises(RewardError, match="expected at least 8 pixels a side, got 7x48"):
        reward(images, PROMPTS)
    with pytest.raises(RewardError, match="expected at least 8 pixels a side, got 7x48"):
        reward.differentiable(as_tensor(images), TEXTS)
