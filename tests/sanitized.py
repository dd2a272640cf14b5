"""Calls every function of the C++ over odd shapes and layouts; run by `fast/test_sanitizers.py`, under sanitizers.

Prints the C++ functions that were called.
"""

import argparse
import ctypes
import random
from pathlib import Path
from typing import Any

import fuzzed
import torch
from caches import make_tiered

from kvcluster import fast
from kvcluster.fast.cpu import compiling
from kvcluster.fast.cpu.linear import linear
from kvcluster.fast.cpu.paged import attend_pages
from kvcluster.fast.cpu.rows import pack_rows, unpack_rows

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
CALLED: set[str] = set()


class Recorded(ctypes.CDLL):
    """A library that writes down which of its functions are looked up."""

    def __getattr__(self, name: str) -> Any:
        CALLED.add(name)
        return super().__getattr__(name)


def pages(draw: random.Random, dtype: torch.dtype) -> None:
    """Attention to pages that end where a page does, and somewhere in it."""
    kv_heads, group, dim, page = draw.choice((1, 2, 3)), draw.choice((1, 2, 5)), draw.choice((16, 48, 64)), 32
    lengths = [draw.choice((1, page, page + 1, draw.randint(1, 150))) for _ in range(draw.randint(1, 3))]
    new = [min(n, draw.choice((1, 1, n, draw.randint(1, 70)))) for n in lengths]
    n_pages = max(-(-n // page) for n in lengths)
    tables = torch.randperm(len(lengths) * n_pages).int().view(len(lengths), n_pages)
    wide = torch.zeros(len(lengths) * n_pages, kv_heads + 1, page * 2 * dim + page * 4 // dtype.itemsize, dtype=dtype)
    cells = wide[:, 1:]
    cells[..., : page * 2 * dim] = torch.randn(cells[..., : page * 2 * dim].shape)
    counts = cells[..., page * 2 * dim :].view(torch.int32)
    counts[:] = torch.randint(1, 5000, counts.shape)
    starts = [sum(new[:i]) for i in range(len(new))]
    of_requests = [
        (start, n_new, n, min(1, -(-n // page)), draw.randint(1, -(-n // page)))
        for start, n_new, n in zip(starts, new, lengths, strict=True)
    ]
    query = torch.randn(sum(new), kv_heads * group, dim)
    output = attend_pages(query, cells, tables, torch.tensor(of_requests), page=page, scale=0.3)
    assert bool(output.isfinite().all())


def tiers(draw: random.Random, dtype: torch.dtype) -> None:
    sizes = {"segment_size": 20, "tokens_per_cluster": 4, "n_sink": draw.randint(0, 4)}
    rest = {"bits": draw.choice((16, 16, 4, 8)), "is_per_query_head": draw.random() < 0.3}
    cache = make_tiered(budget=40, n_steps=draw.randint(1, 3), **sizes, **rest)
    dim = draw.choice((16, 24, 40))
    for n in (draw.randint(1, 90), 1, draw.randint(0, 30), 1):
        cache.append(*(torch.randn(2, 3, n, dim, dtype=dtype) for _ in range(2)))
        cache.attend(torch.randn(2, 3, draw.randint(1, 3), dim, dtype=dtype))


def layers(draw: random.Random, dtype: torch.dtype) -> None:
    inputs, outputs = 16 * draw.randint(1, 6), 4 * draw.randint(1, 30)
    linear(torch.randn(draw.randint(1, 9), inputs), torch.randn(outputs, inputs))


def rows(draw: random.Random, dtype: torch.dtype) -> None:
    array = torch.randn(draw.randint(1, 70), draw.choice((5, 16, 40, 64)), dtype=dtype)
    unpack_rows(pack_rows(array, draw.choice((2, 3, 4, 8))), array.shape[-1])


def bits(draw: random.Random, dtype: torch.dtype) -> None:
    """Packed entries, and queries that chunks are matched by."""
    dim, group, lead, method = draw.choice((16, 48)), draw.randint(1, 2), (2, 3), fast.Attended(n_shared=2)
    of_bits = draw.choice((2, 3, 4, 8, (3, 4), (8, 2)))
    rules = {"chunk_size": draw.choice((8, 33)), "n_sink": 2, "n_recent": draw.randint(32, 60), "bits": of_bits}
    caches = [
        fast.ClusteredCache(keep_ratio=0.6, method=method, **rules),
        fast.RaggedCache(keep_ratios=(0.3, 1, 0.7), **rules),
    ]
    for n in (draw.randint(90, 150), 1, draw.randint(0, 70), 1):
        keys, values = (torch.randn(*lead, n, dim, dtype=dtype) for _ in range(2))
        caches[0].append(keys, values, torch.randn(*lead, group, n, dim, dtype=dtype))
        caches[1].append(keys, values)
        for cache in caches:
            cache.attend(torch.randn(*lead, draw.randint(1, 5), dim, dtype=dtype))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n_calls", type=int, help="fuzzed calls, and an eighth of it of each other kind")
    parser.add_argument("--only", choices=OTHERS, help="one of the other kinds, and no fuzzed calls")
    parser.add_argument("--folder", type=Path, help="of the C++, in place of the package's")
    options = parser.parse_args()
    if options.folder is not None:
        compiling.FOLDER = options.folder
    ctypes.CDLL = Recorded
    torch.manual_seed(0)
    for seed in range(options.n_calls):
        if options.only is None:
            fuzzed.in_fast(fuzzed.case_of(seed, share_wrong=0.05))
        if seed % 8 == 0:
            draw = random.Random(seed)
            for call in OTHERS.values() if options.only is None else [OTHERS[options.only]]:
                call(draw, DTYPES[seed // 8 % 3])
    print(*sorted(CALLED))


OTHERS = {call.__name__: call for call in (pages, tiers, layers, rows, bits)}

if __name__ == "__main__":
    main()
