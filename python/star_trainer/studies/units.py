"""``star-units``: make, show and check the text units of a file of prompts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from star_kernels.text_units import TextUnits, stands_in
from star_trainer.config import ConfigError, Units, check_section
from star_trainer.config.command_line import place, positive, run_command
from star_trainer.families import family_named, pipeline_source
from star_trainer.families.family import TextAxis
from star_trainer.prompts import Prompt, read_prompts
from star_trainer.prompts.units import Extraction, UnitExtractor
from star_trainer.run.files import write_atomically

_WIDTH = 100


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-units",
        description="List the phrases of each prompt that the reward depends on, and how many of them have tokens.",
        epilog=(
            "examples:\n"
            "  star-units prompts.txt --out units.jsonl                  by rule\n"
            "  star-units prompts.jsonl --pipeline PIPELINE              are they in the model's text tokens?\n"
            "  star-units prompts.txt --out units.jsonl --set source=llm model=Qwen/Qwen2.5-7B-Instruct task=ocr\n\n"
            "A run takes them with prompts.source=units.jsonl units=file, or makes them itself with units=rules or llm."
            "\n"
            "The rules know English alone; for other languages take source=llm or write the units into the file."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", help="a file of prompts: .jsonl, .txt (a line each) or .tsv (column Prompt)")
    parser.add_argument("--out", type=place, help="JSON lines to write: the prompt with its metadata and units")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="settings of the section units, such as source=llm"
    )
    parser.add_argument("--keep", action="store_true", help="keep the units that stand in the file, make the others")
    parser.add_argument("--pipeline", help="tiny, or a pipeline's folder or name on a hub, whose tokenizers are asked")
    parser.add_argument(
        "--max-sequence-length", type=positive, default=256, help="positions of that pipeline's text (256)"
    )
    parser.add_argument("--show", type=int, default=20, help="how many prompts are shown (20)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for what cannot be done."""
    options = _parser().parse_args(arguments)
    return run_command("star-units", lambda: _run(options), stopped="stopped; what was extracted is in the cache")


def _run(options: argparse.Namespace) -> None:
    section = check_section(Units, {"source": "rules"}, options.set, "units")
    if section.source == "llm" and section.model is None:
        raise ConfigError("units.model: expected a chat model where source is llm")
    prompts = read_prompts(options.prompts, "prompts")
    if options.out is not None:
        _check_out(options.out, options.prompts)
    axis = None if options.pipeline is None else _text_axis(options.pipeline, options.max_sequence_length)
    extractor = UnitExtractor(section)
    with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
        extractions = _extractions(prompts, extractor, bar, keep=options.keep)
    found = None if axis is None else _align(prompts, extractions, axis)
    if options.out is not None:
        write_atomically(options.out, "".join(map(_line, prompts, extractions)).encode())
    _show(prompts[: options.show], extractions)
    _summarise(prompts, extractions)
    _report_coverage(prompts, extractions, found)


def _check_out(out: Path, source: str) -> None:
    """Refuse a file that would replace the prompts, or that a run would read as something else.

    Raises:
        ConfigError: with what was expected.
    """
    if out.suffix.lower() not in (".jsonl", ".json"):
        raise ConfigError(f"--out: expected a name that ends in .jsonl, since that is what is written, got {out}")
    if out.exists() and out.samefile(Path(source).expanduser()):
        raise ConfigError(f"--out: expected another file than the prompts, which would be lost, got {out}")


def _extractions(prompts: Sequence[Prompt], extractor: UnitExtractor, bar: Any, *, keep: bool) -> list[Extraction]:
    """The units of each prompt; with `keep` those that stand beside it, where there are any."""
    asked = [index for index, prompt in enumerate(prompts) if not (keep and prompt.units)]
    bar.update(len(prompts) - len(asked))
    extractions = [Extraction(prompt.units, "file") for prompt in prompts]
    for index, extraction in zip(asked, extractor([prompts[i] for i in asked], bar.update), strict=True):
        extractions[index] = extraction
    return extractions


