"""What `star-cost` writes: numbers as JSON, which parts measured at different times share, and tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from star_trainer.config import ConfigError
from star_trainer.studies.timing import format_bytes, format_seconds

FORMAT = 1


def read_results(path: Path) -> dict[str, Any]:
    """What an earlier call wrote.

    Raises:
        ConfigError: the file is no such result.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path}: expected results of star-cost, got {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("parts"), dict):
        raise ConfigError(f"{path}: expected results of star-cost in format {FORMAT}")
    return content


def tables(content: dict[str, Any]) -> str:
    """Markdown: a table per comparison."""
    lines: list[str] = []
    for part in content["parts"].values():
        for group in part["groups"]:
            lines += [f"| {group['name']}: {group['what']} | time | against uniform | peak memory | work |"]
            lines += ["|---|---|---|---|---|"]
            lines += [_row(member) for member in group["members"]]
            lines += [""]
    return "\n".join(lines)


def _row(member: dict[str, Any]) -> str:
    cells = [f"{member['method']}, {member['variant']}", "", "", "", _work(member)]
    if "seconds" in member:
        cells[1] = format_seconds(member["seconds"]["median"])
        cells[2] = _ratio(member)
        cells[3] = format_bytes(member["peak_bytes"])
    return f"| {' | '.join(cells)} |"


def _ratio(member: dict[str, Any]) -> str:
    ratio = member["ratio"]
    if ratio is None:
        return "–"
    if member["baseline"] == f"{member['method']}, {member['variant']}":
        return "1"
    return f"{ratio['median']:.3f} [{ratio['low']:.3f}, {ratio['high']:.3f}]"


def _work(member: dict[str, Any]) -> str:
    if member["flops"] is None:
        return f"{format_bytes(member['bytes'])} moved"
    value = member["flops"] / 1e6
    for unit in ("MFLOP", "GFLOP", "TFLOP"):
        if value < 1000:
            return f"{value:.4g} {unit}"
        value /= 1000
    return f"{value:.4g} PFLOP"
