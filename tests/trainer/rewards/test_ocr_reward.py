"""The OCR reward on text that is really drawn and really read, and its score on text that is given."""

from __future__ import annotations

from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont
from rapidfuzz.distance import Levenshtein
from star_trainer.config import Reward
from star_trainer.prompts import Prompt
from star_trainer.rewards import RewardError, load_reward
from star_trainer.rewards.ocr import OcrReward, text_score, wanted

BACKGROUND = (240, 235, 220)


def picture(text: str, angle: float = 0.0) -> np.ndarray:
    """A 512-pixel picture of `text`, turned by `angle` degrees."""
    image = Image.new("RGB", (512, 512), BACKGROUND)
    ImageDraw.Draw(image).multiline_text(
        (256, 256), text, font=ImageFont.load_default(48), fill=(20, 30, 60), anchor="mm", align="center"
    )
    return np.array(image.rotate(angle, fillcolor=BACKGROUND))


@pytest.fixture(scope="module")
def ocr():
    pytest.importorskip("rapidocr_onnxruntime")
    return load_reward(Reward(terms={"ocr": 1.0}))


def score(ocr, image: np.ndarray, prompt: str) -> float:
    return float(ocr(image[None], [Prompt(prompt, {})])[0])


@pytest.mark.parametrize("angle", [0, 90, 180, 270, 20, -45])
def test_drawn_text_is_read_whichever_way_it_is_turned(ocr, angle: float) -> None:
    assert score(ocr, picture("Open 24 Hours", angle), 'a sign that says "Open 24 hours"') == 1.0


@pytest.mark.parametrize(("processes", "threads"), [(None, 0), ("2", 2), ("64", 1)])
def test_the_processes_of_a_machine_share_its_cores(
    monkeypatch: pytest.MonkeyPatch, processes: str | None, threads: int
) -> None:
    pytest.importorskip("rapidocr_onnxruntime")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    # RapidOCR asks for the cores, too, and takes no more threads than those.
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(5)), raising=False)
    reader = OcrReward()._read
    sessions = [reader.text_det.infer.session, reader.text_cls.infer.session, reader.text_rec.session.session]
    # 0 is onnxruntime's own choice.
    assert [session.get_session_options().intra_op_num_threads for session in sessions] == [threads] * 3


def test_text_on_several_lines_is_one_text(ocr) -> None:
    assert score(ocr, picture("Hello\nWorld"), 'a wall with "hello world"') == 1.0


def test_misspelt_text_costs_its_letters(ocr) -> None:
    assert score(ocr, picture("Hello Wurld"), 'a wall with "Hello World"') == pytest.approx(0.9)


def test_other_text_and_no_text_are_worth_nothing(ocr) -> None:
    assert score(ocr, picture(""), 'a wall with "Hello"') == 0.0
    assert score(ocr, picture("Zigzag"), 'a wall with "Hello"') == 0.0


def test_several_texts_are_found_wherever_they_stand(ocr) -> None:
    image = picture("Exit\n\n\nSale")
    assert score(ocr, image, 'a door with "Sale" and "Exit"') == 1.0
    assert score(ocr, image, 'a door with "Sale" and "Open"') == pytest.approx(0.5, abs=0.13)


def test_a_batch_is_scored_image_by_image(ocr) -> None:
    images = np.stack([picture("Hello"), picture("")])
    prompts = [Prompt('"Hello"', {}), Prompt('"Hello"', {})]
    assert ocr(images, prompts).tolist() == [1.0, 0.0]


def test_a_prompt_without_quoted_text_is_named(ocr) -> None:
    with pytest.raises(RewardError, match="reward ocr.*a cat on a mat"):
        score(ocr, picture("x"), "a cat on a mat")


@pytest.mark.parametrize(
    "text", ["Wait…", "DON’T PANIC", "3–5 pm", "1 ½ cups", "Café Crème", "Über Straße", "Łódź", "20 °C"]
)
def test_text_that_the_reader_spells_otherwise_is_right(ocr, text: str) -> None:
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf", 48)
    image = Image.new("RGB", (512, 512), "white")
    ImageDraw.Draw(image).text((256, 256), text, font=font, fill="black", anchor="mm")
    assert score(ocr, np.array(image), f'a sign that says "{text}"') == 1.0


@pytest.mark.parametrize("text", ["ПРИВЕТ", "止まれ", "안녕", "سلام", "龘"])
def test_text_in_letters_that_the_reader_does_not_know_is_refused(ocr, text: str) -> None:
    with pytest.raises(RewardError, match=f"reward ocr: .*letters of, got '{text}'"):
        score(ocr, picture(""), f'a sign that says "{text}"')


def test_text_in_chinese_is_wanted_as_it_is(ocr) -> None:
    assert wanted("写着“你好，世界”的牌子") == ["你好，世界"]


@pytest.mark.parametrize(
    ("texts", "lines", "expected"),
    [
        (["Hello"], ["HELLO"], 1.0),
        (["Hello World"], ["hello", "world"], 1.0),
        (["Hello"], ["say hello there"], 1.0),
        (["Hello"], ["Helo"], 0.8),
        (["Hello"], [], 0.0),
        (["Hello"], ["completely different and long"], 0.0),
        (["Straße"], ["STRASSE"], 1.0),
        (["Straße", "Go"], ["StraBe", "Stop"], 1 - 2 / 8),
        (["Smørrebrød"], ["Smorrebrod"], 1.0),
        (["5 °C"], ["5º c"], 1.0),
        (["你好，世界！"], ["你好,世界!"], 1.0),
        (["Café"], ["Cafe", "x"], 1.0),
        (["Go", "Go home"], ["Go home"], 1 - 2 / 8),
        (["Go", "Go home"], ["Go home", "go"], 1.0),
        (["one", "two"], ["two", "one"], 1.0),
        (["seven", "eight"], ["eigt", "sevn"], 1 - 2 / 10),
        (["a1", "b2", "c3", "d4", "e5"], ["a1", "b2", "c3", "d4"], 0.8),
    ],
)
def test_score_of_given_lines(texts: list[str], lines: list[str], expected: float) -> None:
    assert text_score(texts, lines) == pytest.approx(expected)


def test_one_text_is_scored_as_flow_grpo_does() -> None:
    generator = np.random.default_rng(0)
    letters = list("abAB ")
    for _ in range(500):
        text, read = ("".join(generator.choice(letters, generator.integers(1, 8))) for _ in range(2))
        target, seen = (s.replace(" ", "").lower() for s in (text, read))
        if not target:
            continue
        distance = 0 if target in seen else min(Levenshtein.distance(seen, target), len(target))
        assert text_score([text], [read]) == pytest.approx(1 - distance / len(target))


def test_wanted_texts_are_those_in_quotation_marks() -> None:
    assert wanted('a “Stop” sign and a "Go" sign') == ["Stop", "Go"]
