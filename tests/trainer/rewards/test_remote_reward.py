"""The reward server and its client, over real sockets: what they agree on, what they refuse, and who survives what."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from PIL import Image
from star_trainer.cli import main
from star_trainer.config import ConfigError, Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, load_reward, remote
from star_trainer.rewards.server import Limits, RequestError, create_app, parse_request
from star_trainer.rewards.server import main as serve_main

from tests.trainer.local_server import local_server, send

pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

PROMPTS = [Prompt("a red circle", {"include": []}), Prompt("ein grünes Quadrat", {"number": 2})]
IMAGES = np.random.default_rng(0).integers(0, 256, (2, 6, 5, 3), dtype=np.uint8)


def first_pixel(images: np.ndarray, prompts: Any) -> np.ndarray:
    return images[:, 0, 0, 0].astype(float) + [
        len(prompt.text) + prompt.metadata.get("number", 0) for prompt in prompts
    ]


EXPECTED = first_pixel(IMAGES, PROMPTS).tolist()


@pytest.fixture
def start() -> Iterator[Callable[..., str]]:
    """Run the reference server; gives its address."""
    servers = []

    def run(reward: Any = first_pixel, **options: Any) -> str:
        config = uvicorn.Config(create_app(reward, **options), host="127.0.0.1", port=0, log_level="error")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield run
    for server, thread in servers:
        server.should_exit = True
        thread.join(10)


def client(url: str | list[str], **options: Any) -> Any:
    return load_reward(Reward(terms={"remote": 1.0}, remote={"url": url, **options}))


@pytest.mark.parametrize("form", ["png", "raw"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_the_server_sees_what_the_client_has(start, form: str, batch_size: int) -> None:
    reward = client(start(), format=form, batch_size=batch_size)
    assert reward(IMAGES, PROMPTS).tolist() == EXPECTED


def test_real_rewards_are_served(start) -> None:
    images = np.zeros((2, 64, 64, 3), dtype=np.uint8)
    circle = [{"class": "circle", "count": 1}]
    prompts = [Prompt("x", {"exclude": circle}), Prompt("y", {"include": circle})]
    here = load_reward(Reward(terms={"scene_graded": 0.5}))
    assert client(start(here))(images, prompts).tolist() == here(images, prompts).tolist() == [0.5, 0.0]


def test_a_server_refuses_prompts_that_its_reward_can_tell_nothing_of(start) -> None:
    here = load_reward(Reward(terms={"scene_graded": 1.0}))
    with pytest.raises(RewardError, match="422.*scene_graded.*'x'.*include"):
        client(start(here))(np.zeros((1, 64, 64, 3), dtype=np.uint8), [Prompt("x", {})])


def test_a_token_is_asked_for_and_never_shown(start, monkeypatch: pytest.MonkeyPatch) -> None:
    url = start(token="open sesame")
    with pytest.raises(RewardError, match="401") as refused:
        client(url)(IMAGES, PROMPTS)
    monkeypatch.setenv("STAR_REWARD_TOKEN", "open barley")
    with pytest.raises(RewardError, match="401") as wrong:
        client(url)(IMAGES, PROMPTS)
    assert all("sesame" not in str(e.value) and "barley" not in str(e.value) for e in (refused, wrong))
    monkeypatch.setenv("STAR_REWARD_TOKEN", "open sesame")
    assert client(url)(IMAGES, PROMPTS).tolist() == EXPECTED
    assert requests.get(f"{url}/health", timeout=10).json() == {"status": "ready"}


def test_a_request_that_is_too_large_is_refused_while_it_arrives(start) -> None:
    url = start(limits=Limits(megabytes=0.01))
    images = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    with pytest.raises(RewardError, match="413.*0.01 MB"):
        client(url)(images, PROMPTS)


def test_a_reward_that_cannot_be_had_is_passed_on_with_its_reason(start) -> None:
    def fail(images: Any, prompts: Any) -> Any:
        raise RewardError("reward ocr: no quoted text")

    with pytest.raises(RewardError, match="422.*no quoted text"):
        client(start(fail))(IMAGES, PROMPTS)


def png(size: tuple[int, int] = (5, 6)) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


GOOD = {"format": "png", "shape": [6, 5, 3], "images": [png()], "prompts": [{"prompt": "a", "metadata": {}}]}
RAW = base64.b64encode(bytes(90)).decode()
BAD: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "JSON"),
    "not text": (b"\xff\xfe", "JSON"),
    "pickle": (b"\x80\x04K\x01.", "JSON"),
    "deep nesting": (b"[" * 100_000, "JSON"),
    "a list": ([], "object"),
    "no images": ({**GOOD, "images": [], "prompts": []}, "images, prompts"),
    "more images than prompts": ({**GOOD, "images": [png()] * 2}, "images, prompts"),
    "images no list": ({**GOOD, "images": "x"}, "images, prompts"),
    "too many images": ({**GOOD, "images": [png()] * 9, "prompts": GOOD["prompts"] * 9}, "at most 8"),
    "no shape": ({k: v for k, v in GOOD.items() if k != "shape"}, "shape"),
    "grey shape": ({**GOOD, "shape": [6, 5, 1]}, "shape"),
    "shape of strings": ({**GOOD, "shape": ["6", "5", "3"]}, "shape"),
    "negative shape": ({**GOOD, "shape": [-6, -5, 3]}, "shape"),
    "too many pixels": ({**GOOD, "shape": [100_000, 100_000, 3]}, "pixels"),
    "another format": ({**GOOD, "format": "pickle"}, "format"),
    "no base64": ({**GOOD, "images": ["@@@"]}, r"images\[0\]"),
    "a number as image": ({**GOOD, "images": [3]}, r"images\[0\]"),
    "no PNG": ({**GOOD, "images": [RAW]}, r"images\[0\].*PNG"),
    "half a PNG": ({**GOOD, "images": [base64.b64encode(base64.b64decode(png())[:40]).decode()]}, r"images\[0\].*PNG"),
    "a PNG of another size": ({**GOOD, "images": [png((50, 60))]}, r"images\[0\].*shape"),
    "too few raw bytes": ({**GOOD, "format": "raw", "images": [base64.b64encode(b"x").decode()]}, "90 bytes"),
    "a prompt without text": ({**GOOD, "prompts": [{"metadata": {}}]}, r"prompts\[0\]"),
    "metadata no object": ({**GOOD, "prompts": [{"prompt": "a", "metadata": []}]}, r"prompts\[0\]"),
    "prompt no object": ({**GOOD, "prompts": ["a"]}, r"prompts\[0\]"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_request_is_refused_with_its_reason(kind: str) -> None:
    request, message = BAD[kind]
    body = request if isinstance(request, bytes) else json.dumps(request).encode()
    with pytest.raises(RequestError, match=message):
        parse_request(body, Limits(images=8))


def test_small_pngs_of_many_pixels_are_refused_and_others_decoded_one_at_a_time() -> None:
    def body(count: int, side: int) -> bytes:
        images, prompts = [png((side, side))] * count, [{"prompt": "a", "metadata": {}}] * count
        return json.dumps({"format": "png", "shape": [side, side, 3], "images": images, "prompts": prompts}).encode()

    many, some = body(64, 2048), body(24, 512)
    assert len(many) < 2e6
    tracemalloc.start()
    with pytest.raises(
        RequestError, match=r"at most 512 MB of pixels, got 805; .*reward\.remote\.batch_size"
    ) as refused:
        parse_request(many, Limits())
    assert refused.value.status == 413 and tracemalloc.get_traced_memory()[1] < 10e6
    images, _ = parse_request(some, Limits())
    assert images.nbytes == 24 * 512 * 512 * 3 and tracemalloc.get_traced_memory()[1] < 1.3 * images.nbytes
    tracemalloc.stop()


def test_a_png_with_another_mode_is_read() -> None:
    buffer = io.BytesIO()
    Image.new("RGBA", (5, 6), (1, 2, 3, 4)).save(buffer, "PNG")
    request = {**GOOD, "images": [base64.b64encode(buffer.getvalue()).decode()]}
    images, _ = parse_request(json.dumps(request).encode(), Limits())
    assert images.shape == (1, 6, 5, 3) and images[0, 0, 0].tolist() == [1, 2, 3]


@pytest.fixture
def fake() -> Iterator[Callable[[Callable[[int], tuple[int, bytes] | None]], tuple[str, list[int]]]]:
    """A server that answers by the number of the request, or hangs up where it is told None."""
    with ExitStack() as servers:

        def run(reply: Callable[[int], tuple[int, bytes] | None]) -> tuple[str, list[int]]:
            seen: list[int] = []

            def answer(handler: BaseHTTPRequestHandler) -> None:
                handler.rfile.read(int(handler.headers["Content-Length"]))
                seen.append(len(seen) + 1)
                content = reply(seen[-1])
                if content is None:
                    handler.connection.close()
                else:
                    send(handler, *content)

            return servers.enter_context(local_server(answer)), seen

        yield run


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    return pauses


@pytest.mark.parametrize("first", [None, (500, b"oops"), (429, b"slow down"), (503, b"")])
def test_a_server_that_recovers_costs_retries(fake, no_pauses: list[float], first: tuple[int, bytes] | None) -> None:
    url, seen = fake(lambda number: first if number < 4 else (200, b'{"scores": [0.5, 1]}'))
    assert client(url)(IMAGES, PROMPTS).tolist() == [0.5, 1.0]
    assert len(seen) == 4 and len(no_pauses) == 3
    assert all(2.0**n / 2 <= pause <= 2.0**n for n, pause in enumerate(no_pauses, start=1))


def test_a_server_that_stays_dead_is_named(no_pauses: list[float]) -> None:
    with pytest.raises(RewardError, match="reward remote: http://127.0.0.1:9/score did not answer"):
        client("http://127.0.0.1:9", retries=2)(IMAGES, PROMPTS)
    assert len(no_pauses) == 2


def count_images(reply: Callable[[int], bool]) -> Callable[[int], tuple[int, bytes] | None]:
    return lambda number: (200, b'{"scores": [0.5]}') if reply(number) else None


def test_several_servers_share_the_images_and_one_may_die(fake, no_pauses: list[float]) -> None:
    first, seen_first = fake(count_images(lambda number: True))
    second, seen_second = fake(count_images(lambda number: number <= 2))
    reward = client([first, second], retries=0)
    for _ in range(2):
        assert reward(IMAGES, PROMPTS).tolist() == [0.5, 0.5]
    assert len(seen_first) == len(seen_second) == 2
    for _ in range(3):
        assert reward(IMAGES, PROMPTS).tolist() == [0.5, 0.5]
    # The one that has died is asked once more, and then left alone for a while.
    assert len(seen_second) == 3 and len(seen_first) == 8 and no_pauses == []
    with pytest.raises(RewardError, match="http://127.0.0.1:9/score, http://127.0.0.1:10/score did not answer"):
        client(["http://127.0.0.1:9", "http://127.0.0.1:10"], retries=1)(IMAGES, PROMPTS)


def test_a_server_that_refuses_is_named_among_several(fake) -> None:
    first, _ = fake(lambda number: (401, b"no token"))
    with pytest.raises(RewardError, match=f"{first}/score did not answer .status 401: no token"):
        client([first, first])(IMAGES, PROMPTS)


def test_a_server_that_never_answers_is_given_up(fake, no_pauses: list[float]) -> None:
    url, _ = fake(lambda number: time_out())

    def time_out() -> tuple[int, bytes]:
        threading.Event().wait(2.0)
        return 200, b"{}"

    with pytest.raises(RewardError, match="timed out"):
        client(url, retries=0, timeout=0.2)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b'{"scores": [0.5]}', "expected 2 scores.*got 1"),
        (b'{"scores": [0.5, 1, 2]}', "expected 2 scores.*got 3"),
        (b'{"scores": 0.5}', "expected 2 scores.*got float"),
        (b'{"scores": [0.5, NaN]}', "finite"),
        (b'{"scores": [0.5, Infinity]}', "finite"),
        (b'{"scores": [0.5, "1"]}', "finite"),
        (b'{"scores": [0.5, null]}', "finite"),
        (b'{"scores": [true, 1]}', "finite"),
        (b'{"rewards": [0.5, 1]}', "no scores"),
        (b"[0.5, 1]", "no scores"),
        (b"<html>hello</html>", "no scores"),
        (b"", "no scores"),
    ],
)
def test_a_wrong_answer_is_refused(fake, answer: bytes, message: str) -> None:
    url, seen = fake(lambda number: (200, answer))
    with pytest.raises(RewardError, match=f"(?s)reward remote.*{message}"):
        client(url)(IMAGES, PROMPTS)
    assert len(seen) == 1


def test_a_server_without_an_address_is_a_mistake_in_the_configuration() -> None:
    with pytest.raises(ConfigError, match="reward.remote.url"):
        load_reward(Reward(terms={"remote": 1.0}))


@pytest.mark.parametrize(("setting", "message"), [("terms.poetry=1.0", "poetry"), ("colour=red", "colour")])
def test_the_server_refuses_bad_settings(capsys: pytest.CaptureFixture[str], setting: str, message: str) -> None:
    assert serve_main([setting]) == 2
    assert message in capsys.readouterr().err


def test_a_run_whose_server_dies_is_saved_and_goes_on(
    fake, no_pauses: list[float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alive = [True]

    def reply(number: int) -> tuple[int, bytes] | None:
        if alive[0] and number > 3:
            alive[0] = False
        return (200, json.dumps({"scores": [number / 10 + i / 100 for i in range(4)]}).encode()) if alive[0] else None

    url, _ = fake(reply)
    arguments = [
        *("tiny", f"run.folder={tmp_path}", "run.progress=false", "rollout.prompts=2", "rollout.samples=2"),
        *("rollout.batch_size=4", "rollout.steps=2", "rollout.sde_steps=2", "train.iterations=4", "train.updates=1"),
        *("evaluation.prompts=4", "evaluation.interim_prompts=4", "evaluation.steps=2", "evaluation.pictures=1"),
        *("evaluation.every=50", "reward.terms={'remote': 1.0}", f"reward.remote.url={url}", "reward.remote.retries=1"),
    ]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert "did not answer" in error and "2 iterations are saved" in error
    assert (tmp_path / "checkpoints" / "iteration_000002").is_dir()

    address, _ = fake(lambda number: (200, b'{"scores": [0.1, 0.2, 0.3, 0.4]}'))
    # Where the server is does not touch what is computed.
    assert main([*arguments, f"reward.remote.url={address}"]) == 0
    assert "going on from iteration 2" in capsys.readouterr().out
