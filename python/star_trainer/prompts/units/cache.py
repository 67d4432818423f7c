"""Text units on disk, so that no prompt is extracted twice."""

from __future__ import annotations

import hashlib
import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from star_trainer.config import TrainerError

_SCHEMA = "CREATE TABLE IF NOT EXISTS units (key TEXT PRIMARY KEY, prompt TEXT NOT NULL, units TEXT NOT NULL)"
_AT_ONCE = 500  # SQLite limits how many values a statement may name.


class CacheError(TrainerError, RuntimeError):
    """A cache file that cannot be used; the message names it."""


def cache_key(extractor: str, prompt: str, metadata: Mapping[str, Any]) -> str:
    """What decides the units of a prompt: the extractor with its version, the text, and what is required of objects."""
    content = [extractor, prompt, metadata.get("include")]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class UnitCache:
    """An SQLite file of units, or other lists, by key: processes may share it, and a killed one leaves it whole.

    `setting` is what chooses the file.

    Raises:
        CacheError: the file is no such cache, or cannot be read or written.
    """

    def __init__(self, path: Path, setting: str = "units.cache") -> None:
        self.path = path
        self.setting = setting
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with self._connect() as connection:
                connection.execute(_SCHEMA)
        except OSError as error:
            raise CacheError(f"{path}: {error}") from error

    def get(self, keys: Sequence[str]) -> dict[str, list[str]]:
        """The units of those keys that are known."""
        found: dict[str, list[str]] = {}
        with self._connect() as connection:
            for first in range(0, len(keys), _AT_ONCE):
                some = keys[first : first + _AT_ONCE]
                marks = ", ".join("?" * len(some))
                rows = connection.execute(f"SELECT key, units FROM units WHERE key IN ({marks})", some)
                found |= {key: json.loads(units) for key, units in rows}
        return found

    def put(self, entries: Mapping[str, tuple[str, Sequence[str]]]) -> None:
        """Keep prompt and units under each key."""
        rows = [(key, prompt, json.dumps(list(units))) for key, (prompt, units) in entries.items()]
        with self._connect() as connection:
            connection.executemany("INSERT OR REPLACE INTO units VALUES (?, ?, ?)", rows)

    def _connect(self) -> _Connection:
        return _Connection(self.path, self.setting)


class _Connection:
    """One transaction on the file, closed at its end."""

    def __init__(self, path: Path, setting: str) -> None:
        self.path = path
        self.setting = setting

    def __enter__(self) -> sqlite3.Connection:
        try:
            self.connection = sqlite3.connect(self.path, timeout=60.0)
        except sqlite3.Error as error:
            raise CacheError(f"{self.path}: {error}") from error
        return self.connection

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        try:
            if error is None:
                self.connection.commit()
        except sqlite3.Error as failure:
            error = failure
        finally:
            self.connection.close()
        if isinstance(error, sqlite3.Error):
            raise CacheError(f"{self.path}: {error}; another file is chosen with {self.setting}") from error
