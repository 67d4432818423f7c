"""Which backend an operator runs on, and what is said when it cannot be the one asked for."""

from __future__ import annotations

import logging

import pytest
import torch

import star_kernels as sk
from star_kernels import backends

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    monkeypatch.delenv("STAR_KERNELS_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def built(monkeypatch):
    monkeypatch.setattr(backends, "load_cpu_extension", lambda: None)


@pytest.fixture
def not_built(monkeypatch):
    monkeypatch.setattr(backends, "load_cpu_extension", lambda: "the extension is not built")


def test_every_backend_is_listed_with_none_or_a_reason():
    found = sk.available_backends()
    assert list(found) == ["triton", "cpu", "reference"]
    assert found["reference"] is None
    assert all(reason is None or (isinstance(reason, str) and reason) for reason in found.values())


def test_triton_is_missing_without_a_gpu_unless_it_is_interpreted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert "GPU" in (sk.available_backends()["triton"] or "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert sk.available_backends()["triton"] is None
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in (sk.available_backends()["triton"] or "")


def test_auto_takes_the_extension_for_tensors_on_the_cpu(built):
    assert backends.resolve_backend("op", "auto", CPU, ("cpu", "triton")) == "cpu"


def test_auto_takes_triton_for_tensors_on_a_gpu(monkeypatch):
    monkeypatch.setattr(backends, "_missing_triton", lambda: None)
    assert backends.resolve_backend("op", "auto", CUDA, ("cpu", "triton")) == "triton"


@pytest.mark.parametrize(("device", "kernels"), [(CPU, ("cpu",)), (CPU, ()), (CUDA, ("cpu",))])
def test_auto_falls_back_to_the_reference_and_says_so_once(not_built, caplog, device, kernels):
    backends.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="star_kernels"):
        for _ in range(2):
            assert backends.resolve_backend("some_op", "auto", device, kernels) == "reference"
    assert [record.message.startswith("some_op runs on its reference") for record in caplog.records] == [True]


@pytest.mark.parametrize("name", ["cpu", "triton"])
def test_asking_for_a_backend_that_the_operator_lacks_raises_with_the_reason(built, name):
    with pytest.raises(RuntimeError, match=f"backend='{name}' cannot run some_op: some_op has no {name} kernel"):
        backends.resolve_backend("some_op", name, CPU, ())


def test_asking_for_an_extension_that_is_not_built_raises_with_the_reason(not_built):
    with pytest.raises(RuntimeError, match="backend='cpu' cannot run some_op: the extension is not built"):
        backends.resolve_backend("some_op", "cpu", CPU, ("cpu",))


def test_asking_for_a_kernel_on_the_wrong_device_raises_with_the_reason(built):
    with pytest.raises(RuntimeError, match="its tensors are on cuda"):
        backends.resolve_backend("some_op", "cpu", CUDA, ("cpu",))
    with pytest.raises(RuntimeError, match="its tensors are on the CPU"):
        backends.resolve_backend("some_op", "triton", CPU, ("triton",))


def test_interpreted_triton_runs_on_tensors_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    assert backends.resolve_backend("op", "triton", CPU, ("triton",)) == "triton"


def test_an_unknown_backend_raises_and_the_argument_is_named():
    with pytest.raises(ValueError, match="^backend: expected one of auto, triton, cpu, reference, got 'gpu'"):
        backends.resolve_backend("op", "gpu", CPU, ())


def test_the_environment_overrides_auto_only(built, monkeypatch):
    monkeypatch.setenv("STAR_KERNELS_BACKEND", "reference")
    assert backends.resolve_backend("op", "auto", CPU, ("cpu",)) == "reference"
    assert backends.resolve_backend("op", "cpu", CPU, ("cpu",)) == "cpu"
    monkeypatch.setenv("STAR_KERNELS_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="^STAR_KERNELS_BACKEND='triton' cannot run op"):
        backends.resolve_backend("op", "auto", CPU, ("cpu",))
    monkeypatch.setenv("STAR_KERNELS_BACKEND", "gpu")
    with pytest.raises(ValueError, match="^STAR_KERNELS_BACKEND: expected one of"):
        backends.resolve_backend("op", "auto", CPU, ("cpu",))


def test_an_extension_of_other_sources_is_not_used() -> None:
    # Operators would lack what today's sources register, and a gradient could be missing without an error.
    assert backends._reason_against_extension({"interface": backends._EXTENSION_INTERFACE}) is None
    for info in ({}, {"interface": 0}, {"interface": 99}):
        reason = backends._reason_against_extension(info)
        assert reason is not None and "build it again" in reason
