"""Hostile and broken input: whatever comes in, the answer is an error that names it, and nothing is lost."""

from __future__ import annotations

import base64
import errno
import io
import json
import os
import pickle
import resource
import shutil
import signal
import struct
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from star_trainer.cli import main
from star_trainer.config import ConfigError, Model, Reward, Units, load_config
from star_trainer.config.paths import TINY_PIPELINE
from star_trainer.families.policy import Policy, load_policy
from star_trainer.prompts import Prompt, read_prompts
from star_trainer.prompts.units import UnitExtractor
from star_trainer.rewards import RewardError, load_reward
from star_trainer.rewards.geneval import Detector
from star_trainer.rewards.models.clip import ClipModel
from star_trainer.rewards.server import Limits, RequestError, parse_request
from star_trainer.run import checkpoint
from star_trainer.run.evaluation import Evaluation
from star_trainer.sampling import text_units

from tests.tiny_reward_models import save_clip, save_detector

TENFOLD = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
MERGED = "".join(f"a{n}: &a{n}\n  <<: [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 9))
YAML = {
    "code in a value": ("run:\n  folder: !!python/object/apply:os.getcwd []\n", "line 2"),
    "code in a key": ("!!python/name:os.getcwd x: 1\n", "line 1"),
    "a class of Python": ("run: !!python/object:star_trainer.config.Run {}\n", "line 1"),
    "a module of Python": ("method: !!python/module:os\n", "line 1"),
    "another tag": ("method: !secret x\n", "line 1"),
    "a list that grows tenfold with every line": (f"a0: &a0 [1]\n{TENFOLD}", "with all aliases expanded"),
    "a mapping that grows tenfold with every line": (f"a0: &a0 {{b: 1}}\n{MERGED}", "with all aliases expanded"),
    "a list inside itself": ("method: &a [*a]\n", "with all aliases expanded"),
    "a mapping inside itself": ("run: &a\n  folder: *a\n", "with all aliases expanded"),
    "a mapping merged into itself": ("run: &a\n  <<: *a\n", "with all aliases expanded"),
    "an alias of nothing": ("method: *star\n", "line 1"),
    "deep nesting": ("method: " + "[" * 50_000, "not valid YAML"),
    "deep nesting that ends": ("method: " + "[" * 40 + "]" * 40, "levels"),
    "a key twice": ("method: star\nrun:\n  seed: 1\n  seed: 2\n", "line 4: the key run.seed"),
    "a section twice": ("run:\n  seed: 1\nmethod: star\nrun:\n  seed: 2\n", "line 4: the key run"),
    "a list as key": ("? [a, b]\n: 1\n", "line 1"),
    "a mapping as key": ("run: {{seed: 1}: 2}\n", "line 1"),
    "a number as key": ("1: 2\n", "line 1: 1: Keys should be strings"),
    "no name as key": ("null: 2\n", "None"),
    "two documents": ("method: star\n---\nmethod: uniform\n", "not valid YAML"),
    "a tab": ("run:\n\tseed: 1\n", "line 2"),
    "an open quotation mark": ('method: "star\n', "not valid YAML"),
    "a null byte": ("method: st\0ar\n", "not valid YAML"),
    "half an emoji": ("method: \ud83d\n", "utf-8"),
    "a number of 5,000 digits": (f"run:\n  seed: {'9' * 5000}\n", "digits"),
    "a seed beyond 64 bits": (f"run:\n  seed: {10**30}\n", "line 2: run.seed"),
    "a date that does not exist": ("run:\n  seed: 2026-99-99\n", "not valid YAML"),
    "a date": ("run:\n  seed: 2026-01-01\n", "line 2: run.seed"),
    "truth for a number": ("train:\n  learning_rate: [true]\n", "line 2: train.learning_rate"),
    "a name of 10,000 characters": (f"method: {'x' * 10_000}\n", "line 1: method"),
    "a key of 10,000 characters": (f"{'x' * 1000}: 1\n", "unknown key"),
}


@pytest.mark.parametrize("kind", YAML)
def test_yaml_is_refused_where_it_is_bad(kind: str, tmp_path: Path) -> None:
    text, message = YAML[kind]
    path = tmp_path / "mine.yaml"
    path.write_bytes(text.encode(errors="surrogatepass"))
    start = time.perf_counter()
    with pytest.raises(ConfigError) as caught:
        load_config(str(path))
    assert message in str(caught.value) and "mine.yaml" in str(caught.value)
    assert len(str(caught.value)) < 2500 and "\n" not in str(caught.value)
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize("value", ["!!python/name:os.getcwd", "&a [*a]", "[", "'", "\0", "2026-99-99"])
def test_a_bad_value_on_the_command_line_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"run\.folder"):
        load_config("tiny", [f"run.folder={value}"])


