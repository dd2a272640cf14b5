"""How shares are found: by a second reading, or from what each head loses alone where a model has few of them."""

import hashlib
import json
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from kvcluster.fast.huggingface.fingerprints import weights_digest

from ..layers import full_layers
from ..runs import Runs
from ..texts import encode, opening, span
from .direct import PARTS, RATIO, best_shares, only_one, only_whole, order_by_worth
from .losses import Losses, loss_cases
from .second_reading import N_PIECE, pieces_to_repeat, second_reading
from .shares import KEEP, KEEPS, N_RECENT, N_SINK, head_shares, order_heads

__all__ = ["RULES", "rule_for"]

MOST_DIRECT = 8  # heads that are compressed one by one: what that takes grows with them


def rule_for(model: Any, rule: str) -> str:
    """The rule itself, or for "auto" that for a model with so many heads.

    Raises
    ------
    ValueError : another rule; a model whose layers all slide.
    """
    if rule not in ("auto", *RULES):
        raise ValueError(f"rule must be auto, {' or '.join(RULES)}, got {rule!r}")
    layers, kv_heads = full_layers(model)
    if rule != "auto":
        return rule
    return "direct" if len(layers) * kv_heads <= MOST_DIRECT else "reading"


def by_reading(
    model: Any, tokenizer: Any, text: str, runs: Runs, progress: Progress, *, n_contexts: int, n_tokens: int
) -> dict[str, Any]:
    """Shares by one threshold over the scores of a second reading, the mean over contexts."""
    tokens, start = encode(tokenizer, text), opening(tokenizer)
    length = n_tokens - len(start)
    contexts = [start + span(tokens, "tuning", number, length) for number in range(n_contexts)]
    rule = {"keeps": list(KEEPS), "n_sink": N_SINK, "n_recent": N_RECENT, "n_piece": N_PIECE}
    rule["model"] = weights_digest(model)
    found = []
    for number, context in enumerate(contexts, 1):
        key = rule | {"tokens": digest(context)}
        run = runs.found(key)
        if run is None:
            run = runs.add({"key": key} | read_twice(model, tokenizer, context, progress, f"Context {number}"))
        found.append(run)
    layers = found[0]["layers"]
    shares = torch.tensor([run["shares"] for run in found], dtype=torch.float64).mean(dim=0)
    return {
        "heads": order_heads(shares[KEEPS.index(KEEP)], layers),
        "layers": layers,
        "keeps": list(KEEPS),
        "shares": rounded(shares),
        "contexts": [{"tokens": run["key"]["tokens"], "shares": run["shares"]} for run in found],
        "seconds": round(sum(run["seconds"] for run in found), 1),
    }


def read_twice(model: Any, tokenizer: Any, context: list[int], progress: Progress, name: str) -> dict[str, Any]:
    """The shares of one context, and the layers that they are of."""
    begun = time.perf_counter()
    pieces = pieces_to_repeat(tokenizer, context)
    task = progress.add_task(f"{name}, read twice", total=1 + len(pieces))
    scores = second_reading(model, context, pieces, on_piece=lambda: progress.advance(task))
    stacked = torch.stack(list(scores.values()))
    shares = torch.stack([head_shares(stacked, keep=keep) for keep in KEEPS])
    return {"layers": list(scores), "shares": rounded(shares), "seconds": round(time.perf_counter() - begun, 1)}


def by_direct(
    model: Any,
    tokenizer: Any,
    text: str,
    runs: Runs,
    progress: Progress,
    *,
    n_contexts: int,
    n_tokens: int,
    parts: Sequence[float] = PARTS,
) -> dict[str, Any]:
    """Shares by what each head loses when it alone is compressed, and the order by what each is worth whole.

    Both are means over contexts. `parts`, ascending in (0, 1), are those of its tokens that a head alone keeps.
    """
    layers, kv_heads = full_layers(model)
    heads = [(layer, head) for layer in layers for head in range(kv_heads)]
    cases = loss_cases(tokenizer, text, n_contexts=n_contexts, n_tokens=n_tokens)
    task = progress.add_task("Heads compressed, and whole, alone", total=len(cases) * len(heads) * (len(parts) + 1))
    losses, losses_whole, seconds = [], [], []
    for case in cases:
        of_case = Losses(model, case, runs, lambda: progress.advance(task))
        curves, whole = [], []
        for head in heads:
            options = [({"head": list(head), "part": part}, partial(only_one, model, *head, part)) for part in parts]
            curves.append([of_case.over_full(*option) for option in options])
            whole.append(of_case.over_full({"whole": list(head), "ratio": RATIO}, partial(only_whole, model, *head)))
        losses.append(curves)
        losses_whole.append(whole)
        seconds += of_case.seconds
    mean, mean_whole = np.array(losses).mean(axis=0), np.array(losses_whole).mean(axis=0)
    shares = torch.tensor([best_shares(mean, parts, keep) for keep in KEEPS]).reshape(len(KEEPS), len(layers), kv_heads)
    return {
        "heads": order_by_worth(mean_whole, heads),
        "layers": layers,
        "keeps": list(KEEPS),
        "shares": rounded(shares),
        "parts": list(parts),
        "losses": rounded(torch.from_numpy(mean).reshape(len(layers), kv_heads, -1)),
        "losses_whole": rounded(torch.from_numpy(mean_whole).reshape(1, len(layers), kv_heads))[0],
        "contexts": [
            {"case": case.fingerprint, "losses": of_case, "losses_whole": whole}
            for case, of_case, whole in zip(cases, losses, losses_whole, strict=True)
        ],
        "seconds": round(sum(seconds), 1),
    }


RULES = {"reading": by_reading, "direct": by_direct}


def digest(tokens: list[int]) -> str:
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def rounded(shares: Tensor) -> list[list[list[float]]]:
    return [[[round(share, 6) for share in layer] for layer in at_keep] for at_keep in shares.tolist()]
