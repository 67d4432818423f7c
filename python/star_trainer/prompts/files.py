"""Files of prompts: JSON lines, text and tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from star_trainer.config import ConfigError
from star_trainer.prompts.prompt import Prompt


def read_prompts(name: str, key: str, origin: str | None = None) -> list[Prompt]:
    """The prompts of a file, by the ending of its name.

    ``.txt``: one prompt per line, as in Flow-GRPO's datasets. ``.tsv``: tab-separated with a header, prompts in the
    column ``Prompt``, as in PartiPrompts. Anything else is JSON lines: objects with `prompt`, optionally `units` (a
    list of strings), and whatever else the reward reads as metadata, as in GenEval's files. Empty lines are skipped.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8 or malformed; the message names `key` and the line, or says
            that a missing file comes from `origin`.
    """
    path = Path(name)
    if not path.is_file():
        raise ConfigError(f"{key}: no such file: {path}{f' ({origin})' if origin else ''}")
    try:
        # Not str.splitlines, which also splits at characters that may stand inside a prompt.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path} is not UTF-8: {error}") from error
    filled = [(number, line.rstrip("\r")) for number, line in enumerate(lines, start=1) if line.strip()]
    parsers: dict[str, Callable[[str], Prompt | None]] = {".txt": _text_line, ".tsv": _Table()}
    parse = parsers.get(path.suffix, _json_line)
    prompts = []
    for number, line in filled:
        try:
            prompt = parse(line)
            if prompt is not None:
                _check_text(prompt.text)
        except ValueError as error:
            raise ConfigError(f"{key}: {path}, line {number}: {error}") from error
        if prompt is not None:
            prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{key}: {path} holds no prompts")
    return prompts


def _check_text(text: str) -> None:
    """Refuse what no tokenizer takes, or nothing can be drawn of."""
    if not text.strip():
        raise ValueError("expected a prompt, got white space")
    if "\0" in text:
        raise ValueError("expected a prompt without null bytes")
    # Half of a surrogate pair, which JSON can hold and UTF-8 cannot, is a ValueError.
    text.encode()


def _text_line(line: str) -> Prompt:
    return Prompt(line.strip(), {})


class _Table:
    """Parses lines of a tab-separated table, of which the first names the columns."""

    def __init__(self) -> None:
        self.columns: list[str] = []

    def __call__(self, line: str) -> Prompt | None:
        cells = line.split("\t")
        if not self.columns:
            self.columns = [cell.strip().lower() for cell in cells]
            if "prompt" not in self.columns:
                raise ValueError("expected a header line with a column 'Prompt'")
            return None
        if len(cells) <= self.columns.index("prompt"):
            raise ValueError(f"expected at least {self.columns.index('prompt') + 1} columns, got {len(cells)}")
        row = dict(zip(self.columns, cells, strict=False))
        return Prompt(row["prompt"].strip(), row)


def _json_line(line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {error}") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise ValueError("expected an object with a string 'prompt'")
    units = entry.get("units", [])
    if not isinstance(units, list) or not all(isinstance(unit, str) for unit in units):
        raise ValueError("expected 'units' to be a list of strings")
    return Prompt(entry["prompt"], entry, tuple(units))
