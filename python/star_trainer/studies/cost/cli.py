"""``star-cost``: time, operations and peak memory of capture, allocation and loss against the uniform baseline."""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from star_trainer.config import Config, ConfigError, load_config
from star_trainer.config.command_line import add_config_arguments, place, quieten, run_command
from star_trainer.run.files import write_atomically

PARTS = ("operations", "rollout", "update", "iteration")
# Millions of parameters that a transformer may have for its times to be taken on a CPU.
_LARGEST_ON_CPU = 200


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-cost",
        description="Measure what STAR's capture, allocation and loss add to uniform training, with the library's "
        "kernels (fused), in plain PyTorch (unfused), and with attention probabilities written out (materialised).",
        epilog=(
            "examples:\n"
            "  star-cost tiny                                     everything, on any machine\n"
            "  star-cost tiny --parts iteration rollout.prompts=4 one part; the others in the folder stay\n"
            "  star-cost sd35m_geneval                            on a GPU, random weights of the preset's shape\n"
            "  star-cost sd35m_geneval --flops-only               operations alone, on any machine\n"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_config_arguments(parser)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {', '.join(PARTS)} (default: all)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=120.0,
        help="for the timed rounds, of which there are five at least (default: 120)",
    )
    parser.add_argument(
        "--flops-only", action="store_true", help="count operations, which needs no GPU, and time nothing"
    )
    parser.add_argument("--folder", type=place, help="where results go (default: runs/cost_CONFIG)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; 0, 1 where the device's memory is not enough, or 2 with one line of explanation."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_intermixed_args(given)
    command = shlex.join(["star-cost", *given])
    stopped = "stopped; the parts that were done are written"
    return run_command("star-cost", lambda: _run(options, command), stopped=stopped)


def _run(options: argparse.Namespace, command: str) -> int:
    config, parts = _check(options)
    quieten()
    try:
        report(config, parts, options, command)
    except MemoryError as error:
        print(f"star-cost: not enough memory for {error}; smaller batch sizes need less", file=sys.stderr)
        return 1
    return 0


def _check(options: argparse.Namespace) -> tuple[Config, list[str]]:
    # The same work as with any other rate, and weights that do not wander off.
    fixed = ["method=star", "train.learning_rate=1e-12"]
    config = load_config(options.config, [*options.overrides, *fixed])
    parts = [part.strip() for part in options.parts.split(",") if part.strip()]
    if not parts or any(part not in PARTS for part in parts):
        raise ConfigError(f"--parts: expected some of {', '.join(PARTS)}, got {', '.join(parts) or 'none'}")
    if not options.seconds > 0.0:
        raise ConfigError(f"--seconds: expected more than 0, got {options.seconds}")
    return config, [part for part in PARTS if part in parts]


def report(config: Config, parts: Sequence[str], options: argparse.Namespace, command: str) -> None:
    """Measure what was asked for, and write numbers, tables and the picture after each part.

    Raises:
        ConfigError: settings that cannot be used, or a model too large for a machine without a GPU.
        MemoryError: the device ran out of it.
    """
    import torch
    from tqdm import tqdm

    from star_trainer.run.inputs import check_backend
    from star_trainer.studies.cost.cases import load_case, shape_case
    from star_trainer.studies.cost.flops import Counts
    from star_trainer.studies.cost.parts import SHARES, comparisons, counted, measured
    from star_trainer.studies.cost.results import FORMAT, read_results
    from star_trainer.studies.timing import clock_for, default_device, environment

    check_backend(config.backend)
    device = default_device()
    shapes = shape_case(config)
    if not options.flops_only:
        _check_size(shapes, device, options.config)
    folder = Path(options.folder or f"runs/cost_{Path(options.config).stem}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "cost.json"
    content: dict[str, Any] = read_results(path) if path.exists() else {"format": FORMAT, "parts": {}}
    share = sum(SHARES[part] for part in parts)
    counts = Counts(shapes)
    with tqdm(total=len(parts), disable=not config.run.progress, unit="part") as bar:
        try:
            case = None if options.flops_only else load_case(config, device)
            clock = clock_for(device)
            for part in parts:
                groups = []
                for comparison in comparisons(part, case, shapes, counts):
                    bar.set_description(comparison.name)
                    budget = options.seconds * SHARES[part] / share
                    groups.append(counted(comparison) if case is None else measured(comparison, clock, budget))
                content["parts"][part] = {
                    "command": command,
                    "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
                    "environment": environment(device),
                    "config": config.model_dump(mode="json"),
                    "groups": groups,
                }
                _write(content, folder)
                bar.update()
        except torch.OutOfMemoryError as error:
            raise MemoryError(f"{bar.desc or 'the model'} on {device}: {str(error).splitlines()[0]}") from error
    from star_trainer.studies.cost.results import tables

    print(tables({"parts": {part: content["parts"][part] for part in parts}}))
    print(f"{'tables' if options.flops_only else 'tables, plot'} and numbers are in {folder}")


def _check_size(shapes: Any, device: Any, name: str) -> None:
    millions = sum(parameter.numel() for parameter in shapes.state.policy.model.parameters()) / 1e6
    if device.type == "cpu" and millions > _LARGEST_ON_CPU:
        raise ConfigError(
            f"{name}: expected a GPU to time a transformer of {millions:,.0f} million parameters, found none; "
            "--flops-only counts its operations without one"
        )


def _write(content: dict[str, Any], folder: Path) -> None:
    from star_trainer.studies.cost.plot import plot_cost
    from star_trainer.studies.cost.results import tables

    content["parts"] = {part: content["parts"][part] for part in PARTS if part in content["parts"]}
    write_atomically(folder / "cost.json", (json.dumps(content, indent=1) + "\n").encode())
    write_atomically(folder / "cost.md", tables(content).encode())
    plot_cost(content, folder / "cost.png")


if __name__ == "__main__":
    sys.exit(main())
