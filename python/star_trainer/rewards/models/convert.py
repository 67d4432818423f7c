"""``star-convert-reward``: published checkpoints of rewards as folders that transformers reads, in safetensors.

The checkpoints are read as tensors alone: a file that would run code is refused.
"""

from __future__ import annotations

import argparse
import inspect
import pickle
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from star_trainer.config import ConfigError
from star_trainer.config.command_line import place, run_command

# Width of an attention head of the published encoders: ViT-L and BERT.
_HEAD_WIDTH = 64
# Of the image that HPSv3 sees.
PIXELS = 256 * 28 * 28


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name, from safetensors or from a file of PyTorch that holds nothing but data.

    Raises:
        ConfigError: it cannot be read, would run code, or holds no tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        found: Any = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise ConfigError(f"{path}: cannot be read as tensors alone: {error}") from error
    for name in ("state_dict", "model"):
        if isinstance(found, dict) and isinstance(found.get(name), dict):
            found = found[name]
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"{path}: expected tensors by name, got {type(found).__name__}")
    return {name.removeprefix("module."): value for name, value in found.items()}


def convert_hps(checkpoint: Path, folder: Path, like: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K") -> None:
    """HPS v2 or v2.1 from open_clip's layout; sizes, tokenizer and image processor are those of the CLIP `like`.

    Raises:
        ConfigError: the checkpoint cannot be read, or is not of the same model.
    """
    from transformers import CLIPConfig, CLIPModel, CLIPProcessor

    config, processor = _pretrained(like, CLIPConfig, CLIPProcessor)
    renamed: dict[str, Tensor] = {}
    for name, value in read_tensors(checkpoint).items():
        name = _replaced(name, _OPEN_CLIP)
        if joined := re.fullmatch(r"(.*)in_proj_(weight|bias)", name):
            for part, tensor in zip("qkv", value.chunk(3), strict=True):
                renamed[f"{joined[1]}{part}_proj.{joined[2]}"] = tensor
        else:
            renamed[name] = value.T if name in ("text_projection.weight", "visual_projection.weight") else value
    _check(CLIPModel, config, renamed, checkpoint)
    _write(folder, renamed, config, processor)


_OPEN_CLIP = (
    (r"^visual\.class_embedding$", "vision_model.embeddings.class_embedding"),
    (r"^visual\.positional_embedding$", "vision_model.embeddings.position_embedding.weight"),
    (r"^visual\.conv1\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual\.ln_pre\.", "vision_model.pre_layrnorm."),
    (r"^visual\.ln_post\.", "vision_model.post_layernorm."),
    (r"^visual\.proj$", "visual_projection.weight"),
    (r"^visual\.transformer\.resblocks\.", "vision_model.encoder.layers."),
    (r"^transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"^token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^ln_final\.", "text_model.final_layer_norm."),
    (r"^text_projection$", "text_projection.weight"),
    (r"\.attn\.", ".self_attn."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
)


def convert_image_reward(
    checkpoint: Path, folder: Path, like: str = "google-bert/bert-base-uncased", head_width: int = _HEAD_WIDTH
) -> None:
    """ImageReward v1.0 from BLIP's layout, with the tokenizer of the BERT `like`; sizes come from the weights.

    Raises:
        ConfigError: the checkpoint cannot be read, or is of another model.
    """
    from transformers import BertTokenizer, BlipConfig

    from star_trainer.rewards.models.image_reward import ImageRewardModel

    (tokenizer,) = _pretrained(like, BertTokenizer)
    renamed = {_replaced(name, _BLIP): value for name, value in read_tensors(checkpoint).items()}
    # What BLIP was pretrained with, and ImageReward does not use.
    unused = ("vision_proj.", "text_proj.", "itm_head.", "text_encoder.pooler.")
    renamed = {n: v for n, v in renamed.items() if not n.startswith(unused) and not n.endswith("position_ids")}
    try:
        patch, words = renamed["vision_model.embeddings.patch_embedding.weight"], "text_encoder.embeddings"
        width, text_width = patch.shape[0], renamed["mlp.0.weight"].shape[1]
        patches = renamed["vision_model.embeddings.position_embedding"].shape[1] - 1
        config = BlipConfig(
            vision_config={
                "hidden_size": width,
                "intermediate_size": renamed["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
                "num_hidden_layers": _layers(renamed, r"vision_model\.encoder\.layers\.(\d+)\."),
                "num_attention_heads": max(1, width // head_width),
                "patch_size": patch.shape[-1],
                "image_size": patch.shape[-1] * round(patches**0.5),
                # Of the published encoder; transformers' own is 1e-5.
                "layer_norm_eps": 1e-6,
            },
            text_config={
                "vocab_size": renamed[f"{words}.word_embeddings.weight"].shape[0],
                "hidden_size": text_width,
                "intermediate_size": renamed["text_encoder.encoder.layer.0.intermediate.dense.weight"].shape[0],
                "num_hidden_layers": _layers(renamed, r"text_encoder\.encoder\.layer\.(\d+)\."),
                "num_attention_heads": max(1, text_width // head_width),
                "max_position_embeddings": renamed[f"{words}.position_embeddings.weight"].shape[0],
            },
        )
    except KeyError as error:
        raise ConfigError(f"{checkpoint}: expected ImageReward, got weights without {error.args[0]}") from error
    side = config.vision_config.image_size
    _check(ImageRewardModel, config, renamed, checkpoint)
    _write(folder, renamed, config, tokenizer, _clip_image_processor(side))


_BLIP = (
    (r"^blip\.", ""),
    (r"^mlp\.layers\.", "mlp."),
    (r"^visual_encoder\.cls_token$", "vision_model.embeddings.class_embedding"),
    (r"^visual_encoder\.pos_embed$", "vision_model.embeddings.position_embedding"),
    (r"^visual_encoder\.patch_embed\.proj\.", "vision_model.embeddings.patch_embedding."),
    (r"^visual_encoder\.norm\.", "vision_model.post_layernorm."),
    (r"^visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision_model.encoder.layers.\1.layer_norm\2."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision_model.encoder.layers.\1.self_attn.qkv."),
    (r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.", r"vision_model.encoder.layers.\1.self_attn.projection."),
    (r"^visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision_model.encoder.layers.\1.mlp."),
)


def convert_aesthetic(checkpoint: Path, folder: Path) -> None:
    """LAION's linear aesthetic head, `sac+logos+ava1-l14-linearMSE.pth`.

    Raises:
        ConfigError: the checkpoint cannot be read, or is another head.
    """
    from star_trainer.rewards.models.heads import AESTHETIC_HEAD, linear_head

    renamed = {name.removeprefix("layers."): value for name, value in read_tensors(checkpoint).items()}
    width = renamed["0.weight"].shape[1] if "0.weight" in renamed else 768
    _compare(linear_head(width).state_dict(), renamed, checkpoint)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in renamed.items()}, folder / AESTHETIC_HEAD)


def convert_hps3(
    checkpoint: Path, folder: Path, template: Path, like: str = "Qwen/Qwen2-VL-7B-Instruct", pixels: int = PIXELS
) -> None:
    """HPSv3, or another scorer of its layout; sizes, tokenizer and image processor are those of the Qwen2-VL `like`.

    `template` is a file with what the published code asks the model, which is not repeated here, and `pixels` how many
    the image has that the model sees.

    Raises:
        ConfigError: the checkpoint or the template cannot be used, or the checkpoint is of another model.
    """
    from transformers import AutoImageProcessor, AutoTokenizer, Qwen2VLConfig

    from star_trainer.rewards.models.qwen_vl import REWARD_TOKEN, TEMPLATE, Qwen2VLRewardModel, read_template

    try:
        text = read_template(template)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--template: {error}") from error
    config, tokenizer, processor = _pretrained(like, Qwen2VLConfig, AutoTokenizer, AutoImageProcessor)
    tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
    processor.size = {"shortest_edge": pixels, "longest_edge": pixels}
    renamed = {_replaced(name, _QWEN): value for name, value in read_tensors(checkpoint).items()}
    words = renamed.get("model.language_model.embed_tokens.weight")
    if words is not None:
        config.text_config.vocab_size = len(words)
        renamed.setdefault("lm_head.weight", words)
    _check(Qwen2VLRewardModel, config, renamed, checkpoint)
    _write(folder, renamed, config, tokenizer, processor)
    (folder / TEMPLATE).write_text(text, encoding="utf-8")


# Where transformers has put the parts of Qwen2-VL since 4.52.
_QWEN = ((r"^visual\.", "model.visual."), (r"^model\.(?!visual|language_model)", "model.language_model."))


def _replaced(name: str, rules: Sequence[tuple[str, str]]) -> str:
    for pattern, replacement in rules:
        name = re.sub(pattern, replacement, name)
    return name


def _layers(tensors: Mapping[str, Tensor], pattern: str) -> int:
    return 1 + max((int(found[1]) for name in tensors if (found := re.match(pattern, name))), default=-1)


def _clip_image_processor(side: int) -> Any:
    try:  # The processor without torchvision has had a name of its own since transformers 5.
        from transformers import CLIPImageProcessorPil as CLIPImageProcessor
    except ImportError:
        from transformers import CLIPImageProcessor
    return CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _pretrained(source: str, *kinds: Any) -> list[Any]:
    try:
        return [kind.from_pretrained(source) for kind in kinds]
    except (OSError, ValueError) as error:
        raise ConfigError(f"--like: {source} cannot be used: {error}") from error


def _check(kind: Callable[..., nn.Module], config: Any, tensors: Mapping[str, Tensor], checkpoint: Path) -> None:
    with torch.device("meta"):
        expected = dict(kind(config).named_parameters())
    _compare(expected, tensors, checkpoint)


def _compare(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Whether the weights are those of the model, all of them and no others."""
    if lacking := sorted(expected.keys() - found.keys()):
        raise ConfigError(f"{checkpoint}: lacks {len(lacking)} weights of this model, such as {lacking[0]}")
    if foreign := sorted(found.keys() - expected.keys()):
        raise ConfigError(f"{checkpoint}: has {len(foreign)} weights that this model has not, such as {foreign[0]}")
    for name, value in expected.items():
        if value.shape != found[name].shape:
            raise ConfigError(
                f"{checkpoint}: {name}: expected {list(value.shape)}, got {list(found[name].shape)}: another model"
            )


def _write(folder: Path, tensors: Mapping[str, Tensor], *parts: Any) -> None:
    """Weights, configuration, processor and tokenizer as transformers saves them."""
    folder.mkdir(parents=True, exist_ok=True)
    # Some tensors are views of each other or transposed, which safetensors does not store.
    whole = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    for part in parts:
        part.save_pretrained(folder)


_CONVERTERS: dict[str, Callable[..., None]] = {
    "hps": convert_hps,
    "hps3": convert_hps3,
    "image_reward": convert_image_reward,
    "aesthetic": convert_aesthetic,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for what cannot be done."""
    parser = argparse.ArgumentParser(
        prog="star-convert-reward",
        description="Write a published checkpoint of a reward as a folder for reward.models.",
        epilog=(
            "examples:\n"
            "  star-convert-reward hps HPS_v2.1_compressed.pt rewards/hps\n"
            "  star-convert-reward image_reward ImageReward.pt rewards/image_reward\n"
            "  star-convert-reward hps3 HPSv3.safetensors rewards/hps3 --template template.txt\n"
            "  star-convert-reward aesthetic sac+logos+ava1-l14-linearMSE.pth rewards/aesthetic"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("reward", choices=sorted(_CONVERTERS))
    parser.add_argument("checkpoint", type=place, help="the published file")
    parser.add_argument("folder", type=place, help="where to write")
    parser.add_argument("--like", help="the model that has the tokenizer (and for hps the sizes): a folder or a name")
    parser.add_argument(
        "--template", type=place, help="hps3: a file with what its code asks the model, {text_prompt} for the prompt"
    )
    options = parser.parse_args(arguments)
    more = {name: getattr(options, name) for name in ("like", "template") if getattr(options, name) is not None}

    def convert() -> None:
        converter = _CONVERTERS[options.reward]
        known = inspect.signature(converter).parameters
        if foreign := [name for name in more if name not in known]:
            raise ConfigError(f"--{foreign[0]}: {options.reward} needs none")
        if "template" in known and "template" not in more:
            raise ConfigError(f"--template: expected a file with what {options.reward} is asked")
        converter(options.checkpoint, options.folder, **more)
        print(f"reward.models.{options.reward}={options.folder}")

    return run_command("star-convert-reward", convert, stopped="stopped; what was written may not be whole")


if __name__ == "__main__":
    sys.exit(main())
