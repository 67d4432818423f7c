"""FID and KID on features of a small network, diversity within a group, and R0's table."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from star_trainer.config import ConfigError, load_config
from star_trainer.rewards.diversity import ClipDiversity
from star_trainer.rewards.models.clip import ClipModel
from star_trainer.run.evaluation import Evaluation
from star_trainer.studies.evaluate.cli import main
from star_trainer.studies.evaluate.sets import Features, Reference
from star_trainer.studies.evaluate.tables import r0_table
from star_trainer.train import train
from torch import Tensor, nn


class Network(nn.Module):
    """Eight numbers of an image of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 8, 5, stride=3)

    def forward(self, images: Tensor) -> Tensor:
        return torch.relu(self.layer(images.float() / 255)).mean((2, 3))


class Inception(Network):
    """As the published file: class scores, unless its features are asked for."""

    def forward(self, images: Tensor, return_features: bool = False) -> Tensor:
        found = torch.relu(self.layer(images.float() / 255)).mean((2, 3))
        return found if return_features else found[:, :3]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("network") / "features.pt"
    torch.jit.script(Network().eval()).save(path)
    return path


def pictures(seed: int, count: int = 24, shift: float = 0.0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    levels = generator.uniform(60, 180, (count, 4, 4, 3)) + shift
    return np.kron(levels, np.ones((1, 4, 4, 1))).clip(0, 255).astype(np.uint8)


def save(images: np.ndarray, folder: Path) -> Path:
    folder.mkdir(parents=True)
    for place, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{place:03d}.png")
    return folder


def test_fid_and_kid_are_their_formulas(network: Path, tmp_path: Path) -> None:
    features = Features(network)
    reference = Reference(save(pictures(0), tmp_path / "reference"), features)
    found = reference.distance(np.array_split(pictures(1, shift=20.0), 3))
    real, fake = (features(images).double().numpy() for images in (pictures(0), pictures(1, shift=20.0)))
    covariances = np.cov(real.T), np.cov(fake.T)
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert found.fid == pytest.approx(expected, rel=1e-3)
    assert (found.pictures, found.reference) == (24, 24)
    # With subsets as large as the sets, each is the whole, and KID the unbiased squared distance of cubic kernels.
    kernel = lambda a, b: (a @ b.T / 8 + 1) ** 3  # noqa: E731
    off = lambda k: (k.sum() - np.trace(k)) / (24 * 23)  # noqa: E731
    kid = off(kernel(real, real)) + off(kernel(fake, fake)) - 2 * kernel(real, fake).mean()
    assert found.kid == pytest.approx(kid, rel=1e-3, abs=1e-7)


def test_a_set_is_nearest_to_itself_and_figures_come_again(network: Path, tmp_path: Path) -> None:
    reference = Reference(save(pictures(0), tmp_path / "reference"), Features(network))
    same, near, far = (reference.distance([images]) for images in (pictures(0), pictures(1), pictures(1, shift=60.0)))
    assert same.fid == pytest.approx(0.0, abs=1e-5) and same.fid < near.fid < far.fid and near.kid < far.kid
    assert reference.distance([pictures(1)]) == near


def test_pictures_of_a_reference_may_have_any_sizes(network: Path, tmp_path: Path) -> None:
    folder = save(pictures(0, 2), tmp_path / "reference")
    (folder / "below").mkdir()
    Image.fromarray(np.zeros((40, 30), dtype=np.uint8)).save(folder / "below" / "grey.jpg")
    assert Reference(folder, Features(network)).own.shape == (3, 8)


def test_the_published_networks_features_are_asked_for(tmp_path: Path) -> None:
    torch.jit.script(Inception().eval()).save(tmp_path / "inception.pt")
    assert Features(tmp_path / "inception.pt")(pictures(0, 2)).shape == (2, 8)


class Wrong(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.float()


class Refusing(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images @ torch.ones(7, 7, dtype=torch.uint8)


def test_what_cannot_be_used_is_named(network: Path, tmp_path: Path) -> None:
    (tmp_path / "text.pt").write_text("no network")
    for name in ("text.pt", "nowhere.pt"):
        with pytest.raises(ConfigError, match=rf"--features: .*{name} cannot be loaded as TorchScript"):
            Features(tmp_path / name)
    torch.jit.script(Wrong()).save(tmp_path / "wrong.pt")
    with pytest.raises(ConfigError, match=r"expected features \[2, D\], got \[2, 3, 16, 16\]"):
        Features(tmp_path / "wrong.pt")(pictures(0, 2))
    torch.jit.script(Refusing()).save(tmp_path / "refusing.pt")
    with pytest.raises(ConfigError, match=r"takes no images \[2, 16, 16, 3\] of uint8"):
        Features(tmp_path / "refusing.pt")(pictures(0, 2))
    folder = save(pictures(0, 1), tmp_path / "one")
    with pytest.raises(ConfigError, match="at least two pictures, found 1"):
        Reference(folder, Features(network))
    (folder / "broken.png").write_bytes(b"no picture")
    with pytest.raises(ConfigError, match=r"--reference: .*broken.png cannot be read"):
        Reference(folder, Features(network))


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    clip = ClipModel("tiny", key="clip")
    groups = pictures(0, 8).reshape(2, 4, 16, 16, 3)
    embedded = [clip.embed_images(group).double() for group in groups]
    expected = [np.mean([1 - (e[i] @ e[j]).item() for i in range(4) for j in range(i)]) for e in embedded]
    np.testing.assert_allclose(ClipDiversity(clip)(groups), expected, rtol=1e-5)
    np.testing.assert_allclose(ClipDiversity(clip)(groups[:, :1].repeat(4, axis=1)), 0.0, atol=1e-6)


def test_r0s_table_has_what_was_measured_and_blanks() -> None:
    scores = {"base": {"hps": np.full((2, 2), 0.281), "clip_score": np.array([[30.0, 32.0]])}, "adapter": {}}
    lines = [re.sub(" +", " ", line) for line in r0_table(4, scores, {"base": 12.345}).splitlines()]
    assert lines[0] == "| model | steps | HPS | aesthetic | CLIP score | FID | ImageReward |"
    assert lines[2] == "| base | 4 | 28.10 | | 31.00 | 12.35 | |" and lines[3] == "| adapter | 4 | | | | | |"


def test_star_eval_measures_sets_and_groups(network: Path, tmp_path: Path, capsys: Any) -> None:
    reference = save(np.kron(pictures(0), np.ones((1, 4, 4, 1), dtype=np.uint8)), tmp_path / "reference")
    options = ["--count", "2", "--samples", "2", "--steps", "1", "--rewards", "clip_score", "--r0-table", "--diversity"]
    sets = ["--reference", str(reference), "--features", str(network), "--out", str(tmp_path / "out")]
    assert main(["tiny", *options, *sets, "reward.models.clip=tiny"]) == 0
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert {row["reward"] for row in table["rows"]} == {"clip_score", "diversity"}
    found = table["sets"]["base"]
    assert found["fid"] > 0 and found["pictures"] == 4 and found["reference"] == 24
    printed = capsys.readouterr().out
    assert f"{found['fid']:.3f}" in printed and "| CLIP score | FID" in re.sub(" +", " ", printed)
    lines = [json.loads(line) for line in (tmp_path / "out" / "scores.jsonl").read_text().splitlines()]
    assert all("diversity" not in line and "clip_score" in line for line in lines)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--reference", "x"], "--reference, --features: expected both or none"),
        (["--features", "x"], "--reference, --features: expected both or none"),
        (["--diversity", "--samples", "1"], "--samples: expected at least 2 for --diversity, got 1"),
        (["--r0-table"], "reward.models.hps: expected the folder"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    tmp_path: Path, capsys: Any, options: list[str], said: str
) -> None:
    assert main(["tiny", *options, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_held_out_evaluations_measure_diversity_on_request(tmp_path: Path) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    overrides = [
        f"run.folder={tmp_path}",
        *("run.progress=false", "method=uniform", "train.iterations=1", "rollout.prompts=2", "rollout.samples=2"),
        *("rollout.steps=2", "rollout.sde_steps=1", "evaluation.prompts=3", "evaluation.interim_prompts=2"),
        *("evaluation.steps=2", "evaluation.pictures=1", "evaluation.group=3", "reward.models.clip=tiny"),
    ]
    train(load_config("tiny", overrides))
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    measured = [entry["eval/diversity"] for entry in entries if "eval/diversity" in entry]
    assert len(measured) == 2 and all(0 < value < 2 for value in measured)
    base = Evaluation.load(tmp_path / "base_evaluation.safetensors")
    assert base is not None and base.scores.keys() == {"strict", "graded", "diversity"} and len(base) == 3
