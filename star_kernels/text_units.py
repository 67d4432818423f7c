"""Prompts and unit strings to weights over text tokens: U of docs/method.md, section 3."""

from __future__ import annotations

import re
import unicodedata
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels._checks import check_tensor

# At most as many positions a tokenizer has unless told otherwise.
DEFAULT_MAX_LENGTH = 256

# Scripts that set no spaces between words (Thai to Khmer, Kana, Han): there a letter is no sign that a word goes on.
_UNSPACED_SCRIPTS = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)

# White space other than single spaces.
_WHITE_SPACE = re.compile(r"\s\s|[^\S ]")

Span = tuple[int, int]


@dataclass(frozen=True, eq=False)
class TextUnits:
    """Which text tokens belong to which text unit, for a batch of prompts (docs/method.md, section 3).

    Attributes:
        weights: U, [B, N_text, K] float32: 1 (or one over the unit's token count) on the tokens of unit k of prompt b,
            0 elsewhere. K is the largest number of units of one prompt and at least 1; columns of a prompt with fewer
            units, and of a missing unit, are zero.
        names: per prompt the units' names, in the order of the columns. The name of a unit with several pieces is the
            pieces joined by " + ".
        missing: per prompt the names of the units without any token in the sequence.
        truncated: those of `missing` that are in the prompt, but wholly in the part that the tokenizers cut off.
    """

    weights: Tensor
    names: list[list[str]]
    missing: list[list[str]]
    truncated: list[list[str]]

    def __post_init__(self) -> None:
        check_tensor("weights", self.weights, ("B", "N_text", "K"))
        for field in ("names", "missing", "truncated"):
            if len(getattr(self, field)) != len(self.weights):
                raise ValueError(
                    f"{field}: expected one list for each of the {len(self.weights)} prompts of weights, "
                    f"got {len(getattr(self, field))}"
                )

    @classmethod
    def from_prompts(
        cls,
        prompts: Sequence[str],
        units: Sequence[Sequence[str | Sequence[str]]],
        *,
        tokenizers: Any,
        max_lengths: Sequence[int] | None = None,
        template: tuple[str, str] = ("", ""),
        dropped: int = 0,
        normalize: bool = False,
    ) -> TextUnits:
        """Find each prompt's units in its text and mark their tokens.

        A unit is found wherever its text stands in the prompt as whole words, at every occurrence. Letter case, Unicode
        form (NFKC) and the amount of white space do not matter: "Red circle" is found in "a red  circle", "cat" is not
        found in "category". A token belongs to a unit when its characters overlap the unit's; tokens that the tokenizer
        adds (begin, end, padding) belong to none. A unit that is not found is reported, never an error.

        Args:
            prompts: B strings; an empty one is the unconditional prompt.
            units: per prompt a list of units, which may be empty. A unit is a string, or a list of strings whose
                occurrences all belong to it.
            tokenizers: the tokenizers whose sequences the model's text axis joins, in that order: fast tokenizers of
                transformers, which know each token's characters. Neighbours with the same vocabulary share their
                positions, as CLIP-L and CLIP-G of Stable Diffusion 3 do, whose features are joined and not their
                sequences; a nested tuple shares positions whatever the vocabularies. Where sharers split a text
                differently, a position counts when the token of any of them does. None stands for positions without
                text, as of a text encoder that was left out. For SD3: ``(pipe.tokenizer, pipe.tokenizer_2,
                pipe.tokenizer_3)``, 77 + 256 positions (see also `from_pipeline`).
            max_lengths: the lengths that the prompts are padded and cut to, one per tokenizer, or one per group of
                tokenizers that share positions. By default the tokenizer's model_max_length, but at most 256, which is
                the SD3 pipeline's default for T5.
            template: what the pipeline writes before and after a prompt, as a chat template does; its tokens belong to
                no unit (see `chat_template`).
            dropped: how many of the first tokens, which the template makes, have no position on the text axis; the
                lengths are those of what follows.
            normalize: divide each unit's weights by the number of its tokens.

        Raises:
            TypeError: prompts that are no sequence of strings; units that are no sequences of units per prompt; a
                tokenizer that is slow (has no character offsets) or is none.
            ValueError: no prompts; as many lists of units as prompts, non-empty units and positive lengths expected.
        """
        prompts = _check_prompts(prompts)
        pieces = _check_units(units, len(prompts))
        segments = _segments(tokenizers, max_lengths)
        before, after = _check_template(template)
        if isinstance(dropped, bool) or not isinstance(dropped, int) or dropped < 0:
            raise ValueError(f"dropped: expected a number of tokens, got {dropped!r}")

        # In characters of the text that the tokenizers are given.
        spans = [
            [[(begin + len(before), end + len(before)) for begin, end in _occurrences(text, unit)] for unit in units_of]
            for text, units_of in zip(map(_fold, prompts), pieces, strict=True)
        ]
        prompts = [before + prompt + after for prompt in prompts]
        num_units = max(1, *map(len, pieces))
        weights = torch.zeros(len(prompts), sum(length for _, length in segments), num_units)
        start = 0
        for sharers, length in segments:
            for tokenizer in sharers:
                for row, token_spans in enumerate(_token_spans(tokenizer, prompts, length + dropped)):
                    kept = [(place - dropped, span) for place, span in token_spans if place >= dropped]
                    for column, unit_spans in enumerate(spans[row]):
                        positions = [start + place for place, span in kept if _overlaps(span, unit_spans)]
                        weights[row, positions, column] = 1.0
            start += length

        counts = weights.sum(dim=1)
        names = [[" + ".join(unit) for unit in prompt_units] for prompt_units in pieces]
        missing: list[list[str]] = []
        truncated: list[list[str]] = []
        for row_names, row_spans, row_counts in zip(names, spans, counts.tolist(), strict=True):
            absent = [k for k in range(len(row_names)) if row_counts[k] == 0]
            missing.append([row_names[k] for k in absent])
            truncated.append([row_names[k] for k in absent if row_spans[k]])
        if normalize:
            weights /= counts.clamp(min=1).unsqueeze(1)
        return cls(weights, names, missing, truncated)

    @classmethod
    def from_pipeline(
        cls,
        pipe: Any,
        prompts: Sequence[str],
        units: Sequence[Sequence[str | Sequence[str]]],
        *,
        max_sequence_length: int | None = None,
        normalize: bool = False,
    ) -> TextUnits:
        """`from_prompts` for the text axis that the ``encode_prompt`` of a pipeline of diffusers builds.

        =========================== ==================================================================================
        StableDiffusion3Pipeline    ``pipe.tokenizer_max_length`` CLIP positions (77), then `max_sequence_length` of
                                    T5 (256), which stay (as zero embeddings, without units) in a pipeline without its
                                    third text encoder
        FluxPipeline                `max_sequence_length` positions of T5 (512)
        Flux2KleinPipeline          `max_sequence_length` positions of Qwen3 (512), its chat template around the prompt
        StableDiffusionPipeline     ``pipe.tokenizer.model_max_length`` CLIP positions (77), whatever
                                    `max_sequence_length`
        StableDiffusionXLPipeline   the same, which both tokenizers share
        QwenImagePipeline           as many as the longest of `prompts` has behind the dropped part of the pipeline's
                                    template, at most `max_sequence_length` (1024)
        ZImagePipeline              as many as the longest of `prompts` has with the tokenizer's chat template around
                                    it, at most `max_sequence_length` (512)
        =========================== ==================================================================================

        Args:
            pipe: the pipeline, for its tokenizers and for which text encoders it has.
            prompts: see `from_prompts`.
            units: see `from_prompts`.
            normalize: see `from_prompts`.
            max_sequence_length: what ``encode_prompt`` or the pipeline is called with, by default as there.

        Raises:
            TypeError: `pipe` is none of these pipelines, or lacks parts; else as `from_prompts`.
            ValueError: as `from_prompts`.
        """
        known = [kind.__name__ for kind in type(pipe).__mro__ if kind.__name__ in _TEXT_AXES]
        axis = _TEXT_AXES[known[0]] if known else _TEXT_AXES["StableDiffusion3Pipeline"]
        if lacking := [part for part in axis.parts if not hasattr(pipe, part)]:
            raise TypeError(
                f"pipe: expected one of {', '.join(_TEXT_AXES)}, got {type(pipe).__name__} without "
                f"{', '.join(lacking)}; for other pipelines call from_prompts with the tokenizers of the text axis"
            )
        options = axis.options(pipe, axis.default_length if max_sequence_length is None else max_sequence_length)
        found = cls.from_prompts(prompts, units, **options, normalize=normalize)
        if not axis.pads_to_longest:
            return found
        (before, after), most = options["template"], found.weights.shape[1] + options["dropped"]
        texts = [before + prompt + after for prompt in prompts]
        encoded = options["tokenizers"][0](texts, max_length=most, truncation=True)["input_ids"]
        return replace(found, weights=found.weights[:, : max(map(len, encoded)) - options["dropped"]].contiguous())

    def __len__(self) -> int:
        """The number of prompts, B."""
        return len(self.weights)

    def __getitem__(self, rows: int | slice | Sequence[int] | Tensor) -> TextUnits:
        """The prompts that `rows` picks, as it picks them from a list or a tensor; an int keeps the batch axis."""
        if isinstance(rows, int):
            # Taken from a list, so that a row out of range is the IndexError that ends a loop over the units.
            rows = [range(len(self))[rows]]
        order = torch.arange(len(self))[rows.cpu() if isinstance(rows, Tensor) else rows]
        if order.dim() != 1 or len(order) == 0:
            raise ValueError(f"rows: expected one or more of {len(self)} prompts, got {rows!r}")
        return self._take(order)

    def repeat_interleave(self, repeats: int) -> TextUnits:
        """Each prompt `repeats` times in a row: the units of its samples.

        Raises:
            ValueError: `repeats` is not an int of at least 1.
        """
        if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
            raise ValueError(f"repeats: expected an int of at least 1, got {repeats!r}")
        return self._take(torch.arange(len(self)).repeat_interleave(repeats))

    def to(self, device: torch.device | str | int) -> TextUnits:
        """The same units with their weights on `device`."""
        return TextUnits(self.weights.to(device), self.names, self.missing, self.truncated)

    def _take(self, order: Tensor) -> TextUnits:
        fields = ([list(field[row]) for row in order.tolist()] for field in (self.names, self.missing, self.truncated))
        return TextUnits(self.weights[order.to(self.weights.device)], *fields)


