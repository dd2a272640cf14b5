"""What was measured, one line of JSON per run: the store that lets a benchmark go on where it stopped.

A run is identified by its `key`. Runs of an evaluation hold numbers of each token; those that are committed are
condensed to sums of each context, which is all that intervals need.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from kvcluster.fast.outside import json_of, shown

from .errors import UnusableInputError
from .places import writing

__all__ = ["N_DEPTHS", "Runs", "condense", "needle_sums", "stored_sums", "total"]

N_DEPTHS = 6  # parts of a context that condensed runs tell apart
Run = dict[str, Any]


class Runs:
    """The results so far, in memory and, given a `path`, in a file of JSON lines; a half-written last line is lost.

    A key says what the run depends on, such as its method's name, what is kept, the tokens of its case and the weights
    of its model, but not the method's code: after a change to that, delete the file. `form` is applied to added runs.
    """

    def __init__(self, path: Path | None = None, form: Callable[[Run], Run] = lambda run: run) -> None:
        self.path, self.form = path, form
        self.all: list[Run] = []
        if path is None or not path.exists():
            return
        if not path.is_file():
            raise UnusableInputError(f"{path} must be a file of results, got a folder or a device")
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.split(b"\n")[:-1], 1):
            run = json_of(line.decode(errors="replace"), f"{path}:{number}")
            if not isinstance(run, dict) or not isinstance(run.get("key"), dict):
                raise UnusableInputError(f"{path}:{number} must be a result, an object with a key, got {shown(run)}")
            self.all.append(run)
        if len(whole) < len(content):
            with writing(path):
                os.truncate(path, len(whole))  # not written anew: a killed process would lose them all

    def add(self, run: Run) -> Run:
        """Store a run; returns it as it is stored."""
        stored = self.form(run)
        self.all.append(stored)
        if self.path is not None:
            with writing(self.path), self.path.open("a") as file:
                file.write(json.dumps(stored, allow_nan=False, separators=(",", ":")) + "\n")
        return stored

    def found(self, key: dict[str, Any]) -> Run | None:
        return next((run for run in self.all if run["key"] == key), None)


def condense(run: Run, n_depths: int = N_DEPTHS) -> Run:
    """Sums in place of the numbers of each layer, needle and token; a condensed run is returned as it is.

    `needles` has the sums of each kind, and (right tokens, tokens) of each of `n_depths` equal parts of the context.
    """
    if "stored" in run:
        return run
    condensed: Run = {name: run[name] for name in ("key", "task", "n_tokens", "n_prompt") if name in run}
    condensed |= {"stored": stored_sums(run["n_stored"]), "nbytes": run["nbytes"]}
    condensed |= {name: run[name] for name in ("nbytes_bfloat16",) if name in run}
    if "needles" in run:
        needles = run["needles"]
        condensed["needles"] = {
            "kinds": {
                kind: needle_sums(*zip(*((x["is_right"], x["nll"]) for x in needles if x["kind"] == kind), strict=True))
                for kind in dict.fromkeys(needle["kind"] for needle in needles)
            },
            "depths": depth_sums(needles, n_depths),
        }
    if "following_nll" in run:
        condensed["following"] = {"n": len(run["following_nll"]), "nll": round(sum(run["following_nll"]), 6)}
    return condensed | {name: run[name] for name in ("attention_errors", "prompts", "seconds") if name in run}


def stored_sums(n_stored: Sequence[float]) -> dict[str, float]:
    """Sums, least and most of the entries of each layer."""
    return {"layers": len(n_stored), "entries": sum(n_stored), "least": min(n_stored), "most": max(n_stored)}


def needle_sums(is_right: Sequence[Sequence[bool]], nll: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Sums over answers, from whether each of their tokens is right, and its nats.

    >>> needle_sums([[True, True], [True, False]], [[0.5, 0.25], [0.25, 2.0]])
    {'n': 2, 'tokens': 4, 'right': 3, 'exact': 1, 'nll': 3.0}
    """
    return {
        "n": len(is_right),
        "tokens": sum(map(len, is_right)),
        "right": sum(map(sum, is_right)),
        "exact": sum(map(all, is_right)),
        "nll": round(sum(map(sum, nll)), 6),
    }


def depth_sums(needles: list[dict[str, Any]], n_depths: int) -> list[list[int]]:
    sums = [[0, 0] for _ in range(n_depths)]
    for needle in needles:
        part = sums[min(int(needle["depth"] * n_depths), n_depths - 1)]
        part[0] += sum(needle["is_right"])
        part[1] += len(needle["is_right"])
    return sums


def total(sums: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Needle sums of several kinds or contexts, added up."""
    parts = list(sums)
    return {name: sum(part[name] for part in parts) for name in ("n", "tokens", "right", "exact", "nll")}
