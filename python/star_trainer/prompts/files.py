"""Files of prompts: JSON lines, text and tables."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from star_trainer.config import ConfigError
from star_trainer.prompts.prompt import Prompt, is_null


def read_prompts(name: str, key: str, origin: str | None = None) -> list[Prompt]:
    """The prompts of a file, by the ending of its name.

    ``.txt``: one prompt per line, as in Flow-GRPO's datasets. ``.tsv``: tab-separated with a header, prompts in the
    column ``Prompt``, as in PartiPrompts; cells that are quoted as a whole, as spreadsheets write them, are unquoted.
    Anything else is JSON lines: objects with `prompt`, optionally `units` (a list of strings), and whatever else the
    reward reads as metadata, as in GenEval's files. Empty lines are skipped.

    Raises:
        ConfigError: the file is missing, empty, not UTF-8 or malformed; the message names `key` and the line, or says
            that a missing file comes from `origin`.
    """
    path = Path(name).expanduser()
    if not path.is_file():
        raise ConfigError(f"{key}: no such file: {path}{f' ({origin})' if origin else ''}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{key}: {path} is not UTF-8: {error}") from error
    formats: dict[str, tuple[Callable[[str], Iterator[tuple[int, Any]]], Callable[[Any], Prompt | None]]]
    formats = {".txt": (_lines, _text_line), ".tsv": (_rows, _Table())}
    records, parse = formats.get(path.suffix.lower(), (_lines, _json_line))
    prompts = []
    for number, record in records(text):
        try:
            prompt = parse(record)
            if prompt is not None:
                _check_text(prompt.text)
        except ValueError as error:
            raise ConfigError(f"{key}: {path}, line {number}: {error}") from error
        if prompt is not None:
            prompts.append(prompt)
    if not prompts:
        raise ConfigError(f"{key}: {path} holds no prompts")
    return prompts


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """The lines of a file that are not empty, with their numbers from 1."""
    # Not str.splitlines, which also splits at characters that may stand inside a prompt.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, line


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


# Quoted as a whole, with marks inside it doubled, or as it stands. Quoted cells may hold tabs or new lines, not both: a
# lone mark at a cell's start would take the cells behind it in, up to a mark somewhere further down.
_CELL = re.compile(r'(?:"([^"\n]*(?:""[^"\n]*)*)"|"([^"\t]*(?:""[^"\t]*)*)")(?=[\t\n]|\Z)|[^\t\n]*')


def _rows(text: str) -> Iterator[tuple[int, list[str]]]:
    """The cells of each row of a tab-separated table, and the line that it begins in; empty rows are left out."""
    begin, number = 0, 1
    while begin < len(text):
        first, separator = begin, "\t"
        cells = []
        while separator == "\t":
            match = _CELL.match(text, begin)
            assert match is not None, "it matches the empty string"
            quoted = match[1] if match[1] is not None else match[2]
            cells.append(match[0] if quoted is None else quoted.replace('""', '"'))
            begin = match.end() + 1
            separator = text[match.end() : begin]
        if any(cell.strip() for cell in cells):
            yield number, cells
        number += text.count("\n", first, begin)


class _Table:
    """Takes the rows of a table, of which the first names the columns."""

    def __init__(self) -> None:
        self.columns: list[str] = []

    def __call__(self, cells: list[str]) -> Prompt | None:
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
    units = [] if is_null(entry.get("units")) else entry["units"]
    if not isinstance(units, list) or not all(isinstance(unit, str) for unit in units):
        raise ValueError("expected 'units' to be a list of strings")
    return Prompt(entry["prompt"], entry, tuple(units))
