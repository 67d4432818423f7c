"""The shapes of published pipelines, for `--dry-run` on machines that have neither their files nor a network."""

from __future__ import annotations

from typing import Any

_CLIP_L = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "vocab_size": 49408,
}
_CLIP_BIG_G = _CLIP_L | {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}
_T5_XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "d_kv": 64,
    "num_heads": 64,
    "num_layers": 24,
    "vocab_size": 32128,
    "feed_forward_proj": "gated-gelu",
}
_AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
_SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": list(range(13)),
    "qk_norm": "rms_norm",
}

_SD3_MEDIUM = _SD35_MEDIUM | {"pos_embed_max_size": 192, "dual_attention_layers": [], "qk_norm": None}
_TEXT_ENCODERS: dict[str, dict[str, Any]] = {
    "text_encoder": _CLIP_L,
    "text_encoder_2": _CLIP_BIG_G,
    "text_encoder_3": _T5_XXL,
}

# By name on the model hub, then by folder of the pipeline.
ARCHITECTURES: dict[str, dict[str, dict[str, Any]]] = {
    "stabilityai/stable-diffusion-3-medium-diffusers": {
        "transformer": _SD3_MEDIUM,
        "vae": _AUTOENCODER,
        **_TEXT_ENCODERS,
    },
    "stabilityai/stable-diffusion-3.5-medium": {
        "transformer": _SD35_MEDIUM,
        "vae": _AUTOENCODER,
        **_TEXT_ENCODERS,
    },
}
