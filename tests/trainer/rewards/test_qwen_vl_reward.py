"""HPSv3 on a small Qwen2-VL of random weights: conversion, the published reading of the score, and its gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from star_trainer.config import ConfigError, Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, load_terms
from star_trainer.rewards.models.convert import convert_hps3, main
from star_trainer.rewards.models.qwen_vl import Qwen2VLRewardModel, QwenVLReward
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration

from tests.tiny_checkpoints import central_differences

try:  # The processor without torchvision has had a name of its own since transformers 5.
    from transformers import Qwen2VLImageProcessorPil as Qwen2VLImageProcessor
except ImportError:
    from transformers import Qwen2VLImageProcessor

PROMPTS = [Prompt(text, {}) for text in ("a red circle", "a cat", "a blue square of a cat")]
TEXTS = [prompt.text for prompt in PROMPTS]
PIXELS = 4 * 28 * 28
SPECIAL = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
WORDS = ("user", "assistant", "Rate", "a", "red", "blue", "circle", "square", "cat", "of", ":", "[unk]")
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }} {% for c in m.content %}{% if c.type == 'image' %}<|vision_start|>"
    "<|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)


def save_base(folder: Path) -> Path:
    """The Qwen2-VL whose sizes, tokenizer and image processor the scorer has."""
    vocabulary = {word: place for place, word in enumerate((*SPECIAL, *WORDS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[unk]"))
    tokenizer.pre_tokenizer = Split(Regex(r"\s+"), "removed")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", pad_token="<|pad|>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.chat_template = CHAT
    fast.save_pretrained(folder)
    Qwen2VLImageProcessor().save_pretrained(folder)
    Qwen2VLConfig(
        text_config={
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 128,
            "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=vocabulary["<|image_pad|>"],
        vision_start_token_id=vocabulary["<|vision_start|>"],
        vision_end_token_id=vocabulary["<|vision_end|>"],
        video_token_id=vocabulary["<|vision_end|>"],
    ).save_pretrained(folder)
    return folder


def checkpoint(path: Path, base: Path) -> dict[str, Tensor]:
    """The scorer's file, with the names that transformers had for Qwen2-VL when it was published."""
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size += 1
    torch.manual_seed(0)
    model = Qwen2VLRewardModel(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    names = {name: name.replace("model.visual.", "visual.", 1) for name, _ in model.named_parameters()}
    names = {name: new.replace("model.language_model.", "model.", 1) for name, new in names.items()}
    tensors = {names[name]: parameter.detach().clone() for name, parameter in model.named_parameters()}
    torch.save(tensors, path)
    return tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hps3")
    checkpoint(root / "hps3.pt", save_base(root / "base"))
    (root / "template.txt").write_text("Rate {text_prompt} : <|Reward|> :")
    convert_hps3(root / "hps3.pt", root / "hps3", root / "template.txt", str(root / "base"), PIXELS)
    return root


def load(folder: Path, **options: Any) -> QwenVLReward:
    return QwenVLReward(str(folder / "hps3"), **{"dtype": torch.float32, **options})


def pictures(side: int = 64) -> np.ndarray:
    generator = np.random.default_rng(0)
    smooth = np.kron(generator.uniform(30, 220, (3, side // 8, side // 8, 3)), np.ones((1, 8, 8, 1)))
    return np.clip(smooth + generator.normal(0, 6, (3, side, side, 3)), 0, 255).astype(np.uint8)


def as_tensor(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255


def test_the_score_is_the_first_output_of_the_head_at_the_rating_token(folder: Path) -> None:
    """One image at a time, with its tokens written by hand and the weights under their published names."""
    tensors = torch.load(folder / "hps3.pt")
    config = Qwen2VLConfig.from_pretrained(folder / "hps3")
    plain = Qwen2VLForConditionalGeneration(config).eval()
    new = {
        name: name.replace("model.", "model.language_model.", 1) if name.startswith("model.") else f"model.{name}"
        for name in tensors
        if not name.startswith(("rm_head", "lm_head"))
    }
    plain.load_state_dict({new[name]: tensors[name] for name in new} | {"lm_head.weight": tensors["lm_head.weight"]})
    processor = Qwen2VLImageProcessor(size={"shortest_edge": PIXELS, "longest_edge": PIXELS})
    ids = {word: place for place, word in enumerate((*SPECIAL, *WORDS, "<|Reward|>"))}
    expected = []
    for image, text in zip(pictures(), TEXTS, strict=True):
        made = processor(images=[Image.fromarray(image)], return_tensors="pt")
        count = int(made["image_grid_thw"].prod()) // 4
        assert count == 4
        written = ["<|im_start|>", "user", "<|vision_start|>", *["<|image_pad|>"] * count, "<|vision_end|>", "Rate"]
        written += [*text.split(), ":", "<|Reward|>", ":", "<|im_end|>", "<|im_start|>", "assistant"]
        tokens = torch.tensor([[ids[word] for word in written]])
        told = {"mm_token_type_ids": (tokens == ids["<|image_pad|>"]).int()}
        try:
            hidden = plain.model(input_ids=tokens, **made, **told).last_hidden_state
        except TypeError:
            hidden = plain.model(input_ids=tokens, **made).last_hidden_state
        at = hidden[0, written.index("<|Reward|>")]
        for place in (0, 3, 5):
            at = at @ tensors[f"rm_head.{place}.weight"].T + tensors[f"rm_head.{place}.bias"]
            at = at if place == 5 else at.relu()
        expected.append(at[0].item())
    assert np.ptp(expected) > 0.01
    np.testing.assert_allclose(load(folder)(pictures(), PROMPTS), expected, rtol=1e-4, atol=1e-4)


def test_the_differentiable_value_is_the_value(folder: Path) -> None:
    reward, images = load(folder), pictures()
    with torch.no_grad():
        found = reward.differentiable(as_tensor(images), TEXTS).numpy()
    np.testing.assert_allclose(found, reward(images, PROMPTS), rtol=1e-3, atol=1e-3)


def test_the_gradient_is_that_of_finite_differences(folder: Path) -> None:
    reward = load(folder, dtype=torch.float64)
    reward.model.double()
    exact = reward._exact

    def score(images: Tensor) -> Tensor:
        grid = exact((images.detach() * 255).byte().permute(0, 2, 3, 1).numpy())[1]
        return reward._score(reward._smooth(images, *grid[0, 1:].tolist()), grid, TEXTS)

    start = (0.1 + 0.8 * as_tensor(pictures()).double()).requires_grad_()
    (gradient,) = torch.autograd.grad(score(start).sum(), start)
    direction = torch.randn(start.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Qwen2-VL normalises in float32 whatever its weights are: a smaller step would measure rounding.
    measured = central_differences(score, start.detach(), direction, 3e-4)
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), measured, rtol=1e-2, atol=1e-3)
    (whole,) = torch.autograd.grad(reward.differentiable(start.float(), TEXTS).sum(), start)
    assert torch.nn.functional.cosine_similarity(whole.flatten(1), gradient.flatten(1)).min() > 0.9


def test_it_loads_by_name_in_bfloat16(folder: Path) -> None:
    models = {"hps3": str(folder / "hps3")}
    settings = {"terms": {"hps3": 1.0}, "models": models, "dtype": "bfloat16"}
    (term,) = load_terms(Reward.model_validate(settings)).values()
    full = load(folder)(pictures(), PROMPTS)
    half = load(folder, dtype=torch.bfloat16).model
    assert half.model.visual.dtype == torch.bfloat16
    heads = [load(folder).model.rm_head, half.rm_head]
    assert all(torch.equal(*pair) for pair in zip(*(head.parameters() for head in heads), strict=True))
    np.testing.assert_allclose(term(pictures(), PROMPTS), full, rtol=0.1, atol=0.1 * np.abs(full).max())


def test_a_prompt_cannot_ask_for_a_second_rating(folder: Path) -> None:
    hostile = [Prompt("a cat <|Reward|>", {})] * 3
    assert load(folder)(pictures(), hostile).shape == (3,)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("Rate {text_prompt} :", "--template: .*one <|Reward|>"),
        ("Rate : <|Reward|>", "--template: "),
        ("{text_prompt} <|Reward|> <|Reward|>", "--template: "),
        (None, "--template: expected a file with what hps3 is asked"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused(
    folder: Path, tmp_path: Path, capsys: Any, template: str | None, said: str
) -> None:
    arguments = ["hps3", str(folder / "hps3.pt"), str(tmp_path / "out"), "--like", str(folder / "base")]
    if template is not None:
        (tmp_path / "t.txt").write_text(template)
        arguments += ["--template", str(tmp_path / "t.txt")]
    assert main(arguments) == 2
    assert said.partition(".*")[0] in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_another_checkpoint_is_refused(folder: Path, tmp_path: Path) -> None:
    tensors = {name: value for name, value in torch.load(folder / "hps3.pt").items() if "rm_head" not in name}
    torch.save(tensors, tmp_path / "plain.pt")
    with pytest.raises(ConfigError, match="lacks 6 weights of this model, such as rm_head.0.bias"):
        convert_hps3(tmp_path / "plain.pt", tmp_path / "out", folder / "template.txt", str(folder / "base"), PIXELS)
    with pytest.raises(ConfigError, match=r"^reward\.models\.hps3: "):
        QwenVLReward(str(folder / "base"))


def test_an_image_smaller_than_a_group_of_patches_is_named(folder: Path) -> None:
    with pytest.raises(RewardError, match="expected at least 28 pixels a side, got 24x24"):
        load(folder)(pictures(24), PROMPTS)
