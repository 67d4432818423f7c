"""What the commands share: how settings are named, what is said when one cannot go on, and a quiet terminal."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

from star_trainer.config.errors import TrainerError
from star_trainer.config.loading import preset_names


def run_command(
    name: str,
    action: Callable[[], int | None],
    *,
    stopped: str,
    expected: tuple[type[Exception], ...] = (TrainerError, OSError),
) -> int:
    """The exit status of `action`: its own, or 0; 2 with one line for an `expected` error; 130 for Ctrl-C
    (128 and its number for another signal).

    `stopped` is what Ctrl-C leaves behind, in a few words.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        return action() or 0
    except expected as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{name}: {error if error.args else stopped}", file=sys.stderr)
        return 128 + getattr(error, "number", signal.SIGINT)


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of a command: where they come from, and what replaces some of them."""
    parser.add_argument("config", help=f"a preset ({', '.join(preset_names())}) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")


def positive(text: str) -> int:
    """A number of an option that has to be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def place(text: str) -> Path:
    """A file or folder of an option; no shell expands ~ behind an equals sign."""
    return Path(text).expanduser()


def quieten() -> None:
    """Leave the terminal to the run: other libraries' progress bars and notices about optional parts stay out."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("transformers", "diffusers"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # The run's first line names the backends; a line per operator that has no kernel yet would repeat it.
    logging.getLogger("star_kernels").setLevel(logging.ERROR)
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
