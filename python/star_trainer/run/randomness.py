"""Random numbers by name: every draw comes from a stream that its purpose and place determine.

Nothing depends on how often or in which order other streams were used, so that a run that is resumed, or
that uses another method, draws the same numbers.
"""

from __future__ import annotations

import zlib

import numpy as np
import torch


def _entropy(seed: int, purpose: str, *place: int) -> np.random.SeedSequence:
    # A seed sequence takes trailing zeros for nothing; the length tells (0,) from (0, 0).
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), len(place), *place])


def stream(seed: int, purpose: str, *place: int) -> torch.Generator:
    """A torch generator on the CPU for `purpose` at `place` (iteration, process, chunk and the like)."""
    state = _entropy(seed, purpose, *place).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state) % 2**63)


def numpy_stream(seed: int, purpose: str, *place: int) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(_entropy(seed, purpose, *place))
