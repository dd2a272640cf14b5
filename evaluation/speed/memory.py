"""Peak memory of decoding, measured in a process of its own."""

import multiprocessing
import re
from pathlib import Path
from typing import Any

import torch

from ..machine import return_freed_memory
from ..report import Claim, Line, Section

__all__ = ["peak_memory"]

MOST = 1.05  # of weights, stored entries and one layer's working set
STEPS = 70  # a chunk is clustered on the way


def peak_memory(folder: Path, context: int, batch: int) -> Section:
    """Highest resident memory of `STEPS` decoding steps, above that of an idle interpreter with torch."""
    context_of = multiprocessing.get_context("spawn")
    with context_of.Pool(1) as pool:
        nbytes = pool.apply(measured, (folder, context, batch))
    needed = nbytes["weights"] + nbytes["entries"] + nbytes["working"]
    share = nbytes["peak"] / needed
    cells = (
        f"clustered 0.2, {context:,} tokens, batch {batch}",
        *(f"{nbytes[name] / 2**20:,.0f}" for name in ("weights", "entries", "working", "peak")),
        f"{share:.3f}",
    )
    return Section(
        "5. Peak memory of decoding",
        ("cache", "weights, MiB", "entries, MiB", "one layer's work, MiB", "peak, MiB", "peak / sum"),
        [Line(cells, Claim("peak memory", share, MOST))],
        "Above an interpreter that has decoded with a small cache, the C library told to give freed memory back. One "
        "layer's work: the full keys and values of the layer that is clustered while the cache is filled, as they are "
        "given and as the cache takes them, and its entries, as they are made and as they are kept.",
        nbytes,
    )


@torch.inference_mode()
def measured(folder: Path, context: int, batch: int) -> dict[str, Any]:
    """Bytes of the weights, of the entries, of one layer's work, and the peak."""
    from ..models import load_llama
    from .contenders import CONTENDERS

    return_freed_memory()
    model, _ = load_llama(folder)
    config = model.config
    token = torch.ones(batch, 1, dtype=torch.long)
    make = CONTENDERS["clustered 0.2"]
    weights = sum(parameter.nbytes for parameter in model.parameters())
    small = make(model)
    for _ in range(STEPS):  # now all weights are in memory, and everything is imported
        model(token, past_key_values=small)
    del small
    Path("/proc/self/clear_refs").write_text("5")  # what came before does not count: VmHWM starts anew
    idle = resident("VmRSS") - weights
    cache = make(model)
    shape = (batch, config.num_key_value_heads, context, config.head_dim)
    for layer in cache.layers:  # one layer after the other, as a prompt fills them
        keys, values = torch.randn(shape), torch.randn(shape)
        layer.lazy_initialization(keys, values)
        layer.cache.extend(keys, values)
        layer.cache.cluster()
    working = 2 * (keys.nbytes + values.nbytes) + 2 * cache.layers[0].cache.nbytes
    del keys, values
    for _ in range(STEPS):
        model(token, past_key_values=cache)
    return {
        "weights": weights,
        "entries": cache.nbytes,
        "working": working,
        "peak": resident("VmHWM") - idle,
    }


def resident(field: str) -> int:
    """Bytes of resident memory, now (VmRSS) or at most so far (VmHWM), as Linux reports it."""
    match = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None, f"/proc/self/status has no {field}"
    return 1024 * int(match.group(1))
