"""``star-eval``: pictures, scores and intervals of a pipeline with and without its adapter."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from star_trainer.config import Config, ConfigError, Prompts, Units, check_section, load_config, preset_names
from star_trainer.config.command_line import place, quieten, run_command

if TYPE_CHECKING:
    from star_trainer.families.policy import Policy
    from star_trainer.prompts import Prompt
    from star_trainer.report import Denoising, Pairs
    from star_trainer.rewards import RewardFunction
    from star_trainer.rewards.diversity import Diversity
    from star_trainer.studies.evaluate.gallery import Gallery
    from star_trainer.studies.evaluate.sets import Distance, Reference
    from star_trainer.studies.evaluate.tables import Row

# What Flow-GRPO evaluates Stable Diffusion 3.5 with, where neither a preset nor a run says otherwise.
_PUBLISHED = ("evaluation.steps=40", "evaluation.guidance_scale=4.5", "rollout.batch_size=8")
_SHORT = {"geneval": "geneval_strict"}
_AT_ONCE = 64
# What R0 is measured by, beside FID.
_OF_R0 = ("hps", "aesthetic", "clip_score", "image_reward")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-eval",
        description="Draw pictures with a pipeline, with and without an adapter, from the same noise, and score both.",
        epilog=(
            "examples:\n"
            "  star-eval runs/tiny_star_0                        a run, with its own settings and its last checkpoint\n"
            "  star-eval tiny --adapter runs/tiny_star_0/adapter --rewards scene_strict,clip_score "
            "reward.models.clip=tiny --out eval\n"
            "  star-eval --pipeline stabilityai/stable-diffusion-3.5-medium --adapter runs/mine/adapter\n"
            "      --prompts evaluation_metadata.jsonl --rewards geneval --out eval --resolution 512\n\n"
            "OUT/base and OUT/adapter are laid out as GenEval's scorer expects them. Pictures that are there already\n"
            "are not made again: a command that was stopped goes on. Intervals are 95 % bootstrap intervals over\n"
            "prompts."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "source",
        nargs="*",
        metavar="SOURCE key=value",
        help=f"where settings come from: a run's folder, a preset ({', '.join(preset_names())}) or a YAML file; and "
        "settings that replace those, as of star-train",
    )
    parser.add_argument("--pipeline", help="model.pipeline: 'tiny', a folder, or a name on a hub")
    parser.add_argument("--adapter", type=place, help="LoRA weights, diffusers' or peft's, or a whole transformer")
    parser.add_argument("--prompts", help="file of prompts (.jsonl, .txt, .tsv), or 'scenes'; the run's held-out ones")
    parser.add_argument(
        "--count", type=int, help="how many prompts to take (all of a file's); one that comes again counts once"
    )
    parser.add_argument("--samples", type=int, default=4, help="pictures per prompt (4)")
    parser.add_argument("--rewards", help="names with commas between; geneval is short for geneval_strict")
    parser.add_argument("--reference", type=place, help="folder of pictures that FID and KID compare with")
    parser.add_argument(
        "--features", type=place, help="TorchScript file of the network whose features FID and KID are made of"
    )
    parser.add_argument(
        "--diversity", action="store_true", help="how much the pictures of a prompt differ, by reward.models.clip"
    )
    parser.add_argument(
        "--r0-table",
        action="store_true",
        help=f"print R0's table too, and score {', '.join(_OF_R0)} where --rewards says nothing else",
    )
    parser.add_argument("--steps", type=int, help="evaluation.steps: denoising steps")
    parser.add_argument("--guidance-scale", type=float, help="evaluation.guidance_scale")
    parser.add_argument("--resolution", help="model.resolution: pixels of a side, or '[height, width]'")
    parser.add_argument("--seed", type=int, help="run.seed: of the noise")
    parser.add_argument("--out", type=place, help="folder for pictures and tables (the run's folder, eval/)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for what cannot be done."""
    options = _parser().parse_intermixed_args(arguments)
    stopped = "stopped; the same command goes on with the pictures that are missing"
    return run_command("star-eval", lambda: _run(options), stopped=stopped)


def _run(options: argparse.Namespace) -> None:
    config, run, out = _settings(options)
    quieten()
    evaluate(config, options, run, out)


