"""The mass from the log-sum-exp, and the mean over heads, on the GPU (docs/method.md, section 3).

Floor, on an H100 in bf16. rows·heads·N_image·N_text exponentials, 2·(D + 16) operations of the tensor cores for each (K
up to 16 units take 16 columns), and rows·heads·(N_image + N_text)·D numbers of queries and keys. Stable Diffusion 3.5
medium at 512 px, 8 rows (S: 24 heads of 64, 1024 + 205 tokens, K 8): 40 million exponentials, 10.4 µs; 6.4 GFLOP,
6.5 µs; 31 MB, 9.3 µs. At 1024 px (L: 4096 + 333): 68, 42 and 34 µs. FLUX.1 at 1024 px, 8 rows (24 heads of 128, 4096 +
512): 104 µs of exponentials, 117 µs of tensor cores, 69 µs of memory. `bench/roofline.py` works these figures out.

Design. A program takes 128 image tokens and the heads of one group, and walks the text tokens 32 at a time (64 on
Hopper at head dimensions above 64): two products, and between them an exponential, a multiply-add and a comparison for
each pair of tokens. It adds up its heads in registers and writes the sum to a slot of its own; a second kernel adds the
slots in order, because float atomics would add them in the order of their arrival. Groups of three make 512 programs at
S, and an H100 has room for 528: a program for each head would write and read three times as many slots, one for all
heads would leave half of the GPU idle. The size of a group must not depend on the batch, or a row's sums would.
The head dimension is cut into pieces, so that the registers through which a tile of queries reaches shared memory are
few: four programs fit on an SM (three at head dimension 128), and while one waits for memory or for the tensor
cores, another computes exponentials.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._checks import check_tensor
from star_kernels._kernel_calls import KernelCall, launch
from star_kernels._triton import cast, dot, dot_rows
from star_kernels.attention import reference
from star_kernels.attention.table import Configuration, architecture_of

LOG2_E = tl.constexpr(1.4426950408889634)
_HEADS_OF_A_GROUP = 3
_MOST_TOKENS = 128  # of a tile


class Heads(NamedTuple):
    """A tensor [rows, heads, tokens, elements], or one that lacks some of these axes, and its strides, then 0."""

    data: Tensor
    row: int
    head: int
    token: int
    element: int = 0


@triton.jit
def _mass_kernel(
    image,
    text,
    units,
    normalisers,
    lengths,
    partials,
    heads,
    num_image,
    num_text,
    num_units,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_ALIGNMENT: tl.constexpr,
    GROUP: tl.constexpr,
    NORMALISE_ROWS: tl.constexpr,
):
    """BLOCK_M image tokens and BLOCK_K units of one row, GROUP heads, all text tokens: a slot of `partials`.

    The log-sum-exps belong to the image tokens with NORMALISE_ROWS (their queries meet text keys), and to the text
    tokens without (image keys meet text queries).
    """
    image_blocks, unit_blocks, groups = tl.cdiv(num_image, BLOCK_M), tl.cdiv(num_units, BLOCK_K), tl.cdiv(heads, GROUP)
    program = tl.program_id(0)
    first_image = (program % image_blocks * BLOCK_M).to(tl.int64)
    first_unit = program // image_blocks % unit_blocks * BLOCK_K
    group = program // image_blocks // unit_blocks % groups
    row = (program // image_blocks // unit_blocks // groups).to(tl.int64)

    images, tokens, dims = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    unit_range = first_unit + tl.arange(0, BLOCK_K)
    inside = images < num_image - first_image
    unit_inside = unit_range // UNIT_ALIGNMENT < num_units // UNIT_ALIGNMENT
    mass_dtype: tl.constexpr = tl.float32 if text.data.dtype.element_ty == tl.float32 else tl.bfloat16
    length = num_text
    if lengths is not None:
        length = tl.minimum(tl.maximum(tl.load(lengths + row), 0), num_text).to(tl.int32)

    image_start = image.data + row * image.row + first_image * image.token
    text_start = text.data + row * text.row
    normaliser_start = normalisers.data + row * normalisers.row
    unit_start = units.data + tl.multiple_of(row * units.row, UNIT_ALIGNMENT)
    unit_rows = tl.multiple_of(tokens * units.token, UNIT_ALIGNMENT)
    image_offsets = images[:, None] * image.token + dims * image.element
    text_offsets = tokens[:, None] * text.token + dims * text.element
    unit_offsets = unit_rows[:, None] + unit_range[None, :] * units.element
    total = tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32)
    for h in tl.range(group * GROUP, tl.minimum(group * GROUP + GROUP, heads)):
        head = tl.cast(h, tl.int64)
        pieces = ()  # of [BLOCK_M, HEAD_DIM]
        for d in tl.static_range(0, HEAD_DIM, BLOCK_D):
            first_number = image_start + (head * image.head + d * image.element)
            inside_piece = inside[:, None] & (d + dims < HEAD_DIM)
            pieces += (tl.load(first_number + image_offsets, mask=inside_piece, other=0.0),)  # type: ignore[assignment]
        head_normalisers = normaliser_start + head * normalisers.head
        if NORMALISE_ROWS:
            of_images = head_normalisers + (first_image + images) * normalisers.token
            row_normaliser = tl.load(of_images, mask=inside, other=0.0)[:, None] * LOG2_E
        for start in tl.range(0, length, BLOCK_N):
            first = tl.cast(start, tl.int64)
            valid = tokens < length - start
            logits = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for d in tl.static_range(0, HEAD_DIM, BLOCK_D):
                first_pair = text_start + (head * text.head + first * text.token + d * text.element)
                inside_tile = valid[:, None] & (d + dims < HEAD_DIM)
                text_tile = tl.load(first_pair + text_offsets, mask=inside_tile, other=0.0)
                logits = dot_rows(pieces[d // BLOCK_D], text_tile, logits)
            if NORMALISE_ROWS:
                normaliser = row_normaliser
            else:
                of_tokens = head_normalisers + (first + tokens) * normalisers.token
                normaliser = tl.load(of_tokens, mask=valid, other=0.0)[None, :] * LOG2_E
            # Above 0 by the rounding of the log-sum-exp alone, which in logits of thousands is no small number. NaN is
            # to show. Beyond the text the exponent is some finite number, and its weight 0.
            exponents = tl.minimum(tl.fma(logits, scale, -normaliser), 0.0, propagate_nan=tl.PropagateNan.ALL)
            unit_pointers = unit_start + tl.multiple_of(first * units.token, UNIT_ALIGNMENT) + unit_offsets
            weights = tl.load(unit_pointers, mask=valid[:, None] & unit_inside[None, :], other=0.0)
            if weights.dtype != mass_dtype:
                weights = cast(weights.to(tl.float32), mass_dtype)
            total = dot(cast(tl.exp2(exponents), mass_dtype), weights, total)
    slot = partials + ((row * groups + group) * num_image + first_image) * num_units
    tl.store(
        slot + (images[:, None] * num_units + unit_range[None, :]),
        total,
        mask=inside[:, None] & (unit_range < num_units)[None, :],
    )


@triton.jit(do_not_specialize=("slots", "heads", "num_elements"))
def _head_mean_kernel(partials, mass, slots, heads, num_elements, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr):
    """mass [rows, num_elements] from partials [rows, slots, num_elements], the slots in ascending order, / heads."""
    blocks = tl.cdiv(num_elements, BLOCK)
    program = tl.program_id(0)
    row = (program // blocks).to(tl.int64)
    elements = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = elements < num_elements
    slot_range = tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in tl.range(0, slots, BLOCK_H):
        chosen = first + slot_range
        pointers = partials + (row * slots + chosen)[:, None] * num_elements + elements[None, :]
        total += tl.sum(tl.load(pointers, mask=(chosen < slots)[:, None] & inside[None, :], other=0.0), 0)
    tl.store(mass + row * num_elements + elements, total / heads, mask=inside)


def configuration_for(architecture: str, dtype: torch.dtype, head_dim: int) -> Configuration:
    """Tiles for image tokens by text tokens; by the static report, not measured."""
    if architecture == "sm_90" and dtype != torch.float32 and head_dim > 64:
        # With a second stage of text tokens an SM would hold two programs at head dimension 128, not three. Others
        # would spill registers.
        return Configuration(128, 64, 4, 1)
    stages = 1 if architecture.startswith("gfx") else 2
    return Configuration(64, 16, 4, stages) if dtype == torch.float32 else Configuration(128, 32, 4, stages)


def unit_alignment(unit_weights: Tensor | None) -> int:
    """How many weights of a token may be loaded at once: 16 bytes, or one."""
    if unit_weights is None:
        return 1
    together = 16 // unit_weights.itemsize
    sizes = (unit_weights.shape[2], unit_weights.stride(0), unit_weights.stride(1))
    aligned = unit_weights.stride(2) == 1 and all(size % together == 0 for size in sizes)
    return together if aligned else 1


def within_reach(tensor: Tensor, tokens: int) -> Tensor:
    """`tensor` [..., tokens, elements], dense if a tile of `tokens` would span more than 32 bits, as kernels count."""
    step, element = tensor.stride()[-2:]
    if step < 2**22 and element < 2**22:  # and no tile has as many as 2^9 tokens and elements of one
        return tensor
    span = (min(tensor.shape[-2], tokens) - 1) * step + (tensor.shape[-1] - 1) * element
    return tensor if span < 2**31 else tensor.contiguous()


def prepare(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    text_lengths: Tensor | None,
    scale: float,
    direction: str,
    architecture: str,
) -> tuple[Tensor, list[KernelCall]]:
    """The output of `attention_mass`, not yet written, and the kernels that write it, in order."""
    to_text = direction == "image_to_text"
    image, text = (query, key) if to_text else (key, query)
    rows, heads, num_image, head_dim = image.shape
    num_units = unit_weights.shape[2]
    configuration = configuration_for(architecture, image.dtype, head_dim)
    # More at once would spill registers.
    block_k = 16 if num_units <= 16 or (image.dtype == torch.float32 and head_dim > 128) else 32
    groups = triton.cdiv(heads, _HEADS_OF_A_GROUP)
    mass = log_sum_exp.new_empty((rows, num_image, num_units))
    partials = mass.new_empty((rows, groups, num_image, num_units))
    unit_row, unit_token, unit_element = unit_weights.stride()
    arguments = {
        "image": Heads(image, *image.stride()),
        "text": Heads(text, *text.stride()),
        "units": Heads(unit_weights, unit_row, 0, unit_token, unit_element),
        "normalisers": Heads(log_sum_exp, *log_sum_exp.stride()),
        "lengths": text_lengths,
        "partials": partials,
        "heads": heads,
        "num_image": num_image,
        "num_text": text.shape[2],
        "num_units": num_units,
        "scale": scale * LOG2_E.value,
        "HEAD_DIM": head_dim,
        "BLOCK_D": 16 if head_dim <= 16 else 32,
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": block_k,
        "UNIT_ALIGNMENT": unit_alignment(unit_weights),
        "GROUP": _HEADS_OF_A_GROUP,
        "NORMALISE_ROWS": to_text,
    }
    dtype = str(image.dtype).removeprefix("torch.")
    call = KernelCall(
        f"mass from log-sum-exp, {direction.replace('_', ' ')}, {dtype}, head dim {head_dim}, {num_units} units",
        _mass_kernel,
        (triton.cdiv(num_image, configuration.block_m) * triton.cdiv(num_units, block_k) * groups * rows,),
        arguments,
        configuration.options,
    )
    return mass, [call, head_mean_call(partials, mass, heads)]


def head_mean_call(partials: Tensor, mass: Tensor, heads: int) -> KernelCall:
    """The mean over heads: mass [rows, image, K] from partials [rows, slots, image, K], sums over one head or more."""
    rows, slots, num_image_tokens, num_units = partials.shape
    num_elements = num_image_tokens * num_units
    block = 256
    return KernelCall(
        "mean over heads" if slots == heads else "mean over groups of heads",
        _head_mean_kernel,
        (rows * triton.cdiv(num_elements, block),),
        {
            "partials": partials,
            "mass": mass,
            "slots": slots,
            "heads": heads,
            "num_elements": num_elements,
            "BLOCK_H": 8,
            "BLOCK": block,
        },
        {"num_warps": 4, "enable_fp_fusion": True},
    )


def attention_mass(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    *,
    scale: float,
    text_lengths: Tensor | None,
    direction: str,
) -> Tensor:
    """Like the reference, for float32, bfloat16 and float16."""
    near = (within_reach(tensor, _MOST_TOKENS) for tensor in (query, key, unit_weights))
    return launch(prepare, (*near, log_sum_exp, text_lengths, scale, direction, architecture_of(query.device)))


def attention_mass_beside(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    text_lengths: Tensor | None,
    *tokens_and_scale: Any,
) -> Tensor:
    """`attention_mass` of some rows and tokens of the tensors that an attention was called with.

    What follows the tensors is num_image_tokens, text_first, the first row, the end of the rows, direction and scale.
    Rows and tokens are taken, and shapes are checked, where the plan of the launches is made.
    """
    near = (within_reach(tensor, _MOST_TOKENS) for tensor in (query, key, unit_weights))
    return launch(prepare_beside, (*near, log_sum_exp, text_lengths, *tokens_and_scale, architecture_of(query.device)))


def prepare_beside(
    query: Tensor,
    key: Tensor,
    unit_weights: Tensor,
    log_sum_exp: Tensor,
    text_lengths: Tensor | None,
    num_image_tokens: int,
    text_first: bool,
    first: int,
    end: int,
    direction: str,
    scale: float,
    architecture: str,
) -> tuple[Tensor, list[KernelCall]]:
    """As `prepare`."""
    check_tensor("log_sum_exp", log_sum_exp, query.shape[:3], dtypes=(torch.float32,), device=query.device)
    queries, keys = reference.captured_tokens(query.shape[2], key.shape[2], num_image_tokens, text_first, direction)
    captured, attended, rows = query[first:end, :, queries], key[first:end, :, keys], log_sum_exp[first:end, :, queries]
    num_text = (attended if direction == "image_to_text" else captured).shape[2]
    check_tensor("unit_weights", unit_weights, (end - first, num_text, "K"), device=query.device)
    lengths = None if text_lengths is None else text_lengths[first:end]
    return prepare(captured, attended, unit_weights, rows, lengths, scale, direction, architecture)


def ahead_of_time_calls(architecture: str) -> list[KernelCall]:
    """The kernels at 512 px, on tensors without memory, to be compiled: each dtype, head dimension and direction."""
    rows, heads, image, text = 8, 24, 1024, 205
    lengths = torch.empty(rows, dtype=torch.int64, device="meta")
    calls: dict[str, KernelCall] = {}
    tensors = [(dtype, head_dim) for dtype in (torch.bfloat16, torch.float32) for head_dim in (32, 64, 128, 256)]
    for dtype, head_dim in (*tensors, (torch.float16, 64)):
        shape = (rows, image + text, heads, head_dim)
        query, key = (torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2) for _ in range(2))
        log_sum_exp = torch.empty((rows, heads, image + text), device="meta")
        for num_units, direction in ((8, "image_to_text"), (17, "image_to_text"), (8, "text_to_image")):
            queries, keys = slice(0, image), slice(image, None)
            if direction == "text_to_image":
                queries, keys = keys, queries
            _, made = prepare(
                query[:, :, queries],
                key[:, :, keys],
                torch.empty(rows, text, num_units, dtype=torch.bfloat16, device="meta"),
                log_sum_exp[:, :, queries],
                lengths,
                head_dim**-0.5,
                direction,
                architecture,
            )
            calls |= {call.name: call for call in made}
    return list(calls.values())