class _TextAxis(NamedTuple):
    """How a pipeline's text axis comes about.

    Attributes:
        parts: attributes of the pipeline that are needed.
        default_length: what ``encode_prompt`` takes for max_sequence_length unless told otherwise.
        segments: from a pipeline and max_sequence_length the tokenizers and lengths of `TextUnits.from_prompts`.
        template: what it writes before and after a prompt, if anything.
        dropped: how many of the first tokens it leaves out.
        pads_to_longest: a batch has as many positions as its longest prompt, of one tokenizer.
    """

    parts: tuple[str, ...]
    default_length: int
    segments: Callable[[Any, int], tuple[tuple[Any, ...], tuple[int, ...]]]
    template: Callable[[Any], tuple[str, str]] = lambda pipe: ("", "")
    dropped: Callable[[Any], int] = lambda pipe: 0
    pads_to_longest: bool = False

    def options(self, pipe: Any, length: int) -> dict[str, Any]:
        """Arguments of `TextUnits.from_prompts`."""
        tokenizers, max_lengths = self.segments(pipe, length)
        sequence = {"template": self.template(pipe), "dropped": self.dropped(pipe)}
        return {"tokenizers": tokenizers, "max_lengths": max_lengths, **sequence}


def chat_template(render: Callable[[str], str]) -> tuple[str, str]:
    """What a chat template writes before and after a prompt, the argument `template` of `TextUnits.from_prompts`.

    Args:
        render: the template, from a prompt to the text that is tokenized.

    Raises:
        ValueError: the text does not have the prompt once, as it is.
    """
    place = "the place of the prompt"
    parts = render(place).split(place)
    if len(parts) != 2:
        raise ValueError(f"template: expected the prompt to stand once in the text, got it {len(parts) - 1} times")
    return parts[0], parts[1]


