"""Parts of pipelines that are loaded whole or refused."""

from __future__ import annotations

from typing import Any


def load_whole(kind: Any, source: str, part: str, **options: Any) -> Any:
    """A model of the class `kind`, of diffusers or transformers, from a pipeline's folder `part`.

    Raises:
        OSError: it cannot be had.
        ValueError: some of its weights are missing, which `from_pretrained` would fill with random ones.
    """
    model, found = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **options)
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise ValueError(f"its {part} has no weights for {missing[0]} and {len(missing) - 1} others")
    return model


def read_config(kind: Any, source: str, part: str) -> Any:
    """A configuration of transformers from a pipeline's folder `part`.

    Raises:
        OSError: there is none, where `from_pretrained` would give the sizes of a model of its own choice.
    """
    content, _ = kind.get_config_dict(source, subfolder=part)
    if not content:
        raise OSError(f"its {part} has no config.json")
    return kind.from_dict(content)
