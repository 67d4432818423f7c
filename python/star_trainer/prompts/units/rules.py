"""Text units by rule: GenEval's requirements, quoted text with what carries it, noun phrases for any other prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from star_kernels.text_units import stands_in
from star_trainer.prompts.prompt import required
from star_trainer.prompts.quotes import CLOSING_MARKS, quoted_texts

_WORD = re.compile(r"\w+(?:[-'’.&]\w+)*|[^\w\s]")
_NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What a picture is, not what it shows.
_MEDIUM = _words(
    "photo photograph picture image illustration drawing painting sketch rendering render depiction close-up closeup "
    "shot view portrait"
)
_PLACE = _words("front top back side middle center centre left right bottom style")
# What is rendered, not what it is rendered on.
_WRITING = _words(
    "text word words phrase phrases letter letters lettering message slogan saying motto caption inscription name title"
)
_SAYS = _words(
    "reading reads saying says stating states declaring declares announcing announces proclaiming proclaims displaying "
    "displays advertising warning warns showing shows spelling spells featuring features titled labeled labelled marked"
)
_LONGEST = 24  # words of a phrase; what is longer is no phrase
_OPENS = ("DT", "PRP$", "PDT", "WP$")
_MODIFIES = ("CD", "JJ", "JJR", "JJS", "VBG", "VBN")
_NAMES = ("NN", "NNS", "NNP", "NNPS", "NNP-PERS", "NNP-LOC", "NNP-ORG", "POS", "FW")
_VERB_OR_NOUN = ("VB", "VBP", "VBZ")


class Phrase(NamedTuple):
    """A noun phrase without its article: where it stands in the prompt, and its last noun."""

    begin: int
    end: int
    head: str


def units_by_rule(prompt: str, metadata: Mapping[str, Any] | None = None) -> list[str]:
    """The text units of a prompt, as they stand in it.

    With GenEval's ``include`` in `metadata` (anything else under that name counts as absent): every required object
    with its count and colour, and every required relation with both of its objects. In a prompt with quoted text: every
    quoted text, and the noun phrase that carries it. Else: every noun phrase. A prompt without any is one unit; one
    without a visible character has none.
    """
    units = geneval_units(prompt, _requirements(metadata or {}))
    units = units or rendered_text_units(prompt) or [_text(prompt, phrase) for phrase in noun_phrases(prompt)]
    units = [unit for unit in dict.fromkeys(units) if stands_in(prompt, unit)]
    if units:
        return units
    whole = prompt.strip()
    return [whole] if whole and stands_in(whole, whole) else []


def _requirements(metadata: Mapping[str, Any]) -> list[dict[str, Any]]:
    """GenEval's `include` as far as it is well formed; what stands there may be somebody's own."""
    try:
        include = required(metadata, "include")
    except ValueError:
        return []
    return include if all(isinstance(entry.get("class"), str) for entry in include) else []


def geneval_units(prompt: str, include: Sequence[Mapping[str, Any]]) -> list[str]:
    """The objects that GenEval's `include` requires, each with its count and colour, then the related pairs."""
    spans: list[tuple[int, int] | None] = []
    for requirement in include:
        taken = [span for span in spans if span is not None]
        spans.append(_mention(prompt, requirement, taken))
    units = [prompt[span[0] : span[1]] for span in spans if span is not None]
    for requirement, span in zip(include, spans, strict=True):
        match requirement.get("position"):
            case [str(), int(target)] if 0 <= target < len(spans):
                other = spans[target]
                if span is not None and other is not None:
                    units.append(prompt[min(span[0], other[0]) : max(span[1], other[1])])
    return units


def _mention(prompt: str, requirement: Mapping[str, Any], taken: list[tuple[int, int]]) -> tuple[int, int] | None:
    """Where the prompt speaks of a required object: its class in the singular or plural, with count and colour."""
    from textblob.en.inflect import pluralize

    name = requirement["class"]
    before = [rf"(?:{'|'.join(_NUMBERS)}|\d+)\s+"]
    if isinstance(requirement.get("color"), str):
        before.append(rf"{re.escape(requirement['color'])}\s+")
    pattern = "".join(f"(?:{part})?" for part in before)
    nouns = "|".join(re.escape(form) for form in sorted({name, pluralize(name), f"{name}s"}, key=len, reverse=True))
    for match in re.finditer(rf"(?<!\w){pattern}(?:{nouns})(?!\w)", prompt, re.IGNORECASE):
        if all(match.end() <= begin or end <= match.start() for begin, end in taken):
            return match.span()
    return None


