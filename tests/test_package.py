"""What is handed on: an sdist, made without PyTorch, and the wheel that is built from it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

import star_kernels as sk

pytestmark = pytest.mark.exhaustive
ROOT = Path(__file__).parents[1]
FOLDERS = ("bench", "csrc", "docs", "examples", "python", "star_kernels", "tests")
MADE_IN_USE = ("__pycache__", "*.so", "*.egg-info", "latest.*", "static_gpu.json")
BUILD = "import sys; sys.modules['torch'] = None; from setuptools import build_meta; build_meta.build_{}('made')"
SCENES = "star_trainer/worlds/scenes"


def run(code: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "", **environment}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def files(root: Path, *folders: str) -> set[str]:
    return {str(path.relative_to(root)) for folder in folders for path in (root / folder).rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this one, with a run in it, and beside it the unpacked sdist."""
    base = tmp_path_factory.mktemp("package")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, base / "checkout" / folder, ignore=shutil.ignore_patterns(*MADE_IN_USE))
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, base / "checkout")
    shutil.copytree(ROOT / ".ci", base / "checkout" / ".ci")
    (base / "checkout" / "runs" / "tiny_star_0").mkdir(parents=True)
    (base / "checkout" / "runs" / "tiny_star_0" / "config.yaml").touch()
    made = run(BUILD.format("sdist"), base / "checkout")
    assert made.returncode == 0, made.stderr
    assert "warning" not in (made.stdout + made.stderr).lower(), made.stderr
    (sdist,) = (base / "checkout" / "made").iterdir()
    with tarfile.open(sdist) as archive:
        archive.extractall(base, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (base / sdist.name.removesuffix(".tar.gz")).rename(base / "sdist")
    return base / "checkout"


def test_the_sdist_has_all_that_builds_and_tests_and_no_runs(checkout: Path) -> None:
    sdist = checkout.parent / "sdist"
    assert files(sdist, *FOLDERS) == files(checkout, *FOLDERS) - files(checkout, "docs/images")
    assert next((checkout / "made").iterdir()).stat().st_size <= 12e6
    kept = {"Makefile", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "mkdocs.yml"}
    kept |= {"setup.py", "pyproject.toml", "requirements.txt", "requirements-dev.txt", "CITATION.cff"}
    made = {"PKG-INFO", "setup.cfg", "star_kernels.egg-info", ".ci"}
    assert {path.name for path in sdist.iterdir()} == kept | made | set(FOLDERS)


def test_the_wheel_without_the_extension_is_pure_and_has_what_loads_the_small_models(checkout: Path) -> None:
    sdist = checkout.parent / "sdist"
    made = run(BUILD.format("wheel"), sdist, STAR_KERNELS_BUILD_CPU="0")
    assert made.returncode == 0, made.stderr
    assert "warning" not in (made.stdout + made.stderr).lower(), made.stderr
    (wheel,) = (sdist / "made").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl") and wheel.stat().st_size <= 12e6
    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    for needed in (
        "star_kernels/attention/triton_kernels.py",
        "star_kernels/attention/table.json",
        "star_trainer/config/presets/tiny.yaml",
        f"{SCENES}/captions.py",
        f"{SCENES}/tiny_sd3/pipeline/transformer/diffusion_pytorch_model.safetensors",
        f"{SCENES}/tiny_clip/model/tokenizer.json",
        f"{SCENES}/tiny_pickscore/model/model.safetensors",
    ):
        assert needed in found, needed
    left_out = files(checkout, "star_kernels") | files(checkout / "python", "star_trainer")
    left_out -= found
    # What built the small models stays out.
    assert {Path(path).name for path in left_out} == {"build.py", "build_log.jsonl", "README.md"}


def test_a_wheel_with_the_extension_is_not_built_without_torch(checkout: Path) -> None:
    """`python -m build` in an environment of its own makes the sdist, then says what is missing."""
    asked = run(BUILD.format("wheel").replace("build_wheel('made')", "get_requires_for_build_wheel()"), checkout)
    assert asked.returncode == 0, asked.stderr
    made = run(BUILD.format("wheel"), checkout)
    assert made.returncode != 0
    assert "--no-build-isolation" in made.stderr and "STAR_KERNELS_BUILD_CPU=0" in made.stderr


def test_a_wheel_that_is_handed_on_names_its_torch(checkout: Path) -> None:
    sdist = checkout.parent / "sdist"
    prepare = "from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel('metadata')"
    minor = ".".join(torch.__version__.split(".")[:2])
    for wanted, tag in (("1", f"+torch{minor}"), ("0", "")):
        (sdist / "metadata").mkdir()
        done = run(prepare, sdist, STAR_KERNELS_NAME_TORCH=wanted)
        assert done.returncode == 0, done.stderr
        (metadata,) = (sdist / "metadata").glob("*.dist-info")
        assert f"\nVersion: {sk.__version__}{tag}\n" in (metadata / "METADATA").read_text()
        shutil.rmtree(sdist / "metadata")
