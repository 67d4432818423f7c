"""A reward that another machine computes: the client of `star_trainer.rewards.server`, over HTTP with JSON.

POST ``{url}/score`` takes ``{"format": "png" | "raw", "shape": [H, W, 3], "images": [base64, ...], "prompts":
[{"prompt": str, "metadata": {...}}, ...]}``; raw images are H*W*3 bytes, row by row. The answer is
``{"scores": [number, ...]}``, one per image.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import random
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from star_trainer.config import ConfigError, RemoteReward
from star_trainer.prompts import Prompt
from star_trainer.rewards.errors import RewardError

_LONGEST_PAUSE = 30.0


class RemoteRewardClient:
    """Sends images and prompts to a reward server and checks what comes back.

    Called with images [B, H, W, 3] uint8 and their prompts; returns [B] float64. A server that does not answer, or is
    busy, is asked again with growing pauses.

    Raises:
        ConfigError: no address.
        RewardError: when called: the server stays dead, refuses the request, or does not answer with one finite number
            per image.
    """

    def __init__(self, config: RemoteReward) -> None:
        if config.url is None:
            raise ConfigError("reward.remote.url: expected the reward server's address where reward.terms has remote")
        self.config = config
        self.url = f"{config.url.rstrip('/')}/score"
        token = os.environ.get(config.token_variable)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(self, images: np.ndarray, prompts: Sequence[Prompt]) -> np.ndarray:
        scores: list[float] = []
        for first in range(0, len(prompts), self.config.batch_size):
            rows = slice(first, first + self.config.batch_size)
            scores += self._checked(self._post(self._body(images[rows], prompts[rows])), len(prompts[rows]))
        return np.array(scores)

    def _body(self, images: np.ndarray, prompts: Sequence[Prompt]) -> bytes:
        encode = _png if self.config.format == "png" else np.ndarray.tobytes
        body = {
            "format": self.config.format,
            "shape": list(images.shape[1:]),
            "images": [base64.b64encode(encode(image)).decode() for image in images],
            "prompts": [{"prompt": prompt.text, "metadata": prompt.metadata} for prompt in prompts],
        }
        return json.dumps(body).encode()

    def _post(self, body: bytes) -> str:
        """The text of the server's answer."""
        import requests

        failure = ""
        headers = {**self.headers, "Content-Type": "application/json"}
        for attempt in range(self.config.retries + 1):
            if attempt:
                # Not all processes of a run at the same moment.
                time.sleep(min(2.0**attempt, _LONGEST_PAUSE) * random.uniform(0.5, 1.0))
            try:
                reply = requests.post(self.url, data=body, headers=headers, timeout=self.config.timeout)
            except requests.RequestException as error:
                failure = str(error)
                continue
            if reply.status_code == 200:
                return reply.text
            failure = f"status {reply.status_code}: {reply.text[:200]}"
            if reply.status_code != 429 and reply.status_code < 500:
                break
        raise RewardError(f"reward remote: {self.url} did not answer ({failure})")

    def _checked(self, answer: str, count: int) -> list[float]:
        try:
            scores: Any = json.loads(answer)["scores"]
        except (json.JSONDecodeError, LookupError, TypeError, RecursionError) as error:
            raise RewardError(f"reward remote: {self.url} answers no scores: {answer[:200]}") from error
        if not isinstance(scores, list) or len(scores) != count:
            size = len(scores) if isinstance(scores, list) else type(scores).__name__
            raise RewardError(f"reward remote: expected {count} scores from {self.url}, got {size}")
        if not all(isinstance(s, (int, float)) and not isinstance(s, bool) and math.isfinite(s) for s in scores):
            raise RewardError(f"reward remote: expected finite numbers from {self.url}, got {answer[:200]}")
        return [float(score) for score in scores]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
