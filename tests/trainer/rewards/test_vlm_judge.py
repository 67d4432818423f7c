"""A judge that sees, behind an endpoint on this machine: what it is shown, what it may answer, and how it fails."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from star_trainer.config import ConfigError, Judge, Reward, load_config
from star_trainer.prompts import Prompt
from star_trainer.rewards import NotDifferentiable, RewardError, check_differentiable, check_reward, load_terms
from star_trainer.rewards.judge import TEMPLATES, VlmJudge, parse

from tests.trainer.local_server import local_server, send

PROMPTS = [Prompt(text, {}) for text in ("a red {circle}", "a cat", "two dogs")]
IMAGES = np.stack([np.full((16, 20, 3), level, dtype=np.uint8) for level in (10, 50, 90)])


@contextmanager
def judge(answer: Callable[[int, dict[str, Any]], str | int], **settings: Any) -> Iterator[tuple[VlmJudge, list[Any]]]:
    """A judge whose n-th question is answered by `answer`, a text or a status; and the questions."""
    asked: list[dict[str, Any]] = []
    lock = threading.Lock()

    def post(handler: BaseHTTPRequestHandler) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        with lock:
            asked.append({**body, "path": handler.path, "key": handler.headers["Authorization"]})
            said = answer(len(asked) - 1, body)
        if isinstance(said, int):
            send(handler, said, b"no")
        else:
            send(handler, 200, json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    with local_server(post) as url:
        yield VlmJudge(Judge(endpoint=f"{url}/v1", model="seer", **settings)), asked


def shown(body: dict[str, Any]) -> np.ndarray:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))))


def level(_: int, body: dict[str, Any]) -> str:
    """An answer that depends on the picture alone."""
    return f"I see something.\n\nScore: {shown(body)[0, 0, 0] / 10:g}"


def test_each_image_gets_its_own_answer_scaled_by_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with judge(level, at_once=3) as (reward, asked):
        np.testing.assert_allclose(reward(IMAGES, PROMPTS), [0.1, 0.5, 0.9])
    assert len(asked) == 3 and {body["model"] for body in asked} == {"seer"}
    assert asked[0]["path"] == "/v1/chat/completions" and asked[0]["key"] == "Bearer secret"
    with judge(level, range=(-10.0, 10.0)) as (reward, _):
        np.testing.assert_allclose(reward(IMAGES, PROMPTS), [0.55, 0.75, 0.95])


def test_the_judge_is_shown_the_very_image_and_told_the_prompt() -> None:
    images = np.random.default_rng(0).integers(0, 255, (1, 16, 20, 3), dtype=np.uint8)
    with judge(lambda *_: "3", range=(1.0, 5.0)) as (reward, asked):
        reward(images, PROMPTS[:1])
    np.testing.assert_array_equal(shown(asked[0]), images[0])
    text = asked[0]["messages"][0]["content"][1]["text"]
    assert "a red {circle}" in text and "from 1 to 5" in text and "{" not in text.replace("{circle}", "")


def test_an_image_that_comes_twice_is_asked_about_once() -> None:
    with judge(level) as (reward, asked):
        again = np.concatenate([IMAGES, IMAGES])
        np.testing.assert_allclose(reward(again, PROMPTS * 2), [0.1, 0.5, 0.9] * 2)
    assert len(asked) == 3


def test_a_cache_remembers_images_prompts_and_templates(tmp_path: Path) -> None:
    with judge(level, cache=str(tmp_path / "judge.sqlite")) as (reward, asked):
        for _ in range(2):
            np.testing.assert_allclose(reward(IMAGES, PROMPTS), [0.1, 0.5, 0.9])
        assert len(asked) == 3
        reward(IMAGES, PROMPTS[::-1])
        assert len(asked) == 5
        other = VlmJudge(reward.config.model_copy(update={"template": "text"}))
        other(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == 6


@pytest.mark.parametrize(
    ("answer", "number"),
    [
        ("Score: 7", 7.0),
        ("7", 7.0),
        ("**Score: 7.5**", 7.5),
        ("The cat has three ears.\nFinal score: 3.\n", 3.0),
        ("Score: 8/10", 8.0),
        ("Score: 8/5", None),
        ("Score: 11", None),
        ("Score: -1", None),
        ("Score: 7 or 8", None),
        ("I would give it 7", None),
        ("Score: 7\nBut I am not sure.", None),
        ("seven", None),
        ("Score: nan", None),
        ("1e1", None),
        ("", None),
    ],
)
def test_only_one_number_in_the_range_on_the_last_line_is_an_answer(answer: str, number: float | None) -> None:
    assert parse(answer, 0.0, 10.0) == number


def test_what_a_model_thinks_is_no_answer() -> None:
    with judge(lambda *_: "<think>Score: 2\n</think>\nScore: 6") as (reward, _):
        np.testing.assert_allclose(reward(IMAGES[:1], PROMPTS[:1]), [0.6])


def test_an_answer_without_a_number_is_asked_for_again() -> None:
    with judge(lambda place, _: "It is nice." if place == 0 else "Score: 4") as (reward, asked):
        np.testing.assert_allclose(reward(IMAGES[:1], PROMPTS[:1]), [0.4])
    complaint = asked[1]["messages"]
    assert [message["role"] for message in complaint] == ["user", "assistant", "user"]
    assert complaint[1]["content"] == "It is nice." and "'Score: N'" in complaint[2]["content"]


def test_a_judge_that_never_gives_a_number_has_failed_and_scores_nothing() -> None:
    said = (
        r"reward vlm_judge: seer gives no number from 0 to 10 for 'a cat', asked 2 times; its last answer: 'Lovely\.'"
    )
    with judge(lambda place, _: "Lovely.", retries=1) as (reward, asked), pytest.raises(RewardError, match=said):
        reward(IMAGES[1:2], PROMPTS[1:2])
    assert len(asked) == 2


def test_a_judge_that_is_down_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with judge(lambda *_: 503) as (reward, asked):
        with pytest.raises(RewardError, match="reward vlm_judge: reward.judge.endpoint: .*status 503"):
            reward(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == 4
    with pytest.raises(RewardError, match="reward vlm_judge: reward.judge.endpoint: .* did not answer"):
        reward(IMAGES[:1], PROMPTS[:1])
    with judge(lambda *_: 401) as (reward, asked):
        with pytest.raises(RewardError, match="status 401"):
            reward(IMAGES[:1], PROMPTS[:1])
        assert len(asked) == 1


def test_a_busy_judge_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)
    with judge(lambda place, _: 429 if place == 0 else "5") as (reward, _):
        np.testing.assert_allclose(reward(IMAGES[:1], PROMPTS[:1]), [0.5])


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("Is this {prompt}? From {low} to {high}.")
    with judge(lambda *_: "1", template=str(path)) as (reward, asked):
        reward(IMAGES[:1], PROMPTS[:1])
    assert asked[0]["messages"][0]["content"][1]["text"] == "Is this a red {circle}? From 0 to 10."
    path.write_text("How is it?")
    with pytest.raises(ConfigError, match=r"reward\.judge\.template: .*mine.txt: expected the place of the prompt"):
        VlmJudge(Judge(endpoint="http://localhost:1", model="seer", template=str(path)))
    with pytest.raises(ConfigError, match=r"reward\.judge\.template: expected alignment, text or a file"):
        VlmJudge(Judge(endpoint="http://localhost:1", model="seer", template="alignmnt"))


def test_the_templates_ask_for_the_form_that_is_parsed() -> None:
    for text in TEMPLATES.values():
        assert "{prompt}" in text and "\nScore: N\n" in text and "{low}" in text and "{high}" in text


def test_bad_settings_are_refused_before_anything_is_asked() -> None:
    with pytest.raises(ConfigError, match=r"reward\.judge\.endpoint: expected one where reward.terms has vlm_judge"):
        check_reward(Reward(terms={"vlm_judge": 1.0}))
    settings = {"terms": {"vlm_judge": 1.0}, "judge": {"endpoint": "http://localhost:1"}}
    with pytest.raises(ConfigError, match=r"reward\.judge\.model: "):
        check_reward(Reward.model_validate(settings))
    with pytest.raises(ConfigError, match="range: expected the lowest number first"):
        load_config("tiny", ["reward.judge.range=[5, 5]"])
    settings["judge"]["model"] = "seer"  # type: ignore[index]
    with pytest.raises(NotDifferentiable, match="vlm_judge has no gradient .*an endpoint returns numbers alone"):
        check_differentiable(Reward.model_validate(settings))


def test_it_is_a_term_like_others() -> None:
    with judge(level) as (reward, _):
        settings = {"terms": {"vlm_judge": 2.0}, "judge": reward.config.model_dump()}
        (term,) = load_terms(Reward.model_validate(settings)).values()
        np.testing.assert_allclose(term(IMAGES, PROMPTS), [0.1, 0.5, 0.9])