def _user_turn(tokenizer: Any, *, thinking: bool) -> tuple[str, str]:
    options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    return chat_template(lambda prompt: tokenizer.apply_chat_template([{"role": "user", "content": prompt}], **options))


def _one_tokenizer(pipe: Any, length: int) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    return (pipe.tokenizer,), (length,)


def _stable_diffusion_3(pipe: Any, length: int) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    clip = tuple(tokenizer for tokenizer in (pipe.tokenizer, pipe.tokenizer_2) if tokenizer is not None)
    t5 = None if pipe.text_encoder_3 is None else pipe.tokenizer_3
    return (clip or None, t5), (pipe.tokenizer_max_length, length)


def _stable_diffusion(pipe: Any, length: int) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    clip = [getattr(pipe, part, None) for part in ("tokenizer", "tokenizer_2")]
    present = tuple(tokenizer for tokenizer in clip if tokenizer is not None)
    return (present,), (present[0].model_max_length,)


_TEXT_AXES = {
    "StableDiffusion3Pipeline": _TextAxis(
        ("tokenizer", "tokenizer_2", "tokenizer_3", "text_encoder_3", "tokenizer_max_length"), 256, _stable_diffusion_3
    ),
    "StableDiffusionPipeline": _TextAxis(("tokenizer",), 77, _stable_diffusion),
    "StableDiffusionXLPipeline": _TextAxis(("tokenizer", "tokenizer_2"), 77, _stable_diffusion),
    "FluxPipeline": _TextAxis(("tokenizer_2",), 512, lambda pipe, length: ((pipe.tokenizer_2,), (length,))),
    "Flux2KleinPipeline": _TextAxis(
        ("tokenizer",), 512, _one_tokenizer, lambda pipe: _user_turn(pipe.tokenizer, thinking=False)
    ),
    "QwenImagePipeline": _TextAxis(
        ("tokenizer", "prompt_template_encode", "prompt_template_encode_start_idx"),
        1024,
        _one_tokenizer,
        lambda pipe: chat_template(pipe.prompt_template_encode.format),
        lambda pipe: int(pipe.prompt_template_encode_start_idx),
        pads_to_longest=True,
    ),
    "ZImagePipeline": _TextAxis(
        ("tokenizer",),
        512,
        _one_tokenizer,
        lambda pipe: _user_turn(pipe.tokenizer, thinking=True),
        pads_to_longest=True,
    ),
}


