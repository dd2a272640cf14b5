"""Whether the published method's cache holds the same bytes on every backend, on keys and values of real models.

The oracle is the NumPy reference. Triton's kernels run in its interpreter, which is slow: of them only the
first layer, one in the middle and the last are compared.
"""

from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from kvcluster import fast, reference
from kvcluster.evaluation.pages import table
from kvcluster.evaluation.runs import Runs
from kvcluster.evaluation.texts import built_in_text, encode
from kvcluster.fast.huggingface import known_whole_heads
from kvcluster.fast.huggingface.fingerprints import weights_digest
from kvcluster.fast.huggingface.head_pairs import heads_of_layers
from kvcluster.fast.kernels import match, merge, score

__all__ = ["agreement_table", "differing_bytes", "fed", "measure_agreement"]

N_DECODED, INTERVAL = 80, 64  # decoding compresses once as well
PIECE = 512
ARRIVALS = ("in one piece", f"in pieces of {PIECE}")
BACKENDS = {"torch": "torch", "cpp": "C++", "triton": "Triton, interpreted"}
HELD = ("keys", "values", "counts", "whole_keys", "whole_values")
TITLES = {"smollm2": "SmolLM2-135M", "gemma3-270m": "Gemma 3 270M"}
RATIO = 0.25


def measure_agreement(name: str, model: Any, tokenizer: Any, runs: Runs, *, n_tokens: int) -> None:
    """Add what is missing of the model `name`: each layer that attends to everything, arrival and backend."""
    weights = weights_digest(model)
    types = getattr(model.config, "layer_types", None) or ["full_attention"] * model.config.num_hidden_layers
    layers = [layer for layer, kind in enumerate(types) if kind == "full_attention"]
    whole = heads_of_layers(model, known_whole_heads(model) if name == "smollm2" else [])  # of Gemma none would be left
    with_triton = {layers[0], layers[len(layers) // 2], layers[-1]}
    cases = [
        {"part": "agreement", "name": name, "layer": layer, "arrival": arrival, "backend": backend, "model": weights}
        for layer in layers
        for arrival in ARRIVALS
        for backend in BACKENDS
        if backend != "triton" or layer in with_triton
    ]
    cases = [key for key in cases if runs.found(key) is None]
    if not cases:
        return
    few_programs()
    tokens = encode(tokenizer, built_in_text())[: n_tokens + N_DECODED]
    with torch.inference_mode():
        stored = model(torch.tensor(tokens)[None], use_cache=True, logits_to_keep=1).past_key_values.layers
    oracles: dict[tuple[int, str], Any] = {}  # the last one: backends of a layer and an arrival follow one another
    with Progress() as progress:
        for key in progress.track(cases, description=f"Same bytes, {TITLES[name]}"):
            keys, values = stored[key["layer"]].keys, stored[key["layer"]].values
            plan: dict[str, Any] = {"ratio": RATIO, "max_new_tokens": N_DECODED, "n_prompt": n_tokens}
            plan |= {"interval": INTERVAL, "whole_heads": whole[key["layer"]]}
            pieces = [n_tokens] if key["arrival"] == ARRIVALS[0] else [PIECE] * (n_tokens // PIECE)
            pieces += [1] * N_DECODED
            place = key["layer"], key["arrival"]
            if place not in oracles:
                oracles = {place: fed(reference.ChelseaCache(**plan), keys.numpy(), values.numpy(), pieces)}
            ours = fed(fast.ChelseaCache(**plan, backend=key["backend"]), keys, values, pieces)
            compared, differing = differing_bytes(ours, oracles[place])
            runs.add({"key": key, "bytes": compared, "differing": differing})


def few_programs() -> None:
    """Triton's interpreter is slow per program, not per number: a whole chunk in one. No block size changes a bit."""
    match.BLOCK_ROWS = match.BLOCK_COLUMNS = match.BLOCK_SCORED = score.BLOCK_SOURCES = 128
    merge.BLOCK_ENTRIES = 4096


def fed(cache: Any, keys: Any, values: Any, pieces: list[int]) -> Any:
    """`cache` after tokens that arrive in pieces of these sizes."""
    start = 0
    for piece in pieces:
        cache.append(keys[..., start : start + piece, :], values[..., start : start + piece, :])
        start += piece
    return cache


def differing_bytes(ours: Any, oracle: Any) -> tuple[int, int]:
    """How many bytes the oracle holds, and how many of ours differ; of arrays of another shape or dtype, all."""
    compared = differing = 0
    for name in HELD:
        held, expected = getattr(ours, name), getattr(oracle, name)
        if expected is None:
            assert held is None, name
            continue
        found = held.numpy()
        compared += expected.nbytes
        if (found.shape, found.dtype) == (expected.shape, expected.dtype):
            ours_bytes, its_bytes = (np.frombuffer(x.tobytes(), np.uint8) for x in (found, expected))
            differing += int((ours_bytes != its_bytes).sum())
        else:
            differing += expected.nbytes
    return compared, differing


def agreement_table(runs: list[dict[str, Any]]) -> str:
    """A row for each model, arrival and backend, all layers together."""
    rows = []
    for name, title in TITLES.items():
        for arrival in ARRIVALS:
            for backend, its_title in BACKENDS.items():
                wanted = {"name": name, "arrival": arrival, "backend": backend}.items()
                group = [run for run in runs if wanted <= run["key"].items()]
                compared, differing = (sum(run[part] for run in group) for part in ("bytes", "differing"))
                rows.append([title, arrival, its_title, str(len(group)), f"{compared:,}", f"{differing:,}"])
    return table(["model", "prompt", "backend", "layers", "bytes compared", "bytes that differ"], rows)
