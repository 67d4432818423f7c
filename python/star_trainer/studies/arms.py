"""Arms that commands compare, as ``--arm`` names them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from star_trainer.config import ConfigError


@dataclass(frozen=True)
class Arm:
    """What is compared: a name and the settings in which it differs from the others."""

    name: str
    overrides: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Arm:
        """An arm from ``NAME: key=value ...``, the argument of --arm.

        Raises:
            ConfigError: anything else, or a name of other characters than letters, digits and ``_ . + -``.
        """
        name, colon, settings = text.partition(":")
        if not colon or not re.fullmatch(r"[\w.+-]+", name.strip()):
            raise ConfigError(f"--arm: expected 'NAME: key=value ...' with a name of letters and digits, got {text!r}")
        # Values may have spaces: a setting begins where a key does.
        return cls(name.strip(), tuple(re.split(r"\s+(?=[\w.:]+=)", settings.strip())) if settings.strip() else ())
