"""What differs between kinds of pipelines, and the policy that is made of one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from star_trainer.config import ConfigError
from star_trainer.config.paths import TINY_PIPELINE, folder_or_name
from star_trainer.families.family import Family, Shapes
from star_trainer.families.pipelines.flux import Flux
from star_trainer.families.pipelines.flux2 import Flux2Klein
from star_trainer.families.pipelines.qwen_image import QwenImage
from star_trainer.families.pipelines.sd3 import StableDiffusion3
from star_trainer.families.pipelines.unet import StableDiffusion, StableDiffusionXL
from star_trainer.families.pipelines.z_image import ZImage

# By the name of the pipeline's class.
FAMILIES: dict[str, Family] = {
    family.pipeline_class: family
    for family in (
        StableDiffusion3(),
        Flux(),
        Flux2Klein(),
        QwenImage(),
        ZImage(),
        StableDiffusion(),
        StableDiffusionXL(),
    )
}


def pipeline_source(name: str, key: str = "model.pipeline") -> str:
    """Where a pipeline that the setting `key` names is: a folder, or a name on a hub.

    Raises:
        ConfigError: a path to a folder that is not there.
    """
    return str(TINY_PIPELINE) if name == "tiny" else folder_or_name(name, key)


def family_named(name: str, key: str = "model.pipeline") -> Family:
    """The family of a pipeline that the setting `key` names, by the class that its ``model_index.json`` says.

    Raises:
        ConfigError: there is no such pipeline, or it is of a class that is not known.
    """
    source = pipeline_source(name, key)
    if not Path(source).is_dir():
        for family in FAMILIES.values():
            if source in family.published:
                return family
    return _by_class([_class_name(source, key)], f"{key}: {name!r}")


def read_shapes(name: str) -> tuple[Family, Shapes]:
    """The family of the pipeline that ``model.pipeline`` names, and the configuration of each of its parts.

    Raises:
        ConfigError: they cannot be read.
    """
    family = family_named(name)
    try:
        return family, family.shapes(pipeline_source(name))
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.pipeline: {name!r} has no configurations that can be read: {error}") from error


def family_of(pipeline: Any) -> Family:
    """The family of a loaded pipeline, by its class or one that this is made from.

    Raises:
        ConfigError: it is of no family that is known.
    """
    return _by_class([kind.__name__ for kind in type(pipeline).__mro__], "pipeline")


def _by_class(names: list[str], what: str) -> Family:
    for name in names:
        if name in FAMILIES:
            return FAMILIES[name]
    raise ConfigError(f"{what}: expected a pipeline of one of {', '.join(FAMILIES)}, got {names[0]}")


def _class_name(source: str, key: str) -> str:
    path = Path(source) / "model_index.json"
    try:
        if path.parent.is_dir():
            index = json.loads(path.read_text(encoding="utf-8"))
        else:
            from diffusers import DiffusionPipeline

            index = DiffusionPipeline.load_config(source)
        return str(index["_class_name"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ConfigError(f"{key}: {source!r} cannot be loaded: {error}") from error