def text_axis_of(pipe: Any, length: int) -> dict[str, Any]:
    """Arguments of `TextUnits.from_prompts` for a pipeline of diffusers that `TextUnits.from_pipeline` knows, where
    every prompt is padded and cut to `length`."""
    name = next(kind.__name__ for kind in type(pipe).__mro__ if kind.__name__ in _TEXT_AXES)
    return _TEXT_AXES[name].options(pipe, length)


def stands_in(prompt: str, unit: str) -> bool:
    """Whether `TextUnits.from_prompts` finds a unit's text in a prompt: as whole words, whatever the letter case."""
    return bool(_fold(unit)[0].strip()) and bool(_occurrences(_fold(prompt), [unit]))


def _check_prompts(prompts: Sequence[str]) -> list[str]:
    if isinstance(prompts, str) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts: expected a sequence of strings, got {type(prompts).__name__}")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise TypeError(f"prompts: expected a sequence of strings, got {type(prompt).__name__} at {i}")
    if not prompts:
        raise ValueError("prompts: expected at least one prompt, got none")
    return list(prompts)


def _check_units(units: Sequence[Sequence[str | Sequence[str]]], num_prompts: int) -> list[list[list[str]]]:
    """Per prompt and unit the list of the unit's pieces."""
    if isinstance(units, str) or not isinstance(units, Sequence):
        raise TypeError(f"units: expected a list of units for each prompt, got {type(units).__name__}")
    if len(units) != num_prompts:
        raise ValueError(f"units: expected a list of units for each of the {num_prompts} prompts, got {len(units)}")
    checked = []
    for row, prompt_units in enumerate(units):
        if isinstance(prompt_units, str) or not isinstance(prompt_units, Sequence):
            raise TypeError(f"units[{row}]: expected the list of units of a prompt, got {prompt_units!r}")
        unit_pieces = []
        for column, unit in enumerate(prompt_units):
            pieces = [unit] if isinstance(unit, str) else unit
            if not isinstance(pieces, Sequence) or not all(isinstance(piece, str) for piece in pieces):
                raise TypeError(f"units[{row}][{column}]: expected a string or a list of strings, got {unit!r}")
            if not pieces or not all(_fold(piece)[0].strip() for piece in pieces):
                raise ValueError(f"units[{row}][{column}]: expected text to look for, got {unit!r}")
            unit_pieces.append(list(pieces))
        checked.append(unit_pieces)
    return checked


