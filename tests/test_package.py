"""What an installed package holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_package_has_what_loads_the_small_models_and_not_what_built_them(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path), "build_py"]
    command += ["--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "STAR_KERNELS_BUILD_CPU": "0"}, check=True, timeout=120)
    found = {str(path.relative_to(tmp_path / "lib")) for path in (tmp_path / "lib").rglob("*") if path.is_file()}
    scenes = "star_trainer/worlds/scenes"
    for needed in (
        "star_kernels/attention/triton_kernels.py",
        "star_kernels/attention/table.json",
        "star_trainer/config/presets/tiny.yaml",
        f"{scenes}/captions.py",
        f"{scenes}/tiny_sd3/pipeline/transformer/diffusion_pytorch_model.safetensors",
        f"{scenes}/tiny_clip/model/tokenizer.json",
        f"{scenes}/tiny_pickscore/model/model.safetensors",
    ):
        assert needed in found, needed
    sources = {
        str(path.relative_to(folder.parent))
        for folder in (ROOT / "star_kernels", ROOT / "python" / "star_trainer")
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    left_out = sources - found
    assert {Path(path).name for path in left_out} == {"build.py", "build_log.jsonl", "README.md"}
