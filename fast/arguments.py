"""Checks of arguments, in the words of the reference: every error names the argument, the rule and the value."""

import math
from collections.abc import Callable, Sequence

import torch
from torch._subclasses import FakeTensor
from torch.masked import MaskedTensor

__all__ = [
    "check_append",
    "check_array",
    "check_attention",
    "check_axis_of_rows",
    "check_clustering",
    "check_counts",
    "check_finite",
    "check_half_range",
    "check_heads",
    "check_init",
    "check_integers",
    "check_method",
    "check_n_heads",
    "check_numbers_are_there",
    "check_query",
    "check_rows",
    "check_scored",
    "check_shape",
    "dtype_name",
    "with_four_axes",
]

DTYPES = {torch.float16, torch.bfloat16, torch.float32}


def check_array(name: str, array: torch.Tensor) -> None:
    """Refuse what is not a finite float16, bfloat16 or float32 tensor `(..., tokens, dim)`, dim >= 1."""
    check_shape(name, array)
    check_numbers_are_there(name, array)
    check_finite(name, array)


def check_append(keys: torch.Tensor, values: torch.Tensor, held: tuple[torch.Tensor, ...] | None) -> None:
    """Refuse keys and values that do not fit each other, or what a cache holds: its keys and values, if any."""
    check_array("keys", keys)
    check_array("values", values)
    if values.shape[:-1] != keys.shape[:-1]:
        shapes = f"got values {tuple(values.shape)} and keys {tuple(keys.shape)}"
        raise ValueError(f"values must have the leading axes and tokens of keys, {shapes}")
    for name, new, old in zip(("keys", "values"), (keys, values), held or (), strict=False):
        if new.shape[:-2] != old.shape[:-2] or new.shape[-1] != old.shape[-1]:
            raise ValueError(f"{name} must fit what the cache holds, got {tuple(new.shape)} after {tuple(old.shape)}")
        if new.dtype != old.dtype:
            raise ValueError(f"{name} must have the dtype of the cache, {dtype_name(old)}, got {dtype_name(new)}")
        if new.device != old.device:
            raise ValueError(f"{name} must be on the device of the cache, {old.device}, got {new.device}")


def check_finite(name: str, array: torch.Tensor) -> None:
    """Refuse NaN and infinities, each number read once: one of them leaves no sum finite.

    Where large finite numbers overflow it, each is looked at. In float16 that would be often.
    """
    array = array.detach()
    is_wide = array.dtype != torch.float16 or array.numel() < 4096
    numbers = (array.sum(),) if is_wide else array.aminmax()  # which hands on NaN
    if not all(math.isfinite(number) for number in numbers) and not bool(torch.isfinite(array).all()):
        raise ValueError(f"{name} must be finite, got {int((~torch.isfinite(array)).sum())} NaN or infinite values")


def check_shape(name: str, array: torch.Tensor) -> None:
    """Refuse all else that `check_array` refuses."""
    if not isinstance(array, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(array).__name__}")
    if array.is_nested or array.layout is not torch.strided or isinstance(array, MaskedTensor):
        kind = "nested" if array.is_nested else str(array.layout).removeprefix("torch.").replace("strided", "masked")
        raise ValueError(f"{name} must be a dense tensor, got a {kind} one")
    if array.dtype not in DTYPES:
        raise ValueError(f"{name} must be float16, bfloat16 or float32, got {dtype_name(array)}")
    if array.ndim < 2:
        raise ValueError(f"{name} must have shape (..., tokens, dim), got {tuple(array.shape)}")
    if array.shape[-1] < 1:
        raise ValueError(f"{name} must have dim >= 1, got shape {tuple(array.shape)}")


def check_numbers_are_there(name: str, array: torch.Tensor) -> None:
    """Refuse a tensor that only has a shape."""
    if array.is_meta or isinstance(array, FakeTensor):
        kind = "meta" if array.is_meta else "fake"
        raise ValueError(f"{name} must be a tensor with numbers in memory, got a {kind} one")


