"""``star-units``: make, show and check the text units of a file of prompts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from star_kernels.text_units import TextUnits, stands_in
from star_trainer.config import ConfigError, Units, check_section
from star_trainer.files import write_atomically
from star_trainer.prompts import read_prompts
from star_trainer.scenes import ScenePrompt
from star_trainer.units import Extraction, UnitExtractor
from star_trainer.units.cache import CacheError
from star_trainer.units.chat import ChatError

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
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompts", help="a file of prompts: .jsonl, .txt (a line each) or .tsv (column Prompt)")
    parser.add_argument("--out", type=Path, help="JSON lines to write: the prompt with its metadata and units")
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="key=value", help="settings of the section units, such as source=llm"
    )
    parser.add_argument("--pipeline", help="a pipeline's folder or name on a hub, whose tokenizers are asked")
    parser.add_argument(
        "--max-sequence-length", type=int, default=256, help="T5 positions of that pipeline's text axis (256)"
    )
    parser.add_argument("--show", type=int, default=20, help="how many prompts are shown (20)")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 0, or 2 with one line of explanation for what cannot be done."""
    options = _parser().parse_args(arguments)
    try:
        section = check_section(Units, {"source": "rules"}, options.set, "units")
        if section.source == "llm" and section.model is None:
            raise ConfigError("units.model: expected a chat model where source is llm")
        prompts = read_prompts(options.prompts, "prompts")
        tokenizers = None if options.pipeline is None else _tokenizers(options.pipeline)
        extractor = UnitExtractor(section)
        with tqdm(total=len(prompts), unit="prompt", disable=None) as bar:
            extractions = extractor(prompts, bar.update)
        if options.out is not None:
            write_atomically(options.out, "".join(map(_line, prompts, extractions)).encode())
    except (CacheError, ChatError, ConfigError, OSError) as error:
        print(f"star-units: {error}", file=sys.stderr)
        return 2
    _show(prompts[: options.show], extractions)
    texts, units = [prompt.text for prompt in prompts], [extraction.units for extraction in extractions]
    absent = _without_tokens(texts, units, tokenizers, options.max_sequence_length)
    _summarise(texts, extractions, absent, "the prompt" if tokenizers is None else "the token sequence")
    return 0


def _tokenizers(pipeline: str) -> Any:
    """A pipeline's parts that cut text into tokens; nothing else of it is loaded."""
    from transformers import AutoTokenizer

    parts = []
    for folder in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        try:
            parts.append(AutoTokenizer.from_pretrained(pipeline, subfolder=folder))
        except (OSError, ValueError) as error:
            raise ConfigError(f"--pipeline: {pipeline} has no usable {folder}: {error}") from error
    return parts


def _line(prompt: ScenePrompt, extraction: Extraction) -> str:
    entry = {**prompt.metadata, "prompt": prompt.text, "units": extraction.units, "units_from": extraction.source}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _without_tokens(
    texts: list[str], units: list[tuple[str, ...]], tokenizers: Any, max_sequence_length: int
) -> list[list[str]]:
    """Per prompt the units that are not found: in the token sequence, or without tokenizers in the prompt."""
    if tokenizers is None:
        return [[u for u in row if not stands_in(text, u)] for text, row in zip(texts, units, strict=True)]
    clip, clip_2, t5 = tokenizers
    found = TextUnits.from_prompts(
        texts, units, tokenizers=((clip, clip_2), t5), max_lengths=(clip.model_max_length, max_sequence_length)
    )
    return found.missing


def _show(prompts: Sequence[ScenePrompt], extractions: Sequence[Extraction]) -> None:
    for prompt, extraction in zip(prompts, extractions, strict=False):
        text = " ".join(prompt.text.split())
        print(text if len(text) <= _WIDTH else f"{text[: _WIDTH - 1]}…")
        print("    " + (" | ".join(extraction.units) or "(none)"))


def _summarise(
    texts: Sequence[str], extractions: Sequence[Extraction], absent: Sequence[Sequence[str]], where: str
) -> None:
    total = sum(len(extraction.units) for extraction in extractions)
    found = total - sum(map(len, absent))
    bare = [text for text, extraction in zip(texts, extractions, strict=True) if not extraction.units]
    counts: dict[str, int] = {}
    for extraction in extractions:
        counts[extraction.source] = counts.get(extraction.source, 0) + 1
    sources = ", ".join(f"{count} from {source}" for source, count in counts.items())
    print(f"\n{len(texts)} prompts ({sources}), {total} units, {total / len(texts):.1f} per prompt")
    print(f"found in {where}: {found} of {total} ({found / max(total, 1):.2%}); prompts without a unit: {len(bare)}")
    for text, missing in list(zip(texts, absent, strict=True)):
        if missing:
            print(f"    not found: {' | '.join(missing)} in {text[:_WIDTH]!r}")


if __name__ == "__main__":
    sys.exit(main())
