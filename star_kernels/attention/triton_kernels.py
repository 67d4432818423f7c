"""Joint attention with attention mass on the GPU (docs/method.md, section 3).

Floor, on an H100 in bf16. The forward pass is 4·B·heads·N²·D operations of the tensor cores and B·heads·N² exponentials
over 4·B·heads·N·D numbers read or written once. SD3.5-medium at 512 px, B 8 (S: N 1024 + 205, K 8): 74 GFLOP, 75 µs;
290 million exponentials, 75 µs; 122 MB, 36 µs. At 1024 px (L: 4096 + 333): 974, 974 and 131 µs. Tensor cores and
exponentials bind alike, so they have to work side by side, and whatever capture adds must be none of the two, nor stand
in their way: no exponential, and a product with 16 columns for the text keys alone, 1.7 % of the operations at S and
0.9 % at L. `bench/roofline.py` works these figures out.

Design. One program per block of queries of one head walks the image keys, then the text keys, each in a loop of its
own; P @ U is in the second one, beside P @ V, rescaled as that is. The rows of a batch that are not captured take a
text loop without it. More than 16 units, and the other direction, are a second kernel that takes P again from the
log-sum-exp.

The mean over heads. Float atomics would add the heads in the order of their arrival, so a head writes its mass to a
slot of its own and a second kernel adds the slots in order. At S the slots are 6.3 MB, written once and read once,
3.8 µs of memory time that the L2 cache (50 MB) largely takes over, and a launch; at L 25 MB, 15 µs: 5 % and 1.5 % of
the floor before the cache. The other scheme, one program that goes through all heads of its block, writes the mass
alone (0.26 MB and 1 MB) in one launch. But S then has 80 programs of 128 queries for 132 SMs, so that 52 idle: at
least 1.65 times the whole pass. L has 280 where 264 fit, two on an SM, and 16 of them in a second round that takes as
long as the first. Slots are cheaper. Slots of all 24 layers with one reduction per step would save launches and move
the same bytes, but hold 0.15 GB at S and 0.6 GB at L.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._kernel_calls import KernelCall
from star_kernels._triton import cast, dot, dot_rows
from star_kernels.attention import mass_kernels, reference
from star_kernels.attention.mass_kernels import LOG2_E, head_mean_call, unit_alignment, within_reach
from star_kernels.attention.table import CONFIGURATIONS, Configuration, architecture_of, configuration_for

MAX_FUSED_UNITS = 16
_LN_2 = tl.constexpr(0.6931471805599453)
# Of a scaled row maximum: from here on float32 is so coarse that its rounding moves every exponent of the row by up to
# 8, further up beyond what exp2 can take.
_HUGE = 2.0**28
# Of a log-sum-exp: from here on its rounding changes what is taken from it by a factor of up to 3.
_COARSE = tl.constexpr(2.0**22)


# Sizes that change from call to call; a kernel per divisibility of each would be compiled for nothing.
_SIZES = (
    "heads",
    "num_queries",
    "first_image_query",
    "num_image_queries",
    "first_image_key",
    "num_image_keys",
    "first_text_key",
    "num_text_keys",
    "first_row",
    "end_row",
    "num_units",
)


@triton.jit
def _attend_tile(
    accumulator,  # [BLOCK_M, BLOCK_D]
    mass,  # [BLOCK_M, BLOCK_K] with CAPTURE, otherwise any tensor, which passes through
    largest,  # [BLOCK_M], of the logits
    row_max,  # [BLOCK_M], that times the row's scale
    row_sum,  # [BLOCK_M]
    query,  # [BLOCK_M, BLOCK_D]
    key_ptr,
    value_ptr,
    unit_ptr,
    key_stride_n,
    key_stride_d,
    value_stride_n,
    value_stride_d,
    unit_stride_n,
    unit_stride_k,
    keys_left,
    num_units,
    scale,
    huge_scale,
    huge_logit,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_ALIGNMENT: tl.constexpr,
    MASKED: tl.constexpr,
    CAPTURE: tl.constexpr,
):
    """One step of the online softmax: the BLOCK_N keys that the pointers show, or with MASKED those of them left."""
    tokens = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    key_pointers = key_ptr + (tokens[:, None] * key_stride_n + dims[None, :] * key_stride_d)
    value_pointers = value_ptr + (tokens[:, None] * value_stride_n + dims[None, :] * value_stride_d)
    valid = tokens < keys_left
    tile_mask = (dims < HEAD_DIM)[None, :]
    if MASKED:
        tile_mask = tile_mask & valid[:, None]
    # Without a mask where none is needed: a copy that asks nothing goes to shared memory past the registers.
    whole: tl.constexpr = not MASKED and HEAD_DIM == BLOCK_D
    key = tl.load(key_pointers) if whole else tl.load(key_pointers, mask=tile_mask, other=0.0)
    logits = dot_rows(query, key, tl.zeros([query.shape[0], BLOCK_N], dtype=tl.float32))
    value = tl.load(value_pointers) if whole else tl.load(value_pointers, mask=tile_mask, other=0.0)
    if MASKED:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    # In a row whose maximum would be huge the scale is a power of two, so that the maximum is exact and the largest
    # exponent 0. Two logits that differ are then so far apart, by 16 or more in the exponent, that a scale up to twice
    # as large changes no probability by more than 2^-16. This is work per row; a minimum, or a difference before the
    # product, would be an instruction per logit.
    largest = tl.maximum(largest, tl.max(logits, 1))
    row_scale = tl.where(tl.abs(largest) < huge_logit, scale, huge_scale)
    # By fma, so that the difference of two maxima is that of the rounded products, as it is to the exponents.
    new_max = tl.fma(largest, row_scale, 0.0)
    exponentials = tl.exp2(tl.fma(logits, row_scale[:, None], -new_max[:, None]))
    correction = tl.exp2(row_max - new_max)
    row_sum = row_sum * correction + tl.sum(exponentials, 1)
    probabilities = cast(exponentials, value.dtype)
    if CAPTURE:
        # Before the values: where the weights are converted, this product is waited for at once, as they have no second
        # buffer then.
        units = tl.arange(0, BLOCK_K)
        unit_mask = (units // UNIT_ALIGNMENT < num_units // UNIT_ALIGNMENT)[None, :]
        if MASKED:
            unit_mask = unit_mask & valid[:, None]
        unit_rows = tl.multiple_of(tokens * unit_stride_n, UNIT_ALIGNMENT)
        unit_pointers = unit_ptr + (unit_rows[:, None] + units[None, :] * unit_stride_k)
        weights = tl.load(unit_pointers, mask=unit_mask, other=0.0)
        mass_dtype: tl.constexpr = tl.float32 if value.dtype == tl.float32 else tl.bfloat16
        if weights.dtype != mass_dtype:
            weights = cast(weights.to(tl.float32), mass_dtype)
        # From what the values are multiplied with: the exponentials would take registers beside it in float16.
        mass = dot(cast(probabilities.to(tl.float32), mass_dtype), weights, mass * correction[:, None])
    accumulator = dot(probabilities, value, accumulator * correction[:, None])
    return accumulator, mass, largest, new_max, row_sum


@triton.jit
def _attend_keys(
    accumulator,
    mass,
    largest,
    row_max,
    row_sum,
    query,
    key_ptr,
    value_ptr,
    unit_ptr,
    key_stride_n,
    key_stride_d,
    value_stride_n,
    value_stride_d,
    unit_stride_n,
    unit_stride_k,
    num_keys,
    num_units,
    scale,
    huge_scale,
    huge_logit,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_ALIGNMENT: tl.constexpr,
    TAIL: tl.constexpr,
    CAPTURE: tl.constexpr,
):
    """The online softmax over `num_keys` keys: BLOCK_N at a time, then the rest in one tile of TAIL."""
    num_full = num_keys // BLOCK_N * BLOCK_N
    for start in tl.range(0, num_full, BLOCK_N):
        first = tl.cast(start, tl.int64)
        accumulator, mass, largest, row_max, row_sum = _attend_tile(
            accumulator,
            mass,
            largest,
            row_max,
            row_sum,
            query,
            key_ptr + first * key_stride_n,
            value_ptr + first * value_stride_n,
            unit_ptr + first * unit_stride_n if CAPTURE else unit_ptr,
            key_stride_n,
            key_stride_d,
            value_stride_n,
            value_stride_d,
            unit_stride_n,
            unit_stride_k,
            num_keys,
            num_units,
            scale,
            huge_scale,
            huge_logit,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            BLOCK_K,
            UNIT_ALIGNMENT,
            MASKED=False,
            CAPTURE=CAPTURE,
        )
    if TAIL > 0 and num_full < num_keys:
        # Always so where there is a TAIL. The branch is there for ptxas: without one, it lets no matrix products of the
        # loop overlap, since what follows writes the accumulators too.
        first = tl.cast(num_full, tl.int64)
        accumulator, mass, largest, row_max, row_sum = _attend_tile(
            accumulator,
            mass,
            largest,
            row_max,
            row_sum,
            query,
            key_ptr + first * key_stride_n,
            value_ptr + first * value_stride_n,
            unit_ptr + first * unit_stride_n if CAPTURE else unit_ptr,
            key_stride_n,
            key_stride_d,
            value_stride_n,
            value_stride_d,
            unit_stride_n,
            unit_stride_k,
            num_keys - num_full,
            num_units,
            scale,
            huge_scale,
            huge_logit,
            HEAD_DIM,
            BLOCK_D,
            TAIL,
            BLOCK_K,
            UNIT_ALIGNMENT,
            MASKED=True,
            CAPTURE=CAPTURE,
        )
    return accumulator, mass, largest, row_max, row_sum


@triton.jit(do_not_specialize=_SIZES)
def forward_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    unit_ptr,
    out_ptr,
    log_sum_exp_ptr,
    head_mass_ptr,
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    out_stride_b,
    out_stride_h,
    out_stride_n,
    out_stride_d,
    unit_stride_b,
    unit_stride_n,
    unit_stride_k,
    heads,
    num_queries,
    first_image_query,
    num_image_queries,
    first_image_key,
    num_image_keys,
    first_text_key,
    num_text_keys,
    first_row,
    end_row,
    num_units,
    scale,
    huge_scale,
    huge_logit,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_ALIGNMENT: tl.constexpr,
    IMAGE_TAIL: tl.constexpr,
    TEXT_TAIL: tl.constexpr,
):
    """BLOCK_M queries of one sample and head against all keys, image keys first. BLOCK_K = 0 captures nothing."""
    query_blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    first_query = program % query_blocks * BLOCK_M
    head = program // query_blocks % heads
    batch = program // query_blocks // heads
    head64 = head.to(tl.int64)
    batch64 = batch.to(tl.int64)

    queries = first_query + tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    query_mask = (queries < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    query = tl.load(
        query_ptr
        + (batch64 * query_stride_b + head64 * query_stride_h)
        + (queries.to(tl.int64)[:, None] * query_stride_n + dims[None, :] * query_stride_d),
        mask=query_mask,
        other=0.0,
    )
    key_ptr += batch64 * key_stride_b + head64 * key_stride_h
    value_ptr += batch64 * value_stride_b + head64 * value_stride_h
    accumulator = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    largest = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)

    first_image = tl.cast(first_image_key, tl.int64)
    accumulator, _, largest, row_max, row_sum = _attend_keys(
        accumulator,
        row_sum,
        largest,
        row_max,
        row_sum,
        query,
        key_ptr + first_image * key_stride_n,
        value_ptr + first_image * value_stride_n,
        unit_ptr,
        key_stride_n,
        key_stride_d,
        value_stride_n,
        value_stride_d,
        unit_stride_n,
        unit_stride_k,
        num_image_keys,
        num_units,
        scale,
        huge_scale,
        huge_logit,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        BLOCK_K,
        UNIT_ALIGNMENT,
        TAIL=IMAGE_TAIL,
        CAPTURE=False,
    )

    first_text = tl.cast(first_text_key, tl.int64)
    key_ptr += first_text * key_stride_n
    value_ptr += first_text * value_stride_n
    captured = (
        (batch >= first_row)
        & (batch < end_row)
        & (first_query < first_image_query + num_image_queries)
        & (first_query + BLOCK_M > first_image_query)
    )
    if BLOCK_K > 0 and captured:
        row = batch64 - first_row
        accumulator, mass, largest, row_max, row_sum = _attend_keys(
            accumulator,
            tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32),
            largest,
            row_max,
            row_sum,
            query,
            key_ptr,
            value_ptr,
            unit_ptr + tl.multiple_of(row * unit_stride_b, UNIT_ALIGNMENT),
            key_stride_n,
            key_stride_d,
            value_stride_n,
            value_stride_d,
            unit_stride_n,
            unit_stride_k,
            num_text_keys,
            num_units,
            scale,
            huge_scale,
            huge_logit,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            BLOCK_K,
            UNIT_ALIGNMENT,
            TAIL=TEXT_TAIL,
            CAPTURE=True,
        )
        image_rows = first_query - first_image_query + tl.arange(0, BLOCK_M)
        units = tl.arange(0, BLOCK_K)
        valid = (image_rows >= 0) & (image_rows < num_image_queries)
        slot = head_mass_ptr + (row * heads + head64) * num_image_queries * num_units
        tl.store(
            slot + (image_rows.to(tl.int64)[:, None] * num_units + units[None, :]),
            mass / row_sum[:, None],
            mask=valid[:, None] & (units < num_units)[None, :],
        )
    elif num_text_keys > 0:
        # A branch for ptxas too: one loop right behind the other is to it as bad.
        accumulator, _, largest, row_max, row_sum = _attend_keys(
            accumulator,
            row_sum,
            largest,
            row_max,
            row_sum,
            query,
            key_ptr,
            value_ptr,
            unit_ptr,
            key_stride_n,
            key_stride_d,
            value_stride_n,
            value_stride_d,
            unit_stride_n,
            unit_stride_k,
            num_text_keys,
            num_units,
            scale,
            huge_scale,
            huge_logit,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            BLOCK_K,
            UNIT_ALIGNMENT,
            TAIL=TEXT_TAIL,
            CAPTURE=False,
        )

    tl.store(
        out_ptr
        + (batch64 * out_stride_b + head64 * out_stride_h)
        + (queries.to(tl.int64)[:, None] * out_stride_n + dims[None, :] * out_stride_d),
        cast(accumulator / row_sum[:, None], out_ptr.dtype.element_ty),
        mask=query_mask,
    )
    row_max = tl.where(tl.abs(largest) < huge_logit, row_max, largest * scale)
    log_sum_exp = (row_max + tl.log2(row_sum)) * _LN_2
    # Where float32 cannot tell a probability from its double any more: up, by more than all roundings until a
    # probability is taken from it, so that none overflows.
    log_sum_exp += tl.where(tl.abs(log_sum_exp) < _COARSE, 0.0, tl.abs(log_sum_exp) * 2.0**-21)
    tl.store(
        log_sum_exp_ptr + (batch64 * heads + head64) * num_queries + queries,
        log_sum_exp,
        mask=queries < num_queries,
    )


def _tail(num_keys: int, block_n: int) -> int:
    """The size of the tile that holds the keys left over after whole tiles, 0 where none is."""
    left = num_keys % block_n
    return max(16, triton.next_power_of_2(left)) if left else 0


def padded_head_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def forward_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None,
    out: Tensor,
    log_sum_exp: Tensor,
    head_mass: Tensor | None,
    *,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    rows: tuple[int, int],
    configuration: Configuration,
) -> KernelCall:
    """The attention kernel for these tensors: out, log_sum_exp and, with unit weights, head_mass are written."""
    batch, heads, num_queries, head_dim = query.shape
    image_queries, _, image_keys, text_keys = reference.token_slices(
        num_queries, key.shape[2], num_image_tokens, text_first
    )
    num_image_keys, num_text_keys = image_keys.stop - image_keys.start, text_keys.stop - text_keys.start
    num_units = 0 if unit_weights is None else unit_weights.shape[2]
    unit_strides = (0, 0, 0) if unit_weights is None else unit_weights.stride()
    arguments = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "unit_ptr": unit_weights,
        "out_ptr": out,
        "log_sum_exp_ptr": log_sum_exp,
        "head_mass_ptr": head_mass,
        **{
            f"{name}_stride_{axis}": stride
            for name, tensor in (("query", query), ("key", key), ("value", value), ("out", out))
            for axis, stride in zip("bhnd", tensor.stride(), strict=True)
        },
        **{f"unit_stride_{axis}": stride for axis, stride in zip("bnk", unit_strides, strict=True)},
        "heads": heads,
        "num_queries": num_queries,
        "first_image_query": image_queries.start,
        "num_image_queries": num_image_tokens,
        "first_image_key": image_keys.start,
        "num_image_keys": num_image_keys,
        "first_text_key": text_keys.start,
        "num_text_keys": num_text_keys,
        "first_row": rows[0],
        "end_row": rows[1],
        "num_units": num_units,
        "scale": scale * LOG2_E.value,
        "huge_scale": 2.0 ** min(127, math.frexp(scale * LOG2_E.value)[1]),
        "huge_logit": min(_HUGE / (scale * LOG2_E.value), 3e38),
    }
    constants = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": 0 if num_units == 0 else max(16, triton.next_power_of_2(num_units)),
        "UNIT_ALIGNMENT": unit_alignment(unit_weights),
        "IMAGE_TAIL": _tail(num_image_keys, configuration.block_n),
        "TEXT_TAIL": _tail(num_text_keys, configuration.block_n),
    }
    dtype = str(query.dtype).removeprefix("torch.")
    return KernelCall(
        f"forward, {dtype}, head dim {head_dim}, " + (f"{num_units} units" if num_units else "no capture"),
        forward_kernel,
        (triton.cdiv(num_queries, configuration.block_m) * heads * batch,),
        arguments | constants,
        configuration.options,
    )


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None = None,
    *,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    rows: tuple[int, int],
    configuration: Configuration,
) -> tuple[tuple[Tensor, Tensor | None, Tensor], list[KernelCall]]:
    """The outputs of attention that captures M or nothing, not yet written, and the kernels that write them in order.

    At most MAX_FUSED_UNITS units.
    """
    out = reference.token_major(query)
    query, key, value = (within_reach(tensor, configuration.block_n) for tensor in (query, key, value))
    unit_weights = None if unit_weights is None else within_reach(unit_weights, configuration.block_n)
    log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
    mass = head_mass = None
    if unit_weights is not None:
        num_rows, num_units = rows[1] - rows[0], unit_weights.shape[2]
        mass = query.new_empty((num_rows, num_image_tokens, num_units), dtype=torch.float32)
        head_mass = mass.new_empty((num_rows, query.shape[1], num_image_tokens, num_units))
    forward = forward_call(
        query,
        key,
        value,
        unit_weights,
        out,
        log_sum_exp,
        head_mass,
        num_image_tokens=num_image_tokens,
        text_first=text_first,
        scale=scale,
        rows=rows,
        configuration=configuration,
    )
    outputs = (out, mass, log_sum_exp)
    if mass is None or head_mass is None:
        return outputs, [forward]
    return outputs, [forward, head_mean_call(head_mass, mass, query.shape[1])]


def joint_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None = None,
    *,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    rows: tuple[int, int],
    direction: str = "image_to_text",
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attention, the mass of this layer in one `direction`, and the log-sum-exp, as the reference defines them."""
    fused = direction == "image_to_text" and (unit_weights is None or unit_weights.shape[2] <= MAX_FUSED_UNITS)
    (out, mass, log_sum_exp), calls = prepare(
        query,
        key,
        value,
        unit_weights if fused else None,
        num_image_tokens=num_image_tokens,
        text_first=text_first,
        scale=scale,
        rows=rows,
        configuration=configuration_for(architecture_of(query.device), query.dtype, query.shape[3]),
    )
    with torch.cuda.device_of(query):
        for call in calls:
            call.launch()
    if unit_weights is not None and not fused:
        image_queries, text_queries, image_keys, text_keys = reference.token_slices(
            query.shape[2], key.shape[2], num_image_tokens, text_first
        )
        queries, keys = (image_queries, text_keys) if direction == "image_to_text" else (text_queries, image_keys)
        captured = slice(*rows)
        mass = mass_kernels.attention_mass(
            query[captured, :, queries],
            key[captured, :, keys],
            unit_weights,
            log_sum_exp[captured, :, queries],
            scale=scale,
            text_lengths=None,
            direction=direction,
        )
    return out, mass, log_sum_exp


def ahead_of_time_calls(architecture: str) -> list[KernelCall]:
    """The kernels of each row of the configuration table at 512 px, on tensors without memory, to be compiled.

    In bfloat16 and float32, and in float16 attention at the head dimension of Stable Diffusion 3.5; then those of the
    mass from the log-sum-exp.
    """
    batch, heads, image, text = 8, 24, 1024, 205
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    rows = [(dtypes[itemsize], head_dim) for itemsize, head_dim in CONFIGURATIONS[architecture]]
    calls: dict[str, KernelCall] = {}
    for dtype, head_dim in (*rows, (torch.float16, 64)):
        shape = (batch, image + text, heads, head_dim)
        query, key, value = (torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2) for _ in range(3))
        for num_units in (0, 8):
            _, row = prepare(
                query,
                key,
                value,
                torch.empty(batch, text, num_units, device="meta") if num_units else None,
                num_image_tokens=image,
                text_first=False,
                scale=head_dim**-0.5,
                rows=(0, batch),
                configuration=configuration_for(architecture, dtype, head_dim),
            )
            calls |= {call.name: call for call in row}
    return [*calls.values(), *mass_kernels.ahead_of_time_calls(architecture)]
