"""An implementation under test: anybody's module with some of the public names, on their kind of arrays."""

import importlib
import importlib.util
import inspect
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvcluster import reference

from .case import OPERATIONS, Case
from .inputs import DTYPES

__all__ = ["Implementation", "Outcome", "filled_cache", "load_implementation", "run"]


# What decided-on arguments look like to an implementation, whatever its arrays are.
Clustering = namedtuple("Clustering", ("labels", "counts"))
Clusters = namedtuple("Clusters", ("labels", "counts", "centroids", "members", "first_member"))


class Outcome(NamedTuple):
    """What a call gave: arrays by name, or the exception that it raised."""

    arrays: dict[str, np.ndarray]
    error: Exception | None = None


class Implementation:
    """The public names that an object has, called with NumPy arrays.

    Parameters
    ----------
    namespace : a module, or any object, with some of the names of `OPERATIONS`. It may also have `from_numpy`, which
        makes its kind of array of a NumPy array (bfloat16 is `ml_dtypes.bfloat16` there), and `to_numpy`, the way
        back; or `ARRAYS = "torch"`. By default it gets NumPy arrays, and what it returns is read through DLPack or
        `__array__`. `DTYPES`, a tuple of "f16", "bf16", "f32", says which it takes; all by default.
    """

    def __init__(self, namespace: Any, name: str | None = None) -> None:
        self.namespace = namespace
        self.name = str(name or getattr(namespace, "__name__", type(namespace).__name__))
        self.operations = tuple(name for name in OPERATIONS if hasattr(namespace, name))
        self.dtypes = tuple(getattr(namespace, "DTYPES", ("f16", "bf16", "f32")))
        is_torch = getattr(namespace, "ARRAYS", "numpy") == "torch"
        self.from_numpy: Callable[[np.ndarray], Any] = getattr(
            namespace, "from_numpy", tensor_of if is_torch else np.array
        )
        self.to_numpy: Callable[[Any], np.ndarray] = getattr(namespace, "to_numpy", array_of)

    def accepts(self, case: Case) -> str | None:
        """Why the case cannot be put to this implementation; None if it can."""
        if case.operation not in self.operations:
            return "no such name"
        used = {name for name, dtype in DTYPES.items() if any(array.dtype == dtype for array in case.arrays.values())}
        if not used <= set(self.dtypes):
            return f"dtype {', '.join(sorted(used - set(self.dtypes)))}"
        try:
            known = inspect.signature(getattr(self.namespace, case.operation)).parameters
        except (TypeError, ValueError):
            return None
        if any(parameter.kind == parameter.VAR_KEYWORD for parameter in known.values()):
            return None
        asked = set(case.parameters) - {"pieces"}
        asked |= {"deviations", "init"} & set(case.arrays)
        if case.operation in ("ClusteredCache", "RecallCache"):
            asked -= {"scale"}
        missing = sorted(asked - set(known))
        return f"no parameter {', '.join(missing)}" if missing else None


def run(implementation: Implementation, case: Case) -> Outcome:
    """What the implementation makes of a case."""
    try:
        return Outcome(CALLS.get(case.operation, call_function)(implementation, case))
    except Exception as error:  # whatever an unknown implementation raises is to be told, not to stop the suite
        return Outcome({}, error)


def call_function(implementation: Implementation, case: Case) -> dict[str, np.ndarray]:
    """A function of arrays; `labels`, `counts` and `centroids` together are one argument, a decision made before."""
    arrays = {name: implementation.from_numpy(array) for name, array in case.arrays.items()}
    if case.operation == "merge":
        positional = [arrays["array"], Clustering(arrays["labels"], arrays["counts"])]
    elif case.operation == "recall_attention":
        positional = [arrays["query"], arrays["keys"], arrays["values"], clusters_of(implementation, case)]
    else:
        positional = [array for name, array in arrays.items() if name not in ("deviations", "init")]
    named = {name: arrays[name] for name in ("deviations", "init") if name in arrays}
    parameters = dict(case.parameters)
    if case.operation == "alternating_partition":
        positional = [parameters.pop("size")]
    result = getattr(implementation.namespace, case.operation)(*positional, **named, **parameters)
    return parts(implementation, RESULTS[case.operation], result)


def clusters_of(implementation: Implementation, case: Case) -> Clusters:
    """The clusters of a case with what follows from them, on the implementation's arrays."""
    labels, counts, centroids = (case.arrays[name] for name in ("labels", "counts", "centroids"))
    members, first_member = labels.argsort(axis=-1, kind="stable"), counts.cumsum(axis=-1) - counts
    return Clusters(*map(implementation.from_numpy, (labels, counts, centroids, members, first_member)))


