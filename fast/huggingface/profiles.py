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

from ..exact.quantization import PLANES
from ..outside import read_json, shown
from ..scalars import check_integer, check_keep_ratio
from .fingerprints import weights_digest
from .profile_fields import fields_of
from .sharing import shared_out

__all__ = ["Profile", "known_profile", "known_whole_heads", "n_whole_by_default", "profile_for", "whole_heads_of"]

DATA = "profiles.json"
LEAST = 1 / 8  # of the mean, in any head: fewer entries leave too little beside the shared ones
MOST_LAYERS = 10_000  # of a model
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
    bits : (bytes of clustered entries over those of all their tokens in 16 bits, bits with which least is lost at so
        many), ascending; None: not measured.
    """

    name: str
    weights: dict[str, str]
    layers: tuple[int, ...]
    keeps: tuple[float, ...]
    shares: tuple[tuple[tuple[float, ...], ...], ...]
    heads: tuple[tuple[int, int], ...]
    attended: tuple[int, ...] | None = None
    bits: tuple[tuple[float, int], ...] | None = None

    @classmethod
    def read(cls, path: str | Path) -> "Profile":
        """The profile that `kvcluster tune` wrote to `path`.

        Raises
        ------
        FileNotFoundError : no such file.
        ValueError : another kind of file, or one whose numbers make no profile; the first is named.
        """
        try:
            return cls.of(read_json(path, "it"))
        except ValueError as error:
            raise ValueError(f"path must be a file that `kvcluster tune --json` wrote, got {path}: {error}") from error

    @classmethod
    def of(cls, result: Any) -> "Profile":
        """A profile from the JSON of `kvcluster tune`.

        Raises
        ------
        ValueError : what is missing or wrong in it.
        """
        profile = cls(**fields_of(result))
        profile.check()
        return profile

    @property
    def digest(self) -> str:
        """Tells profiles with other shares or another order of heads apart."""
        return hashlib.sha256(repr((self.layers, self.keeps, self.shares, self.heads)).encode()).hexdigest()[:16]

    @property
    def n_heads(self) -> int:
        """KV heads of a layer."""
        return len(self.shares[0][0]) if self.shares and self.shares[0] else 0

    def check(self) -> None:
        """Refuse numbers that make no profile."""
        n_layers, n_heads = len(self.layers), self.n_heads
        shapes = {tuple(map(len, at_keep)) for at_keep in self.shares}
        numbers = [share for at_keep in self.shares for layer in at_keep for share in layer]
        if len(self.shares) != len(self.keeps) or shapes != {(n_heads,) * n_layers} or n_heads * n_layers == 0:
            raise ValueError("shares must be keeps x layers x KV heads")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError(f"layers must ascend, got {shown(self.layers)}")
        if list(self.keeps) != sorted(set(self.keeps)) or not all(0 < keep < 1 for keep in self.keeps):
            raise ValueError(f"keeps must ascend in (0, 1), got {shown(self.keeps)}")
        if not all(0 <= share <= 1 for share in numbers):
            raise ValueError(f"shares must be in [0, 1], got {min(numbers)} to {max(numbers)}")
        if sorted(self.heads) != [(layer, head) for layer in self.layers for head in range(n_heads)]:
            raise ValueError("heads must be every KV head of every layer, once")
        if not set(self.attended or ()) <= set(self.layers):
            raise ValueError(f"attended must be of the layers {shown(self.layers)}, got {shown(self.attended)}")
        ratios = [ratio for ratio, _ in self.bits or ()]
        if ratios != sorted(set(ratios)) or not all(0 < ratio < 1 for ratio in ratios):
            raise ValueError(f"bytes_ratio must ascend in (0, 1) over bits, got {shown(ratios)}")
        if not {bits for _, bits in self.bits or ()} <= set(PLANES):
            raise ValueError(f"bits must be of {list(PLANES)}, got {shown(self.bits)}")

    def check_model(self, model: Any) -> None:
        """Refuse a model that the profile is not of.

        Raises
        ------
        ValueError : other weights, or layers and heads that it has not.
        """
        ours, config = weights_digest(model), model.config.get_text_config()
        if ours not in self.weights.values():
            theirs = " and ".join(f"{each[:12]}..." for each in self.weights.values())
            rule = f"profile must be one that `kvcluster tune` made for model, whose weights are {ours[:12]}..."
            raise ValueError(f"{rule}, got one for {self.name} with {theirs}")
        n_layers, n_heads, last = config.num_hidden_layers, config.num_key_value_heads, self.layers[-1]
        if last >= n_layers or self.n_heads != n_heads:
            rule = f"profile must be of layers below {n_layers} with {n_heads} KV heads"
            raise ValueError(f"{rule}, got layers up to {last} with {self.n_heads}")

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
        keep_ratio = check_keep_ratio(keep_ratio)
        chunk_size = check_integer("chunk_size", chunk_size, least=1)
        n_layers = check_integer("n_layers", n_layers, least=self.layers[-1] + 1, most=MOST_LAYERS)
        wanted = [[share * chunk_size for share in layer] for layer in self.shares_at(keep_ratio)]
        n_heads = sum(map(len, wanted))
        total = math.floor(keep_ratio * chunk_size * n_heads)
        least = max(1, round(LEAST * total / n_heads))
        entries = shared_out(wanted, total, least=least, most=chunk_size)
        ratios: list[float | tuple[float, ...]] = [keep_ratio] * n_layers
        for layer, numbers in zip(self.layers, entries, strict=True):
            # half an entry less than n / chunk_size: whatever the rounding, `ceil(ratio * chunk_size)` is n
            of_heads = tuple(1.0 if n == chunk_size else (n - 0.5) / chunk_size for n in numbers)
            ratios[layer] = of_heads[0] if len(set(of_heads)) == 1 else of_heads
        return ratios

    def bits_at(self, bytes_ratio: float) -> int | None:
        """The bits at the measured number of bytes whose ratio to `bytes_ratio` is nearest to 1; None: not measured."""
        if self.bits is None:
            return None
        return min(self.bits, key=lambda at: abs(math.log(at[0] / bytes_ratio)))[1]

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
        n_wanted = (
            n_whole_by_default(len(self.heads)) if n_heads is None else check_integer("n_heads", n_heads, least=1)
        )
        if n_wanted > len(self.heads):
            raise ValueError(
                f"n_heads must be at most {len(self.heads)}, the KV heads that attend to everything, got {n_heads}"
            )
        return list(self.heads[:n_wanted])


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