def _settings(options: argparse.Namespace) -> tuple[Config, Path | None, Path]:
    """The configuration, the run's folder if it is one, and where to write."""
    sources = [item for item in options.source if "=" not in item]
    overrides = [item for item in options.source if "=" in item]
    if len(sources) > 1:
        raise ConfigError(f"expected one run, preset or file of settings, got {' and '.join(sources)}")
    named = {
        "model.pipeline": options.pipeline,
        "evaluation.steps": options.steps,
        "evaluation.guidance_scale": options.guidance_scale,
        "model.resolution": options.resolution,
        "run.seed": options.seed,
    }
    overrides = [f"{key}={value}" for key, value in named.items() if value is not None] + overrides
    for name in ("count", "samples"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name}: expected at least 1, got {value}")
    source = sources[0] if sources else None
    run = Path(source) if source is not None and (Path(source) / "config.json").is_file() else None
    if run is not None:
        config = load_config(str(run / "config.json"), overrides)
    elif source is not None or options.pipeline in (None, "tiny"):
        config = load_config(source or "tiny", overrides)
    else:
        config = check_section(Config, {}, [*_PUBLISHED, *overrides], "the command line")
    rewards = options.rewards or (",".join(_OF_R0) if options.r0_table else None)
    if (options.reference is None) != (options.features is None):
        raise ConfigError("--reference, --features: expected both or none")
    if options.diversity and options.samples < 2:
        raise ConfigError(f"--samples: expected at least 2 for --diversity, got {options.samples}")
    if rewards is not None:
        names = [_SHORT.get(name.strip(), name.strip()) for name in rewards.split(",") if name.strip()]
        terms = dict.fromkeys(names, 1.0)
        alone = {"terms": terms, "floors": {}, "gates": {}}
        config = config.model_copy(update={"reward": config.reward.model_copy(update=alone)})
    if not config.reward.terms:
        raise ConfigError("--rewards: expected at least one name")
    if options.out is not None:
        return config, run, options.out
    if run is None:
        raise ConfigError("--out: expected a folder for pictures and tables")
    return config, run, run / "eval"


def evaluate(config: Config, options: argparse.Namespace, run: Path | None, out: Path) -> None:
    """Make what is missing of the pictures, score them all, and write and print the table.

    Several processes, as `accelerate launch` or `torchrun` start them, share the pictures; the main one does the rest.

    Raises:
        ConfigError: settings, prompts, weights or pictures that cannot be used; the message names the option.
    """
    from tqdm import tqdm

    from star_trainer.rewards import Models, RewardError, check_prompts, check_reward, load_terms
    from star_trainer.run.files import write_page
    from star_trainer.run.inputs import check_backend
    from star_trainer.run.processes import fail_together
    from star_trainer.sampling import NonFiniteError
    from star_trainer.studies.evaluate.gallery import Gallery, batches_of, draw
    from star_trainer.studies.evaluate.models import connect
    from star_trainer.studies.evaluate.page import evaluation_page
    from star_trainer.studies.evaluate.sets import Features, Reference
    from star_trainer.studies.evaluate.tables import markdown, r0_table, sets_table, tabulate

    check_backend(config.backend)
    check_reward(config.reward)
    prompts = _prompts(config, options)
    check_prompts(config.reward.terms, prompts, "--rewards")
    accelerator = connect(config)
    main = accelerator.is_main_process
    models = Models(config.reward)

    def load() -> tuple[dict[str, RewardFunction], Diversity | None, Reference | None]:
        if not main:
            return {}, None, None
        reference = Reference(options.reference, Features(options.features)) if options.reference else None
        return load_terms(config.reward, models=models), models.diversity() if options.diversity else None, reference

    scorers, diversity, reference = fail_together(accelerator, load, ConfigError, RewardError)
    policy, digest = _models(config, options.adapter, run)
    galleries = {
        model: Gallery(out / model, prompts, options.samples)
        for model in (("base",) if digest is None else ("base", "adapter"))
    }

    def open_all() -> None:
        for model, gallery in galleries.items():
            gallery.open(_decisive(config, digest if model == "adapter" else None))

    def draw_all() -> None:
        with tqdm(total=total, initial=total - todo, unit="picture", disable=None if main else True) as bar:
            for model, gallery in galleries.items():
                with policy.base_weights() if model == "base" and digest is not None else nullcontext():
                    draw(gallery, own[model], policy, config, bar)

    fail_together(accelerator, open_all if main else lambda: None, ConfigError, OSError)
    size = config.rollout.batch_size
    own = {model: batches_of(gallery.missing(), size, accelerator) for model, gallery in galleries.items()}
    todo = sum(len(batch) for batches in own.values() for batch in batches)
    total = len(galleries) * len(prompts) * options.samples
    # None makes a picture before all know which are missing.
    accelerator.wait_for_everyone()
    fail_together(accelerator, draw_all, ConfigError, OSError, NonFiniteError)
    if not main:
        return
    scores = {model: _score(gallery, scorers) for model, gallery in galleries.items()}
    if diversity is not None:
        for model, gallery in galleries.items():
            scores[model]["diversity"] = _diversity(gallery, diversity)
    distances = {}
    if reference is not None:
        distances = {model: reference.distance(_pictures(gallery)) for model, gallery in galleries.items()}
    rows = tabulate(scores, [prompt.metadata.get("tag") for prompt in prompts])
    table = "\n".join([markdown(rows), *([sets_table(distances)] if distances else [])])
    if options.r0_table:
        fids = {model: distance.fid for model, distance in distances.items()}
        table = "\n".join([table, r0_table(config.evaluation.steps, scores, fids)])
    settings = _write(out, config, galleries, scores, rows, distances, table)
    print(table)
    pairs = _pairs(config, galleries, scores)
    content = (settings, rows, table, pairs)
    report = write_page(out / "report.html", lambda: evaluation_page(*content, _denoising(policy, config, prompts)))
    print(f"{report}pictures, scores and tables are in {out}")


