"""``star-export``: an adapter from any checkpoint or snapshot of a run, finished or stopped."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from star_trainer.config import Config, ConfigError
from star_trainer.config.command_line import positive, quieten, run_command


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-export",
        description="Make an adapter in diffusers' format (or a whole transformer, where all weights were trained) of "
        "the averaged weights of a run, finished or stopped.",
    )
    parser.add_argument("run", type=Path, help="the run's folder")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--iteration", type=positive, metavar="N", help="of a checkpoint or snapshot (the newest)")
    which.add_argument("--best", action="store_true", help="the snapshot that did best on the held-out prompts")
    parser.add_argument("--out", type=Path, help="folder to write to (RUN/exported/iteration_N)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for what cannot be done."""
    options = _parser().parse_args(arguments)
    return run_command("star-export", lambda: _run(options), stopped="stopped; nothing was written")


def _run(options: argparse.Namespace) -> None:
    quieten()
    # Imported late: the help text needs no torch.
    from star_trainer.run import checkpoint, snapshots

    run: Path = options.run
    if not (run / "config.json").is_file():
        raise ConfigError(f"{run}: expected the folder of a run, with its config.json")
    kept, checkpoints = snapshots.iterations(run), checkpoint.iterations(run / "checkpoints")
    wanted = options.iteration
    if options.best:
        wanted = snapshots.best_iteration(run)
        if wanted is None:
            raise ConfigError(f"--best: {run} has no snapshots")
    elif wanted is None:
        wanted = max((*kept, *checkpoints), default=None)
    if wanted not in kept and wanted not in checkpoints:
        there = ", ".join(map(str, sorted({*kept, *checkpoints}))) or "none"
        raise ConfigError(f"--iteration: expected one with a checkpoint or a snapshot in {run} ({there}), got {wanted}")
    out = options.out or run / "exported" / f"iteration_{wanted:06d}"
    snapshot = snapshots.folder_of(run) / f"iteration_{wanted:06d}"
    if list(snapshot.glob("*.safetensors")):
        shutil.copytree(snapshot, out, dirs_exist_ok=True)
    else:
        _export_checkpoint(run, wanted, out)
    print(f"the weights after iteration {wanted} are in {out}")


def _export_checkpoint(run: Path, iteration: int, out: Path) -> None:
    import torch

    from star_trainer.families import pipeline_source, read_shapes
    from star_trainer.families.loading import load_whole
    from star_trainer.families.policy import add_adapter
    from star_trainer.run import checkpoint
    from star_trainer.run.export import save_weights

    found = checkpoint.load_iteration(run / "checkpoints", iteration)
    if found is None:
        raise ConfigError(
            f"--iteration: the snapshot of {iteration} in {run} has scores alone, and no checkpoint is left"
        )
    try:
        model = Config.model_validate(found.values["config"]).model
    except ValidationError as error:
        raise ConfigError(f"{found.path}: its settings are not those of this version: {error}") from error
    family, shapes = read_shapes(model.pipeline)
    weights = found.tensors["average"]
    if model.lora is None:
        # A transformer has more than what is trained, such as embedded positions: that is the pipeline's own.
        options = {"subfolder": family.model_part, "torch_dtype": getattr(torch, model.dtype)}
        transformer = load_whole(family.model_class, pipeline_source(model.pipeline), **options)
        weights = transformer.state_dict() | weights
    else:
        # Of the model only the names are needed.
        with torch.device("meta"):
            transformer, _ = family.build_models(shapes)
        add_adapter(transformer, model, family)
    save_weights(family, transformer, out, weights)


if __name__ == "__main__":
    sys.exit(main())
