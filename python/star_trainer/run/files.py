"""Files that are written whole or not at all, and folders that may be names on a hub."""

from __future__ import annotations

import os
from pathlib import Path

from star_trainer.config import ConfigError


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; whoever reads it sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def folder_or_name(source: str, key: str) -> str:
    """A folder that is there, or else what may be a name on a model hub.

    Raises:
        ConfigError: a path to a folder that is not there; the message starts with `key`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return str(path)
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or path.exists():
        raise ConfigError(f"{key}: no such folder: {source}")
    return source