def _prompts(config: Config, options: argparse.Namespace) -> list[Prompt]:
    from star_trainer.prompts import read_prompts
    from star_trainer.run.inputs import load_prompts
    from star_trainer.run.randomness import numpy_stream

    if options.prompts in (None, "scenes"):
        _, draw = load_prompts(config.prompts if options.prompts is None else Prompts())
        drawn = draw(numpy_stream(config.run.seed, "held-out"), options.count or config.evaluation.prompts)
    else:
        drawn = read_prompts(options.prompts, "--prompts")[: options.count]
    # Some files hold a prompt once per picture. Intervals are over prompts that differ.
    distinct: dict[str, Prompt] = {}
    for prompt in drawn:
        distinct.setdefault(prompt.text, prompt)
    return list(distinct.values())


def _models(config: Config, adapter: Path | None, run: Path | None) -> tuple[Policy, str | None]:
    """The model with what was trained, if anything, and the digest of that."""
    from star_trainer.studies.evaluate.models import load_adapted, load_base, load_trained

    if adapter is None and run is None and config.model.adapter is not None:
        return load_adapted(config, config.model.adapter, "model.adapter")
    if adapter is not None:
        if not adapter.exists():
            raise ConfigError(f"--adapter: no such folder or file: {adapter}")
        return load_adapted(config, str(adapter), "--adapter")
    if run is not None:
        return load_trained(config, run)
    return load_base(config), None


def _decisive(config: Config, digest: str | None) -> dict[str, Any]:
    """What decides pictures; the rest of the configuration may change between two calls."""
    return {
        "model.pipeline": config.model.pipeline,
        "model.dtype": config.model.dtype,
        "model.vae_dtype": config.model.dtype_of_vae,
        "model.tf32": config.model.tf32,
        "model.levels": config.model.levels,
        "model.resolution": config.model.resolution,
        "model.max_sequence_length": config.model.max_sequence_length,
        "evaluation.steps": config.evaluation.steps,
        "evaluation.guidance_scale": config.evaluation.guidance_scale,
        "run.seed": config.run.seed,
        "adapter": digest,
    }


def _score(gallery: Gallery, scorers: Mapping[str, RewardFunction]) -> dict[str, np.ndarray]:
    """Scores [P, S] by reward."""
    from tqdm import tqdm

    places = list(gallery.places())
    found: dict[str, list[np.ndarray]] = {name: [] for name in scorers}
    for first in tqdm(range(0, len(places), _AT_ONCE), desc=f"scoring {gallery.root.name}", disable=None):
        some = places[first : first + _AT_ONCE]
        images = gallery.read(some)
        for name, scorer in scorers.items():
            found[name].append(scorer(images, [gallery.prompts[prompt] for prompt, _ in some]))
    return {name: np.concatenate(parts).reshape(-1, gallery.samples) for name, parts in found.items()}


def _pictures(gallery: Gallery) -> Iterator[np.ndarray]:
    places = list(gallery.places())
    return (gallery.read(places[first : first + _AT_ONCE]) for first in range(0, len(places), _AT_ONCE))