REFUSED_PROMPTS = {
    "white space in JSON": (
        "p.jsonl",
        b'{"prompt": "a cat"}\n{"prompt": " \\t\\u3000\\n "}\n',
        "line 2: .*white space",
    ),
    "nothing in JSON": ("p.jsonl", b'{"prompt": ""}\n', "line 1: .*white space"),
    "white space in a table": ("p.tsv", b"Prompt\tKind\na cat\tA\n \tB\n", "line 3: .*white space"),
    "a null byte in JSON": ("p.jsonl", b'{"prompt": "a\\u0000cat"}\n', "line 1: .*null bytes"),
    "a null byte in a line": ("p.txt", b"a cat\n\na\0dog\n", "line 3: .*null bytes"),
    "half an emoji": ("p.jsonl", b'{"prompt": "a \\ud83d cat"}\n', "line 1: .*surrogates"),
    "no string": ("p.jsonl", b'{"prompt": ["a cat"]}\n', "line 1: "),
    "no object": ("p.jsonl", b'"a cat"\n', "line 1: "),
    "a unit that is none": ("p.jsonl", b'{"prompt": "a cat", "units": [3]}\n', "line 1: .*units"),
    "UTF-16": ("p.txt", "a cat\n".encode("utf-16"), "not UTF-8"),
    "an image": ("p.txt", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "not UTF-8"),
    "a number of 5,000 digits": ("p.jsonl", b'{"prompt": "a cat", "seed": ' + b"9" * 5000 + b"}\n", "line 1: "),
    "a folder": ("p.folder", None, "no such file"),
}


@pytest.mark.parametrize("kind", REFUSED_PROMPTS)
def test_prompts_that_are_none_are_refused_by_their_line(kind: str, tmp_path: Path) -> None:
    name, content, message = REFUSED_PROMPTS[kind]
    path = tmp_path / name
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"prompts.source: .*{message}"):
        read_prompts(str(path), "prompts.source")


ODD_PROMPTS = {
    "emoji in text": "\U0001f408 a cat \U0001f469\u200d\U0001f469\u200d\U0001f467 on a \U0001f6f9",
    "emoji alone": "\U0001f408\U0001f6f9",
    "10,000 characters": "a red circle " * 770,
    "one word of 10,000 characters": "x" * 10_000,
    "10,000 quotation marks": '"' * 10_000,
    "10,000 opening marks": "\u201c\u2018\u00ab" * 3_333,
    "digits": "1234 5678",
    "marks": "?!... --- ''\"\"",
    "another script": "\u4e00\u53ea\u7ea2\u8272\u7684\u732b",
    "from right to left": "\u202e\u0642\u0637\u0629 \u062d\u0645\u0631\u0627\u0621\u202c",
    "a letter with 500 accents": "a" + "\u0301" * 500 + " cat",
    "nothing to be seen": "\u200b\u200d\ufeff",
    "control characters": "\x07\x1b[31ma red circle\x1b[0m\x7f",
    "tokens of the tokenizers": "<|endoftext|> </s> <pad> a cat <|startoftext|>",
    "a template": "{preset} %s %(x)s \\n ${HOME} {0.__class__}",
    "lines": "a red\rcircle\u2028and a\x0bblue square",
    "code": "'; DROP TABLE units; --",
}


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(Model(max_sequence_length=16))


