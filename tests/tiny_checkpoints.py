"""Published checkpoints of rewards in small, of random weights, and their formulas written out anew in float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import BertTokenizer, CLIPConfig, CLIPProcessor

from tests.tiny_models import tiny_clip_tokenizer
from tests.tiny_reward_models import CLIPImageProcessor

SIDE, PATCH = 32, 8
WIDTH, HEADS = 32, 4
EMBEDDED = 16
HEAD_SIZES = (1024, 128, 64, 16, 1)
_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64).view(3, 1, 1)
_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64).view(3, 1, 1)


def _random(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        scale = 0.3 if name.endswith("bias") or len(shape) == 1 else 1.5 / math.sqrt(shape[-1])
        tensors[name] = scale * torch.randn(shape, generator=generator)
        if "ln_" in name or "norm" in name.lower():
            tensors[name] += float(name.endswith("weight"))
    return tensors


def _block(prefix: str, names: Sequence[str], width: int, wide: int) -> dict[str, tuple[int, ...]]:
    """Shapes of linear layers [out, in] with a bias, under their names, by what they do."""
    joined, out, first, second = names
    return {
        f"{prefix}{joined}weight": (3 * width, width),
        f"{prefix}{joined}bias": (3 * width,),
        f"{prefix}{out}.weight": (width, width),
        f"{prefix}{out}.bias": (width,),
        f"{prefix}{first}.weight": (wide, width),
        f"{prefix}{first}.bias": (wide,),
        f"{prefix}{second}.weight": (width, wide),
        f"{prefix}{second}.bias": (width,),
    }


def _norm(name: str, width: int = WIDTH) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def head_checkpoint(path: Path, width: int, prefix: str = "layers.") -> dict[str, Tensor]:
    """LAION's linear head, as a file of PyTorch."""
    tensors = _head(width, prefix)
    torch.save(tensors, path)
    return tensors


def _head(width: int, prefix: str) -> dict[str, Tensor]:
    sizes = (width, *HEAD_SIZES)
    shapes: dict[str, tuple[int, ...]] = {}
    for place, before, after in zip((0, 2, 4, 6, 7), sizes, sizes[1:], strict=False):
        shapes |= {f"{prefix}{place}.weight": (after, before), f"{prefix}{place}.bias": (after,)}
    return _random(shapes, 3)


def head_value(tensors: dict[str, Tensor], features: Tensor, prefix: str = "layers.") -> Tensor:
    for place in (0, 2, 4, 6, 7):
        weight, bias = tensors[f"{prefix}{place}.weight"].double(), tensors[f"{prefix}{place}.bias"].double()
        features = features @ weight.T + bias
    return features[:, 0]


