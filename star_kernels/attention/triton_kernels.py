"""Joint attention with attention mass on the GPU (docs/method.md, section 3).

Floor, on an H100 in bf16. The forward pass is 4·B·heads·N²·D operations of the tensor cores and B·heads·N² exponentials
over 4·B·heads·N·D numbers read or written once. SD3.5-medium at 512 px, B 8 (S: N 1024 + 205, K 8): 74 GFLOP, 75 µs;
290 million exponentials, 75 µs; 122 MB, 36 µs. At 1024 px (L: 4096 + 333): 974, 974 and 131 µs. Tensor cores and
exponentials bind alike, so they have to work side by side, and whatever capture adds must be none of the two, nor stand
in their way: no exponential, and a product with 16 columns for the text keys alone, 1.7 % of the operations at S and
0.9 % at L. `bench/roofline.py` works these figures out.

Design. One program per block of queries of one head walks the image keys, then the text keys, each in a loop of its
own; P @ U is in the second one, beside P @ V, rescaled as that is. The rows of a batch that are not captured take a
text loop without it. More than 16 units, and the other direction, are left to the mass from the log-sum-exp.

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

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels._kernel_calls import KernelCall, launch
from star_kernels._triton import cast, dot, dot_rows
from star_kernels.attention import mass_kernels, reference
from star_kernels.attention.mass_kernels import LOG2_E, Heads, head_mean_call, unit_alignment, within_reach
from star_kernels.attention.table import CONFIGURATIONS, Configuration, architecture_of, configuration_for

MAX_FUSED_UNITS = 16
_LN_2 = tl.constexpr(0.6931471805599453)
# Of a row's logits in 16-bit types, scaled, in base 2. Up to here the rounding of their maximum moves the exponents of
# the row by at most 8; further up they leave the range of float16, then that of float32.
LARGEST_LOGIT = tl.constexpr(2.0**28)


class _Units(NamedTuple):
    """The unit weights [N_text, K] of one sample, their strides, K, and how many of a token may be loaded at once."""

    data: Any
    token: Any
    element: Any
    number: Any
    together: Any


class _Keys(NamedTuple):
    """The image or the text keys of one sample and head, and their units where they are captured."""

    number: Any
    key: Heads
    value: Heads
    units: _Units | None


class _State(NamedTuple):
    """The online softmax of BLOCK_M queries over the keys so far."""

    out: Any  # [BLOCK_M, BLOCK_D], not yet divided by row_sum
    mass: Any  # [BLOCK_M, BLOCK_K], likewise; zeros [BLOCK_M] where nothing is captured: Triton 3.6 returns no None
    row_max: Any  # [BLOCK_M], in base 2; of float32, not yet scaled
    row_sum: Any  # [BLOCK_M]


@triton.jit
def _from(tokens, batch, head, first):
    """The tokens of one sample and head from the `first` on."""
    start = batch.to(tl.int64) * tokens.row + head.to(tl.int64) * tokens.head
    start += tl.cast(first, tl.int64) * tokens.token
    return Heads(tokens.data + start, tokens.row, tokens.head, tokens.token, tokens.element)


@triton.jit
def _pointers(tokens, start, rows, dims):
    start = tl.cast(start, tl.int64) * tokens.token
    return tokens.data + start + (rows[:, None] * tokens.token + dims[None, :] * tokens.element)


@triton.jit
def _attend_tile(
    state,
    query,  # [BLOCK_M, BLOCK_D]
    keys,
    start,
    scale,
    HEAD_DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One step of the online softmax: BLOCK_N keys from `start` on, or with MASKED those of them that there are."""
    tokens = tl.arange(0, BLOCK_N)
    dims = tl.arange(0, query.shape[1])
    valid = tokens < keys.number - start
    inside = (dims < HEAD_DIM)[None, :]
    if MASKED:
        inside = inside & valid[:, None]
    # Without a mask where none is needed: a copy that asks nothing goes to shared memory past the registers.
    whole: tl.constexpr = not MASKED and query.shape[1] == HEAD_DIM
    pointers = _pointers(keys.key, start, tokens, dims)
    key = tl.load(pointers) if whole else tl.load(pointers, mask=inside, other=0.0)
    logits = dot_rows(query, key, tl.zeros([query.shape[0], BLOCK_N], dtype=tl.float32))
    pointers = _pointers(keys.value, start, tokens, dims)
    value = tl.load(pointers) if whole else tl.load(pointers, mask=inside, other=0.0)
    if MASKED:
        logits = tl.where(valid[None, :], logits, float("-inf"))
    if query.dtype == tl.float32:
        # An instruction more per logit, and exact for any: what the largest is rounded to does not enter.
        row_max = tl.maximum(state.row_max, tl.max(logits, 1))
        correction = tl.exp2((state.row_max - row_max) * scale)
        exponentials = tl.exp2((logits - row_max[:, None]) * scale)
    else:
        row_max = tl.maximum(state.row_max, tl.max(logits, 1) * scale)
        correction = tl.exp2(state.row_max - row_max)
        exponentials = tl.exp2(tl.fma(logits, scale, -row_max[:, None]))
    row_sum = state.row_sum * correction + tl.sum(exponentials, 1)
    probabilities = cast(exponentials, value.dtype)
    mass = state.mass
    if keys.units is not None:
        # Before the values: where the weights are converted, this product is waited for at once, as they have no second
        # buffer then.
        columns = tl.arange(0, mass.shape[1])
        unit_mask = (columns // keys.units.together < keys.units.number // keys.units.together)[None, :]
        if MASKED:
            unit_mask = unit_mask & valid[:, None]
        unit_rows = tl.multiple_of(tokens * keys.units.token, keys.units.together)
        pointers = keys.units.data + tl.cast(start, tl.int64) * keys.units.token
        pointers += unit_rows[:, None] + columns[None, :] * keys.units.element
        weights = tl.load(pointers, mask=unit_mask, other=0.0)
        mass_dtype: tl.constexpr = tl.float32 if value.dtype == tl.float32 else tl.bfloat16
        if weights.dtype != mass_dtype:
            weights = cast(weights.to(tl.float32), mass_dtype)
        # From what the values are multiplied with: the exponentials would take registers beside it in float16.
        mass = dot(cast(probabilities.to(tl.float32), mass_dtype), weights, mass * correction[:, None])
    out = dot(probabilities, value, state.out * correction[:, None])
    return _State(out, mass, row_max, row_sum)


@triton.jit
def _row_sum(state, query):
    """What the sums of a row are divided by: NaN where 16 bits could not hold its exponentials, so that it shows."""
    if query.dtype == tl.float32:
        return state.row_sum
    else:
        return tl.where(tl.abs(state.row_max) < LARGEST_LOGIT, state.row_sum, float("nan"))


@triton.jit
def _attend_keys(state, query, keys, scale, HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr):
    """The online softmax over all of the keys: BLOCK_N at a time, then half as many, then 16.

    How many are taken at once is part of the result, by the order of its sums, and depends on their number alone.
    """
    rest = keys.number // BLOCK_N * BLOCK_N
    for start in tl.range(0, rest, BLOCK_N):
        state = _attend_tile(state, query, keys, start, scale, HEAD_DIM, BLOCK_N, MASKED=False)
    # The branch is there for ptxas: without one, it lets no matrix products of the loop overlap, since what follows
    # writes the accumulators too.
    if rest < keys.number:
        if BLOCK_N > 32 and keys.number - rest > 16:
            state = _attend_tile(state, query, keys, rest, scale, HEAD_DIM, BLOCK_N // 2, MASKED=True)
            rest += BLOCK_N // 2
        # Without units Triton 3.9 spills registers where it may choose the stages, with them 3.6 where it may not.
        for start in tl.range(rest, keys.number, 16, num_stages=1 if keys.units is None else None):
            state = _attend_tile(state, query, keys, start, scale, HEAD_DIM, 16, MASKED=True)
    return state


# Sizes that change from call to call; a kernel per divisibility of each would be compiled for nothing.
@triton.jit(
    do_not_specialize=(
        "heads",
        "num_queries",
        "num_image_queries",
        "num_image_keys",
        "num_text_keys",
        "first_row",
        "end_row",
        "num_units",
    )
)
def forward_kernel(
    query,
    key,
    value,
    out,
    units,
    text_lengths,
    log_sum_exp,
    head_mass,
    heads,
    num_queries,
    num_image_queries,
    num_image_keys,
    num_text_keys,
    first_row,
    end_row,
    num_units,
    scale,
    TEXT_FIRST: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    UNIT_ALIGNMENT: tl.constexpr,
):
    """BLOCK_M queries of one sample and head against all keys, image keys first; `units` None captures nothing."""
    query_blocks = tl.cdiv(num_queries, BLOCK_M)
    program = tl.program_id(0)
    first_query = program % query_blocks * BLOCK_M
    head = program // query_blocks % heads
    batch = program // query_blocks // heads
    first_image_query = num_queries - num_image_queries if TEXT_FIRST else 0
    first_image_key = num_text_keys if TEXT_FIRST else 0
    first_text_key = 0 if TEXT_FIRST else num_image_keys
    if text_lengths is not None:
        num_text_keys = tl.minimum(tl.load(text_lengths + batch).to(tl.int32), num_text_keys)

    # [BLOCK_M], in 64 bits also where 32 would do: ptxas then finds registers for the rest.
    queries = first_query + tl.arange(0, BLOCK_M)
    rows = queries.to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    query_mask = (queries < num_queries)[:, None] & (dims < HEAD_DIM)[None, :]
    tile = tl.load(_pointers(_from(query, batch, head, 0), 0, rows, dims), mask=query_mask, other=0.0)
    zeros = tl.zeros([BLOCK_M], dtype=tl.float32)
    state = _State(tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32), zeros, zeros - float("inf"), zeros)
    # Without a name: given one, Triton would make variables of the constants in a tuple.
    state = _attend_keys(
        state,
        tile,
        _Keys(
            num_image_keys,
            _from(key, batch, head, first_image_key),
            _from(value, batch, head, first_image_key),
            None,
        ),
        scale,
        HEAD_DIM,
        BLOCK_N,
    )

    captured = (batch >= first_row) & (batch < end_row)
    captured &= (first_query < first_image_query + num_image_queries) & (first_query + BLOCK_M > first_image_query)
    if units is not None and captured:
        row = (batch - first_row).to(tl.int64)
        weights = units.data + tl.multiple_of(row * units.row, UNIT_ALIGNMENT)
        state = _attend_keys(
            _State(state.out, tl.zeros([BLOCK_M, BLOCK_K], dtype=tl.float32), state.row_max, state.row_sum),
            tile,
            _Keys(
                num_text_keys,
                _from(key, batch, head, first_text_key),
                _from(value, batch, head, first_text_key),
                _Units(weights, units.token, units.element, num_units, UNIT_ALIGNMENT),
            ),
            scale,
            HEAD_DIM,
            BLOCK_N,
        )
        image_rows = queries - first_image_query
        columns = tl.arange(0, BLOCK_K)
        inside = (image_rows >= 0) & (image_rows < num_image_queries)
        slot = head_mass + (row * heads + head) * num_image_queries * num_units
        tl.store(
            slot + (image_rows.to(tl.int64)[:, None] * num_units + columns[None, :]),
            state.mass / _row_sum(state, tile)[:, None],
            mask=inside[:, None] & (columns < num_units)[None, :],
        )
        state = _State(state.out, zeros, state.row_max, state.row_sum)
    elif num_text_keys > 0:
        # A branch for ptxas too: one loop right behind the other is to it as bad.
        state = _attend_keys(
            state,
            tile,
            _Keys(
                num_text_keys,
                _from(key, batch, head, first_text_key),
                _from(value, batch, head, first_text_key),
                None,
            ),
            scale,
            HEAD_DIM,
            BLOCK_N,
        )

    row_sum = _row_sum(state, tile)
    row_max = state.row_max * scale if tile.dtype == tl.float32 else state.row_max
    rounded = cast(state.out / row_sum[:, None], out.data.dtype.element_ty)
    tl.store(_pointers(_from(out, batch, head, 0), 0, rows, dims), rounded, mask=query_mask)
    log_sum_exp += (batch.to(tl.int64) * heads + head) * num_queries
    tl.store(log_sum_exp + queries, (row_max + tl.log2(row_sum)) * _LN_2, mask=queries < num_queries)


def padded_head_dim(head_dim: int) -> int:
    return max(16, triton.next_power_of_2(head_dim))


def prepare(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    unit_weights: Tensor | None,
    text_lengths: Tensor | None,
    num_image_tokens: int,
    text_first: bool,
    scale: float,
    rows: tuple[int, int],
    configuration: Configuration,
) -> tuple[tuple[Tensor, Tensor | None, Tensor], list[KernelCall]]:
    """The outputs of attention that captures M or nothing, not yet written, and the kernels that write them in order.

    At most MAX_FUSED_UNITS units.
    """
    batch, heads, num_queries, head_dim = query.shape
    num_text_keys = reference.num_text_keys(num_queries, key.shape[2], num_image_tokens)
    out = reference.token_major(query)
    log_sum_exp = query.new_empty(query.shape[:3], dtype=torch.float32)
    units = mass = head_mass = None
    num_units = 0
    if unit_weights is not None:
        num_rows, num_units = rows[1] - rows[0], unit_weights.shape[2]
        mass = query.new_empty((num_rows, num_image_tokens, num_units), dtype=torch.float32)
        head_mass = mass.new_empty((num_rows, heads, num_image_tokens, num_units))
        row, token, element = unit_weights.stride()
        units = Heads(unit_weights, row, 0, token, element)
    arguments = {
        "query": Heads(query, *query.stride()),
        "key": Heads(key, *key.stride()),
        "value": Heads(value, *value.stride()),
        "out": Heads(out, *out.stride()),
        "units": units,
        "text_lengths": text_lengths,
        "log_sum_exp": log_sum_exp,
        "head_mass": head_mass,
        "heads": heads,
        "num_queries": num_queries,
        "num_image_queries": num_image_tokens,
        "num_image_keys": key.shape[2] - num_text_keys,
        "num_text_keys": num_text_keys,
        "first_row": rows[0],
        "end_row": rows[1],
        "num_units": num_units,
        "scale": scale * LOG2_E.value,
        "TEXT_FIRST": text_first,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_M": configuration.block_m,
        "BLOCK_N": configuration.block_n,
        "BLOCK_K": max(16, triton.next_power_of_2(num_units)),
        "UNIT_ALIGNMENT": unit_alignment(unit_weights),
    }
    name = f"forward, {str(query.dtype).removeprefix('torch.')}, head dim {head_dim}, "
    name += f"{num_units} units" if num_units else "no capture"
    name += "" if text_lengths is None else ", text lengths"
    grid = (triton.cdiv(num_queries, configuration.block_m) * heads * batch,)
    calls = [KernelCall(name, forward_kernel, grid, arguments, configuration.options)]
    if mass is not None and head_mass is not None:
        calls.append(head_mean_call(head_mass, mass, heads))
    return (out, mass, log_sum_exp), calls


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
    text_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Attention, the mass of this layer in one `direction`, and the log-sum-exp, as the reference defines them.

    In 16-bit types a row with a logit of LARGEST_LOGIT is NaN in all three. No sample without keys is looked for.
    """
    fused = direction == "image_to_text" and (unit_weights is None or unit_weights.shape[2] <= MAX_FUSED_UNITS)
    configuration = configuration_for(architecture_of(query.device), query.dtype, query.shape[3])
    query, key, value = (within_reach(tensor, configuration.block_n) for tensor in (query, key, value))
    if unit_weights is not None:
        unit_weights = within_reach(unit_weights, configuration.block_n)
    if text_lengths is not None:
        text_lengths = text_lengths.contiguous()
    given = (query, key, value, unit_weights if fused else None, text_lengths)
    out, mass, log_sum_exp = launch(prepare, (*given, num_image_tokens, text_first, scale, rows, configuration))
    if unit_weights is not None and not fused:
        tokens = (num_image_tokens, text_first, *rows, direction)
        mass = mass_kernels.attention_mass_beside(query, key, unit_weights, log_sum_exp, text_lengths, *tokens, scale)
    return out, mass, log_sum_exp


def ahead_of_time_calls(architecture: str) -> list[KernelCall]:
    """The kernels of each row of the configuration table at 512 px, on tensors without memory, to be compiled.

    In bfloat16 and float32, and in float16 attention at the head dimension of Stable Diffusion 3.5; then those of the
    mass from the log-sum-exp.
    """
    batch, heads, image, text = 8, 24, 1024, 205
    lengths = torch.empty(batch, dtype=torch.int64, device="meta")
    dtypes = {2: torch.bfloat16, 4: torch.float32}
    rows = [(dtypes[itemsize], head_dim) for itemsize, head_dim in CONFIGURATIONS[architecture]]
    calls: dict[str, KernelCall] = {}
    for dtype, head_dim in (*rows, (torch.float16, 64)):
        shape = (batch, image + text, heads, head_dim)
        query, key, value = (torch.empty(shape, dtype=dtype, device="meta").transpose(1, 2) for _ in range(3))
        scalars = (image, False, head_dim**-0.5, (0, batch), configuration_for(architecture, dtype, head_dim))
        units = torch.empty(batch, text, 8, device="meta")
        uses = ((None, None), (units, None), (units, lengths))
        for unit_weights, text_lengths in uses[:2] if dtype == torch.float16 else uses:
            _, row = prepare(query, key, value, unit_weights, text_lengths, *scalars)
            calls |= {call.name: call for call in row}
    return [*calls.values(), *mass_kernels.ahead_of_time_calls(architecture)]