def check_integers(name: str, array: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`array` as int64; refuse what is not a tensor of integers on the device of `like`."""
    if not isinstance(array, torch.Tensor):
        raise TypeError(f"{name} must be a torch tensor, got {type(array).__name__}")
    if array.is_floating_point() or array.is_complex() or array.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {dtype_name(array)}")
    if array.device != like.device:
        raise ValueError(f"{name} must be on the device of what they belong to, {like.device}, got {array.device}")
    return array.long()


def check_axis_of_rows(n_axes: int) -> None:
    """Refuse to select of a cache whose first axis are heads that are not alike."""
    if n_axes < 1:
        raise ValueError("select needs an axis of rows before that of heads in keys, got (heads, tokens, dim)")


def check_rows(indices: torch.Tensor, n_rows: int) -> None:
    """Refuse what is not a tensor (rows,) of integers below `n_rows`."""
    if not isinstance(indices, torch.Tensor):
        raise TypeError(f"indices must be a torch tensor, got {type(indices).__name__}")
    if indices.ndim != 1 or indices.dtype not in (torch.int32, torch.int64):
        got = f"{dtype_name(indices)} of shape {tuple(indices.shape)}"
        raise ValueError(f"indices must be int32 or int64 of shape (rows,), got {got}")
    lowest, highest = map(int, indices.aminmax()) if len(indices) else (0, -1)
    if lowest < 0 or highest >= n_rows:
        raise ValueError(f"indices must be from 0 to {n_rows - 1}, got {lowest} to {highest}")


def with_four_axes(array: torch.Tensor) -> torch.Tensor:
    """`array` (..., rows, dim) as (batch, heads, rows, dim), the kernels' shape; other leading axes become heads."""
    return array if array.ndim == 4 else array.reshape(1, array.shape[:-2].numel(), *array.shape[-2:])


def dtype_name(array: torch.Tensor) -> str:
    """`float64`, not `torch.float64`."""
    return str(array.dtype).removeprefix("torch.")


def check_half_range(name: str, array: torch.Tensor, why: str) -> None:
    """Refuse numbers that might overflow float32 when another one is subtracted, or when they are rounded up."""
    half = torch.finfo(torch.float32).max / 2
    largest = max(abs(float(number)) for number in array.detach().aminmax()) if array.numel() else 0.0
    if largest > half:
        raise ValueError(f"{name} must be at most {half:.3g} in size {why}, got {largest:.3g}")


def check_n_heads(keep_ratios: Sequence[float], shape: tuple[int, ...]) -> None:
    """Refuse keys of a shape (..., heads, tokens, dim) with another number of heads."""
    heads = shape[-3] if len(shape) > 2 else 0
    if heads != len(keep_ratios):
        rule = f"keep_ratios must be one for each head of keys, {heads}"
        raise ValueError(f"{rule}, got {len(keep_ratios)} for keys of shape {tuple(shape)}")


def check_init(keys: torch.Tensor, init: torch.Tensor, n_clusters: int) -> None:
    """Refuse an `init` that does not fit `keys`."""
    if not isinstance(init, torch.Tensor):
        raise TypeError(f"init must be a torch tensor, got {type(init).__name__}")
    shape = (*keys.shape[:-2], n_clusters)
    if not init.is_floating_point() and not init.is_complex() and init.dtype != torch.bool:
        if init.shape != shape:
            raise ValueError(f"init must hold token indices of shape {shape}, got {tuple(init.shape)}")
        if init.numel() and not bool(((init >= 0) & (init < keys.shape[-2])).all()):
            raise ValueError(f"init must be from 0 to {keys.shape[-2] - 1}, got {int(init.min())} to {int(init.max())}")
        return
    check_array("init", init)
    if init.shape != (*shape, keys.shape[-1]):
        raise ValueError(f"init must hold centroids of shape {(*shape, keys.shape[-1])}, got {tuple(init.shape)}")


def check_scored(query: torch.Tensor, centroids: torch.Tensor, counts: torch.Tensor, deviations: torch.Tensor) -> None:
    """Refuse tensors that do not fit each other."""
    for name, array in (("query", query), ("centroids", centroids), ("deviations", deviations)):
        check_array(name, array)
    shapes = tuple(query.shape), tuple(centroids.shape)
    if query.shape[:-2] != centroids.shape[:-2] or query.shape[-1] != centroids.shape[-1]:
        raise ValueError(f"query must have the leading axes and dim of centroids, got {shapes[0]} and {shapes[1]}")
    if query.shape[-2] == 0 or centroids.shape[-2] == 0:
        raise ValueError(f"query and centroids must not be empty, got {shapes[0]} and {shapes[1]}")
    if deviations.shape != centroids.shape:
        raise ValueError(f"deviations must have the shape of centroids, got {tuple(deviations.shape)} and {shapes[1]}")
    check_integers("counts", counts, centroids)
    if counts.shape != centroids.shape[:-1]:
        raise ValueError(
            f"counts must have the shape of centroids without dim, got {tuple(counts.shape)} and {shapes[1]}"
        )
    if bool((counts < 0).any()):
        raise ValueError(f"counts must be at least 0, got {int(counts.min())}")


def check_clustering(labels: torch.Tensor, counts: torch.Tensor) -> None:
    """Refuse counts that are not the numbers of the labels, and entries without tokens."""
    entries = counts.shape[-1]
    if labels.numel() and not bool(((labels >= 0) & (labels < entries)).all()):
        raise ValueError(f"labels must be from 0 to {entries - 1}, got {int(labels.min())} to {int(labels.max())}")
    members = torch.zeros_like(counts).scatter_add_(-1, labels, torch.ones_like(labels))
    if not torch.equal(members, counts):
        raise ValueError("counts must be the number of tokens of each label, got other numbers")
    if bool((counts < 1).any()):
        raise ValueError(f"counts must be at least 1, got {int(counts.min())}")


def check_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    look: Callable[[str, torch.Tensor], None] = check_array,
) -> None:
    """Refuse tensors that do not fit each other; each alone is looked at by `look`."""
    arrays = {"query": query, "keys": keys, "values": values}
    devices = {array.device for array in arrays.values() if isinstance(array, torch.Tensor)}
    if len(devices) > 1:
        named = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"query, keys and values must be on one device, got {named}")
    for name, array in arrays.items():
        look(name, array)
    shapes = [tuple(array.shape) for array in (query, keys, values)]
    if keys.shape[-2] == 0:
        raise ValueError(f"keys must hold at least one token, got shape {shapes[1]}")
    if values.shape[:-1] != keys.shape[:-1]:
        raise ValueError(
            f"values must have the leading axes and tokens of keys, got values {shapes[2]} and keys {shapes[1]}"
        )
    if query.shape[:-2] != keys.shape[:-2] or query.shape[-1] != keys.shape[-1]:
        raise ValueError(f"query must have the leading axes and dim of keys, got query {shapes[0]}, keys {shapes[1]}")


