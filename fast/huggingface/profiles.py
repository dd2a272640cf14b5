"""Profiles: how many of the entries each KV head of a model should get, found once by `kvcluster tune`.

A few heads look far back wherever something in the context is asked for, others hardly leave the last tokens. So one
number of entries for all heads is too many for most and too few for some. That shares should differ is known (AdaKV,
arXiv:2407.11550; a digest of arXiv:2506.11418v1 has about 4 % of the heads keep everything); how ours are found is our
choice, see docs/tuning.md. The profiles in `profiles.json` are such results, a model a line, put there by
`benchmarks/tuning/run.py`.
"""

import bisect
import functools
import hashlib
import json
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from ..arguments import check_integer, check_keep_ratio
from .saving import weights_digest

__all__ = ["Profile", "known_profile", "known_whole_heads", "n_whole_by_default", "profile_for", "whole_heads_of"]

DATA = "profiles.json"
LEAST = 1 / 8  # of the mean, in any head: fewer entries leave too little beside the shared ones
PERCENT = 4  # of the heads stay whole by default, as a digest of arXiv:2506.11418v1 has it
HOW = "`kvcluster tune MODEL --json FILE` makes a profile, to be given as profile=FILE"
LOGGER = logging.getLogger("kvcluster")


@dataclass(frozen=True)
class Profile:
    """Shares of the KV heads of one model.

    Attributes
    ----------
    name : of the model, for people.
    weights : digests of the weights by dtype, which tell the model from others.
    layers : indices of the layers that attend to all tokens.
    keeps : parts of all tokens that are kept, ascending, in (0, 1).
    shares : for each of `keeps`, layer and KV head, the part of the head's tokens to keep, in [0, 1]. Over all heads
        their mean is that of `keeps`.
    heads : (layer, KV head), those first that should rather keep every token.
    attended : of `layers` those where `Attended()` loses less than distinctive matching; None: not measured, and
        `Attended()` is used in all layers if it is asked for, in none if not.
    """

    name: str
    weights: dict[str, str]
    layers: tuple[int, ...]
    keeps: tuple[float, ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]
    heads: tuple[tuple[int, int], ...]
    attended: tuple[int, ...] | None = None

    @classmethod
    def read(cls, path: str | Path) -> "Profile":
        """The profile that `kvcluster tune` wrote to `path`.

        Raises
        ------
        FileNotFoundError : no such file.
        ValueError : another kind of file, or one whose numbers make no profile; the first is named.
        """
        try:
            return cls.of(json.loads(Path(path).read_text("utf-8")))
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # no JSON; no such field; no object
            raise ValueError(
                f"path must be a file that `kvcluster tune --json` wrote, got {path}: {error!r}"
            ) from error

    @classmethod
    def of(cls, result: dict[str, Any]) -> "Profile":
        """A profile from the JSON of `kvcluster tune`."""
        profile = cls(
            name=str(result["name"]),
            weights={str(dtype): str(digest) for dtype, digest in result["weights"].items()},
            layers=tuple(int(layer) for layer in result["layers"]),
            keeps=tuple(float(keep) for keep in result["keeps"]),
            shares=tuple(tuple(tuple(map(float, layer)) for layer in at_keep) for at_keep in result["shares"]),
            heads=tuple((int(layer), int(head)) for layer, head in result["heads"]),
            attended=None if result.get("attended") is None else tuple(int(layer) for layer in result["attended"]),
        )
        profile.check()
        return profile

    @property
    def digest(self) -> str:
        """Tells profiles with other shares or another order of heads apart."""
        return hashlib.sha256(repr((self.layers, self.keeps, self.shares, self.heads)).encode()).hexdigest()[:16]

    def check(self) -> None:
        """Refuse numbers that make no profile."""
        n_layers, n_heads = len(self.layers), len(self.shares[0][0])
        shapes = {tuple(map(len, at_keep)) for at_keep in self.shares}
        numbers = [share for at_keep in self.shares for layer in at_keep for share in layer]
        if len(self.shares) != len(self.keeps) or shapes != {(n_heads,) * n_layers} or n_heads * n_layers == 0:
            raise ValueError("shares must be keeps x layers x KV heads")
        if list(self.keeps) != sorted(set(self.keeps)) or not all(0 < keep < 1 for keep in self.keeps):
            raise ValueError(f"keeps must ascend in (0, 1), got {self.keeps}")
        if not all(0 <= share <= 1 for share in numbers):
            raise ValueError(f"shares must be in [0, 1], got {min(numbers)} to {max(numbers)}")
        if sorted(self.heads) != [(layer, head) for layer in self.layers for head in range(n_heads)]:
            raise ValueError("heads must be every KV head of every layer, once")
        if not set(self.attended or ()) <= set(self.layers):
            raise ValueError(f"attended must be of the layers {self.layers}, got {self.attended}")

    def check_model(self, model: Any) -> None:
        """Refuse a model that the profile is not of.

        Raises
        ------
        ValueError : other weights.
        """
        ours = weights_digest(model)
        if ours not in self.weights.values():
            theirs = " and ".join(f"{each[:12]}..." for each in self.weights.values())
            rule = f"profile must be one that `kvcluster tune` made for model, whose weights are {ours[:12]}..."
            raise ValueError(f"{rule}, got one for {self.name} with {theirs}")

    def keep_ratios(self, keep_ratio: float, *, chunk_size: int, n_layers: int) -> list[float | tuple[float, ...]]:
        """A `keep_ratio` for each layer of the model, or one for each of its KV heads where these differ.

        Parameters
        ----------
        keep_ratio : entries / tokens of what is clustered, the mean over all heads of `layers`, in (0, 1].
        chunk_size : as the cache has it.
        n_layers : of the model; those that attend to a window get `keep_ratio`, which nothing reads.

        Notes
        -----
        Between two of `keeps` shares are interpolated, which keeps their mean. Then a head gets a whole number of
        entries of a chunk, from an eighth of the mean to all, so that they are at most `keep_ratio * chunk_size` on
        average.
        """
        check_keep_ratio(keep_ratio)
        check_integer("chunk_size", chunk_size, least=1)
        wanted = [[share * chunk_size for share in layer] for layer in self.shares_at(keep_ratio)]
        n_heads = sum(map(len, wanted))
        total = math.floor(float(keep_ratio) * chunk_size * n_heads)
        least = max(1, round(LEAST * total / n_heads))
        entries = shared_out(wanted, total, least=least, most=chunk_size)
        ratios: list[float | tuple[float, ...]] = [keep_ratio] * n_layers
        for layer, numbers in zip(self.layers, entries, strict=True):
            # half an entry less than n / chunk_size: whatever the rounding, `ceil(ratio * chunk_size)` is n
            of_heads = tuple(1.0 if n == chunk_size else (n - 0.5) / chunk_size for n in numbers)
            ratios[layer] = of_heads[0] if len(set(of_heads)) == 1 else of_heads
        return ratios

    def shares_at(self, keep: float) -> list[list[float]]:
        """The share of each layer and KV head where `keep` of all tokens are kept; 0 and 1 keep none and all."""
        even = [[[end] * len(layer) for layer in self.shares[0]] for end in (0.0, 1.0)]
        keeps, shares = (0.0, *self.keeps, 1.0), (even[0], *self.shares, even[1])
        above = min(bisect.bisect_left(keeps, keep), len(keeps) - 1)
        below = max(0, above - 1)
        weight = (keep - keeps[below]) / (keeps[above] - keeps[below]) if above else 0.0
        pairs = zip(shares[below], shares[above], strict=True)
        return [[(1 - weight) * a + weight * b for a, b in zip(*layer, strict=True)] for layer in pairs]

    def whole_heads(self, n_heads: int | None = None) -> list[tuple[int, int]]:
        """The first `n_heads` of all heads, by default 4 %, at least one."""
        n_wanted = n_whole_by_default(len(self.heads)) if n_heads is None else n_heads
        check_integer("n_heads", n_wanted, least=1)
        if n_wanted > len(self.heads):
            raise ValueError(
                f"n_heads must be at most {len(self.heads)}, the KV heads that attend to everything, got {n_heads}"
            )
        return list(self.heads[:n_wanted])


