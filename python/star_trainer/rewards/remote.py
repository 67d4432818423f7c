"""A reward that another machine computes: the client of `star_trainer.rewards.server`, over HTTP with JSON.

POST ``{url}/score`` takes ``{"format": "png" | "raw", "shape": [H, W, 3], "images": [base64, ...], "prompts":
[{"prompt": str, "metadata": {...}}, ...]}``; raw images are H*W*3 bytes, row by row. The answer is
``{"scores": [number, ...]}``, one per image.
"""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import random
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from PIL import Image

from star_trainer.config import ConfigError, RemoteReward
from star_trainer.prompts import Prompt
from star_trainer.rewards.errors import RewardError

_LONGEST_PAUSE = 30.0
_REST = 60.0  # seconds


class RemoteRewardClient:
    """Sends images and prompts to a reward server and checks what comes back.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64. Several servers share the images of a
    call and take turns. Where one does not answer, or is busy, the next one is asked, and after all of them the first
    again, with growing pauses; one that did not answer comes last for a minute.

    Raises:
        ConfigError: no address.
        RewardError: when called: the server stays dead, refuses the request, or does not answer with one finite number
            per image.
    """

    def __init__(self, config: RemoteReward) -> None:
        if not config.url:
            raise ConfigError("reward.remote.url: expected the reward server's address where reward.terms has remote")
        self.config = config
        self.urls = [f"{url.rstrip('/')}/score" for url in config.url]
        # Not all processes begin with the same server.
        self._turns = itertools.count(int(os.environ.get("RANK", 0)))
        self._resting: dict[str, float] = {}
        token = os.environ.get(config.token_variable)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        size = max(1, min(self.config.batch_size, -(-len(prompts) // len(self.urls))))
        parts = [slice(first, first + size) for first in range(0, len(prompts), size)]
        with ThreadPoolExecutor(len(self.urls)) as pool:
            scores = pool.map(self._scores, [images[rows] for rows in parts], [prompts[rows] for rows in parts])
            return np.array([score for part in scores for score in part])

    def _scores(self, images: np.ndarray, prompts: Sequence[Prompt]) -> list[float]:
        url, answer = self._post(self._body(images, prompts))
        return _checked(url, answer, len(prompts))

    def _body(self, images: np.ndarray, prompts: Sequence[Prompt]) -> bytes:
        encode = _png if self.config.format == "png" else np.ndarray.tobytes
        body = {
            "format": self.config.format,
            "shape": list(images.shape[1:]),
            "images": [base64.b64encode(encode(image)).decode() for image in images],
            "prompts": [{"prompt": prompt.text, "metadata": prompt.metadata} for prompt in prompts],
        }
        return json.dumps(body).encode()

    def _post(self, body: bytes) -> tuple[str, str]:
        """The server that answered, and the text of its answer."""
        import requests

        failure = ""
        headers = {**self.headers, "Content-Type": "application/json"}
        for attempt in range(self.config.retries + 1):
            if attempt:
                # Not all processes of a run at the same moment.
                time.sleep(min(2.0**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0))
            for url in self._in_turn():
                try:
                    reply = requests.post(url, data=body, headers=headers, timeout=self.config.timeout)
                except requests.RequestException as error:
                    failure = str(error)
                else:
                    if reply.status_code == 200:
                        self._resting.pop(url, None)
                        return url, reply.text
                    failure = f"status {reply.status_code}: {reply.text[:200]}"
                    if reply.status_code != 429 and reply.status_code < 500:
                        raise RewardError(f"reward remote: {url} did not answer ({failure})")
                self._resting[url] = time.monotonic() + _REST
        raise RewardError(f"reward remote: {', '.join(self.urls)} did not answer ({failure})")

    def _in_turn(self) -> list[str]:
        """All servers, each time beginning with another one, and those last that did not answer a moment ago."""
        first, now = next(self._turns) % len(self.urls), time.monotonic()
        return sorted(self.urls[first:] + self.urls[:first], key=lambda url: self._resting.get(url, now) > now)


def _checked(url: str, answer: str, count: int) -> list[float]:
    try:
        scores: Any = json.loads(answer)["scores"]
    except (json.JSONDecodeError, LookupError, TypeError, RecursionError) as error:
        raise RewardError(f"reward remote: {url} answers no scores: {answer[:200]}") from error
    if not isinstance(scores, list) or len(scores) != count:
        size = len(scores) if isinstance(scores, list) else type(scores).__name__
        raise RewardError(f"reward remote: expected {count} scores from {url}, got {size}")
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
        raise RewardError(f"reward remote: expected finite numbers from {url}, got {answer[:200]}")
    return [float(score) for score in scores]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
