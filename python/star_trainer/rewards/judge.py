"""A judge that sees: a vision-language model behind an OpenAI-compatible endpoint, asked for a number per image."""

from __future__ import annotations

import base64
import hashlib
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from star_trainer.config import ConfigError, Judge
from star_trainer.prompts import Prompt
from star_trainer.prompts.units.cache import CacheError, UnitCache
from star_trainer.prompts.units.chat import ChatError, EndpointChat, without_thought
from star_trainer.rewards.errors import RewardError

PLACE_OF_PROMPT = "{prompt}"
_FORM = (
    "Say in a few sentences what you see. Then end with one line of the form\nScore: N\n"
    "where N is a number from {low} to {high}."
)
_GIVEN = "A text-to-image model was given this prompt:\n{prompt}\n\n"
TEMPLATES = {
    "alignment": _GIVEN + "How well does the image show what the prompt asks for? Check every object, its number, its "
    "colour and material, what it does, and where it stands. {high} is for an image in which nothing is missing or "
    "wrong, {low} for one that shows nothing of it.\n\n" + _FORM,
    "text": _GIVEN
    + "How well is the text written that the prompt asks for? Read the image letter by letter. {high} is "
    "for exactly that text, legible and once, {low} for none of it; a missing, wrong or extra letter costs in "
    "proportion.\n\n" + _FORM,
}
# The last line: a number, after no more than the word score, out of no more than the highest.
_MARKS = r"[\s*_\"']*"
_ANSWER = re.compile(
    rf"{_MARKS}(?:(?:final |overall )?score{_MARKS}[:=]?{_MARKS})?"
    rf"(-?\d+(?:\.\d+)?)(?:\s*/\s*(\d+(?:\.\d+)?))?\.?{_MARKS}",
    re.IGNORECASE,
)


class VlmJudge:
    """The number that a vision-language model gives an image for its prompt, scaled to [0, 1].

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64. Images are sent as PNG in data URLs,
    several requests at a time. An answer without a usable number is asked for again; after that the judge has failed.

    Raises:
        ConfigError: no endpoint or model, or a template that cannot be used.
        RewardError: when called: the endpoint stays dead, or gives no usable number for an image.
    """

    def __init__(self, config: Judge) -> None:
        if config.endpoint is None or config.model is None:
            lacking = "endpoint" if config.endpoint is None else "model"
            raise ConfigError(f"reward.judge.{lacking}: expected one where reward.terms has vlm_judge")
        self.config = config
        self.template = _template(config)
        self.chat = EndpointChat(
            config.endpoint,
            config.model,
            key_variable=config.key_variable,
            timeout=config.timeout,
            max_new_tokens=config.max_new_tokens,
            token_limit=config.token_limit,
            temperature=config.temperature,
            setting="reward.judge",
        )
        self.cache = UnitCache(Path(config.cache).expanduser(), "reward.judge.cache") if config.cache else None

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        keys = [self._key(image, prompt.text) for image, prompt in zip(images, prompts, strict=True)]
        try:
            known = self.cache.get(keys) if self.cache else {}
            # An image that comes twice is asked about once.
            missing = {key: place for place, key in reversed(list(enumerate(keys))) if key not in known}
            with ThreadPoolExecutor(self.config.at_once) as pool:
                asked = {key: pool.submit(self._ask, images[at], prompts[at].text) for key, at in missing.items()}
                answers = {key: future.result() for key, future in asked.items()}
            if self.cache:
                self.cache.put({key: (prompts[missing[key]].text, [str(found)]) for key, found in answers.items()})
        except (CacheError, ChatError) as error:
            raise RewardError(f"reward vlm_judge: {error}") from error
        answers |= {key: float(found[0]) for key, found in known.items()}
        low, high = self.config.range
        return np.array([(answers[key] - low) / (high - low) for key in keys])

    def _key(self, image: np.ndarray, prompt: str) -> str:
        """What decides an answer."""
        said = [self.config.endpoint, self.config.model, self.template, self.config.range, image.shape, prompt]
        return hashlib.sha256(repr(said).encode() + image.tobytes()).hexdigest()

    def _ask(self, image: np.ndarray, prompt: str) -> float:
        low, high = self.config.range
        # The prompt comes last: it may itself hold braces.
        text = self.template.replace("{low}", f"{low:g}").replace("{high}", f"{high:g}")
        text = text.replace(PLACE_OF_PROMPT, prompt)
        opening = {
            "role": "user",
            "content": [_part(image), {"type": "text", "text": text}],
        }
        messages, answer = [opening], ""
        for _ in range(self.config.retries + 1):
            answer = without_thought(self.chat(messages))
            if (number := parse(answer, low, high)) is not None:
                return number
            complaint = f"The last line has to be 'Score: N', N being a number from {low:g} to {high:g}. Answer again."
            messages = [opening, {"role": "assistant", "content": answer}, {"role": "user", "content": complaint}]
        raise RewardError(
            f"reward vlm_judge: {self.config.model} gives no number from {low:g} to {high:g} for {prompt[:80]!r}, "
            f"asked {self.config.retries + 1} times; its last answer: {answer[-200:]!r}"
        )


def parse(answer: str, low: float, high: float) -> float | None:
    """The number in the last line of an answer, or None where that is anything but one number in [low, high]."""
    lines = [line for line in answer.splitlines() if line.strip()]
    found = _ANSWER.fullmatch(lines[-1]) if lines else None
    if found is None or (found[2] is not None and float(found[2]) != high):
        return None
    number = float(found[1])
    return number if low <= number <= high else None


def _part(image: np.ndarray) -> dict[str, object]:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def _template(config: Judge) -> str:
    """One of `TEMPLATES`, or a file's text.

    Raises:
        ConfigError: no such file, or one without the prompt's place.
    """
    if config.template in TEMPLATES:
        return TEMPLATES[config.template]
    path = Path(config.template)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        names = ", ".join(TEMPLATES)
        raise ConfigError(f"reward.judge.template: expected {names} or a file, got {path}: {error}") from error
    if PLACE_OF_PROMPT not in text:
        raise ConfigError(f"reward.judge.template: {path}: expected the place of the prompt, {PLACE_OF_PROMPT}")
    return text
