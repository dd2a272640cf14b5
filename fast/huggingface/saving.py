"""Caches of whole models in files: a long prompt is prefilled once and used many times.

The file is in the safetensors format. Its header holds, as strings, `format_version`, `description` (JSON) and the
SHA-256 of the description. The description holds `class`, `parameters` (of `for_model`), `kvcluster` (the version that
wrote it), `n_seen`, `model` (see `fingerprint`), `layers` (the numbers of each layer's state) and `tensors` (the
SHA-256 of each). The tensors are those of each layer's state, as `layers.<index>.<name>`, in the dtype they had.
"""

import hashlib
import json
import os
import stat
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from ..distinctive_matching import Distinctive
from ..methods import method_of, spelled
from ..soft_matching import SoftMatching
from .fingerprints import check_fingerprint, device_of, digest, fingerprint, plain
from .head_pairs import is_sharded
from .hooks import attention_modules, check_model, head_dim
from .stored import Sizes, check_window
from .tensor_files import TensorFile, write_tensors

__all__ = ["load_cache", "save_cache"]

FORMAT_VERSION = "1"
PRIVATE = 0o600  # mode of new files


def save_cache(cache: Any, model: Any, path: str | Path) -> None:
    """Write `cache`, a `ModelCache` made for `model`, to the file `path`: the whole of it or nothing.

    The file is written in a folder beside `path`, then put in the place of what `path` held. It keeps that file's mode;
    a new one can be read by its owner alone, as it holds the conversation. A link stays a link. What killed saves left
    beside `path` is removed, see `scratch_folder`.

    Raises
    ------
    FileNotFoundError : no such folder.
    OSError : the file cannot be written, such as on a full disk; what `path` held is as it was.
    ValueError : `path` is a folder, a pipe or a device.
    RuntimeError : the layers have not seen the same tokens, or the model is gone.

    Notes
    -----
    Takes as much memory on the host as the cache holds, offloaded layers included, until the file is written.
    """
    path = Path(path).resolve()
    if not path.parent.is_dir():
        raise FileNotFoundError(f"path must lie in an existing folder, got {path}")
    check_is_file(path)
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else PRIVATE
    cache.check_whole()
    if model is None:
        raise RuntimeError("the model that the cache was made for must exist: the file tells it from others")
    tensors: dict[str, Tensor] = {}
    layers = []
    for index, layer in enumerate(cache.layers):
        layer_tensors, numbers = state(layer)
        tensors |= {f"layers.{index}.{name}": array.cpu().contiguous() for name, array in layer_tensors.items()}
        layers.append(numbers)
    description = json.dumps(
        {
            "class": type(cache).__name__,
            "parameters": cache.parameters | spelled_method(cache.parameters),
            "kvcluster": version("kvcluster"),
            "n_seen": cache.n_seen,
            "model": fingerprint(model),
            "layers": layers,
            "tensors": {name: digest(array) for name, array in tensors.items()},
        },
        default=plain,
    )
    metadata = {
        "format_version": FORMAT_VERSION,
        "description": description,
        "description_sha256": hashlib.sha256(description.encode()).hexdigest(),
    }
    write_tensors(tensors, metadata, path, mode)


