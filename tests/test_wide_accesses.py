"""Latents go through memory once, 16 bytes at a time, in what the compiler makes of the kernels that read them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.test_ahead_of_time import python

pytest.importorskip("triton")

COUNT = """
import json, re
from star_kernels.policy_loss import triton_kernels as policy_loss
from star_kernels.transition import triton_kernels as transition
counts = {}
for module in (policy_loss, transition):
    for call in module.ahead_of_time_calls("sm_90"):
        if re.match("position|step|log-prob", call.name):
            code = call.compile("sm_90").asm["ptx"]
            counts[call.name] = [len(re.findall(rf"{way}\\.global[.\\w]*\\.v4\\.b32", code)) for way in ("ld", "st")]
print(json.dumps(counts))
"""
# Accesses of a warp: 32 lanes with 16 bytes each. A tile of a latent has 1024 entries, or with 4 channels 512.
TRAFFIC = {
    "position, bf16, C 16": [4 * 4, 4],
    "position, bf16, C 16, channels last": [4 * 4, 4],
    "position, fp32, C 32, guidance and mask": [5 * 8, 8],
    "position, fp32, C 4, channels last, guidance and mask": [5 * 4 + 1, 4],  # and old_log_prob of 128 positions
    "position, fp32, C 32, guidance, mask and guard": [6 * 8, 8],
    "position, bf16, C 16, dppo": [5 * 4, 4],
    "step, bf16, C 16, guidance": [4 * 4, 4],
    "step, bf16, C 16, guidance, channels last": [4 * 4, 4],
    "log-prob, fp32, C 32, guidance": [4 * 8, 0],
}


def test_every_latent_is_read_and_written_once_in_accesses_of_16_bytes(triton_cache: Path) -> None:
    run = python("-c", COUNT, cache=triton_cache)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == TRAFFIC