def check_counts(keys: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Counts that belong to `keys`; refuse others."""
    if not isinstance(counts, torch.Tensor):
        raise TypeError(f"counts must be a torch tensor, got {type(counts).__name__}")
    if counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool:
        raise ValueError(f"counts must be integers, got {dtype_name(counts)}")
    if counts.shape != keys.shape[:-1]:
        raise ValueError(
            f"counts must have the shape of keys without dim, got {tuple(counts.shape)} and {tuple(keys.shape)}"
        )
    if not counts.numel():
        return counts
    lowest, highest = map(int, counts.aminmax())
    if lowest < 0:
        raise ValueError(f"counts must be at least 0, got {lowest}")
    if highest >= 2**31:
        raise ValueError(f"counts must be below 2**31, got {highest}")
    if lowest == 0 and not bool(counts.any(dim=-1).all()):
        raise ValueError("counts must have an entry above 0 for every leading index, got only 0")
    return counts


def check_method(method: object) -> None:
    """Refuse what is no method of clustering chunks."""
    if isinstance(method, type) or not callable(getattr(method, "compress", None)):
        raise TypeError(f"method must be a method such as SoftMatching() or Distinctive(n_shared=4), got {method!r}")


def check_heads(whole_heads: Sequence[int], shape: tuple[int, ...]) -> None:
    """Refuse heads that keys of this shape (..., heads, tokens, dim) do not have."""
    heads = shape[-3] if len(shape) > 2 else 0
    if whole_heads and max(whole_heads) >= heads:
        raise ValueError(
            f"whole_heads must be below the heads of keys, {heads}, got {max(whole_heads)} for keys of shape {shape}"
        )


def check_query(query: torch.Tensor, keys: torch.Tensor | None) -> None:
    """Refuse a query that does not fit the keys of a cache, which must hold some."""
    if keys is None:
        raise ValueError("attend needs at least one appended token, got an empty cache")
    check_array("query", query)
    if query.shape[:-2] != keys.shape[:-2] or query.shape[-1] != keys.shape[-1]:
        shapes = f"got query {tuple(query.shape)}, keys {tuple(keys.shape)}"
        raise ValueError(f"query must have the leading axes and dim of keys, {shapes}")
    if keys.shape[-2] == 0:
        raise ValueError(f"keys must hold at least one token, got shape {tuple(keys.shape)}")
    if query.shape[-2] == 0:
        raise ValueError(f"query must not be empty, got {tuple(query.shape)}")
