"""Text in quotation marks, told from the inches, feet, decades and apostrophes that are written with the same marks."""

from __future__ import annotations

import re
import unicodedata
from typing import NamedTuple

from star_kernels.text_units import is_unspaced

_DOUBLE, _SINGLE = '"“”„‟＂', "'‘’‚‛`´＇"
# Marks that always may open, with those that close them; where these are missing, any mark of their kind does.
_PARTNERS = {"“": "”", "„": "“”", "‟": "”", "‘": "’", "‚": "‘’", "‛": "’"}
_BRACKETS = {"«": "»", "»": "«»", "‹": "›", "›": "‹›", "「": "」", "『": "』", "｢": "｣", "﹁": "﹂", "〝": "〞〟"}
CLOSING_MARKS = f"{_DOUBLE}{_SINGLE}{''.join(_BRACKETS.values())}"
# Rock 'n' roll, but not the letter 'n' on a block.
_AND = re.compile(rf"(?<=\w )(?<!letter )(?<!word )(?<!says )[{_SINGLE}]n[{_SINGLE}](?= \w)", re.IGNORECASE)
# Words that have lost their start ('80s, 'til) or their end (the dogs', goin', ol').
_LOST_START = re.compile(r"(?:\d\ds?|tis|twas|til|em|cause)\b", re.IGNORECASE)
_LOST_END = re.compile(r"(?:s|in|ol|o)$", re.IGNORECASE)


class _Mark(NamedTuple):
    """A quotation mark, and whether it may open or close a quotation where it stands."""

    place: int
    character: str
    opens: bool
    closes: bool


def quoted_texts(prompt: str) -> list[tuple[int, int]]:
    """Where text stands in quotation marks of any language, without the marks and white space inside them.

    Of quotations inside each other the outer one counts. What holds no letter or digit is no text.
    """
    marks = _marks(prompt)
    spans = []
    after = 0
    for index, mark in enumerate(marks):
        end = _end(prompt, marks, index) if mark.opens and mark.place >= after else None
        if end is None or not (content := prompt[mark.place + 1 : end]).strip():
            continue
        begin = mark.place + 1 + len(content) - len(content.lstrip())
        if any(character.isalnum() for character in content):
            spans.append((begin, begin + len(content.strip())))
        after = end + 1
    return spans


def _marks(prompt: str) -> list[_Mark]:
    left_out = {place for match in _AND.finditer(prompt) for place in (match.start(), match.end() - 1)}
    marks = []
    for place, character in enumerate(prompt):
        if character in _BRACKETS:
            marks.append(_Mark(place, character, True, False))
        elif character in _DOUBLE + _SINGLE and place not in left_out:
            before, behind = prompt[max(place - 1, 0) : place], prompt[place + 1 : place + 2]
            if character in _SINGLE and _is_letter(before) and _is_letter(behind):
                continue
            starts, ends = not before.strip("([{").strip(), not behind.strip(")]}.,;:!?").strip()
            # Between two letters, or two spaces, it may be either.
            opens = starts or not ends or character in _PARTNERS
            # Behind a number it stands for inches, or closes.
            if character in _DOUBLE and character not in _PARTNERS and _is_number(before):
                opens = False
            marks.append(_Mark(place, character, opens, ends or not starts))
    return marks


def _is_letter(character: str) -> bool:
    return character.isalnum() and not is_unspaced(character)


def _is_number(character: str) -> bool:
    return character != "" and unicodedata.category(character) in ("Nd", "No")


def _end(prompt: str, marks: list[_Mark], first: int) -> int | None:
    """Where the quotation ends that `marks[first]` opens, if it does."""
    place, character = marks[first].place, marks[first].character
    if character in _BRACKETS:
        ends = [prompt.find(closing, place + 1) for closing in _BRACKETS[character]]
        return min((end for end in ends if end != -1), default=None)
    end = None
    if character in _PARTNERS:
        end = _closing(prompt, marks, first, _PARTNERS[character])
    return end if end is not None else _closing(prompt, marks, first, _DOUBLE if character in _DOUBLE else _SINGLE)


def _closing(prompt: str, marks: list[_Mark], first: int, closing: str) -> int | None:
    """The place of the first mark of `closing` that closes `marks[first]`, before another quotation opens."""
    opening = marks[first]
    kind = _DOUBLE if opening.character in _DOUBLE else _SINGLE
    doubtful = None
    for index in range(first + 1, len(marks)):
        place, character, opens, closes = marks[index]
        if kind is _SINGLE and "\n" in prompt[marks[index - 1].place : place]:
            break
        if character == opening.character and character in _PARTNERS:
            break
        if character not in closing:
            continue
        if not closes:
            if character in _PARTNERS or opening.character not in _PARTNERS:
                break
            continue
        if kind is _DOUBLE and _is_number(prompt[place - 1]) and _goes_on(prompt, marks, index):
            continue
        if kind is _DOUBLE:
            return place
        if not (_LOST_END.search(prompt, max(place - 2, 0), place) and re.match(r" \w", prompt[place + 1 : place + 3])):
            if doubtful is None or not _is_number(prompt[place - 1]):
                return place
        elif doubtful is None:
            doubtful = place
    return None if _LOST_START.match(prompt, opening.place + 1) else doubtful


def _goes_on(prompt: str, marks: list[_Mark], index: int) -> bool:
    """Whether `marks[index]`, behind a number, stands for inches inside a quotation: another mark can only close it."""
    for place, character, opens, closes in marks[index + 1 :]:
        if character in _DOUBLE:
            return closes and not opens and not _is_number(prompt[place - 1])
    return False
