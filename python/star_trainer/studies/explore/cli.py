"""``star-explore``: a local page that samples a prompt and shows where its advantage goes."""

from __future__ import annotations

import argparse
import importlib.util
import ipaddress
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from star_trainer.config import Config, ConfigError, check_section, load_config
from star_trainer.config.command_line import place, quieten, run_command

if TYPE_CHECKING:
    from star_trainer.prompts import Prompt
    from star_trainer.studies.explore.sampling import Explorer

# As star-eval, where nothing else is said.
_PUBLISHED = ("evaluation.steps=40", "evaluation.guidance_scale=4.5", "rollout.batch_size=4")
# The small models that know scenes.
_TINY = ("reward.models={clip: tiny, pickscore: tiny, pickscore_processor: tiny}", "evaluation.steps=10")
_SUGGESTIONS = 8


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-explore",
        description="Serve a page in which one types a prompt, chooses its units, samples a group, and sees the maps "
        "of every denoising step, layer and unit, and with a reward where each sample's advantage goes.",
        epilog=(
            "examples:\n"
            "  star-explore tiny --reward pickscore\n"
            "  star-explore tiny --reward scene_graded --prompts scenes --adapter runs/tiny_star_0\n"
            "  star-explore stabilityai/stable-diffusion-3.5-medium --size 512 model.dtype=bfloat16\n\n"
            "Nothing is loaded from anywhere but the pipeline's and the reward's own models, and nothing is sent."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("pipeline", metavar="PIPELINE", help="'tiny', a folder, or a name on a hub")
    parser.add_argument(
        "settings",
        nargs="*",
        metavar="key=value",
        help="settings as of star-train, such as allocation.sharpness=2 or reward.models.clip=FOLDER",
    )
    parser.add_argument(
        "--adapter", type=place, help="what was trained: LoRA weights, a whole transformer, or a run's folder"
    )
    parser.add_argument("--reward", help="names as in reward.terms, or module:function, with commas between")
    parser.add_argument(
        "--prompts", help="suggestions: a file (.jsonl, .txt, .tsv) or 'scenes'; some rewards need their metadata"
    )
    parser.add_argument("--steps", type=int, help="evaluation.steps: denoising steps")
    parser.add_argument("--size", help="model.resolution: pixels of a side, or HEIGHTxWIDTH")
    parser.add_argument("--guidance", type=float, help="evaluation.guidance_scale")
    parser.add_argument("--host", default="127.0.0.1", help="address that is listened at (127.0.0.1: this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port that is listened at (7860)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for what cannot be done."""
    options = _parser().parse_intermixed_args(arguments)
    return run_command("star-explore", lambda: _run(options), stopped="stopped")


def _run(options: argparse.Namespace) -> None:
    if importlib.util.find_spec("gradio") is None:
        raise ConfigError("star-explore needs the extra: pip install 'star-kernels[explore]'")
    if not 0 < options.port < 65536:
        raise ConfigError(f"--port: expected 1 to 65535, got {options.port}")
    config = settings(options)
    quieten()
    explorer = load(config, options)
    from star_trainer.studies.explore.page import serve

    page = serve(explorer, options.host, options.port)
    print(f"http://{options.host}:{options.port}  (Ctrl-C ends it)", flush=True)
    if not _is_loopback(options.host):
        print(f"--host {options.host}: whoever reaches this machine can use the page", file=sys.stderr)
    page.block_thread()


def settings(options: argparse.Namespace) -> Config:
    """What the options say, over the settings of the run that is looked at, or of the small pipeline, or published
    ones.

    Raises:
        ConfigError: a pipeline that is not there or of no known family, or settings that cannot be used.
    """
    from star_trainer.families import family_named
    from star_trainer.studies.explore.sampling import resolution

    samplers = family_named(options.pipeline, "PIPELINE").noising.samplers
    named = {
        "model.pipeline": options.pipeline,
        "model.resolution": None if options.size is None else resolution(options.size),
        "evaluation.steps": options.steps,
        "evaluation.guidance_scale": options.guidance,
    }
    overrides = [*(f"{key}={value}" for key, value in named.items() if value is not None), *options.settings]
    if options.adapter is not None and not options.adapter.exists():
        raise ConfigError(f"--adapter: no such folder or file: {options.adapter}")
    if _is_run(options):
        config = load_config(str(options.adapter / "config.json"), overrides)
    elif options.pipeline == "tiny":
        config = load_config("tiny", [*_TINY, *overrides])
    else:
        sampler = f"rollout.sampler={samplers[0]}"
        config = check_section(Config, {}, [sampler, *_PUBLISHED, *overrides], "the command line")
    names = [name.strip() for name in (options.reward or "").split(",") if name.strip()]
    if options.reward is not None and not names:
        raise ConfigError("--reward: expected at least one name")
    terms = {name: config.reward.terms.get(name, 1.0) for name in names}
    floors = {name: floor for name, floor in config.reward.floors.items() if name in terms}
    gates = {name: gate for name, gate in config.reward.gates.items() if {name, *gate} <= terms.keys()}
    alone = {"terms": terms, "floors": floors, "gates": gates}
    return config.model_copy(update={"reward": config.reward.model_copy(update=alone)})


def load(config: Config, options: argparse.Namespace) -> Explorer:
    """The pipeline with what was trained, and the reward.

    Raises:
        ConfigError: one of them cannot be had, or does not suit the settings.
    """
    from star_trainer.rewards import check_reward, load_terms, weighted_sum
    from star_trainer.run.inputs import check_backend
    from star_trainer.studies.evaluate.models import load_adapted, load_base, load_trained
    from star_trainer.studies.explore.sampling import Explorer

    check_backend(config.backend)
    check_reward(config.reward)
    prompts = _prompts(options.prompts)
    reward = weighted_sum(config.reward, load_terms(config.reward)) if config.reward.terms else None
    if _is_run(options):
        policy, _ = load_trained(config, options.adapter)
    elif options.adapter is not None:
        policy, _ = load_adapted(config, str(options.adapter), "--adapter")
    else:
        policy = load_base(config)
    return Explorer(policy, config, reward, prompts, adapted=options.adapter is not None)


def _is_run(options: argparse.Namespace) -> bool:
    return options.adapter is not None and (options.adapter / "checkpoints").is_dir()


def _prompts(source: str | None) -> list[Prompt]:
    from star_trainer.config import Prompts
    from star_trainer.prompts import read_prompts
    from star_trainer.run.inputs import load_prompts
    from star_trainer.run.randomness import numpy_stream

    if source is None:
        return []
    if source == "scenes":
        _, draw = load_prompts(Prompts())
        prompts = draw(numpy_stream(0, "held-out"), _SUGGESTIONS)
    else:
        prompts = read_prompts(source, "--prompts")
    return list({prompt.text: prompt for prompt in prompts}.values())


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


if __name__ == "__main__":
    sys.exit(main())