def filled_cache(implementation: Implementation, case: Case) -> tuple[Any, Any]:
    """The cache after the appends of a case, and what the last of them returned."""
    parameters = {name: value for name, value in case.parameters.items() if name not in ("pieces", "scale")}
    if case.operation == "ClusteredCache" and implementation.namespace is reference:
        if "n_shared" in parameters:
            parameters["method"] = reference.Distinctive(parameters.pop("n_shared"))
        cache = (reference.BoundedCache if "budget" in parameters else reference.ClusteredCache)(**parameters)
    else:
        cache = getattr(implementation.namespace, case.operation)(**parameters)
    start, returned = 0, None
    for piece in case.parameters["pieces"]:
        span = slice(start, start + piece)
        new = [implementation.from_numpy(case.arrays[name][..., span, :]) for name in ("keys", "values")]
        returned = cache.append(*new)
        start += piece
    return cache, returned


def call_cache(implementation: Implementation, case: Case) -> dict[str, np.ndarray]:
    """A cache: made, filled piece by piece, attended to; what is stored is compared where it can be seen."""
    cache, returned = filled_cache(implementation, case)
    query = implementation.from_numpy(case.arrays["query"])
    scale = {"scale": case.parameters["scale"]} if "scale" in case.parameters else {}
    seen = {"n_seen": np.array(cache.n_seen), "n_stored": np.array(cache.n_stored)}
    if isinstance(returned, tuple) and len(returned) == 3:  # the entries before the last clustering
        seen["n_returned"] = np.array(implementation.to_numpy(returned[2]).shape[-1])
    for name in ("keys", "values", "counts"):
        if getattr(cache, name, None) is not None:
            seen[name] = implementation.to_numpy(getattr(cache, name))
    if getattr(cache, "clusters", None) is not None:
        seen |= parts(implementation, RESULTS["kmeans"], cache.clusters)
    if hasattr(cache, "select_clusters"):
        selection = cache.select_clusters(query)
        if selection is not None:
            seen |= parts(implementation, RESULTS["select_clusters"], selection)
    return seen | {"output": implementation.to_numpy(cache.attend(query, **scale))}


def parts(implementation: Implementation, names: tuple[str, ...], result: Any) -> dict[str, np.ndarray]:
    """The named arrays of a result: its attributes, the elements of a tuple, or itself."""
    if all(hasattr(result, name) for name in names):
        found = [getattr(result, name) for name in names]
    elif isinstance(result, tuple | list):
        if len(result) != len(names):
            raise TypeError(f"the result must be {', '.join(names)}, got {len(result)} values")
        found = list(result)
    elif len(names) == 1:
        found = [result]
    else:
        raise TypeError(f"the result must have {', '.join(names)}, got {type(result).__name__}")
    return {name: implementation.to_numpy(array) for name, array in zip(names, found, strict=True)}


RESULTS = {
    "alternating_partition": ("sources", "destinations"),
    "similarity": ("similarity",),
    "chunked_soft_matching": ("labels", "counts"),
    "distinctive_matching": ("labels", "counts"),
    "merge": ("centroids",),
    "attention": ("output",),
    "clustered_attention": ("output",),
    "kmeans": ("labels", "counts", "centroids"),
    "select_clusters": ("taken",),
    "recall_attention": ("output",),
}
CALLS = {"ClusteredCache": call_cache, "RecallCache": call_cache}


def tensor_of(array: np.ndarray) -> Any:
    """A torch tensor with the bits of a NumPy array."""
    import torch

    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def array_of(result: Any) -> np.ndarray:
    """A NumPy array of whatever it is, with the same bits."""
    if isinstance(result, np.ndarray | list | int):
        return np.asarray(result)
    if hasattr(result, "detach"):  # a torch tensor, which may lie on a GPU and may be bfloat16
        import torch

        tensor = result.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(DTYPES["bf16"])
        return tensor.numpy()
    return np.from_dlpack(result) if hasattr(result, "__dlpack__") else np.asarray(result)


def load_implementation(target: str) -> Implementation:
    """The implementation that `package.module` or a path to a .py file names.

    Raises
    ------
    ImportError : it cannot be imported, or has none of the public names.
    """
    if target.endswith(".py"):
        path = Path(target).resolve()
        spec = importlib.util.spec_from_file_location(path.stem, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ImportError(f"target must be a module or a .py file, got {target!r}")
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))  # its own imports
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(path.parent))
    else:
        sys.path.insert(0, "")
        try:
            module = importlib.import_module(target)
        finally:
            sys.path.remove("")
    implementation = Implementation(module, target)
    if not implementation.operations:
        raise ImportError(f"target must have one of {', '.join(OPERATIONS)}, got {target!r} without any")
    return implementation
