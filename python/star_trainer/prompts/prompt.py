"""A prompt and what stands beside it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt, what its file says beside it (for rewards), and its text units (the phrases that rewards depend on)."""

    text: str
    metadata: dict[str, Any] = field(compare=False)
    units: tuple[str, ...] = ()
