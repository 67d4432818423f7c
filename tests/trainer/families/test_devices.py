"""Each process on its own GPU and each thread on its own stream, told by a torch.cuda that keeps a record."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from star_trainer.config import Reward
from star_trainer.families.devices import Handover, finish, own_device, own_worker
from star_trainer.prompts import Prompt
from star_trainer.prompts.units import chat
from star_trainer.rewards import check_reward, load_reward


class Cuda:
    """Four GPUs; as on real ones, the current one and the current stream are a thread's."""

    def __init__(self) -> None:
        self.thread = threading.local()
        self.log: list[tuple[str, ...]] = []

    def is_available(self) -> bool:
        return True

    def device_count(self) -> int:
        return 4

    def set_device(self, device: torch.device) -> None:
        self.thread.device = device.index

    def current_device(self) -> int:
        return getattr(self.thread, "device", 0)

    def is_initialized(self) -> bool:
        return True

    def Stream(self, device: torch.device) -> Stream:  # noqa: N802
        return Stream(f"own of {device}", device.index, self.log)

    def set_stream(self, stream: Stream) -> None:
        self.thread.stream, self.thread.device = stream, stream.device

    def current_stream(self, device: torch.device | None = None) -> Stream:
        device = device or torch.device("cuda", self.current_device())
        return getattr(self.thread, "stream", Stream(f"default of {device}", device.index, self.log))


class Stream:
    def __init__(self, name: str, device: int, log: list[tuple[str, ...]]) -> None:
        self.name, self.device, self.log = name, device, log

    def record_event(self) -> str:
        self.log.append(("recorded", self.name))
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.log.append(("waits", self.name, event))

    def synchronize(self) -> None:
        self.log.append(("finished", self.name))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    names = ("is_available", "is_initialized", "device_count", "set_device", "current_device", "Stream")
    for name in (*names, "set_stream", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, getattr(cuda, name))
    monkeypatch.setenv("LOCAL_RANK", "3")
    return cuda


def test_a_reward_of_ones_own_is_on_its_processes_gpu_from_its_import_on(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "reward_with_a_gpu.py").write_text(
        "import torch\nimported = torch.cuda.current_device()\n"
        "def score(images, prompts):\n"
        "    own = torch.cuda.current_stream().name.startswith('own of')\n"
        "    return [100 * own + 10 * imported + torch.cuda.current_device()] * len(prompts)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    config = Reward(terms={"reward_with_a_gpu:score": 1.0})
    try:
        # A run's settings are checked first, and that imports it.
        check_reward(config)
        reward = load_reward(config)
    finally:
        sys.modules.pop("reward_with_a_gpu", None)
    with own_worker() as worker:
        scores = worker.submit(reward, np.zeros((1, 8, 8, 3), dtype=np.uint8), [Prompt("a", {})]).result()
    assert scores.tolist() == [133.0]


def test_processes_that_are_shown_one_gpu_each_are_on_that(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert own_device() == torch.device("cuda", 3)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device() == torch.device("cuda", 0)


def test_the_chat_model_is_on_its_processes_gpu(cuda: Cuda, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    placed: list[torch.device] = []
    model = SimpleNamespace(to=placed.append)
    monkeypatch.setattr(chat, "load_whole", lambda *args, **options: model)
    tokenizer = SimpleNamespace(from_pretrained=lambda source: SimpleNamespace(chat_template="{{ messages }}"))
    monkeypatch.setattr("transformers.AutoTokenizer", tokenizer)
    chat.TransformersChat(str(tmp_path), max_new_tokens=5)
    assert placed == [torch.device("cuda", 3)]


def test_a_tensor_is_ready_before_the_other_stream_reads_it_and_the_results_before_anyone_does(cuda: Cuda) -> None:
    device = torch.device("cuda", 3)
    kept = SimpleNamespace(device=device, record_stream=lambda stream: cuda.log.append(("kept for", stream.name)))
    handover = Handover(kept)  # type: ignore[arg-type]

    def work() -> None:
        with handover.taken() as tensor:
            assert tensor is kept
            cuda.log.append(("reads",))

    with own_worker() as worker:
        worker.submit(work).result()
    finish(device)
    assert cuda.log == [
        ("recorded", "default of cuda:3"),
        ("waits", "own of cuda:3", "event of default of cuda:3"),
        ("kept for", "own of cuda:3"),
        ("reads",),
        ("finished", "own of cuda:3"),
        ("finished", "default of cuda:3"),
    ]


def test_on_a_cpu_a_tensor_is_handed_over_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tensor = torch.zeros(2)
    with own_worker() as worker:
        assert worker.submit(own_device).result() == torch.device("cpu")
    finish(tensor.device)
    with Handover(tensor).taken() as taken:
        assert taken is tensor
