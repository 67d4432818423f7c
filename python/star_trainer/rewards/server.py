"""``star-reward-server``: the rewards of this package for trainers on other machines, over HTTP with JSON.

The request and the answer are described in `star_trainer.rewards.remote`. No pickle is read; images are PNG or raw
bytes, and how large and how many they may be is limited.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import hmac
import io
import json
import math
import os
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from star_trainer.config import ConfigError, Reward, check_section
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, RewardFunction, load_reward


@dataclass(frozen=True)
class Limits:
    """What one request may hold."""

    megabytes: float = 256.0
    images: int = 256
    pixels: int = 2048 * 2048
    decoded_megabytes: float = 512.0


class RequestError(ValueError):
    """A request that is refused; the message says why, and `status` is that of the answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def parse_request(body: bytes, limits: Limits) -> tuple[np.ndarray, list[Prompt]]:
    """Images [B, H, W, 3] uint8 and their prompts.

    Raises:
        RequestError: the body is not what it should be, or more than the limits allow.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"not JSON: {error}") from error
    if not isinstance(request, dict):
        raise RequestError(f"expected an object, got {type(request).__name__}")
    images, prompts, shape = request.get("images"), request.get("prompts"), request.get("shape")
    if not isinstance(images, list) or not isinstance(prompts, list) or len(images) != len(prompts) or not images:
        raise RequestError("images, prompts: expected two lists of the same length, at least 1")
    if len(images) > limits.images:
        raise RequestError(f"images: expected at most {limits.images}, got {len(images)}", 413)
    if (
        not isinstance(shape, list)
        or len(shape) != 3
        or not all(isinstance(size, int) and not isinstance(size, bool) and size >= 1 for size in shape)
        or shape[2] != 3
    ):
        raise RequestError(f"shape: expected [H, W, 3], got {shape!r}")
    if shape[0] * shape[1] > limits.pixels:
        raise RequestError(f"shape: expected at most {limits.pixels} pixels, got {shape}", 413)
    decoders = {"png": _from_png, "raw": _from_raw}
    decode = decoders.get(request.get("format", "png"))
    if decode is None:
        raise RequestError(f"format: expected png or raw, got {request.get('format')!r}")
    # A PNG may unfold to a thousand times its size.
    megabytes = len(images) * math.prod(shape) / 1e6
    if megabytes > limits.decoded_megabytes:
        raise RequestError(
            f"images: expected at most {limits.decoded_megabytes:g} MB of pixels, got {megabytes:.0f}; send fewer at a "
            "time (reward.remote.batch_size)",
            413,
        )
    parsed = [_prompt(prompt, index) for index, prompt in enumerate(prompts)]
    pixels = np.empty((len(images), *shape), dtype=np.uint8)
    for index, image in enumerate(images):
        pixels[index] = _decoded(decode, image, shape, index)
    return pixels, parsed


def _decoded(decode: Callable[[bytes, list[int]], np.ndarray], image: Any, shape: list[int], index: int) -> np.ndarray:
    if not isinstance(image, str):
        raise RequestError(f"images[{index}]: expected base64, got {type(image).__name__}")
    try:
        return decode(base64.b64decode(image, validate=True), shape)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"images[{index}]: {error}") from error


def _from_raw(content: bytes, shape: list[int]) -> np.ndarray:
    if len(content) != np.prod(shape):
        raise ValueError(f"expected {np.prod(shape)} bytes for shape {shape}, got {len(content)}")
    return np.frombuffer(content, dtype=np.uint8).reshape(shape)


def _from_png(content: bytes, shape: list[int]) -> np.ndarray:
    try:
        with warnings.catch_warnings():
            # More pixels than the limit are refused below, from the header alone.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(content), formats=["PNG"])
        if [image.height, image.width] != shape[:2]:
            raise ValueError(f"expected {shape[:2]} pixels as shape says, got {[image.height, image.width]}")
        return np.array(image.convert("RGB"))
    except (Image.DecompressionBombError, OSError, SyntaxError, UnidentifiedImageError) as error:
        raise ValueError(f"not a whole PNG: {error}") from error


def _prompt(value: Any, index: int) -> Prompt:
    metadata = value.get("metadata", {}) if isinstance(value, dict) else None
    if not isinstance(metadata, dict) or not isinstance(value.get("prompt"), str):
        raise RequestError(f"prompts[{index}]: expected an object with a string 'prompt' and an object 'metadata'")
    return Prompt(value["prompt"], metadata)


def create_app(reward: RewardFunction, *, token: str | None = None, limits: Limits | None = None) -> Any:
    """The server as an ASGI application: POST /score and GET /health.

    Args:
        reward: called with one request at a time.
        token: if given, requests have to carry it as ``Authorization: Bearer``.
        limits: of a request.
    """
    from fastapi import FastAPI, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.responses import JSONResponse

    limits = Limits() if limits is None else limits
    busy = threading.Lock()
    app = FastAPI(title="star-reward-server", docs_url=None, redoc_url=None, openapi_url=None)

    def score(body: bytes) -> list[float]:
        # One request's images at a time, for there may be as many requests as threads.
        with busy:
            images, prompts = parse_request(body, limits)
            return np.asarray(reward(images, prompts), dtype=np.float64).tolist()

    async def read(request: Request) -> bytes:
        expected = f"Bearer {token}"
        if token is not None and not hmac.compare_digest(
            request.headers.get("authorization", "").encode(), expected.encode()
        ):
            raise RequestError("the token is missing or wrong", 401)
        most = int(limits.megabytes * 1e6)
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > most:
                raise RequestError(f"expected at most {limits.megabytes:g} MB", 413)
        return bytes(body)

    async def answer(request: Request) -> JSONResponse:
        try:
            return JSONResponse({"scores": await run_in_threadpool(score, await read(request))})
        except RequestError as error:
            return JSONResponse({"error": str(error)}, error.status)
        except RewardError as error:
            return JSONResponse({"error": str(error)}, 422)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ready"})

    app.add_route("/score", answer, methods=["POST"])
    app.add_route("/health", health, methods=["GET"])
    return app


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="star-reward-server",
        description="Serve rewards over HTTP to trainers whose reward.terms has remote.",
        epilog=(
            "example:\n"
            "  STAR_REWARD_TOKEN=... star-reward-server terms.geneval_graded=1.0 --host 0.0.0.0\n"
            "  star-train mine.yaml reward.terms.remote=1.0 reward.remote.url=http://that-machine:8100"
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("settings", nargs="+", metavar="key=value", help="settings of the section reward")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    parser.add_argument("--port", type=int, default=8100)
    parser.add_argument("--token-variable", default="STAR_REWARD_TOKEN", help="environment variable with the token")
    parser.add_argument("--max-megabytes", type=float, default=Limits.megabytes, help="largest request")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns 2 with one line of explanation for settings that cannot be used."""
    options = _parser().parse_args(arguments)
    try:
        section = check_section(Reward, {"terms": {}}, options.settings, "reward")
        reward = load_reward(section)
    except ConfigError as error:
        print(f"star-reward-server: {error}", file=sys.stderr)
        return 2
    token = os.environ.get(options.token_variable)
    if token is None:
        print(
            f"star-reward-server: {options.token_variable} is not set: whoever reaches this port may use it",
            file=sys.stderr,
        )
    import uvicorn

    limits = Limits(megabytes=options.max_megabytes)
    uvicorn.run(
        create_app(reward, token=token, limits=limits), host=options.host, port=options.port, log_level="warning"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