def _check_template(template: tuple[str, str]) -> tuple[str, str]:
    if not isinstance(template, (tuple, list)) or len(template) != 2 or not all(isinstance(t, str) for t in template):
        raise TypeError(f"template: expected two strings, those before and after a prompt, got {template!r}")
    return template[0], template[1]


def _segments(tokenizers: Any, max_lengths: Sequence[int] | None) -> list[tuple[list[Any], int]]:
    """The stretches of the text axis in order: the tokenizers that share one, and its length."""
    entries = list(tokenizers) if isinstance(tokenizers, (list, tuple)) else [tokenizers]
    if not entries:
        raise ValueError("tokenizers: expected at least one tokenizer, got none")
    groups: list[list[Any]] = []
    group_of_entry: list[int] = []
    for i, entry in enumerate(entries):
        members = [t for t in (entry if isinstance(entry, (list, tuple)) else [entry]) if t is not None]
        for tokenizer in members:
            _check_tokenizer(f"tokenizers[{i}]", tokenizer)
        if i > 0 and _same_vocabulary(entries[i - 1], entry):
            groups[-1] += members
        else:
            groups.append(members)
        group_of_entry.append(len(groups) - 1)
    if max_lengths is None:
        lengths = [min([DEFAULT_MAX_LENGTH, *(t.model_max_length for t in members)]) for members in groups]
    else:
        lengths = _check_lengths(max_lengths, group_of_entry)
    return list(zip(groups, lengths, strict=True))


def _check_tokenizer(name: str, tokenizer: Any) -> None:
    if not callable(tokenizer) or not hasattr(tokenizer, "is_fast"):
        raise TypeError(f"{name}: expected a fast tokenizer of transformers or None, got {type(tokenizer).__name__}")
    if not tokenizer.is_fast:
        kind = type(tokenizer).__name__
        raise TypeError(
            f"{name}: expected a fast tokenizer, whose tokens know their characters, got the slow {kind}; load "
            f"{kind}Fast from the same files, or use transformers 5, whose tokenizers for CLIP and T5 are fast"
        )


def _same_vocabulary(left: Any, right: Any) -> bool:
    if left is None or right is None or isinstance(left, (list, tuple)) or isinstance(right, (list, tuple)):
        return False
    # The sizes first, because get_vocab copies tens of thousands of strings.
    return left is right or (len(left) == len(right) and left.get_vocab() == right.get_vocab())


def _check_lengths(max_lengths: Sequence[int], group_of_entry: list[int]) -> list[int]:
    """One length per group, given either so or per tokenizer."""
    num_entries, num_groups = len(group_of_entry), group_of_entry[-1] + 1
    if isinstance(max_lengths, str) or not isinstance(max_lengths, Sequence):
        raise TypeError(f"max_lengths: expected a sequence of ints, got {type(max_lengths).__name__}")
    for length in max_lengths:
        if isinstance(length, bool) or not isinstance(length, int):
            raise TypeError(f"max_lengths: expected ints, got {length!r}")
        if length < 1:
            raise ValueError(f"max_lengths: expected lengths of at least 1, got {list(max_lengths)}")
    if len(max_lengths) == num_groups:
        return list(max_lengths)
    if len(max_lengths) != num_entries:
        raise ValueError(
            f"max_lengths: expected one length for each of {num_entries} tokenizers (or of their {num_groups} groups "
            f"that share positions), got {list(max_lengths)}"
        )
    by_group: list[set[int]] = [set() for _ in range(num_groups)]
    for group, length in zip(group_of_entry, max_lengths, strict=True):
        by_group[group].add(length)
    if any(len(lengths) > 1 for lengths in by_group):
        raise ValueError(
            f"max_lengths: expected the same length for tokenizers that share positions, got {list(max_lengths)}"
        )
    return [lengths.pop() for lengths in by_group]