def rendered_text_units(prompt: str) -> list[str]:
    """Quoted texts, each followed by its carrier: the noun phrase around it, or else the last one before it."""
    quotes = quoted_texts(prompt)
    phrases = [phrase for phrase in noun_phrases(_blank(prompt, quotes)) if phrase.head not in _WRITING]
    units = []
    for begin, end in quotes:
        units.append(prompt[begin:end])
        around = [phrase for phrase in phrases if _follows(prompt, end, phrase.begin)]
        before = [phrase for phrase in phrases if phrase.end <= begin]
        after = [phrase for phrase in phrases if phrase.begin >= end]
        units += [_text(prompt, phrase) for phrase in (around[:1] or before[-1:] or after[:1])]
    return units


def _blank(prompt: str, spans: list[tuple[int, int]]) -> str:
    """The prompt with something in place of quoted text that is no noun: a full stop for every character."""
    for begin, end in spans:
        prompt = prompt[:begin] + "." * (end - begin) + prompt[end:]
    return prompt


def _follows(prompt: str, quote_end: int, begin: int) -> bool:
    """Whether a phrase stands directly behind a quoted text, as in: a "closed" sign."""
    between = prompt[quote_end:begin]
    return begin > quote_end and len(between) <= 3 and not between.strip(f"{CLOSING_MARKS} ")


def noun_phrases(prompt: str) -> list[Phrase]:
    """Noun phrases by TextBlob's part-of-speech tags: numbers, adjectives and participles before a run of nouns."""
    words = list(_tagged(prompt))
    phrases = []
    position = 0
    while position < len(words):
        end = _phrase_end(words, position)
        if end is None:
            position += 1
            continue
        first = position
        while first < end - 1 and words[first].tag in _OPENS:
            first += 1
        phrase = Phrase(words[first].begin, words[end - 1].end, words[end - 1].text.lower())
        if not _says_how(words, position, end) and phrase.head not in _SAYS:
            phrases.append(phrase)
        position = end
    return phrases


class _Word(NamedTuple):
    text: str
    begin: int
    end: int
    tag: str


def _tagged(prompt: str) -> Iterator[_Word]:
    # Not at the top: the tagger reads its lexicon, which takes a second.
    from textblob.en import parser

    matches = list(_WORD.finditer(prompt))
    tags = parser.find_tags([match.group() for match in matches]) if matches else []
    for match, (_, tag, *_) in zip(matches, tags, strict=True):
        text = match.group()
        yield _Word(text, *match.span(), tag if any(map(str.isalnum, text)) else ",")


def _phrase_end(words: list[_Word], start: int) -> int | None:
    """One past the last noun of the phrase that starts here, or None where none does."""
    position, last_noun = start, None
    while position < min(len(words), start + _LONGEST):
        word = words[position]
        if word.text.lower() in _SAYS and position > start:
            break
        opened = position > start
        if word.tag in _OPENS:
            if opened and words[position - 1].tag not in _OPENS:
                break
        elif word.tag in _NAMES or (
            word.tag in _VERB_OR_NOUN and opened and _rather_noun(words[position - 1], last_noun)
        ):
            last_noun = position + 1
        elif word.tag in _MODIFIES:
            participle = word.tag in ("VBG", "VBN")
            if last_noun is not None or (participle and not opened and not _modifies_next(words, position)):
                break
        elif not _joins(words, start, position, last_noun):
            break
        position += 1
    opened = words[start].tag in _OPENS and position > start + 1
    # Behind an article stands a noun, whatever the tagger takes it for: "a key".
    return position if last_noun is None and opened and words[position - 1].tag in _MODIFIES else last_noun


def _rather_noun(before: _Word, last_noun: int | None) -> bool:
    """Whether a "verb" is a noun of this phrase: its first one, or behind a singular, as in "a teddy bear"."""
    return last_noun is None or before.tag == "NN"


def _modifies_next(words: list[_Word], position: int) -> bool:
    """Whether a participle belongs to the noun behind it, as in "in shining armour", not to one before it."""
    doing = position > 0 and words[position - 1].tag in _NAMES
    return not doing and position + 1 < len(words) and words[position + 1].tag in ("NN", "NNS")


def _joins(words: list[_Word], start: int, position: int, last_noun: int | None) -> bool:
    """Whether a comma or an "and" stands between two adjectives of one phrase."""
    if last_noun is not None or position == start or position + 1 >= len(words):
        return False
    separates = words[position].text in (",", "and", "&")
    return separates and words[position - 1].tag in ("JJ", "VBN", "VBG") and words[position + 1].tag in _MODIFIES


def _says_how(words: list[_Word], start: int, end: int) -> bool:
    """Whether a phrase says what kind of picture this is, or where in it something stands: neither can be seen."""
    head = words[end - 1].text.lower()
    before_of = end < len(words) and words[end].text.lower() == "of"
    if head in _MEDIUM:
        return before_of or start == 0
    return before_of and head in _PLACE and start > 0 and words[start - 1].tag in ("IN", "TO")


def _text(prompt: str, phrase: Phrase) -> str:
    return prompt[phrase.begin : phrase.end]
