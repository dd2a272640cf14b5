"""Attention to the entries of a cache in two stages: splits of fixed length side by side, then their combination.

Every key and value is read once for up to `ROWS` query rows that share it. The result does not depend on the order in
which programs run: there are no atomic additions, and the splits are combined in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..exact.entries import Reached, Rest, attend_copies, places_of
from .combine import N_WARPS, Partials, combined, empty_partials

__all__ = [
    "N_STAGES",
    "N_WARPS",
    "ROWS",
    "SPLIT",
    "attend",
    "attend_checked",
    "attend_places",
    "attend_ragged",
    "attend_recalled",
    "entries_of_step",
    "split_kernel",
    "splits_of",
    "write_splits",
]

ROWS = 16  # query rows of a program; tensor cores take no fewer
SPLIT = 256  # entries of a program
N_STAGES = 2


def entries_of_step(is_float32: bool) -> int:
    """Entries that a program works on at once: exact products in float32 need registers, which more would exceed."""
    return 16 if is_float32 else 64


def splits_of(entries: int) -> int:
    """How many splits so many entries are."""
    return triton.cdiv(entries, SPLIT)


def attend_places(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, rest: Rest | None, scale: float
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_places`; without `rest` rows are read where they lie."""
    if rest is not None:
        return attend_copies(attend, query, keys, values, places, rest, scale)
    on_heads = (query.unsqueeze(0), keys.unsqueeze(0), values.unsqueeze(0))
    return attend(*on_heads, None, 1, scale, places=places)[0]