def _token_spans(tokenizer: Any, prompts: list[str], length: int) -> Iterable[list[tuple[int, Span]]]:
    """Per prompt the tokens that stand for text: their position, and their characters less white space around them."""
    encoded = tokenizer(
        prompts,
        padding="max_length",
        max_length=length,
        truncation=True,
        return_offsets_mapping=True,
    )
    for text, offsets in zip(prompts, encoded["offset_mapping"], strict=True):
        if len(offsets) != length:
            raise ValueError(
                f"max_lengths: expected room for the tokens that {type(tokenizer).__name__} adds, got {length}, which "
                f"it makes {len(offsets)}"
            )
        spans = []
        for position, (begin, end) in enumerate(offsets):
            # No characters: the tokenizer added this token.
            if (content := text[begin:end]).strip():
                begin += len(content) - len(content.lstrip())
                spans.append((position, (begin, begin + len(content.strip()))))
        yield spans


def _overlaps(span: Span, others: list[Span]) -> bool:
    return any(span[0] < end and begin < span[1] for begin, end in others)


def _occurrences(text: tuple[str, list[Span]], pieces: list[str]) -> list[Span]:
    """Where the pieces stand in the folded text as whole words, in characters of the text before folding."""
    folded, origins = text
    found = []
    for piece in pieces:
        wanted = _fold(piece)[0].strip()
        begin = folded.find(wanted)
        while begin != -1:
            end = begin + len(wanted)
            if not _word_goes_on(folded, begin) and not _word_goes_on(folded, end):
                found.append((origins[begin][0], origins[end - 1][1]))
            begin = folded.find(wanted, begin + 1)
    return found


def _word_goes_on(text: str, boundary: int) -> bool:
    """Whether the characters on both sides of a boundary belong to one word."""
    if not 0 < boundary < len(text):
        return False
    sides = text[boundary - 1], text[boundary]
    return all(side.isalnum() or _is_mark(side) for side in sides) and not any(map(is_unspaced, sides))


def _is_mark(character: str) -> bool:
    return unicodedata.category(character).startswith("M")


def is_unspaced(character: str) -> bool:
    """Whether a character belongs to a script that sets no spaces between words."""
    block = bisect_right(_UNSPACED_SCRIPTS, (ord(character), 0x110000)) - 1
    return block >= 0 and ord(character) <= _UNSPACED_SCRIPTS[block][1]


def _fold(text: str) -> tuple[str, list[Span]]:
    """The form in which text is compared, and for each of its characters where in `text` it comes from.

    A letter is folded together with the marks behind it, so that both of its Unicode forms become the same; characters
    that print nothing (joiners, variation selectors) are left out; white space becomes one space.
    """
    if text.isascii() and not _WHITE_SPACE.search(text):
        # As below, in a fraction of the time.
        return text.lower(), [(place, place + 1) for place in range(len(text))]
    folded: list[str] = []
    origins: list[Span] = []
    begin = 0
    while begin < len(text):
        end = begin + 1
        if text[begin].isspace():
            while end < len(text) and text[end].isspace():
                end += 1
            canonical = " "
        else:
            while end < len(text) and _extends(text[end]):
                end += 1
            printed = "".join(c for c in text[begin:end] if unicodedata.category(c) != "Cf" and not _is_selector(c))
            canonical = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", printed).casefold())
        folded.append(canonical)
        origins += [(begin, end)] * len(canonical)
        begin = end
    return "".join(folded), origins


def _extends(character: str) -> bool:
    """Whether a character is written onto the one before it: a mark, a half-width mark, or a Hangul vowel or final."""
    if character < "\u0300":
        return False
    return _is_mark(unicodedata.normalize("NFKD", character)[0]) or "\u1160" <= character <= "\u11ff"


def _is_selector(character: str) -> bool:
    return "\ufe00" <= character <= "\ufe0f"
