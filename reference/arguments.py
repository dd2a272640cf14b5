"""Checks of arguments: every error names the argument, the rule and the value that broke it."""

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np

__all__ = ["check_append", "check_array", "check_attention", "check_budget", "check_clustering", "check_counts"]
__all__ += ["check_half_range", "check_heads", "check_init", "check_integer", "check_integers", "check_keep_ratio"]
__all__ += ["check_keep_ratios", "check_labelled", "check_method", "check_n_clusters", "check_n_heads", "check_number"]
__all__ += ["check_pair", "check_recent_share", "check_scale", "check_scored", "check_seed", "check_share"]
__all__ += ["check_whole_heads"]

# All three are exactly representable in float32; NumPy knows bfloat16 through the package ml_dtypes.
DTYPES = ("float16", "bfloat16", "float32")
MOST = 2**62  # of any integer: two of them fit 64 bits, in which compiled code counts


def check_integer(name: str, value: int, least: int) -> int:
    """`value` as Python's own int, which never overflows; refuse what is not an integer from `least` to 2**62."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > MOST:
        raise ValueError(f"{name} must be at most {MOST}, got {value}")
    return int(value)


def check_seed(name: str, seed: int) -> int:
    """`seed` as Python's own int; refuse what is not an integer of 32 bits."""
    seed = check_integer(name, seed, least=0)
    if seed >= 2**32:
        raise ValueError(f"{name} must be below 2**32, got {seed}")
    return seed


def check_number(name: str, value: float) -> float:
    """`value` as Python's own float, infinite if it is too large for one; refuse what is not a real number."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        return float(value)
    except OverflowError:
        return math.inf


def check_keep_ratio(keep_ratio: float, name: str = "keep_ratio") -> float:
    """`keep_ratio` as Python's own float; refuse what is not a number in (0, 1]."""
    number = check_number(name, keep_ratio)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {keep_ratio}")
    return number


def check_keep_ratios(keep_ratios: Sequence[float]) -> tuple[float, ...]:
    """A number in (0, 1] for each head; refuse anything else."""
    if isinstance(keep_ratios, str) or not isinstance(keep_ratios, Sequence) or not len(keep_ratios):
        raise TypeError(f"keep_ratios must be a sequence of numbers, one for each head, got {keep_ratios!r}")
    return tuple(check_keep_ratio(ratio, name="keep_ratios") for ratio in keep_ratios)


def check_n_heads(keep_ratios: Sequence[float], shape: tuple[int, ...]) -> None:
    """Refuse keys of a shape (..., heads, tokens, dim) with another number of heads."""
    heads = shape[-3] if len(shape) > 2 else 0
    if heads != len(keep_ratios):
        rule = f"keep_ratios must be one for each head of keys, {heads}"
        raise ValueError(f"{rule}, got {len(keep_ratios)} for keys of shape {tuple(shape)}")


def check_recent_share(recent_share: float) -> float:
    """A number in [0, 0.5]: of two new tokens at most one may widen the recent window. Refuse anything else."""
    share = check_share("recent_share", recent_share)
    if share > 0.5:
        raise ValueError(f"recent_share must be at most 0.5, got {recent_share}")
    return share


def check_share(name: str, share: float) -> float:
    """`share` as Python's own float; refuse what is not a number in [0, 1]."""
    number = check_number(name, share)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} must be in [0, 1], got {share}")
    return number


def check_method(method: object) -> None:
    """Refuse what does not cluster, and a class in place of an instance."""
    if isinstance(method, type) or not callable(getattr(method, "cluster", None)):
        raise TypeError(f"method must be a method such as SoftMatching() or Distinctive(n_shared=4), got {method!r}")


def check_budget(budget: int, *, n_sink: int, n_recent: int, chunk_size: int, entries: int) -> int:
    """`budget`; refuse one that could not hold all sinks and recent tokens, and one span of `entries`."""
    budget = check_integer("budget", budget, least=1)
    least = n_sink + n_recent + chunk_size - 1 + entries
    if budget < least:
        raise ValueError(
            "budget must be at least n_sink + n_recent + chunk_size - 1 + ceil(keep_ratio * chunk_size), got "
            f"{budget} < {n_sink} + {n_recent} + {chunk_size} - 1 + {entries} = {least}"
        )
    return budget


