"""Reward models of small random weights, as transformers saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from star_trainer.rewards.geneval_classes import CLASSES
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    SwinConfig,
)

from tests.tiny_models import tiny_clip_tokenizer

try:  # The processors without torchvision have had a name of their own since transformers 5.
    from transformers import CLIPImageProcessorPil as CLIPImageProcessor
    from transformers import Mask2FormerImageProcessorPil as Mask2FormerImageProcessor
except ImportError:
    from transformers import CLIPImageProcessor, Mask2FormerImageProcessor

_RENAMED = {"computer mouse": "mouse", "tv remote": "remote", "computer keyboard": "keyboard"}
COCO = [_RENAMED.get(name, name) for name in CLASSES]


def save_clip(folder: Path) -> Path:
    """A CLIP, with the image processor of the published ones at 32 pixels."""
    tokenizer = tiny_clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = CLIPModel(
        CLIPConfig(
            text_config={**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
            vision_config={**sizes, "image_size": 32, "patch_size": 8},
            projection_dim=16,
        )
    )
    model.save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def save_detector(folder: Path, labels: Sequence[str] = COCO) -> Path:
    """A Mask2Former of COCO's classes, or other `labels`."""
    torch.manual_seed(0)
    stages = [f"stage{i}" for i in range(1, 5)]
    backbone = SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1, 1, 2, 2], window_size=4, out_features=stages)
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=32,
        dim_feedforward=32,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        num_queries=12,
        id2label=dict(enumerate(labels)),
    )
    Mask2FormerForUniversalSegmentation(config).save_pretrained(folder)
    Mask2FormerImageProcessor(size={"shortest_edge": 64, "longest_edge": 128}).save_pretrained(folder)
    return folder