def attend_recalled(
    query: Tensor, reached: Reached, taken: Tensor | None, n_recalled: int, rest: Rest | None, scale: float
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_recalled`."""
    return attend_places(query, reached.keys, reached.values, places_of(reached, taken, n_recalled), rest, scale)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    queries: int,
    scale: float,
    places: Tensor | None = None,
) -> Tensor:
    """Attention output (batch, heads, rows, dim_value), in the dtype of `query`.

    Parameters
    ----------
    query : (batch, heads, rows, dim); float16, bfloat16 or float32; row r belongs to new token r % queries.
    keys, values : (batch, heads, entries, dim or dim_value), any strides; dim and dim_value at most 256.
    counts : (batch, heads, entries), int32, any strides; None where every count is 1.
    queries : how many of the entries, the last ones, are the new tokens; each row sees the entries up to its own.
    places : (batch * heads, entries), int64, any strides: where in keys and values each entry lies, -1 if there is none
        (at least one of a head must be there). Read there: no gathered copy is made. None: in their order.
    """
    entries = values.shape[2] if places is None else places.shape[1]
    return attend_heads(query, keys, values, counts, queries, scale, entries=entries, places=places)


def attend_checked(
    query: Tensor, keys: Tensor, values: Tensor, counts: Tensor | None, queries: int, scale: float
) -> tuple[Tensor, bool]:
    """As `kvcluster.fast.plain.attention.attend_checked`; the output is that of `attend` where all is finite."""
    output = attend_heads(query, keys, values, counts, queries, scale, entries=values.shape[2], is_checked=True)
    return output, bool(output.isfinite().all())


def attend_ragged(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor,
    lengths: tuple[int, ...],
    firsts: tuple[int, ...],
    queries: int,
    scale: float,
) -> Tensor:
    """As `kvcluster.fast.plain.attention.attend_ragged`, read where the entries lie, by one launch for all heads."""
    heads = torch.tensor([lengths, firsts], device=query.device)
    keys, values, counts = (x.unsqueeze(1) for x in (keys, values, counts))
    return attend_heads(query, keys, values, counts, queries, scale, entries=max(lengths), ragged=heads)


def attend_heads(query: Tensor, keys: Tensor, values: Tensor, *others: Any, entries: int, **options: Any) -> Tensor:
    """The launches of `attend` and of `attend_ragged`, whose `write_splits` says what the arguments are."""
    partials = empty_partials(splits_of(entries), query, values.shape[3])
    write_splits(partials, query, keys, values, *others, entries=entries, **options)
    return combined(partials).to(query.dtype)


def write_splits(
    partials: Partials,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    counts: Tensor | None,
    queries: int,
    scale: float,
    *,
    entries: int,
    places: Tensor | None = None,
    ragged: Tensor | None = None,
    is_checked: bool = False,
) -> None:
    """Write what each split of the entries has seen, into the first of the `partials`.

    Parameters
    ----------
    entries : of the head that has most.
    ragged : (2, heads), int64: entries of each head, and the place of its first; keys, values and counts then have one
        axis of length 1 in place of the heads.
    is_checked : let a product of query and key that is not finite make the output NaN, minus infinity too.
    """
    batch, heads, rows, dim = query.shape
    dim_value = values.shape[3]
    dtypes = {query.dtype, keys.dtype, values.dtype}
    # Triton's interpreter multiplies bfloat16 wrongly; several dtypes meet in float32.
    widen = len(dtypes) > 1 or (triton.knobs.runtime.interpret and torch.bfloat16 in dtypes)
    block_dim = max(16, triton.next_power_of_2(dim))
    split_kernel[(splits_of(entries), triton.cdiv(rows, ROWS), batch * heads)](
        query.contiguous(),
        keys,
        values,
        keys if counts is None else counts,
        keys if places is None else places,
        keys if ragged is None else ragged,
        *partials,
        heads,
        rows,
        queries,
        entries,
        scale,
        *keys.stride(),
        *values.stride(),
        *((0, 0, 0) if counts is None else counts.stride()),
        *((0, 0) if places is None else places.stride()),
        HAS_COUNTS=counts is not None,
        HAS_PLACES=places is not None,
        IS_RAGGED=ragged is not None,
        IS_CHECKED=is_checked,
        DIM=dim,
        BLOCK_DIM=block_dim,
        DIM_VALUE=dim_value,
        BLOCK_VALUE=max(16, triton.next_power_of_2(dim_value)),
        ROWS=ROWS,
        ENTRIES=entries_of_step(widen or query.dtype == torch.float32),
        SPLIT=SPLIT,
        WIDEN=widen,
        num_warps=N_WARPS,
        num_stages=N_STAGES,
    )


@triton.jit
def split_kernel(
    query,
    keys,
    values,
    counts,
    places,
    ragged,
    outputs,
    sums,
    highest_out,
    heads,
    rows,
    queries,
    entries,
    scale,
    key_batch,
    key_head,
    key_entry,
    key_dim,
    value_batch,
    value_head,
    value_entry,
    value_dim,
    count_batch,
    count_head,
    count_entry,
    place_problem,
    place_entry,
    HAS_COUNTS: tl.constexpr,
    HAS_PLACES: tl.constexpr,
    IS_RAGGED: tl.constexpr,
    IS_CHECKED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    DIM_VALUE: tl.constexpr,
    BLOCK_VALUE: tl.constexpr,
    ROWS: tl.constexpr,
    ENTRIES: tl.constexpr,
    SPLIT: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One program: ROWS query rows of one KV head and SPLIT entries; their weighted values, sum and highest logit."""
    split = tl.program_id(0)
    problem = tl.program_id(2).to(tl.int64)
    batch = problem // heads
    head = problem % heads
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    is_row = row < rows
    first = 0
    if IS_RAGGED:
        entries = tl.load(ragged + head)
        first = tl.load(ragged + heads + head)
        head = 0
    visible = entries - queries + row % queries + 1
    feature = tl.arange(0, BLOCK_DIM)
    feature_value = tl.arange(0, BLOCK_VALUE)
    q = tl.load(
        query + (problem * rows + row)[:, None] * DIM + feature[None, :],
        mask=is_row[:, None] & (feature < DIM)[None, :],
        other=0.0,
    )  # (ROWS, BLOCK_DIM)
    if WIDEN:
        q = q.to(tl.float32)
    keys += batch * key_batch + head * key_head + first * key_entry
    values += batch * value_batch + head * value_head + first * value_entry
    counts += batch * count_batch + head * count_head + first * count_entry

    total = tl.zeros((ROWS,), tl.float32)
    highest = tl.full((ROWS,), float("-inf"), tl.float32)
    output = tl.zeros((ROWS, BLOCK_VALUE), tl.float32)
    for step in range(0, SPLIT, ENTRIES):
        entry = split * SPLIT + step + tl.arange(0, ENTRIES)
        is_entry = entry < entries
        place = entry.to(tl.int64)
        if HAS_PLACES:
            place = tl.load(places + problem * place_problem + entry * place_entry, mask=is_entry, other=-1)
            is_entry = place >= 0
        key = tl.load(
            keys + place[None, :] * key_entry + feature[:, None] * key_dim,
            mask=is_entry[None, :] & (feature < DIM)[:, None],
            other=0.0,
        )  # (BLOCK_DIM, ENTRIES)
        if WIDEN:
            key = key.to(tl.float32)
        logits = scale * tl.dot(q, key, input_precision="ieee")  # (ROWS, ENTRIES)
        if IS_CHECKED:
            logits = tl.where(tl.abs(logits) < float("inf"), logits, float("nan"))
        if HAS_COUNTS:
            count = tl.load(counts + entry * count_entry, mask=is_entry, other=0)
            logits += tl.where(count > 0, tl.log(tl.maximum(count, 1).to(tl.float32)), float("-inf"))[None, :]
        logits = tl.where(is_entry[None, :] & (entry[None, :] < visible[:, None]), logits, float("-inf"))
        raised = tl.maximum(highest, tl.max(logits, axis=1))
        base = tl.where(raised == float("-inf"), 0.0, raised)  # nothing seen yet
        shrink = tl.exp(highest - base)
        weights = tl.exp(logits - base[:, None])
        total = total * shrink + tl.sum(weights, axis=1)
        value = tl.load(
            values + place[:, None] * value_entry + feature_value[None, :] * value_dim,
            mask=is_entry[:, None] & (feature_value < DIM_VALUE)[None, :],
            other=0.0,
        )  # (ENTRIES, BLOCK_VALUE)
        if WIDEN:
            value = value.to(tl.float32)
        output = output * shrink[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        highest = raised

    at = split * tl.num_programs(2) * rows + problem * rows + row
    tl.store(sums + at, total, mask=is_row)
    tl.store(highest_out + at, highest, mask=is_row)
    tl.store(
        outputs + at[:, None] * DIM_VALUE + feature_value[None, :],
        output,
        mask=is_row[:, None] & (feature_value < DIM_VALUE)[None, :],
    )
