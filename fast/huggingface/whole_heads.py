"""The KV heads that should keep every token, "whole heads", of the models that they are known of.

A few heads look far back wherever something in the context is asked for, so clustering these costs most. A digest of
arXiv:2506.11418v1 has about 4 % of all heads keep everything, found once for each model on plain text; how they are
told is not in it, so the rule is ours: see `kvcluster tune`. The heads in `whole_heads.json` are such results, a model
a line, put there by `benchmarks/tuning/run.py`.
"""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..arguments import check_integer
from .saving import weights_digest

__all__ = ["known_whole_heads", "n_whole_by_default", "whole_heads_of"]

DATA = "whole_heads.json"
PERCENT = 4  # of the heads, as a digest of arXiv:2506.11418v1 has it
HOW = "`kvcluster tune MODEL --json FILE` finds its heads, and whole_heads_of(FILE, model) reads them"


def known_whole_heads(model: Any, n_heads: int | None = None) -> list[tuple[int, int]]:
    """The (layer, KV head) pairs of `model` that should keep every token, the most wanting first.

    Parameters
    ----------
    model : a transformers model in float32, bfloat16 or float16, told from others by its weights.
    n_heads : how many; by default 4 % of the KV heads of the layers that attend to everything.

    Raises
    ------
    LookupError : a model that this package knows no heads of.
    ValueError : a number out of range.

    Notes
    -----
    Which heads look far back is a property of the weights: those of the same architecture trained or rounded otherwise
    may have others, and count as unknown.
    """
    weights = weights_digest(model)
    known = json.loads(files(__package__).joinpath(DATA).read_text("utf-8"))
    for each in known:
        if weights in each["weights"].values():
            return first_heads(each["heads"], n_heads)
    names = ", ".join(each["name"] for each in known)
    got = f"a {model.config.model_type} with other weights"
    raise LookupError(f"model must be one whose whole heads are known ({names}), got {got}: {HOW}")


def whole_heads_of(path: str | Path, model: Any, n_heads: int | None = None) -> list[tuple[int, int]]:
    """The (layer, KV head) pairs that should keep every token, from the JSON that `kvcluster tune` wrote for `model`.

    Parameters
    ----------
    path : the file.
    model, n_heads : as in `known_whole_heads`.

    Raises
    ------
    FileNotFoundError : no such file.
    ValueError : another kind of file, or one for a model with other weights; a number out of range.
    """
    try:
        result = json.loads(Path(path).read_text("utf-8"))
        weights, heads = result["weights"], result["heads"]
    except (ValueError, KeyError, TypeError) as error:  # no text, no JSON; no such field; no object
        raise ValueError(f"path must be a file that `kvcluster tune --json` wrote, got {path}: {error!r}") from error
    ours = weights_digest(model)
    if ours not in weights.values():
        rule = f"path must be the result of `kvcluster tune` for model, whose weights are {ours[:12]}..."
        raise ValueError(
            f"{rule}, got one for {' and '.join(f'{each[:12]}...' for each in weights.values())} in {path}"
        )
    return first_heads(heads, n_heads)


def first_heads(heads: list[list[int]], n_heads: int | None) -> list[tuple[int, int]]:
    """The first `n_heads` of all."""
    n_wanted = n_whole_by_default(len(heads)) if n_heads is None else n_heads
    check_integer("n_heads", n_wanted, least=1)
    if n_wanted > len(heads):
        raise ValueError(f"n_heads must be at most {len(heads)}, the KV heads that attend to everything, got {n_heads}")
    return [(layer, head) for layer, head in heads[:n_wanted]]


def n_whole_by_default(n_heads: int) -> int:
    """4 % of `n_heads`, rounded to nearest, at least 1.

    >>> [n_whole_by_default(n) for n in (3, 37, 38, 90)]
    [1, 1, 2, 4]
    """
    return max(1, (PERCENT * n_heads + 50) // 100)
