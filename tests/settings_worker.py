"""Caches with one huge setting each, in a process that may not take much memory; prints what does not work, as JSON.

Run with the name of a twin, memory is as large as a setting asks for.
"""

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from caches import make_tiered
from models import random_tokens, tiny_llama

from kvcluster import fast, reference
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache
from kvcluster.fast.memory import room
from kvcluster.fast.vllm.settings import Settings

MOST = 512 * 2**20  # bytes more than the process has when all is loaded
HUGE = (2**31 - 1, 2**62)
KEYS = np.random.default_rng(0).standard_normal((2, 300, 8)).astype(np.float32)
SIZES = {"chunk_size": 32, "n_sink": 4, "n_recent": 40}
RECALL = {"budget": 100, "n_sink": 4, "n_recent": 4, "tokens_per_cluster": 5, "segment_size": 40}
RECALL |= {"prompt_segment_size": 100, "max_iter": 3}
CACHES: dict[str, dict[str, Any]] = {
    "ClusteredCache": {"keep_ratio": 0.5, **SIZES},
    "ClusteredCache in bits": {"keep_ratio": 0.5, "bits": 4, "n_exact": 32, **SIZES},
    "BoundedCache": {"keep_ratio": 0.5, "budget": 200, **SIZES},
    "RaggedCache": {"keep_ratios": (0.3, 0.5), **SIZES},
    "ChelseaCache": {"ratio": 0.5, "max_new_tokens": 30, "n_prompt": 300, "interval": 5, **SIZES},
    "RecallCache": RECALL,
    "RecallCache in bits": RECALL | {"bits": 4},
    "RecallCache beside": RECALL | {"is_exact_counted": False},
    "TieredRecallCache": RECALL | {"n_steps": 2},
}
FUNCTIONS: dict[str, dict[str, Any]] = {
    "chunked_soft_matching": {"keep_ratio": 0.5, "chunk_size": 32},
    "distinctive_matching": {"keep_ratio": 0.5, "chunk_size": 32, "n_shared": 4},
    "kmeans": {"n_clusters": 5, "max_iter": 3},
}
MODELS: dict[Any, dict[str, Any]] = {
    ClusteredCache: {"keep_ratio": 0.5, "n_dense_layers": 0, **SIZES},
    ChelseaCache: {"ratio": 0.5, "max_new_tokens": 3, "interval": 3, "whole_heads": (), **SIZES},
    RecallCache: {**RECALL, "n_dense_layers": 0},
}


def with_a_huge_one(parameters: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The parameters with one of the integers huge, and which."""
    integers = [name for name, value in parameters.items() if type(value) is int and name != "bits"]
    return [(f"{name}={huge}", parameters | {name: huge}) for name in integers for huge in HUGE]


def use(make: Callable[..., Any], parameters: dict[str, Any], convert: Callable[..., Any]) -> None:
    """Take a prompt, some tokens, and attend."""
    cache = make(**parameters)
    for first, stop in ((0, 200), (200, 201), (201, 300)):
        cache.append(convert(KEYS[:, first:stop].copy()), convert(KEYS[:, first:stop].copy()))
        cache.attend(convert(KEYS[:, :2].copy()))


def cases() -> list[tuple[str, Callable[[], Any]]]:
    """What is done, and its name."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for package, convert in ((reference, np.asarray), (fast, torch.from_numpy)):
        for name, right in CACHES.items():
            kind = name.split()[0]
            make = getattr(package, kind, make_tiered)
            if kind == "TieredRecallCache" and package is reference:
                continue
            for which, of in with_a_huge_one(right):
                found.append((f"{name} {which}", lambda make=make, of=of, to=convert: use(make, of, to)))  # type: ignore
        for name, right in FUNCTIONS.items():
            arrays = [convert(KEYS.copy())] * (1 + (name == "distinctive_matching"))
            for which, of in with_a_huge_one(right):
                function = getattr(package, name)
                found.append((f"{name} {which}", lambda f=function, a=arrays, of=of: f(*a, **of)))  # type: ignore
    model, tokens = tiny_llama(layers=2), random_tokens(60)
    for kind, right in MODELS.items():
        for which, of in with_a_huge_one(right):
            make = lambda kind=kind, of=of: kind.for_model(model, **of)  # noqa: E731
            found.append((f"model {kind.__name__} {which}", lambda make=make: model(tokens, past_key_values=make())))  # type: ignore
    for which, of in with_a_huge_one({"chunk_size": 64, "n_sink": 32, "n_recent": 40}):
        found.append((f"vLLM {which}", lambda of=of: Settings(keep_ratio=0.5, **of).rule(32).most_pages(1000)))  # type: ignore
    return found


def main() -> None:
    if sys.argv[1:] == ["as large as asked for"]:
        room.MOST_ASKED = 2**63  # type: ignore[misc]
    found, failed = cases(), {}
    use(fast.ClusteredCache, CACHES["ClusteredCache"], torch.from_numpy)  # threads and compiled code are there
    with open("/proc/self/statm") as pages:
        taken = int(pages.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + MOST, resource.RLIM_INFINITY))
    n_refused = 0
    with torch.no_grad():
        for name, call in found:
            try:
                call()
            except (TypeError, ValueError) as error:
                n_refused += 1
                if " must " not in str(error):
                    failed[name] = repr(error)[:200]
            except Exception as error:
                failed[name] = repr(error)[:200]
    print(json.dumps({"calls": len(found), "refused": n_refused, "failed": failed}))


if __name__ == "__main__":
    main()
