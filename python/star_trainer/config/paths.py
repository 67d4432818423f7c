"""Where models are: in the package, in a folder, or on a model hub."""

from __future__ import annotations

from pathlib import Path

from star_trainer.config.errors import ConfigError

_SCENES = Path(__file__).parents[1] / "worlds" / "scenes"
# What the name 'tiny' stands for: of a pipeline, of a CLIP model, and of PickScore.
TINY_PIPELINE = _SCENES / "tiny_sd3" / "pipeline"
TINY_CLIP = _SCENES / "tiny_clip" / "model"
TINY_PICKSCORE = _SCENES / "tiny_pickscore" / "model"


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