def shared_out(wanted: list[list[float]], total: int, *, least: int, most: int) -> list[list[int]]:
    """Whole numbers in proportion to `wanted`, from `least` to `most`, which together are at most `total`.

    Raises
    ------
    ValueError : `total` is too small for that.

    Examples
    --------
    >>> shared_out([[0.5, 2.0], [8.0, 30.0]], total=22, least=1, most=10)
    [[1, 2], [9, 10]]
    """
    n_heads = sum(map(len, wanted))
    if total < least * n_heads:
        raise ValueError(f"keep_ratio must leave an entry of a chunk for each of {n_heads} heads, got {total}")

    def at(scale: float) -> list[list[int]]:
        return [[min(most, max(least, int(scale * number))) for number in layer] for layer in wanted]

    low, high = 0.0, 1.0
    while sum(map(sum, at(high))) < total and high < 2**40:
        high *= 2
    for _ in range(64):  # until the two are neighbours
        middle = (low + high) / 2
        low, high = (middle, high) if sum(map(sum, at(middle))) <= total else (low, middle)
    return at(low)


def n_whole_by_default(n_heads: int) -> int:
    """4 % of `n_heads`, rounded to nearest, at least 1.

    >>> [n_whole_by_default(n) for n in (3, 37, 38, 90)]
    [1, 1, 2, 4]
    """
    return max(1, (PERCENT * n_heads + 50) // 100)


def shipped() -> Iterator[Profile]:
    """The profiles that come with the package."""
    return map(Profile.of, json.loads(files(__package__).joinpath(DATA).read_text("utf-8")))


def known_profile(model: Any) -> Profile:
    """The profile that ships for `model`.

    Parameters
    ----------
    model : a transformers model in float32, bfloat16 or float16, told from others by its weights.

    Raises
    ------
    LookupError : a model that this package has no profile of.

    Notes
    -----
    Which heads look far back is a property of the weights: those of the same architecture trained or rounded otherwise
    may have others, and count as unknown.
    """
    weights, names = weights_digest(model), []
    for profile in shipped():
        if weights in profile.weights.values():
            return profile
        names.append(profile.name)
    got = f"a {model.config.model_type} with other weights"
    raise LookupError(f"model must be one whose profile is known ({', '.join(names)}), got {got}: {HOW}")


def profile_for(model: Any, profile: "Profile | str | Path | None") -> Profile | None:
    """`profile` itself, or read from a file, or with "known" the one that ships; None where there is none.

    Raises
    ------
    FileNotFoundError : no such file.
    ValueError : another kind of file; a profile of another model.
    """
    if profile is None:
        return None
    if profile == "known":
        try:
            return known_profile(model)
        except LookupError as error:
            say_once(f"all KV heads keep the same share, which costs most of what is asked for: {error}")
            return None
    found = profile if isinstance(profile, Profile) else Profile.read(profile)
    found.check_model(model)
    return found


@functools.cache
def say_once(message: str) -> None:
    LOGGER.warning(message)


def known_whole_heads(model: Any, n_heads: int | None = None) -> list[tuple[int, int]]:
    """The (layer, KV head) pairs of `model` that should keep every token, the most wanting first.

    Parameters
    ----------
    model : as in `known_profile`.
    n_heads : how many; by default 4 % of the KV heads of the layers that attend to everything.

    Raises
    ------
    LookupError : a model that this package has no profile of.
    ValueError : a number out of range.
    """
    return known_profile(model).whole_heads(n_heads)


def whole_heads_of(path: str | Path, model: Any, n_heads: int | None = None) -> list[tuple[int, int]]:
    """The (layer, KV head) pairs that should keep every token, from the profile that `kvcluster tune` wrote.

    Parameters
    ----------
    path : the file.
    model, n_heads : as in `known_whole_heads`.

    Raises
    ------
    FileNotFoundError : no such file.
    ValueError : another kind of file, or one for a model with other weights; a number out of range.
    """
    profile = Profile.read(path)
    profile.check_model(model)
    return profile.whole_heads(n_heads)