def save_like(folder: Path) -> Path:
    """The CLIP whose sizes, tokenizer and processor HPS has: its folder has no weights."""
    tokenizer = tiny_clip_tokenizer()
    sizes = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_attention_heads": HEADS, "hidden_act": "gelu"}
    CLIPConfig(
        text_config={
            **sizes,
            "num_hidden_layers": 2,
            "vocab_size": len(tokenizer),
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**sizes, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": PATCH},
        projection_dim=EMBEDDED,
    ).save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def open_clip_checkpoint(path: Path) -> dict[str, Tensor]:
    """HPS v2's file: open_clip's names, under ``state_dict``."""
    shapes: dict[str, tuple[int, ...]] = {
        "logit_scale": (),
        "positional_embedding": (77, WIDTH),
        "text_projection": (WIDTH, EMBEDDED),
        "token_embedding.weight": (len(tiny_clip_tokenizer()), WIDTH),
        "visual.class_embedding": (WIDTH,),
        "visual.positional_embedding": ((SIDE // PATCH) ** 2 + 1, WIDTH),
        "visual.proj": (WIDTH, EMBEDDED),
        "visual.conv1.weight": (WIDTH, 3, PATCH, PATCH),
        **_norm("ln_final"),
        **_norm("visual.ln_pre"),
        **_norm("visual.ln_post"),
    }
    for tower in ("", "visual."):
        for layer in range(2):
            prefix = f"{tower}transformer.resblocks.{layer}."
            shapes |= _block(prefix, ("attn.in_proj_", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"), WIDTH, 4 * WIDTH)
            shapes |= _norm(f"{prefix}ln_1") | _norm(f"{prefix}ln_2")
    tensors = {name: _random({name: shape}, seed)[name] for seed, (name, shape) in enumerate(shapes.items()) if shape}
    tensors["logit_scale"] = torch.tensor(math.log(100.0))
    torch.save({"state_dict": tensors, "epoch": 1, "name": "hps"}, path)
    return tensors


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    heads = [t.unflatten(-1, (-1, WIDTH // HEADS)).transpose(-2, -3) for t in (query, key, value)]
    scores = heads[0] @ heads[1].transpose(-1, -2) / math.sqrt(heads[0].shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return (scores.softmax(-1) @ heads[2]).transpose(-2, -3).flatten(-2)


def _layer_norm(w: dict[str, Tensor], name: str, x: Tensor, eps: float = 1e-5) -> Tensor:
    return functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _pre_norm_block(
    w: dict[str, Tensor], prefix: str, names: Sequence[str], x: Tensor, eps: float, mask: Tensor | None = None
) -> Tensor:
    first_norm, joined, out, second_norm, up, down = names
    normed = _layer_norm(w, prefix + first_norm, x, eps)
    qkv = normed @ w[f"{prefix}{joined}weight"].T + w[f"{prefix}{joined}bias"]
    x = x + _linear(w, prefix + out, _attention(*qkv.chunk(3, -1), mask))
    hidden = functional.gelu(_linear(w, prefix + up, _layer_norm(w, prefix + second_norm, x, eps)))
    return x + _linear(w, prefix + down, hidden)


def _patches(weight: Tensor, bias: Tensor | None, pixels: Tensor) -> Tensor:
    return functional.conv2d(pixels, weight, bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)


def hps_value(tensors: dict[str, Tensor], pixels: Tensor, tokens: Tensor) -> Tensor:
    """HPS v2 from open_clip's weights: the cosine of both embeddings. Pixels prepared, tokens padded with zeros."""
    w = {name: value.double() for name, value in tensors.items()}
    names = ("ln_1", "attn.in_proj_", "attn.out_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    x = _patches(w["visual.conv1.weight"], None, pixels.double())
    x = torch.cat([w["visual.class_embedding"].expand(len(x), 1, -1), x], 1) + w["visual.positional_embedding"]
    x = _layer_norm(w, "visual.ln_pre", x)
    for layer in range(2):
        x = _pre_norm_block(w, f"visual.transformer.resblocks.{layer}.", names, x, 1e-5)
    image = _layer_norm(w, "visual.ln_post", x[:, 0]) @ w["visual.proj"]
    length = tokens.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    x = w["token_embedding.weight"][tokens] + w["positional_embedding"][:length]
    for layer in range(2):
        x = _pre_norm_block(w, f"transformer.resblocks.{layer}.", names, x, 1e-5, causal)
    x = _layer_norm(w, "ln_final", x)
    # The end of the text has the largest number of all tokens.
    text = x[torch.arange(len(x)), tokens.argmax(-1)] @ w["text_projection"]
    return (functional.normalize(image, dim=-1) * functional.normalize(text, dim=-1)).sum(-1)


def save_bert_tokenizer(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "circle", "square", "photo", "of", "cat"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def image_reward_checkpoint(path: Path) -> dict[str, Tensor]:
    """ImageReward's file: BLIP's names under ``blip.``, the head's under ``mlp.``, and what is not used."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes: dict[str, tuple[int, ...]] = {
        f"{vision}cls_token": (1, 1, WIDTH),
        f"{vision}pos_embed": (1, (SIDE // PATCH) ** 2 + 1, WIDTH),
        f"{vision}patch_embed.proj.weight": (WIDTH, 3, PATCH, PATCH),
        f"{vision}patch_embed.proj.bias": (WIDTH,),
        f"{text}embeddings.word_embeddings.weight": (15, 24),
        f"{text}embeddings.position_embeddings.weight": (40, 24),
        "blip.vision_proj.weight": (8, WIDTH),
        "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, 24),
        "blip.text_proj.bias": (8,),
        **_norm(f"{vision}norm"),
        **_norm(f"{text}embeddings.LayerNorm", 24),
    }
    for layer in range(2):
        prefix = f"{vision}blocks.{layer}."
        shapes |= _block(prefix, ("attn.qkv.", "attn.proj", "mlp.fc1", "mlp.fc2"), WIDTH, 4 * WIDTH)
        shapes |= _norm(f"{prefix}norm1") | _norm(f"{prefix}norm2")
        prefix = f"{text}encoder.layer.{layer}."
        for kind, keys in (("attention", 24), ("crossattention", WIDTH)):
            for part, width in (("query", 24), ("key", keys), ("value", keys)):
                shapes |= {f"{prefix}{kind}.self.{part}.weight": (24, width), f"{prefix}{kind}.self.{part}.bias": (24,)}
            shapes |= {f"{prefix}{kind}.output.dense.weight": (24, 24), f"{prefix}{kind}.output.dense.bias": (24,)}
            shapes |= _norm(f"{prefix}{kind}.output.LayerNorm", 24)
        shapes |= {f"{prefix}intermediate.dense.weight": (96, 24), f"{prefix}intermediate.dense.bias": (96,)}
        shapes |= {f"{prefix}output.dense.weight": (24, 96), f"{prefix}output.dense.bias": (24,)}
        shapes |= _norm(f"{prefix}output.LayerNorm", 24)
    tensors = {name: _random({name: shape}, seed)[name] for seed, (name, shape) in enumerate(shapes.items())}
    tensors |= _head(24, "mlp.layers.")
    tensors[f"{text}embeddings.position_ids"] = torch.arange(40)[None]
    torch.save(tensors, path)
    return tensors


def image_reward_value(tensors: dict[str, Tensor], pixels: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """ImageReward from its published weights: BLIP's multimodal encoder, the head, and its mean and deviation."""
    w = {name: value.double() for name, value in tensors.items()}
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    names = ("norm1", "attn.qkv.", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    x = _patches(w[f"{vision}patch_embed.proj.weight"], w[f"{vision}patch_embed.proj.bias"], pixels.double())
    x = torch.cat([w[f"{vision}cls_token"].expand(len(x), 1, -1), x], 1) + w[f"{vision}pos_embed"]
    for layer in range(2):
        x = _pre_norm_block(w, f"{vision}blocks.{layer}.", names, x, 1e-6)
    seen = _layer_norm(w, f"{vision}norm", x, 1e-6)
    x = w[f"{text}embeddings.word_embeddings.weight"][tokens]
    x = x + w[f"{text}embeddings.position_embeddings.weight"][: tokens.shape[1]]
    x = _layer_norm(w, f"{text}embeddings.LayerNorm", x, 1e-12)
    for layer in range(2):
        prefix = f"{text}encoder.layer.{layer}."
        for kind, source, shown in (("attention", None, mask.bool()[:, None, None]), ("crossattention", seen, None)):
            start = f"{prefix}{kind}."
            source = x if source is None else source
            mixed = [_linear(w, f"{start}self.{p}", s) for p, s in (("query", x), ("key", source), ("value", source))]
            x = _layer_norm(
                w, f"{start}output.LayerNorm", x + _linear(w, f"{start}output.dense", _attention(*mixed, shown)), 1e-12
            )
        hidden = functional.gelu(_linear(w, f"{prefix}intermediate.dense", x))
        x = _layer_norm(w, f"{prefix}output.LayerNorm", x + _linear(w, f"{prefix}output.dense", hidden), 1e-12)
    return (head_value(tensors, x[:, 0], "mlp.layers.") - 0.16717362830052426) / 1.0333394966054072


def published_pixels(images: Tensor) -> Tensor:
    """CLIP's preparation on numbers: shorter side to 32 bicubically with antialiasing, the middle, CLIP's mean and std.

    Written for square images: there is no middle to find.
    """
    resized = functional.interpolate(images.double(), (SIDE, SIDE), mode="bicubic", antialias=True)
    return (resized - _MEAN) / _STD


def central_differences(function: Callable[[Tensor], Tensor], at: Tensor, direction: Tensor, step: float) -> Tensor:
    with torch.no_grad():
        return (function(at + step * direction) - function(at - step * direction)) / (2 * step)