@pytest.mark.parametrize("kind", ODD_PROMPTS)
def test_odd_prompts_go_through_units_cache_tokens_and_encoders(kind: str, tmp_path: Path, policy: Policy) -> None:
    text = ODD_PROMPTS[kind]
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": text}) + "\n")
    start = time.perf_counter()
    (prompt,) = read_prompts(str(path), "prompts.source")
    assert prompt.text == text
    config = Units(source="rules", cache=str(tmp_path / "units.sqlite"))
    (filled,) = UnitExtractor(config).fill([prompt])
    assert UnitExtractor(config).fill([prompt])[0].units == filled.units
    assert all(unit in text for unit in filled.units)
    found = text_units(policy, [filled])
    embeddings = policy.encode([text])
    assert found.weights.shape[1] == embeddings.tensors["text"].shape[1]
    assert torch.isfinite(embeddings.tensors["text"]).all() and torch.isfinite(embeddings.tensors["pooled"]).all()
    assert time.perf_counter() - start < 20.0


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def encoded(form: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, form)
    return buffer.getvalue()


def flipped(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 0xFF]) + content[place + 1 :]


def header(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size, whatever its data are."""
    start = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", start) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


WHOLE = encoded()
IMAGES = {
    "nothing": b"",
    "the signature alone": WHOLE[:8],
    "half of the header": WHOLE[:20],
    "the header alone": WHOLE[:33],
    "half of the data": WHOLE[: len(WHOLE) // 2],
    "all but the last data": WHOLE[:-40],
    "a flipped byte in the signature": flipped(WHOLE, 1),
    "a flipped byte in the header": flipped(WHOLE, 20),
    "a flipped byte in the data": flipped(WHOLE, len(WHOLE) // 2),
    "a JPEG": encoded("JPEG"),
    "a GIF": encoded("GIF"),
    "a TIFF": encoded("TIFF"),
    "no data": header(40, 30),
    "too little data": header(40, 30, b"\0" * 100),
    "a size beyond all memory": header(2**31 - 1, 2**31 - 1),
    "another size": header(41, 30, b"\0" * 10_000),
    "no pixels": header(0, 0),
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='40' height='30'/>",
    "a pickle": pickle.dumps(np.zeros((30, 40, 3), dtype=np.uint8)),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_the_reward_server_refuses_a_broken_image_by_its_place(kind: str) -> None:
    images = [base64.b64encode(content).decode() for content in (WHOLE, IMAGES[kind])]
    prompts = [{"prompt": "a", "metadata": {}}] * 2
    body = json.dumps({"format": "png", "shape": [30, 40, 3], "images": images, "prompts": prompts}).encode()
    with pytest.raises(RequestError, match=r"^images\[1\]: "):
        parse_request(body, Limits())


ZEROS = np.zeros((2, 16, 16, 3), dtype=np.uint8)
NO_IMAGES: dict[str, Any] = {
    "floats": ZEROS / 255.0,
    "NaN": np.full(ZEROS.shape, np.nan),
    "signed bytes": ZEROS.astype(np.int8),
    "grey": ZEROS[..., :1],
    "an alpha channel": np.zeros((2, 16, 16, 4), dtype=np.uint8),
    "channels first": ZEROS.transpose(0, 3, 1, 2),
    "one image": ZEROS[0],
    "too few": ZEROS[:1],
    "no pixels": ZEROS[:, :0],
    "no array": [[0]],
}


@pytest.mark.parametrize("kind", NO_IMAGES)
def test_what_is_no_batch_of_images_is_refused_by_every_reward(kind: str) -> None:
    prompts = [Prompt("a", {"include": [{"class": "circle", "count": 1}]})] * 2
    with pytest.raises(RewardError, match=r"^rewards: expected images \[2, H, W, 3\] of uint8, got "):
        load_reward(Reward(terms={"scene_graded": 1.0}))(NO_IMAGES[kind], prompts)


NOISE = np.random.default_rng(0).integers(0, 256, (1, 48, 40, 3), dtype=np.uint8)
ODD_IMAGES = {
    "tiny": np.zeros((1, 8, 8, 3), dtype=np.uint8),
    "white": np.full((1, 32, 32, 3), 255, dtype=np.uint8),
    "noise": NOISE,
    "backwards and strided": NOISE[:, ::-2, ::-3],
    "read-only": np.frombuffer(NOISE.tobytes(), dtype=np.uint8).reshape(NOISE.shape),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_odd_images_have_a_reward_of_every_kind(kind: str, rewards: dict[str, Any]) -> None:
    prompt = Prompt('a sign that says "\U0001f408 Go"', {"include": [{"class": "cat", "count": 1}]})
    for name, reward in rewards.items():
        values = reward(ODD_IMAGES[kind], [prompt])
        assert values.shape == (1,) and np.isfinite(values).all(), name


@pytest.mark.parametrize("name", ["clip_score", "pickscore"])
def test_an_image_that_is_too_small_for_a_model_is_refused(name: str, rewards: dict[str, Any]) -> None:
    with pytest.raises(RewardError, match="images: expected at least 8 pixels a side, got 7x9"):
        rewards[name](np.zeros((1, 7, 9, 3), dtype=np.uint8), [Prompt("a cat", {})])


@pytest.fixture(scope="module")
def rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every kind of reward, those with models on small random weights."""
    clip = str(save_clip(tmp_path_factory.mktemp("clip")))
    detector = str(save_detector(tmp_path_factory.mktemp("detector")))
    models = {"clip": clip, "pickscore": clip, "pickscore_processor": clip, "detector": detector}
    names = ("scene_graded", "geneval_graded", "geneval_flow_grpo", "ocr", "clip_score", "pickscore")
    return {name: load_reward(Reward(terms={name: 1.0}, models=models)) for name in names}


@pytest.mark.parametrize("shape", [(1, 1, 9, 3), (1, 600, 8, 3), (1, 4, 4096, 3)])
def test_an_image_that_the_text_reader_would_blow_up_is_refused(shape: tuple[int, ...], rewards: dict) -> None:
    with pytest.raises(RewardError, match="reward ocr: expected sides of at most 8 to 1"):
        rewards["ocr"](np.zeros(shape, dtype=np.uint8), [Prompt('"Go"', {})])


class Marker:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pickled_instead(folder: Path, name: str, marker: Path) -> None:
    """Put a pickle that does something in the place of safetensors, under the name that such files had."""
    (weights,) = folder.glob("*.safetensors")
    weights.unlink()
    (folder / name).write_bytes(pickle.dumps(Marker(marker)))
    torch.save({"x": torch.zeros(1)}, folder / f"also_{name}")


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_a_pipeline_with_pickled_weights_is_refused_unread(part: str, tmp_path: Path) -> None:
    folder, marker = tmp_path / "pipeline", tmp_path / "marker"
    shutil.copytree(TINY_PIPELINE, folder)
    name = "pytorch_model.bin" if part == "text_encoder" else "diffusion_pytorch_model.bin"
    pickled_instead(folder / part, name, marker)
    with pytest.raises(ConfigError, match=r"model\.pipeline"):
        load_policy(Model(pipeline=str(folder), max_sequence_length=16))
    assert not marker.exists()


def test_reward_models_with_pickled_weights_are_refused_unread(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    clip, detector = save_clip(tmp_path / "clip"), save_detector(tmp_path / "detector")
    usable = ClipModel(str(clip), key="reward.models.clip")
    for folder in (clip, detector):
        pickled_instead(folder, "pytorch_model.bin", marker)
    with pytest.raises(ConfigError, match=r"reward\.models\.clip"):
        ClipModel(str(clip), key="reward.models.clip")
    with pytest.raises(ConfigError, match=r"reward\.models\.detector"):
        Detector(str(detector), usable)
    assert not marker.exists()


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


WEIGHTS = {
    "truncated": truncated,
    "empty": lambda path: os.truncate(path, 0),
    "a header that claims terabytes": lambda path: path.write_bytes(struct.pack("<Q", 1 << 42) + b"{}"),
    "a header that is no JSON": lambda path: path.write_bytes(struct.pack("<Q", 8) + b"{oops...."),
    "missing": Path.unlink,
    "other tensors": lambda path: save_file({"x": torch.zeros(2)}, path),
}


@pytest.mark.parametrize("kind", [kind for kind in WEIGHTS if kind != "other tensors"])
def test_broken_weights_of_a_pipeline_are_refused_by_its_name(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(TINY_PIPELINE, folder)
    WEIGHTS[kind](folder / "transformer" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ConfigError, match=r"model\.pipeline: .*cannot be loaded"):
        load_policy(Model(pipeline=str(folder), max_sequence_length=16))


@pytest.mark.parametrize("part", ["transformer", "vae"])
def test_weights_that_lack_some_are_refused_rather_than_drawn_at_random(part: str, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(TINY_PIPELINE, folder)
    path = folder / part / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, path)
    with pytest.raises(ConfigError, match=f"model.pipeline.*{part} has no weights for {name}"):
        load_policy(Model(pipeline=str(folder)))


def lacking(folder: Path, name: str) -> str:
    """Take the weights whose names begin with `name` out of a model's file; gives the first of them."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    taken = sorted(key for key in tensors if key.startswith(name))
    save_file({key: value for key, value in tensors.items() if key not in taken}, path, metadata={"format": "pt"})
    return taken[0]


def test_reward_models_that_lack_weights_are_refused_rather_than_drawn_at_random(tmp_path: Path) -> None:
    clip, detector = save_clip(tmp_path / "clip"), save_detector(tmp_path / "detector")
    usable = ClipModel(str(clip), key="reward.models.clip")
    name = lacking(clip, "text_model.encoder.layers.1.")
    with pytest.raises(ConfigError, match=rf"reward\.models\.clip: .*no weights for {name} and \d+ others"):
        ClipModel(str(clip), key="reward.models.clip")
    name = lacking(detector, "class_predictor.bias")
    with pytest.raises(ConfigError, match=rf"reward\.models\.detector: .*no weights for {name}$"):
        Detector(str(detector), usable)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_broken_evaluation_counts_as_none(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    Evaluation(np.zeros((2, 4, 4, 3), dtype=np.uint8), {"graded": np.zeros(2)}).save(path)
    assert Evaluation.load(path) is not None
    WEIGHTS[kind](path)
    assert Evaluation.load(path) is None


RUN = [
    *("run.progress=false", "train.iterations=2", "train.updates=1", "checkpoints.every=1", "evaluation.every=2"),
    *("rollout.prompts=2", "rollout.samples=2", "rollout.batch_size=4", "rollout.steps=2", "rollout.sde_steps=1"),
    *("evaluation.prompts=2", "evaluation.interim_prompts=2", "evaluation.steps=1", "evaluation.pictures=1"),
    "method=uniform",
]


def test_a_full_disk_costs_a_checkpoint_and_the_run_goes_on_from_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    command = ["tiny", f"run.folder={folder}", *RUN]
    AcceleratorState._reset_state(reset_partial_state=True)
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    begin = checkpoint.begin

    def with_a_full_disk(root: Path, iteration: int) -> Path:
        if iteration == 2:
            # Room for all that a run writes but its weights.
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, limits[1]))
        return begin(root, iteration)

    try:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "begin", with_a_full_disk)
            assert main(command) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert os.strerror(errno.EFBIG) in error and ".safetensors" in error and "goes on from the last whole" in error
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None and found.iteration == 1
    AcceleratorState._reset_state(reset_partial_state=True)
    assert main(command) == 0
    assert "going on from iteration 1" in capsys.readouterr().out
    found = checkpoint.load_latest(folder / "checkpoints")
    assert found is not None and found.iteration == 2
    assert load_file(folder / "adapter" / "pytorch_lora_weights.safetensors")
    assert not list(folder.glob("**/*.partial"))
