"""``star-train``: post-train a pipeline from a preset or a YAML file."""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence

from star_trainer.config import TrainerError, describe_keys, load_config
from star_trainer.config.command_line import add_config_arguments, positive, quieten, run_command

# What a disk says that is full or may not be written to.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-train",
        description="Post-train a text-to-image pipeline with spatially allocated rewards (STAR), a control, or R0.",
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for a configuration or run that cannot go on."""
    options = _parser().parse_intermixed_args(arguments)
    stopped = "stopped; the same command goes on from the last checkpoint"
    return run_command("star-train", lambda: _run(options), stopped=stopped, expected=(TrainerError,))


def _run(options: argparse.Namespace) -> None:
    config = load_config(options.config, options.overrides)
    quieten()
    # Imported late: a bad configuration is reported before torch and diffusers load.
    if options.dry_run:
        from star_trainer.dry_run import report

        print(report(config, options.processes))
        return
    from star_trainer.run.processes import lost_process
    from star_trainer.train import train

    try:
        train(config)
    except RuntimeError as error:
        if not lost_process(error):
            raise
        reason = str(error).splitlines()[0]
        raise TrainerError(
            f"another process of this run is gone or does not answer ({reason}); "
            "the same command goes on from the last checkpoint"
        ) from error
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        raise TrainerError(f"{error}; the same command goes on from the last whole checkpoint") from error


if __name__ == "__main__":
    sys.exit(main())
