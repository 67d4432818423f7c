"""What has to be settled before anything is imported: Triton's interpreter where there is no GPU, and no downloads."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"  # a name that no folder has is then refused at once, not after five attempts


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start what takes longest first: at the end the other workers would wait for it."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], None]], Path]:
    """`made_once(name, make)`: a folder to read that `make` has filled, once for all workers of pytest-xdist."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def folder(name: str, make: Callable[[Path], None]) -> Path:
        path, done = root / name, root / f"{name}.made"
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(path, ignore_errors=True)  # of a worker that failed
                path.mkdir()
                make(path)
                done.touch()
        return path

    return folder


@pytest.fixture(scope="session")
def triton_cache(made_once: Callable[[str, Callable[[Path], None]], Path]) -> Path:
    """What one test has compiled, no other one compiles again; Triton lets several processes share such a folder."""
    return made_once("triton_cache", lambda folder: None)
