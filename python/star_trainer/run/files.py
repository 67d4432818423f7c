"""Files that are written whole or not at all, and what is in them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path


def write_atomically(path: Path, content: bytes) -> None:
    """Replace `path` by `content`; whoever reads it sees the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_page(path: Path, make: Callable[[], bytes], say: Callable[[str], None] = print) -> str:
    """Write the page that `make` gives; that it fails is said and ends nothing, as all else is written before.

    Returns:
        Its name for a list of what was written, with a comma, or nothing where it failed.
    """
    try:
        write_atomically(path, make())
    except Exception as error:
        say(f"{path} could not be written: {type(error).__name__}: {error}")
        return ""
    return f"{path.name}, "


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