def check_array(name: str, array: np.ndarray) -> None:
    """Refuse what is not a finite float16, bfloat16 or float32 array `(..., tokens, dim)`, dim >= 1."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype.name not in DTYPES or not array.dtype.isnative:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {array.dtype}")
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape (..., tokens, dim), got {array.shape}")
    if array.shape[-1] < 1:
        raise ValueError(f"{name} must have dim >= 1, got shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"{name} must be finite, got {int((~np.isfinite(array)).sum())} NaN or infinite values")


def check_pair(a: np.ndarray, b: np.ndarray) -> None:
    """Refuse two arrays whose rows cannot be compared."""
    check_array("a", a)
    check_array("b", b)
    if a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1]:
        raise ValueError(f"a and b must have the same leading axes and dim, got a {a.shape} and b {b.shape}")


def check_attention(query: np.ndarray, keys: np.ndarray, values: np.ndarray) -> None:
    """Refuse arrays that do not fit each other."""
    for name, array in (("query", query), ("keys", keys), ("values", values)):
        check_array(name, array)
    if keys.shape[-2] == 0:
        raise ValueError(f"keys must hold at least one token, got shape {keys.shape}")
    check_values(keys, values)
    if query.shape[:-2] != keys.shape[:-2] or query.shape[-1] != keys.shape[-1]:
        shapes = f"got query {query.shape}, keys {keys.shape}"
        raise ValueError(f"query must have the leading axes and dim of keys, {shapes}")


def check_values(keys: np.ndarray, values: np.ndarray) -> None:
    """Refuse values that are not one for each of the keys."""
    if values.shape[:-1] != keys.shape[:-1]:
        shapes = f"got values {values.shape} and keys {keys.shape}"
        raise ValueError(f"values must have the leading axes and tokens of keys, {shapes}")


def check_counts(keys: np.ndarray, counts: np.ndarray) -> None:
    """Refuse counts that do not belong to `keys`."""
    check_integers("counts", counts)
    if counts.shape != keys.shape[:-1]:
        raise ValueError(f"counts must have the shape of keys without dim, got {counts.shape} and {keys.shape}")
    if (counts < 0).any():
        raise ValueError(f"counts must be at least 0, got {counts.min()}")
    if not (counts > 0).any(axis=-1).all():
        raise ValueError("counts must have an entry above 0 for every leading index, got only 0")


def check_integers(name: str, array: np.ndarray) -> None:
    """Refuse what is not an array of integers."""
    if not isinstance(array, np.ndarray):
        raise TypeError(f"{name} must be a NumPy array, got {type(array).__name__}")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be integers, got {array.dtype.name}")


def check_clustering(array: np.ndarray, labels: np.ndarray, counts: np.ndarray) -> None:
    """Refuse labels of other tokens than those of `array`, counts of other labels, and entries without tokens."""
    check_integers("labels", labels)
    check_integers("counts", counts)
    if labels.shape != array.shape[:-1]:
        raise ValueError(f"labels must have the shape of array without dim, got {labels.shape} and {array.shape}")
    if counts.shape[:-1] != labels.shape[:-1]:
        raise ValueError(f"counts must have the leading axes of labels, got {counts.shape} and {labels.shape}")
    entries = counts.shape[-1]
    if labels.size and not 0 <= labels.min() <= labels.max() < entries:
        raise ValueError(f"labels must be from 0 to {entries - 1}, got {labels.min()} to {labels.max()}")
    for problem in np.ndindex(*labels.shape[:-1]):
        members = np.bincount(labels[problem], minlength=entries)
        if not np.array_equal(members, counts[problem]):
            raise ValueError("counts must be the number of tokens of each label, got other numbers")
    if (counts < 1).any():
        raise ValueError(f"counts must be at least 1, got {counts.min()}")


def check_append(keys: np.ndarray, values: np.ndarray, held: tuple[np.ndarray | None, np.ndarray | None]) -> None:
    """Refuse keys and values that do not fit each other, or the keys and values that a cache holds, if any."""
    check_array("keys", keys)
    check_array("values", values)
    check_values(keys, values)
    for name, new, old in zip(("keys", "values"), (keys, values), held, strict=True):
        if old is not None and (new.shape[:-2] != old.shape[:-2] or new.shape[-1] != old.shape[-1]):
            raise ValueError(f"{name} must fit what the cache holds, got {new.shape} after {old.shape}")
        if old is not None and new.dtype != old.dtype:
            raise ValueError(f"{name} must have the dtype of the cache, {old.dtype.name}, got {new.dtype.name}")


def check_whole_heads(whole_heads: Sequence[int]) -> tuple[int, ...]:
    """Different indices of heads, ascending; refuse anything else."""
    if isinstance(whole_heads, str) or not isinstance(whole_heads, Sequence):
        raise TypeError(f"whole_heads must be a sequence of integers, got {whole_heads!r}")
    heads = [check_integer("whole_heads", head, least=0) for head in whole_heads]
    if len(set(heads)) < len(heads):
        raise ValueError(f"whole_heads must be different heads, got {heads}")
    return tuple(sorted(heads))


def check_heads(whole_heads: Sequence[int], shape: tuple[int, ...]) -> None:
    """Refuse heads that keys of this shape (..., heads, tokens, dim) do not have."""
    heads = shape[-3] if len(shape) > 2 else 0
    if whole_heads and max(whole_heads) >= heads:
        raise ValueError(
            f"whole_heads must be below the heads of keys, {heads}, got {max(whole_heads)} for keys of shape {shape}"
        )


def check_n_clusters(n_clusters: int, tokens: int) -> int:
    """`n_clusters`; refuse what is not a number of clusters that so many tokens can make."""
    n_clusters = check_integer("n_clusters", n_clusters, least=1)
    if n_clusters > tokens:
        raise ValueError(f"n_clusters must be at most the number of tokens, {tokens}, got {n_clusters}")
    return n_clusters


def check_init(keys: np.ndarray, init: np.ndarray, n_clusters: int) -> None:
    """Refuse an `init` that does not fit `keys`."""
    if not isinstance(init, np.ndarray):
        raise TypeError(f"init must be a NumPy array, got {type(init).__name__}")
    shape = (*keys.shape[:-2], n_clusters)
    if init.dtype.kind in "iu":
        if init.shape != shape:
            raise ValueError(f"init must hold token indices of shape {shape}, got {init.shape}")
        if init.size and not 0 <= init.min() <= init.max() < keys.shape[-2]:
            raise ValueError(f"init must be from 0 to {keys.shape[-2] - 1}, got {init.min()} to {init.max()}")
        return
    check_array("init", init)
    if init.shape != (*shape, keys.shape[-1]):
        raise ValueError(f"init must hold centroids of shape {(*shape, keys.shape[-1])}, got {init.shape}")


def check_labelled(keys: np.ndarray, labels: np.ndarray) -> None:
    """Refuse clusters that are not those of `keys`."""
    check_integers("labels of clusters", labels)
    if labels.shape != keys.shape[:-1]:
        raise ValueError(f"clusters must have a label for every token of keys, got {labels.shape} and {keys.shape}")


def check_scored(query: np.ndarray, centroids: np.ndarray, counts: np.ndarray, deviations: np.ndarray) -> None:
    """Refuse arrays that do not fit each other."""
    for name, array in (("query", query), ("centroids", centroids), ("deviations", deviations)):
        check_array(name, array)
    shapes = f"{query.shape} and {centroids.shape}"
    if query.shape[:-2] != centroids.shape[:-2] or query.shape[-1] != centroids.shape[-1]:
        raise ValueError(f"query must have the leading axes and dim of centroids, got {shapes}")
    if query.shape[-2] == 0 or centroids.shape[-2] == 0:
        raise ValueError(f"query and centroids must not be empty, got {shapes}")
    if deviations.shape != centroids.shape:
        raise ValueError(f"deviations must have the shape of centroids, got {deviations.shape} and {centroids.shape}")
    check_integers("counts", counts)
    if counts.shape != centroids.shape[:-1]:
        raise ValueError(
            f"counts must have the shape of centroids without dim, got {counts.shape} and {centroids.shape}"
        )
    if (counts < 0).any():
        raise ValueError(f"counts must be at least 0, got {counts.min()}")


def check_half_range(name: str, array: np.ndarray, why: str) -> None:
    """Refuse numbers that might overflow float32 when another one is subtracted, or when they are rounded up."""
    half = float(np.finfo(np.float32).max) / 2
    largest = float(np.abs(array.astype(np.float64)).max(initial=0))
    if largest > half:
        raise ValueError(f"{name} must be at most {half:.3g} in size {why}, got {largest:.3g}")


def check_scale(scale: float) -> float:
    """`scale` as Python's own float; refuse what is not a finite number."""
    number = check_number("scale", scale)
    if not math.isfinite(number):
        raise ValueError(f"scale must be finite, got {scale}")
    return number
