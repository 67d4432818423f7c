"""Small tokenizers and a small transformer of the real classes, built without files or downloads."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import torch
from diffusers import SD3Transformer2DModel
from tokenizers import normalizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
CLIP_MERGES = DATA / "clip_bpe_simple_vocab_16e6.txt.gz"

# Words that the tiny vocabularies know whole, or nearly: CLIP's merges of one word may get into another's way.
TEXT = (
    "a photo of a red circle and a blue square with the words hello world on a stop sign three cats and a dog sit in a "
    'green room below the yellow triangle next to one big car bench cow traffic light above an orange umbrella !! !"'
)
WORDS = TEXT.split()


def _byte_symbols() -> list[str]:
    """The 256 characters that stand for bytes in CLIP's vocabulary, in its order: the printable ones first."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def _clip_tokenizer(merges: list[tuple[str, str]], **options: Any) -> CLIPTokenizer:
    symbols = _byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *("".join(merge) for merge in merges)]
    vocab = {token: i for i, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocab, merges=merges, **{"model_max_length": 77, **options})


def tiny_clip_tokenizer(**options: Any) -> CLIPTokenizer:
    """A CLIPTokenizer with byte-pair merges for WORDS, and every byte: no text is unknown to it."""
    merges: dict[tuple[str, str], None] = {}
    for word in WORDS:
        left, *rest = [*word[:-1], word[-1] + "</w>"]
        for right in rest:
            merges[left, right] = None
            left += right
    return _clip_tokenizer(list(merges), **options)


def real_clip_tokenizer(**options: Any) -> CLIPTokenizer:
    """CLIP's own tokenizer, from the merges in the data folder."""
    lines = gzip.decompress(CLIP_MERGES.read_bytes()).decode().split("\n")
    num_merges = 49152 - 256 - 2
    merges = [tuple(line.split()) for line in lines[1 : num_merges + 1]]
    return _clip_tokenizer(merges, **options)


def tiny_t5_tokenizer(**options: Any) -> T5Tokenizer:
    """A T5Tokenizer with a unigram model of half of WORDS and of ASCII; other characters are unknown to it."""
    words = sorted(set(WORDS))[::2]
    pieces = [(f"▁{word}", -4.0) for word in words] + [(word, -5.0) for word in words if len(word) > 1]
    characters = [(chr(code), -8.0) for code in range(33, 127)]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("é", -8.0), *pieces, *characters]
    tokenizer = T5Tokenizer(vocab=vocab, extra_ids=0, **{"model_max_length": 512, **options})
    # T5's own vocabulary file carries sentencepiece's table of the same normal form.
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    return tokenizer


# What Qwen-Image's template has before a prompt.
QWEN_TEXT = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of "
    "the objects and background:\nuser\nassistant\n"
)
QWEN_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_qwen_tokenizer() -> Qwen2Tokenizer:
    """A Qwen2Tokenizer of all bytes, to which the words of TEXT and of its templates are a token, as to Qwen's own."""
    trainer = trainers.BpeTrainer(vocab_size=2000, initial_alphabet=_byte_symbols(), show_progress=False)
    backend = Qwen2Tokenizer().backend_tokenizer
    backend.train_from_iterator([TEXT, QWEN_TEXT], trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, additional_special_tokens=special)
    tokenizer.chat_template = QWEN_CHAT_TEMPLATE
    return tokenizer


def tiny_transformer(**config: Any) -> SD3Transformer2DModel:
    """An SD3Transformer2DModel with what SD3.5 has: a dual block, RMS-normed queries and keys. 4 x 4 image tokens."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        transformer = SD3Transformer2DModel(
            **{
                "sample_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "out_channels": 4,
                "num_layers": 3,
                "attention_head_dim": 8,
                "num_attention_heads": 2,
                "joint_attention_dim": 12,
                "caption_projection_dim": 16,
                "pooled_projection_dim": 10,
                "pos_embed_max_size": 8,
                "dual_attention_layers": (0,),
                "qk_norm": "rms_norm",
                **config,
            }
        )
        # Norm weights of one would hide a norm that is left out, or applied to the wrong tensor.
        for name, parameter in transformer.named_parameters():
            if ".norm_" in name:
                torch.nn.init.uniform_(parameter, 0.5, 4.0)
    return transformer
