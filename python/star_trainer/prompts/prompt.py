"""A prompt and what stands beside it."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A prompt, what its file says beside it (for rewards), and its text units (the phrases that rewards depend on)."""

    text: str
    metadata: dict[str, Any] = field(compare=False)
    units: tuple[str, ...] = ()


def is_null(value: Any) -> bool:
    """Whether a value is what tables make of a missing one: null or NaN."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def required(metadata: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """GenEval's list of objects under `key` (``include`` or ``exclude``); what is null there counts as absent.

    Raises:
        ValueError: it is no list of objects.
    """
    entries = metadata.get(key)
    if is_null(entries):
        return []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        got = reprlib.repr(entries)
        raise ValueError(f"expected {key!r} to be a list of objects, each with 'class' and 'count', got {got}")
    return [{name: value for name, value in entry.items() if not is_null(value)} for entry in entries]
