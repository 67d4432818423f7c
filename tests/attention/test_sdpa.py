"""The implementation by PyTorch's own kernels: whose bits it gives, how it chooses, how kernels on GPUs are called."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from star_kernels import _operators, backends, joint_attention
from star_kernels.attention import attention_implementation, sdpa, table

aten = torch.ops.aten
IMAGE, TEXT = 41, 13
KERNELS = ("cudnn", "flash", "efficient")


def leaves(
    batch: int = 3, heads: int = 2, dim: int = 24, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> list[Tensor]:
    """query, key and value that require gradients, with their tokens outside their heads in memory."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, IMAGE + TEXT, heads, dim, generator=generator)
        .to(device, dtype)
        .transpose(1, 2)
        .requires_grad_()
        for _ in range(3)
    ]


def unit_weights(batch: int = 3) -> Tensor:
    return torch.rand(batch, TEXT, 4, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What is said once has not been said."""
    backends.say_once.cache_clear()
    # A command of the trainer that ran in this process has silenced the library.
    with caplog.at_level(logging.WARNING, logger="star_kernels"):
        yield caplog
    backends.say_once.cache_clear()


@pytest.fixture
def without_fused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device for which the table says sdpa, as for any GPU that was not measured."""
    monkeypatch.setattr(table, "implementation_for", lambda *_: "sdpa")


@pytest.mark.parametrize("units", [False, True], ids=["no capture", "capture"])
@pytest.mark.parametrize("layout", ["token-major", "head-major", "head dim outside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_out_and_gradients_are_those_of_the_kernel_alone(dtype: torch.dtype, layout: str, units: bool) -> None:
    tensors = [tensor.detach() for tensor in leaves(dtype=dtype)]
    if layout == "head-major":
        tensors = [tensor.contiguous() for tensor in tensors]
    elif layout == "head dim outside":
        tensors = [tensor.transpose(2, 3).contiguous().transpose(2, 3) for tensor in tensors]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    weights = unit_weights() if units else None
    out, _ = joint_attention(*tensors, weights, num_image_tokens=IMAGE, scale=0.3, implementation="sdpa")
    # PyTorch's kernel would read beyond the end where the head dimension is not innermost.
    readable = [tensor.contiguous() if "outside" in layout else tensor for tensor in tensors]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        expected = F.scaled_dot_product_attention(*readable, scale=0.3)
    plain = [tensor.detach() for tensor in readable]
    by_operator, log_sum_exp = aten._scaled_dot_product_flash_attention_for_cpu(*plain, scale=0.3)
    assert torch.equal(out, expected) and torch.equal(out, by_operator)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    gradients = torch.autograd.grad(out, tensors, grad)
    of_operator = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, *plain, by_operator, log_sum_exp, 0.0, False, scale=0.3
    )
    for gradient, *others in zip(gradients, torch.autograd.grad(expected, tensors, grad), of_operator, strict=True):
        assert all(torch.equal(gradient, other) for other in others)


@pytest.mark.parametrize("implementation", ["fused", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rollout_and_update_agree_bit_for_bit(dtype: torch.dtype, implementation: str) -> None:
    """With or without gradients, capture, and what is captured: of a guidance batch the conditional half."""
    tensors = leaves(batch=4, dtype=dtype)
    options: dict[str, Any] = {"num_image_tokens": IMAGE, "implementation": implementation}
    with torch.no_grad():
        rollout, mass = joint_attention(*tensors, unit_weights(4)[2:], rows=(2, 4), **options)
    update, _ = joint_attention(*tensors, **options)
    both, whole_mass = joint_attention(*tensors, unit_weights(4), **options)
    half, half_mass = joint_attention(*(tensor[2:] for tensor in tensors), unit_weights(4)[2:], **options)
    assert update.requires_grad and not rollout.requires_grad
    assert torch.equal(rollout, update) and torch.equal(rollout, both) and torch.equal(rollout[2:], half)
    assert torch.equal(mass, whole_mass[2:]) and torch.equal(mass, half_mass)


def test_autocast_casts_as_pytorch_casts() -> None:
    query, key, value = leaves()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = joint_attention(query, key, value.bfloat16(), num_image_tokens=IMAGE, implementation="sdpa")
        assert attention_implementation(query, key) == "fused"
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            expected = F.scaled_dot_product_attention(query, key, value)
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)


def test_a_flop_counter_sees_pytorchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "kernel_for", lambda query, num_keys: "flash")
    query, key, value = leaves(device="meta")
    with FlopCounterMode(display=False) as ours:
        joint_attention(query, key, value, num_image_tokens=IMAGE, implementation="sdpa")
    assert ours.get_total_flops() == 4 * query.shape[0] * query.shape[1] * (IMAGE + TEXT) ** 2 * query.shape[3]


def test_auto_is_fused_on_the_cpu_and_where_a_backend_is_asked_for(without_fused: None) -> None:
    query, key, _ = leaves()
    assert attention_implementation(query, key) == "sdpa:flash"
    assert attention_implementation(query, key, implementation="fused") == "fused"
    assert attention_implementation(query, key, backend="reference") == "fused"


def test_auto_is_what_the_table_says_of_the_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr(table, "implementation_for", lambda *arguments: asked.append(arguments) or "fused")
    query, key, _ = leaves()
    assert attention_implementation(query, key[:, :, :7]) == "fused"
    with torch.autocast("cpu", dtype=torch.bfloat16):
        attention_implementation(query, key)
    assert asked == [
        (query.device, torch.float32, 24, 7),
        (query.device, torch.bfloat16, 24, IMAGE + TEXT),
    ]


def test_pytorch_is_asked_the_same_whatever_batch_gradient_mode_and_length(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []

    def choose(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> int:
        assert mask is None
        asked.append((query.shape, key.shape, query.requires_grad, torch.is_grad_enabled()))
        return SDPBackend.CUDNN_ATTENTION.value

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    sdpa._ask.cache_clear()
    query = leaves(batch=5, heads=7)[0]
    for tensor in (query.detach(), query[:1, :, :3], query):
        with torch.set_grad_enabled(tensor.requires_grad):
            assert sdpa.kernel_for(tensor, tensor.shape[2]) == "cudnn"
    assert asked == [((1, 1, 2, 24), (1, 1, 2, 24), True, True)]
    sdpa.kernel_for(query, 1)
    assert asked[1][1] == (1, 1, 1, 24)
    sdpa._ask.cache_clear()


def test_what_the_user_switches_off_is_not_taken(log: pytest.LogCaptureFixture) -> None:
    query, key, value = leaves()
    options: dict[str, Any] = {"num_image_tokens": IMAGE, "implementation": "sdpa"}
    for _ in range(2):
        with sdpa_kernel(SDPBackend.MATH):
            assert attention_implementation(query, key, implementation="sdpa") == "fused"
            out, _ = joint_attention(query, key, value, **options)
    assert torch.equal(out, joint_attention(query, key, value, num_image_tokens=IMAGE, implementation="fused")[0])
    assert len([message for message in log.messages if "runs as fused" in message]) == 1
    assert attention_implementation(query, key, implementation="sdpa") == "sdpa:flash"


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "choice",
    [
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]),
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]),
        lambda: sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]),
        lambda: sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True),
        deterministic,
    ],
    ids=["no flash", "no efficient", "no cuDNN", "another order", "deterministic"],
)
def test_pytorch_is_asked_again_when_its_settings_change(
    choice: Callable[[], AbstractContextManager[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    query = leaves()[0]
    sdpa._ask.cache_clear()
    sdpa.kernel_for(query, 2)
    monkeypatch.setattr(torch, "_fused_sdp_choice", lambda *_: SDPBackend.EFFICIENT_ATTENTION.value)
    assert sdpa.kernel_for(query, 2) == "flash"
    with choice():
        assert sdpa.kernel_for(query, 2) == "efficient"
    assert sdpa.kernel_for(query, 2) == "flash"
    sdpa._ask.cache_clear()


def test_a_head_dimension_that_no_fused_kernel_has_runs_on_pytorchs(
    log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sdpa, "kernel_for", lambda query, num_keys: "efficient")
    query = leaves(dim=160)[0].detach().to("meta")
    assert attention_implementation(query, query, implementation="fused") == "sdpa:efficient"
    assert len(log.messages) == 1 and "above 128" in log.messages[0]
    assert attention_implementation(query, query, implementation="fused", backend="reference") == "fused"
    assert attention_implementation(query[..., :128], query, implementation="fused") == "fused"


class Calls(TorchDispatchMode):
    """The attention operators of PyTorch that run, with their arguments by name."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and "attention" in func.__name__:
            names = [argument.name for argument in func._schema.arguments]
            self.calls.append((func.__name__.split(".")[0], dict(zip(names, args, strict=False)) | (kwargs or {})))
        return func(*args, **(kwargs or {}))


def is_aligned(tensor: Tensor) -> bool:
    return tensor.stride(3) == 1 and all(step % 8 == 0 for step in (*tensor.stride()[:3], tensor.storage_offset()))


@pytest.mark.parametrize("text_lengths", [None, [TEXT, 4, 0]], ids=["whole", "by rows"])
@pytest.mark.parametrize("dim", [64, 20, 160])
@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_on_gpus_are_called_as_pytorch_calls_them(
    kernel: str, dim: int, text_lengths: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which has the shapes and the signatures of the kernels on GPUs and their derivatives."""
    monkeypatch.setattr(sdpa, "kernel_for", lambda query, num_keys: kernel)
    # Or `Calls` would see the operator that calls them row by row instead.
    monkeypatch.setattr(_operators, "is_traced", lambda arguments: False)
    tensors = leaves(dim=dim, dtype=torch.bfloat16, device="meta")
    lengths = None if text_lengths is None else torch.tensor(text_lengths)
    with Calls() as seen:
        out, _ = joint_attention(
            *tensors,
            num_image_tokens=IMAGE,
            text_lengths=lengths,
            text_first=lengths is not None,  # so that the rows' own tokens are put together
            implementation="sdpa",
        )
        gradients = torch.autograd.grad(out, tensors, torch.empty_like(out))
        _, log_sum_exp = sdpa.attention(kernel, *(tensor.detach() for tensor in tensors), dim**-0.5)
    del seen.calls[-1]
    assert log_sum_exp.shape == tensors[0].shape[:3]
    assert out.shape == tensors[0].shape
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
    name = f"_scaled_dot_product_{kernel}_attention"
    count = 1 if lengths is None else 5
    assert [called for called, _ in seen.calls] == [name] * count + [f"{name}_backward"] * count
    for called, arguments in seen.calls:
        assert all(is_aligned(arguments[which]) for which in ("query", "key", "value"))
        assert arguments["query"].shape[3] == dim + -dim % 8 and arguments["scale"] == dim**-0.5
        if "backward" not in called:
            assert kernel == "flash" or arguments["compute_log_sumexp"] is True
            continue
        num_queries = arguments["query"].shape[2]
        assert arguments["logsumexp"].is_contiguous()
        width = {"cudnn": (num_queries, 1), "flash": (num_queries,), "efficient": (num_queries + -num_queries % 32,)}
        assert arguments["logsumexp"].shape[2:] == width[kernel]
        if kernel == "efficient":
            assert arguments["out"].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("kernel", KERNELS)
def test_mass_is_taken_beside_kernels_on_gpus(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "kernel_for", lambda query, num_keys: kernel)
    tensors = [*leaves(device="meta"), unit_weights().to("meta")]
    for direction in ("image_to_text", "text_to_image"):
        out, mass = joint_attention(*tensors, num_image_tokens=IMAGE, direction=direction, implementation="sdpa")
        assert out.shape == tensors[0].shape and mass.shape == (3, IMAGE, 4)


def test_a_tensor_that_kernels_on_gpus_cannot_read_is_copied() -> None:
    shifted = torch.empty(1, 2, 5, 17, device="meta", dtype=torch.bfloat16)[..., 1:]
    strided = torch.empty(1, 2, 5, 24, device="meta", dtype=torch.bfloat16)[..., ::3]
    fine = torch.empty(1, 2, 5, 32, device="meta", dtype=torch.bfloat16)[..., 16:]
    assert is_aligned(sdpa._readable(shifted)) and is_aligned(sdpa._readable(strided))
    assert sdpa._readable(fine) is fine


def test_padding_of_log_sum_exps_reaches_no_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Efficient attention reads rows of 32; a probability behind the end is exp(-inf)."""
    given: list[Tensor] = []
    monkeypatch.setattr(
        torch.ops.aten,
        "_scaled_dot_product_efficient_attention_backward",
        lambda *arguments, scale: given.append(arguments[6]) or arguments[1:4],
    )
    query = torch.randn(1, 2, 5, 8)
    meta = query.to("meta")
    monkeypatch.setattr(sdpa, "_readable", lambda tensor: tensor)
    sdpa.backward("efficient", meta, meta, meta, meta, meta, torch.randn(1, 2, 5), 0.3)
    assert given[0].shape == (1, 2, 32) and (given[0][..., 5:] == torch.inf).all()


class OnCuda:
    """What `backward_kernel_for` looks at."""

    def __init__(self, dtype: torch.dtype, dim: int) -> None:
        self.device, self.dtype, self.shape = torch.device("cuda"), dtype, (1, 1, 5, dim)


@pytest.mark.parametrize(
    ("dtype", "dim", "capability", "expected"),
    [
        (torch.bfloat16, 64, (9, 0), "flash"),
        (torch.float16, 20, (8, 6), "flash"),
        (torch.float32, 64, (9, 0), "efficient"),
        (torch.float16, 64, (7, 5), "efficient"),
        (torch.bfloat16, 64, (7, 5), None),
        (torch.bfloat16, 200, (8, 9), "efficient"),
        (torch.float64, 64, (9, 0), None),
    ],
)
def test_the_backward_pass_of_the_fused_kernel_on_cuda(
    dtype: torch.dtype,
    dim: int,
    capability: tuple[int, int],
    expected: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    assert sdpa.backward_kernel_for(OnCuda(dtype, dim)) == expected
