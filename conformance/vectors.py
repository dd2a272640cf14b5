"""Test vectors: the cases and their expected results, as files for people who do not write Python.

One safetensors file per operation and a manifest in JSON; docs/vectors/README.md describes them, reader.cpp beside it
reads them. The same seed gives the same bytes on every machine: inputs and decisions by the arithmetic contract,
attention by `exact_attention`.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from .caches import BESIDE
from .case import Case
from .cases import all_cases
from .comparing import expected, oracle_arguments
from .exact import exact_attention, exact_bound
from .inputs import DTYPES
from .operations import OPERATIONS
from .writing import CONTRACT

__all__ = ["verify_vectors", "write_vectors"]

FORMAT = {"format": "kvcluster vectors", "arithmetic_contract": CONTRACT}
MANIFEST = "manifest.json"
NAMES = ("operation", "name")  # of a case
STORED = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64", "int64": "I64"}


def write_vectors(folder: str | Path, seed: int = 0, on_case: Callable[[Case], None] | None = None) -> int:
    """Write the vectors into a folder, and return the number of cases.

    Parameters
    ----------
    folder : created, with the folders above it, if it does not exist. All files appear in it at once.
    seed : at least 0; another seed gives the cases other numbers.
    on_case : called after each case.

    Raises
    ------
    FileExistsError : `folder` exists and is neither an empty folder nor an earlier set of vectors.
    ModuleNotFoundError : ml_dtypes is not installed; bfloat16 needs it.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        new, earlier = Path(temporary, "new"), Path(temporary, "earlier")
        new.mkdir()
        manifest: dict[str, Any] = {**FORMAT, "version": version("kvcluster"), "seed": seed, "files": {}, "cases": []}
        for operation, arrays, cases in contents(seed, on_case):
            content = serialize(arrays)
            (new / f"{operation}.safetensors").write_bytes(content)
            manifest["files"][f"{operation}.safetensors"] = fingerprint(content)
            manifest["cases"] += cases
        text = json.dumps(manifest, indent=1, sort_keys=True, allow_nan=False) + "\n"
        (new / MANIFEST).write_bytes(text.encode())
        try:
            if folder.exists():
                os.replace(folder, earlier)
            os.replace(new, folder)
        except BaseException:
            if earlier.exists():
                os.replace(earlier, folder)
            raise
    return len(manifest["cases"])


def verify_vectors(folder: str | Path, on_case: Callable[[Case], None] | None = None) -> list[str]:
    """What differs between a set of vectors and what the reference says now, in words; empty if nothing does.

    A set of another version may lack cases and outputs that came later: what it has must be right.

    Raises
    ------
    ValueError : `folder` has no manifest of vectors.
    ModuleNotFoundError : as `write_vectors`.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    listed = {tuple(case[name] for name in NAMES): case for case in manifest["cases"]}
    differences = []
    for operation, arrays, cases in contents(manifest["seed"], on_case):
        if manifest.get("version") != version("kvcluster"):
            arrays, cases = of_those(arrays, cases, listed)
            if not cases and operation not in {name for name, _ in listed}:
                continue
        for case in cases:
            if listed.pop((operation, case["name"]), None) != case:
                differences.append(f"{MANIFEST}: {operation} {case['name']} is missing or differs")
        name = f"{operation}.safetensors"
        if not (folder / name).is_file():
            differences.append(f"{name}: missing")
            continue
        content = (folder / name).read_bytes()
        if manifest["files"].get(name) != fingerprint(content):
            differences.append(f"{name}: sha256 or bytes are not those of {MANIFEST}")
        differences += [f"{name}: {text}" for text in different_arrays(content, arrays)]
    return differences + [f"{MANIFEST}: {operation} {name} is not a case" for operation, name in listed]


def of_those(
    arrays: dict[str, np.ndarray], cases: list[dict[str, Any]], listed: dict[tuple[Any, ...], dict[str, Any]]
) -> tuple[dict[str, np.ndarray], list[dict[str, Any]]]:
    """Of arrays and cases of an operation those that an older set has listed."""
    kept, names = [], set()
    for case in cases:
        says = listed.get((case["operation"], case["name"]))
        if says is not None:
            outputs = {name: output for name, output in case["outputs"].items() if name in says.get("outputs", {})}
            kept.append({**case, "outputs": outputs})
            names |= {f"{case['name']}/in/{name}" for name in case["inputs"]}
            names |= {f"{case['name']}/out/{name}" for name in (*outputs, "bound")}
    return {name: array for name, array in arrays.items() if name in names}, kept


def contents(seed: int, on_case: Callable[[Case], None] | None) -> Iterator[tuple[str, dict[str, np.ndarray], list]]:
    """For every operation its name, its arrays as they are stored, and what the manifest says of its cases."""
    if "bf16" not in DTYPES:
        raise ModuleNotFoundError("vectors need ml_dtypes", name="ml_dtypes")
    for operation in OPERATIONS:
        arrays: dict[str, np.ndarray] = {}
        cases = []
        for case in all_cases((operation,), seed):
            if not case.is_refused:
                inputs, outputs = arrays_of(case)
                cases.append(description(case, inputs, outputs))
                arrays |= {f"{case.name}/in/{name}": array for name, array in inputs.items()}
                arrays |= {f"{case.name}/out/{name}": array for name, array in outputs.items()}
                if on_case is not None:
                    on_case(case)
        yield operation, arrays, cases


def arrays_of(case: Case) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Inputs and outputs of a case, integers as int64; for attention with its bound."""
    outputs = {name: array for name, array in expected(case).items() if name not in BESIDE}
    if "output" in outputs:
        query, *entries = oracle_arguments(case)
        outputs["output"] = exact_attention(query, *entries)
        outputs["bound"] = exact_bound(outputs["output"], query, *entries)
    inputs, outputs = (
        {name: array.astype(np.int64) if array.dtype.kind in "iu" else array for name, array in arrays.items()}
        for arrays in (case.arrays, outputs)
    )
    return inputs, outputs


