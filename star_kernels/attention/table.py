"""What was chosen, and where measured, per GPU architecture: tile sizes of the attention kernel, and whose kernel runs.

``table.json`` beside this file holds it as data; ``python -m bench.tune_attention`` measures and writes it. Nothing is
tuned at run time. Each entry of "tiles" is a `Configuration` for an architecture, bytes per element and head dimension;
each entry of "implementations" says which of "fused" (the library's kernel) and "sdpa" (PyTorch's, then the mass from
its log-sum-exp) took less time there at a number of keys. "source" says where an entry comes from.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from star_kernels.backends import say_once

PATH = Path(__file__).with_name("table.json")
IMPLEMENTATIONS = ("fused", "sdpa")


@dataclass(frozen=True)
class Configuration:
    """Tile sizes of the attention kernel.

    Attributes:
        block_m: queries per program.
        block_n: keys per iteration.
        num_warps, num_stages: Triton's options of these names.
        max_registers: per thread, on NVIDIA, so that as many programs fit on an SM with capture as without.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Triton's compile options."""
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options if self.max_registers is None else options | {"maxnreg": self.max_registers}


Row = tuple[int, int]  # bytes per element, and head dimension rounded up to a power of two, at least 32
_TEXT, _COUNT, _TIME, _COUNT_OR_NULL = "a string", "a positive int", "a positive float", "a positive int or null"
_KEY = {"architecture": _TEXT, "itemsize": _COUNT, "head_dim": _COUNT}
_TILES = {**_KEY, **dict.fromkeys(Configuration.__dataclass_fields__, _COUNT), "source": _TEXT}
_TILES["max_registers"] = _COUNT_OR_NULL
_CHOICES = {**_KEY, "num_keys": _COUNT, "implementation": _TEXT, "fused_ms": _TIME, "sdpa_ms": _TIME, "source": _TEXT}


def load(path: Path = PATH) -> tuple[dict[str, dict[Row, Configuration]], dict[str, dict[Row, dict[int, str]]]]:
    """The file's tiles by architecture and row, and its implementations by architecture, row and number of keys.

    Raises:
        ValueError: not such a file; the message names the file, the entry, what it holds and what was expected.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a JSON file, got {error}") from error
    if not isinstance(content, dict) or content.keys() != {"tiles", "implementations"}:
        raise ValueError(f"{path}: expected an object of 'tiles' and 'implementations', got {content!r:.100}")
    tiles: dict[str, dict[Row, Configuration]] = {}
    for where, entry in _entries(path, content, "tiles", _TILES):
        values = {name: entry[name] for name in Configuration.__dataclass_fields__}
        _add(tiles.setdefault(entry["architecture"], {}), _row(entry), Configuration(**values), where)
    for architecture, rows in tiles.items():
        if missing := {(itemsize, head_dim) for itemsize in (2, 4) for head_dim in (32, 64, 128)} - rows.keys():
            raise ValueError(f"{path}: tiles: {architecture} has no entry for (itemsize, head_dim) {missing}")
    choices: dict[str, dict[Row, dict[int, str]]] = {}
    for where, entry in _entries(path, content, "implementations", _CHOICES):
        if entry["implementation"] not in IMPLEMENTATIONS:
            raise ValueError(f"{where}: implementation: expected one of {IMPLEMENTATIONS}, got {entry!r}")
        lengths = choices.setdefault(entry["architecture"], {}).setdefault(_row(entry), {})
        _add(lengths, entry["num_keys"], entry["implementation"], where)
    return tiles, choices


def _entries(
    path: Path, content: dict[str, Any], section: str, fields: Mapping[str, str]
) -> list[tuple[str, dict[str, Any]]]:
    """A section's entries, each with its place for messages, once their fields are what they should be."""
    if not isinstance(content[section], list):
        raise ValueError(f"{path}: {section}: expected a list, got {content[section]!r:.100}")
    found = [(f"{path}: {section}[{i}]", entry) for i, entry in enumerate(content[section])]
    for where, entry in found:
        if not isinstance(entry, dict) or entry.keys() != fields.keys():
            raise ValueError(f"{where}: expected the fields {', '.join(fields)}, got {entry!r}")
        for name, expected in fields.items():
            if not _is(entry[name], expected):
                raise ValueError(f"{where}: {name}: expected {expected}, got {entry[name]!r}")
        for name in ("head_dim", "block_m", "block_n", "num_warps"):
            if name in entry and entry[name] & (entry[name] - 1):
                raise ValueError(f"{where}: {name}: expected a power of two, got {entry[name]}")
    return found


def _is(value: Any, expected: str) -> bool:
    if expected == _TEXT or value is None:
        return isinstance(value, str) if expected == _TEXT else expected == _COUNT_OR_NULL
    return type(value) is (float if expected == _TIME else int) and value > 0


def _row(entry: dict[str, Any]) -> Row:
    return entry["itemsize"], entry["head_dim"]


def _add(target: dict[Any, Any], key: object, value: object, where: str) -> None:
    if key in target:
        raise ValueError(f"{where}: expected one entry of its kind, got a second one for {key}")
    target[key] = value


CONFIGURATIONS, MEASURED = load()


def _row_of(dtype: torch.dtype, head_dim: int) -> Row:
    return dtype.itemsize, max(32, 1 << (head_dim - 1).bit_length())


def configuration_for(architecture: str, dtype: torch.dtype, head_dim: int) -> Configuration:
    """The tiles for tensors of `dtype` and `head_dim` (at most 128) on an `architecture` of the table."""
    return CONFIGURATIONS[architecture][_row_of(dtype, head_dim)]


@functools.cache
def name_of(device: torch.device) -> str:
    """What the GPU's maker calls its architecture: sm_90, gfx942."""
    if torch.version.hip is not None:
        return str(torch.cuda.get_device_properties(device).gcnArchName).partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The entry of `CONFIGURATIONS` for a device; for a GPU that has none, one that should fit, and a warning says so.

    For the CPU, where kernels are interpreted, that of Hopper.
    """
    if device.type != "cuda":
        return "sm_90"
    name = name_of(device)
    if name in CONFIGURATIONS:
        return name
    # Consumer chips, of compute capability 12 too, have the shared memory and the tensor cores of 8.
    stand_in = "gfx942" if name.startswith("gfx") else {"9": "sm_90", "10": "sm_100"}.get(name[3:-1], "sm_80")
    say_once(
        f"the architecture {name} is not in the table of tile sizes: those of {stand_in} are taken, which were not "
        f"measured there (python -m bench.tune_attention writes the table)"
    )
    return stand_in


def implementation_for(device: torch.device, dtype: torch.dtype, head_dim: int, num_keys: int) -> str:
    """Which implementation of attention is the faster one, "fused" or "sdpa", for tensors of these kinds.

    On the CPU "fused". On a GPU what was measured on its architecture at the number of keys nearest to `num_keys` in
    proportion, and "sdpa" where nothing was measured: the caller takes "fused" where PyTorch has no kernel that returns
    its log-sum-exp. Batch size, gradients and capture have no say: rollout and update have to agree.
    """
    if device.type != "cuda":
        return "fused"
    measured = MEASURED.get(name_of(device), {}).get(_row_of(dtype, head_dim))
    if not measured:
        return "sdpa"
    # In terms that torch.compile can trace with a length that it left open.
    shorter, *others = sorted(measured)
    for longer in others:
        if num_keys * num_keys <= shorter * longer:
            break
        shorter = longer
    return measured[shorter]