def check_is_file(path: str | Path) -> None:
    """Refuse what `path` has that is no file: a pipe would be waited for, a device replaced."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"path must be a file, got {path}")


def load_cache(kind: Any, path: str | Path, model: Any, options: dict[str, Any]) -> Any:
    """The cache of class `kind` that `path` holds, on the device of `model`; `options` go to `kind.for_model`.

    Raises
    ------
    OSError, ValueError : see `ModelCache.load`.
    """
    check_model(model)
    check_is_file(path)
    try:
        with open(path, "rb") as opened:
            file = TensorFile(opened, path)
            description = described(file, path)
            if description["class"] != kind.__name__:
                raise ValueError(f"path must hold a {kind.__name__}, got a {description['class']} in {path}")
            check_fingerprint(fingerprint(model), description["model"], path)
            check_names(set(file.tensors), set(description["tensors"]), path)
            cache = kind.for_model(model, **parameters_of(description, path), **options)
            check_prefixes(description, len(cache.layers))
            sizes = sizes_of(model)
            devices = [device_of(module) for module in attention_modules(model)]
            for index, layer in enumerate(cache.layers):
                prefix = f"layers.{index}."
                tensors = {}
                for name, expected in description["tensors"].items():
                    if name.startswith(prefix):
                        array = file.get_tensor(name)
                        if digest(array) != expected:
                            raise ValueError(f"path must hold what was saved, got a damaged {name} in {path}")
                        tensors[name.removeprefix(prefix)] = array.to(devices[index])
                restore(layer, tensors, description["layers"][index], sizes)
            check_layers(cache, description)
    except (KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError, MemoryError) as error:
        raise ValueError(f"path must hold what save writes, got {path}: {error!r:.200}") from error
    return cache


def sizes_of(model: Any) -> Sizes:
    """Those that a cache of `model` has."""
    config = model.config.get_text_config()
    kv_heads, heads = config.num_key_value_heads, config.num_attention_heads
    return Sizes(None if is_sharded(model) else kv_heads, heads // kv_heads, head_dim(config))


def check_prefixes(description: dict[str, Any], n_layers: int) -> None:
    """Refuse numbers and tensors of other layers than the model has."""
    if not isinstance(description["layers"], list) or len(description["layers"]) != n_layers:
        raise ValueError(f"layers must be a list of {n_layers}, got {description['layers']!r:.80}")
    known = {f"layers.{index}" for index in range(n_layers)}
    if unknown := [name for name in description["tensors"] if ".".join(name.split(".")[:2]) not in known]:
        raise ValueError(f"tensors must be of the {n_layers} layers of the model, got {unknown[0]}")


def check_layers(cache: Any, description: dict[str, Any]) -> None:
    """Refuse layers that are not of the same tokens and rows."""
    seen = {layer.get_seq_length() for layer in cache.layers}
    if seen != {description["n_seen"]}:
        raise ValueError(f"n_seen of the layers must be {description['n_seen']!r:.80}, got {sorted(seen)}")
    rows = {layer.keys.shape[0] if layer.is_sliding else layer.cache.n_rows for layer in cache.layers if seen != {0}}
    padding = {tuple(layer.cache.padding) for layer in cache.own_layers if seen != {0}}
    if len(rows) > 1 or len(padding) > 1:
        raise ValueError(f"layers must have the same rows and padding, got {sorted(rows)} and {sorted(padding)}")


def described(file: TensorFile, path: str | Path) -> dict[str, Any]:
    """The description in the header of an open file, if it is one of this format and as it was written."""
    metadata = file.metadata
    if "format_version" not in metadata:
        raise ValueError(f"path must be a file that save wrote, got {path} without a format_version")
    if metadata["format_version"] != FORMAT_VERSION:
        got = metadata["format_version"]
        raise ValueError(f"format_version of path must be {FORMAT_VERSION}, got {got} in {path}")
    description = metadata.get("description", "")
    if hashlib.sha256(description.encode()).hexdigest() != metadata.get("description_sha256"):
        raise ValueError(f"path must hold what was saved, got a damaged description in {path}")
    return json.loads(description)


def spelled_method(parameters: dict[str, Any]) -> dict[str, Any]:
    """The method among the parameters of `for_model`, if there is one, as JSON has it."""
    if "method" not in parameters:
        return {}
    method = parameters["method"]
    return {"method": [spelled(each) for each in method] if isinstance(method, list) else spelled(method)}


def parameters_of(description: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The parameters of `for_model` that a file was saved with, those of version 0.1 in today's words.

    Raises
    ------
    ValueError : a method of which this version knows nothing; an option of version 0.1 that is gone.
    """
    parameters = dict(description["parameters"])
    if "n_shared" in parameters:  # 0.1: None was chunked soft matching
        n_shared = parameters.pop("n_shared")
        parameters["method"] = SoftMatching() if n_shared is None else Distinctive(n_shared)
    elif "method" in parameters:
        method = parameters["method"]
        of_layers = isinstance(method, list)
        parameters["method"] = [method_of(**each) for each in method] if of_layers else method_of(**method)
    if description["class"] == "ClusteredCache":
        parameters.setdefault("profile", None)  # 0.3: all heads alike
    for name, without in (("mass", None), ("is_centred", False)):
        value = parameters.pop(name, without)
        if value != without:
            raise ValueError(f"{name} must be {without}, which is all that this version has, got {value} in {path}")
    return parameters


def check_names(names: set[str], expected: set[str], path: str | Path) -> None:
    if names != expected:
        lacking, unknown = sorted(expected - names), sorted(names - expected)
        raise ValueError(f"path must hold the tensors that were saved, got {lacking} missing, {unknown} more in {path}")


def state(layer: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and integers of a layer of ours, or of one of transformers' with a sliding window."""
    if not layer.is_sliding:
        return layer.cache.state()
    if not layer.is_initialized or layer.get_seq_length() == 0:  # or all of it was cropped
        return {}, {}
    return {"keys": layer.keys, "values": layer.values}, {"n_seen": layer.cumulative_length}


def restore(layer: Any, tensors: dict[str, Tensor], numbers: Any, of: Sizes) -> None:
    """Fill an empty layer with what `state` gave, if it is what a layer of a model of these sizes can hold."""
    if layer.is_sliding:
        check_window(layer, tensors, numbers, of)
        if tensors:
            layer.update(tensors["keys"], tensors["values"])
            layer.cumulative_length = numbers["n_seen"]
        return
    layer.cache.restore(tensors, numbers, of)
    if tensors:
        layer.lazy_initialization(*next(cache.like for cache in layer.cache.caches if cache.n_seen))
