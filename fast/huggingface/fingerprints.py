"""What tells the model of a cache from others: its config, its weights, the adapters at work in it."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import attention_modules, decoder_of

__all__ = ["check_fingerprint", "device_of", "digest", "fingerprint", "plain", "weights_digest"]

CONFIG_FIELDS = (
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
    "vocab_size",
    "rope_parameters",
    "rope_theta",  # and the next: as transformers 4 has them
    "rope_scaling",
    "layer_types",
    "no_rope_layers",
    "sliding_window",
)
SAMPLED, SAMPLED_OF_ALL = 512, 64  # numbers of each matrix of some layers, and of all
ADDED = ("layers", "adapters")  # to the fingerprint, since 0.3: older files do not have them


def fingerprint(model: Any) -> dict[str, Any]:
    """What tells `model` from others whose caches differ, as JSON has it.

    Its type, dtype and the fields of its config that shape a cache; `weights_digest`; and the digest of all layers with
    the adapters that are at work in them.
    """
    config = model.config.get_text_config()
    fields = {"model_type": config.model_type, "dtype": str(model.dtype).removeprefix("torch.")}
    fields |= {name: getattr(config, name, None) for name in CONFIG_FIELDS}
    decoder = decoder_of(model)
    fields |= {"weights": weights_digest(model), "layers": sampled_digest(weights_of(decoder), SAMPLED_OF_ALL)}
    return json.loads(json.dumps(fields | {"adapters": adapters_of(decoder)}, default=plain))


def adapters_of(decoder: nn.Module) -> list[str]:
    """The adapters at work in the layers of a model that PEFT has wrapped, those that are merged included."""
    found: set[str] = set()
    for module in decoder.modules():
        at_work: Any = getattr(module, "active_adapters", ())
        merged: Any = getattr(module, "merged_adapters", ())
        if not getattr(module, "disable_adapters", False) and not callable(at_work):
            found |= {*at_work, *(f"merged {name}" for name in merged)}
    return sorted(found)


def weights_digest(model: Any, dtype: torch.dtype | None = None) -> str:
    """A SHA-256 of some of the weights of `model`, as they are or as they would be in another `dtype`.

    Of `SAMPLED` numbers, evenly spaced, of each parameter of the first and of the last attention layer and of the
    embedding. Models that differ only elsewhere are not told apart.
    """
    attention = attention_modules(model)
    sampled = [(f"{end}.{name}", x) for end in (0, -1) for name, x in sorted(weights_of(attention[end]))]
    sampled += [("embedding", x) for _, x in weights_of(model.get_input_embeddings())]
    return sampled_digest(sampled, SAMPLED, dtype)


def weights_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters by name, fetched from where accelerate keeps them, and what quantized layers have in their place."""
    for prefix, part in module.named_modules():
        with fetched(part):
            yield from part.named_parameters(prefix, recurse=False)
            if callable(weight := getattr(part, "weight", None)):  # as of torch.ao's quantized layers
                yield f"{prefix}.weight", weight()


def fetched(module: nn.Module) -> AbstractContextManager[object]:
    """While open, the parameters of `module` lie where it computes, not where accelerate keeps them meanwhile."""
    if not hasattr(module, "_hf_hook"):
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def device_of(module: nn.Module) -> torch.device:
    """Where `module` computes; `meta` is where accelerate leaves what it fetches."""
    for part in module.modules():
        with fetched(part):
            for weight in part.parameters(recurse=False):
                return weight.device
    return torch.device("cpu")  # where layers without parameters, which torch.ao has quantized, compute


def sampled_digest(weights: Iterable[tuple[str, Tensor]], n: int, dtype: torch.dtype | None = None) -> str:
    """A SHA-256 of `n` numbers of each of `weights`, in `dtype`; of those that lie nowhere, of their shapes."""
    total = hashlib.sha256()
    for name, weight in weights:
        own = weight.to_local() if hasattr(weight, "to_local") else weight  # of a sharded model, this rank's part
        own = own.dequantize() if own.is_quantized or type(own.data) is not Tensor else own
        if own.is_meta:
            total.update(f"{name} {own.dtype} {tuple(own.shape)}\n".encode())
            continue
        numbers = own.detach().flatten()
        step = -(-len(numbers) // n) | 1  # odd, so that the columns of even matrices take turns
        total.update(f"{name} {digest(numbers[::step].to(dtype or own.dtype).cpu())}\n".encode())
    return total.hexdigest()


def check_fingerprint(ours: dict[str, Any], theirs: dict[str, Any], path: str | Path) -> None:
    for field in [name for name in ours | theirs if name in theirs or name not in ADDED]:
        if ours.get(field) != theirs.get(field):
            rule = f"{field} of the model that path was saved with must be that of model, {ours.get(field)}"
            raise ValueError(f"{rule}, got {theirs.get(field)} in {path}")


def digest(array: Tensor) -> str:
    """SHA-256 of dtype, shape and numbers of a tensor on the host."""
    total = hashlib.sha256(f"{array.dtype} {tuple(array.shape)} ".encode())
    total.update(array.contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()


def plain(number: Any) -> int | float:
    """Another library's number as one of Python's, which JSON knows."""
    return int(number) if isinstance(number, Integral) else float(number)
