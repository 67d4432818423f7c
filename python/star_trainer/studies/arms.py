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
        if not colon:
            raise ConfigError(f"--arm: expected 'NAME: key=value ...' with a name of letters and digits, got {text!r}")
        return cls.named(name.strip(), settings, "--arm")

    @classmethod
    def named(cls, name: str, settings: str, key: str) -> Arm:
        """An arm from its name and ``key=value ...``.

        Raises:
            ConfigError: a name of other characters than letters, digits and ``_ . + -``; the message names `key`.
        """
        if not re.fullmatch(r"[\w.+-]+", name):
            raise ConfigError(f"{key}: expected 'NAME: key=value ...' with a name of letters and digits, got {name!r}")
        # Values may have spaces: a setting begins where a key does.
        return cls(name, tuple(re.split(r"\s+(?=[\w.:]+=)", settings.strip())) if settings.strip() else ())