def description(case: Case, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> dict[str, Any]:
    """A case as the manifest has it."""
    parts = {
        part: {name: {"dtype": STORED[array.dtype.name], "shape": list(array.shape)} for name, array in arrays.items()}
        for part, arrays in (("inputs", inputs), ("outputs", outputs))
    }
    for name, output in parts["outputs"].items():
        output["compare"] = "integers" if output["dtype"] == "I64" else "bound" if name == "output" else "bits"
    parts["outputs"].pop("bound", None)  # it is there for `output`, not to be compared itself
    return {"operation": case.operation, "name": case.name, "parameters": case.written_parameters, **parts}


def serialize(arrays: dict[str, np.ndarray]) -> bytes:
    """The content of a safetensors file: the widest dtype first, then by name."""
    arrays = {name: np.ascontiguousarray(array).reshape(array.shape) for name, array in sorted(arrays.items())}
    if not hasattr(safetensors, "TensorSpec"):  # before 0.8
        old: Any = {n: {"dtype": a.dtype.name, "shape": a.shape, "data": a.tobytes()} for n, a in arrays.items()}
        return bytes(safetensors.serialize(old))
    tensors = {
        name: safetensors.TensorSpec(
            dtype=array.dtype.name, shape=array.shape, data_ptr=array.ctypes.data, data_len=array.nbytes
        )
        for name, array in arrays.items()
    }
    return bytes(safetensors.serialize(tensors))


def fingerprint(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "bytes": len(content)}


def different_arrays(content: bytes, arrays: dict[str, np.ndarray]) -> Iterator[str]:
    """How the arrays of a file differ from `arrays`, bit for bit, in words."""
    try:
        stored = dict(safetensors.deserialize(content))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        yield f"cannot be read, {error}"
        return
    for name, right in arrays.items():
        if name not in stored:
            yield f"{name} is missing"
            continue
        entry = stored.pop(name)
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        if (dtype, shape) != (STORED[right.dtype.name], right.shape):
            yield f"{name} must be {STORED[right.dtype.name]} {right.shape}, got {dtype} {shape}"
            continue
        words = (right.size, right.dtype.itemsize)
        actual_bytes, right_bytes = (
            np.frombuffer(data, np.uint8).reshape(words) for data in (entry["data"], right.tobytes())
        )
        if (differs := (actual_bytes != right_bytes).any(axis=-1)).any():
            yield f"{name}: {differs.sum():,} of {right.size:,} differ, the first at index {differs.argmax()}"
    yield from (f"{name} belongs to no case" for name in sorted(stored))


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that holds anything but vectors."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise FileExistsError(f"folder must be a folder, got the file {folder}")
    if paths := list(folder.iterdir()):
        try:
            ours = {MANIFEST, *(name for name in read_manifest(folder)["files"] if name.endswith(".safetensors"))}
        except ValueError:
            ours = set()
        foreign = {path.name for path in paths if path.name not in ours or path.is_symlink() or not path.is_file()}
        if foreign:
            raise FileExistsError(
                f"folder must be new, empty or an earlier set of vectors, got {folder} with {min(foreign)}"
            )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of vectors; ValueError if it has none."""
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        stated = {name: manifest[name] for name in FORMAT}
        is_whole = isinstance(manifest["seed"], int) and isinstance(manifest["files"], dict)
        is_whole = is_whole and all(isinstance(case[name], str) for case in manifest["cases"] for name in NAMES)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:  # no file; no JSON; other JSON
        raise ValueError(f"folder must hold the {MANIFEST} of vectors, got {folder} ({error!r})") from error
    if stated != FORMAT or not is_whole:
        raise ValueError(f"{MANIFEST} must say {FORMAT}, with seed, files and cases, got {stated}")
    return manifest
