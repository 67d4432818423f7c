"""What texts a prompt asks for, and how the text reader spells them."""

from __future__ import annotations

import reprlib
import unicodedata
from functools import cache
from pathlib import Path

from star_trainer.config import ConfigError
from star_trainer.prompts.quotes import quoted_texts
from star_trainer.rewards.errors import RewardError

_SAME = str.maketrans(
    {
        **dict.fromkeys("‘’‚‛′`´ʼˈˊˋ", "'"),
        **dict.fromkeys("“”„‟″〝〞", '"'),
        **dict.fromkeys("‐‑‒–—―−", "-"),
        **{"\u2044": "/", "×": "x", "°": "o", "ı": "i", "ɡ": "g"},
        **{"æ": "ae", "ø": "o", "đ": "d", "ð": "d", "ħ": "h"},
    }
)
# Letters that the reader takes for another one where it does not meet their usual spelling.
_USUAL = str.maketrans({"ß": "ss", "œ": "oe", "ł": "l", "þ": "th"})
_TAKEN_FOR = str.maketrans({"ß": "b", "œ": "e", "ł": "t", "þ": "p"})


def spellings(text: str) -> tuple[str, str]:
    """What is compared of a text: as it is usually spelt without its special letters, and as the reader takes it.

    Letter case, white space, accents, the kinds of quotation marks and dashes, and signs outside ASCII do not count.
    """
    plain = "".join(c for c in unicodedata.normalize("NFKD", text.translate(_SAME)) if not unicodedata.combining(c))
    plain = plain.lower().translate(_SAME)
    kept = "".join(c for c in plain if (c.isascii() or c.isalnum()) and not c.isspace())
    return kept.translate(_USUAL), kept.translate(_TAKEN_FOR)


def wanted(prompt: str) -> list[str]:
    """The texts that a prompt quotes.

    Raises:
        RewardError: there are none, or they have letters that the reader has not learnt: it knows Latin ones, digits
            and most Chinese characters.
        ConfigError: there are Chinese characters, and the reader is not installed.
    """
    texts = [prompt[begin:end] for begin, end in quoted_texts(prompt)]
    if not texts:
        raise RewardError(f"expected a prompt with a quoted text to render, got {reprlib.repr(prompt)}")
    for text in texts:
        if unknown := "".join(dict.fromkeys(c for c in text if not all(map(_is_known, spellings(c)[0])))):
            raise RewardError(f"expected a text that the reader knows the letters of, got {text!r} with {unknown!r}")
    return texts


def _is_known(character: str) -> bool:
    return character.isascii() or (_is_han(character) and character in _alphabet())


def _is_han(character: str) -> bool:
    return unicodedata.name(character, "").startswith("CJK UNIFIED")


@cache
def _alphabet() -> frozenset[str]:
    """What the models that come with RapidOCR can answer with."""
    try:
        import rapidocr_onnxruntime
        from onnxruntime import InferenceSession
    except ImportError as error:
        raise ConfigError(f"reward.terms: ocr needs the extra: pip install 'star-kernels[ocr]' ({error})") from error
    characters: set[str] = set()
    for path in Path(rapidocr_onnxruntime.__file__).parent.glob("models/*_rec_*.onnx"):
        session = InferenceSession(str(path), providers=["CPUExecutionProvider"])
        characters.update(session.get_modelmeta().custom_metadata_map["character"])
    return frozenset(characters)
