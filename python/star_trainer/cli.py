"""``star-train``: post-train a pipeline from a preset or a YAML file."""

from __future__ import annotations

import argparse
import errno
import logging
import os
import sys
import warnings
from collections.abc import Sequence

from star_trainer.config import ConfigError, describe_keys, load_config, preset_names

# What a disk says that is full or may not be written to.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-train",
        description="Post-train a Stable Diffusion 3 pipeline with spatially allocated rewards (STAR) or a control.",
        epilog=(
            "examples:\n"
            "  star-train tiny                                   a small real pipeline, on any machine\n"
            "  star-train tiny method=uniform run.seed=1         the Flow-GRPO baseline, another seed\n"
            "  star-train mine.yaml train.learning_rate=1e-4     your own file, one key changed\n\n"
            "rewards: reward.terms.NAME=WEIGHT adds a term to those of the file or changes its weight;\n"
            "reward.terms='{NAME: WEIGHT}' replaces all of them, and so does any section that is set as a whole\n\n"
            f"keys and their defaults (a preset sets its own):\n{describe_keys()}"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="load no weights; say what the run would need and do")
    parser.add_argument(
        "--processes", type=positive, default=1, metavar="N", help="processes that the dry run plans for (1)"
    )
    return parser


def add_config_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings of a command: where they come from, and what replaces some of them."""
    parser.add_argument("config", help=f"a preset ({', '.join(preset_names())}) or a YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace those of the file")


def positive(text: str) -> int:
    """A number of an option that has to be at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for a configuration or run that cannot go on."""
    options = _parser().parse_intermixed_args(arguments)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        config = load_config(options.config, options.overrides)
        quieten()
        # Imported late: a bad configuration is reported before torch and diffusers load.
        from star_trainer.checkpoint import CheckpointError
        from star_trainer.processes import lost_process
        from star_trainer.rewards import RewardError
        from star_trainer.rollout import NonFiniteError
        from star_trainer.train import train
        from star_trainer.units.cache import CacheError
        from star_trainer.units.chat import ChatError
    except ConfigError as error:
        print(f"star-train: {error}", file=sys.stderr)
        return 2
    try:
        if options.dry_run:
            from star_trainer.dry_run import report

            print(report(config, options.processes))
            return 0
        train(config)
    except (CacheError, ChatError, CheckpointError, ConfigError, NonFiniteError, RewardError) as error:
        print(f"star-train: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not lost_process(error):
            raise
        reason = str(error).splitlines()[0]
        print(
            f"star-train: another process of this run is gone or does not answer ({reason}); "
            "the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        return 2
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        print(f"star-train: {error}; the same command goes on from the last whole checkpoint", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("star-train: stopped; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


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


if __name__ == "__main__":
    sys.exit(main())