def _text_axis(pipeline: str, max_sequence_length: int) -> TextAxis:
    """A pipeline's text tokens; of its parts only those that cut text are loaded."""
    family, source = family_named(pipeline, "--pipeline"), pipeline_source(pipeline, "--pipeline")
    try:
        return family.text_axis(source, max_sequence_length)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--pipeline: {pipeline} has no usable tokenizers: {error}") from error


def _line(prompt: Prompt, extraction: Extraction) -> str:
    entry = {**prompt.metadata, "prompt": prompt.text, "units": extraction.units, "units_from": extraction.source}
    return json.dumps(entry, ensure_ascii=False) + "\n"


@dataclasses.dataclass(frozen=True)
class _Coverage:
    """Per prompt the units without a token, those of them that the tokenizers cut off, and where they cut."""

    missing: list[list[str]]
    cut: list[list[str]]
    lengths: str


def _align(prompts: Sequence[Prompt], extractions: Sequence[Extraction], axis: TextAxis) -> _Coverage:
    """Where the units stand in the token sequence.

    Raises:
        ConfigError: a sequence too short for any text.
    """
    try:
        units = TextUnits.from_prompts(
            [prompt.text for prompt in prompts],
            [extraction.units for extraction in extractions],
            tokenizers=axis.tokenizers,
            max_lengths=axis.max_lengths,
            template=axis.template,
            dropped=axis.dropped,
        )
    except ValueError as error:
        raise ConfigError(f"--max-sequence-length: {error}") from error
    return _Coverage(units.missing, units.truncated, axis.description)


def _show(prompts: Sequence[Prompt], extractions: Sequence[Extraction]) -> None:
    for prompt, extraction in zip(prompts, extractions, strict=False):
        text = " ".join(prompt.text.split())
        print(text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…")
        print("    " + (" | ".join(extraction.units) or "(none)"))


def _summarise(prompts: Sequence[Prompt], extractions: Sequence[Extraction]) -> None:
    total = sum(len(extraction.units) for extraction in extractions)
    counts: dict[str, int] = {}
    for extraction in extractions:
        counts[extraction.source] = counts.get(extraction.source, 0) + 1
    sources = ", ".join(f"{count} from {source}" for source, count in counts.items())
    print(f"\n{len(prompts)} prompts ({sources}), {total} units, {total / len(prompts):.1f} per prompt")
    replaced = sum(bool(p.units) and e.source != "file" for p, e in zip(prompts, extractions, strict=True))
    if replaced:
        print(f"{replaced} prompts had units in the file, which are replaced here; --keep keeps them")


def _report_coverage(prompts: Sequence[Prompt], extractions: Sequence[Extraction], coverage: _Coverage | None) -> None:
    """How many units are found, and each that is not: in the token sequence, or without tokenizers in the prompt."""
    if coverage is None:
        where = "the prompt"
        missing = [
            [unit for unit in extraction.units if not stands_in(prompt.text, unit)]
            for prompt, extraction in zip(prompts, extractions, strict=True)
        ]
        cut: list[list[str]] = [[] for _ in prompts]
    else:
        where, missing, cut = "the token sequence", coverage.missing, coverage.cut
    total = sum(len(extraction.units) for extraction in extractions)
    found = total - sum(map(len, missing))
    bare = sum(not extraction.units for extraction in extractions)
    print(f"found in {where}: {found} of {total} ({found / max(total, 1):.2%}); prompts without a unit: {bare}")
    for prompt, absent, behind in zip(prompts, missing, cut, strict=True):
        elsewhere = [unit for unit in absent if unit not in behind]
        text = repr(prompt.text[:_WIDTH])
        if elsewhere:
            print(f"    not in the prompt: {' | '.join(elsewhere)} in {text}")
        if behind:
            assert coverage is not None
            print(f"    cut off after {coverage.lengths}: {' | '.join(behind)} in {text}")


if __name__ == "__main__":
    sys.exit(main())