def _diversity(gallery: Gallery, diversity: Diversity) -> np.ndarray:
    """[P, 1]: one number for the pictures of a prompt."""
    groups = ([(prompt, sample) for sample in range(gallery.samples)] for prompt in range(len(gallery.prompts)))
    return np.stack([diversity(gallery.read(places)[None]) for places in groups])


def _write(
    out: Path,
    config: Config,
    galleries: Mapping[str, Gallery],
    scores: Mapping[str, Mapping[str, np.ndarray]],
    rows: Sequence[Row],
    distances: Mapping[str, Distance],
    table: str,
) -> dict[str, Any]:
    """scores.jsonl (a line per picture), table.json, table.md, and sheet.png where there are two models.

    Returns:
        What decides the pictures.
    """
    from star_trainer.run.evaluation import Evaluation, draw_comparison
    from star_trainer.run.files import write_atomically

    lines = []
    for model, gallery in galleries.items():
        for prompt, sample in gallery.places():
            entry = {
                "model": model,
                "file": str(gallery.path(prompt, sample).relative_to(out)),
                "prompt": gallery.prompts[prompt].text,
                "tag": gallery.prompts[prompt].metadata.get("tag"),
                **{
                    name: float(values[prompt, sample]) for name, values in scores[model].items() if name != "diversity"
                },
            }
            lines.append(json.dumps(entry) + "\n")
    write_atomically(out / "scores.jsonl", "".join(lines).encode())
    shown = [
        {
            "reward": row.reward,
            "tag": row.tag,
            "prompts": row.prompts,
            **{
                column: {
                    name: None if math.isnan(value) else value
                    for name, value in (("mean", mean.value), ("low", mean.low), ("high", mean.high))
                }
                for column, mean in row.estimates.items()
            },
        }
        for row in rows
    ]
    samples = next(iter(galleries.values())).samples
    settings = {**_decisive(config, None), "samples": samples}
    del settings["adapter"]
    content = {"settings": settings, "rows": shown, "sets": {model: asdict(d) for model, d in distances.items()}}
    write_atomically(out / "table.json", json.dumps(content, indent=2).encode())
    write_atomically(out / "table.md", table.encode())
    if len(galleries) == 2:
        base = galleries["base"]
        places = [(prompt, 0) for prompt in range(min(config.evaluation.pictures, len(base.prompts)))]
        before, after = (
            Evaluation(gallery.read(places), {name: values[:, 0] for name, values in scores[model].items()})
            for model, gallery in galleries.items()
        )
        texts = [base.prompts[prompt].text for prompt, _ in places]
        draw_comparison(texts, before, after, next(iter(scores["base"])), out / "sheet.png")
    return settings


def _pairs(config: Config, galleries: Mapping[str, Gallery], scores: Mapping[str, Mapping[str, np.ndarray]]) -> Pairs:
    """The first picture of the first prompts by each model, ``before`` and ``after`` where there are two."""
    from star_trainer.report import Pairs

    prompts = next(iter(galleries.values())).prompts[: config.evaluation.pictures]
    places = [(prompt, 0) for prompt in range(len(prompts))]
    names = ("before", "after") if len(galleries) == 2 else ("base",)
    images = {name: gallery.read(places) for name, gallery in zip(names, galleries.values(), strict=True)}
    found = {name: next(iter(own.values()))[:, 0] for name, own in zip(names, scores.values(), strict=True)}
    return Pairs([prompt.text for prompt in prompts], images, found)


def _denoising(policy: Policy, config: Config, prompts: Sequence[Prompt]) -> Denoising:
    """How the first picture of the first prompts forms, from the noise that `gallery.draw` gave it."""
    from star_trainer.prompts.units import UnitExtractor
    from star_trainer.report import MOST_PROMPTS
    from star_trainer.run.denoising import watch_denoising
    from star_trainer.run.randomness import stream

    # No chat model beside the pipeline for a picture.
    units = Units(source="rules") if config.units.source == "llm" else config.units
    shown = UnitExtractor(units).fill(prompts[:MOST_PROMPTS])
    noise = [stream(config.run.seed, "star-eval", place, 0) for place in range(len(shown))]
    evaluation, with_units = config.evaluation, any(prompt.units for prompt in shown)
    seen = watch_denoising(
        policy, config, shown, noise, evaluation.guidance_scale, steps=evaluation.steps, maps=with_units
    )
    return seen.denoising(policy)


if __name__ == "__main__":
    sys.exit(main())
