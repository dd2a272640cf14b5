"""The keys, values and queries of a real model that reads English text: SmolLM2-135M, or another."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from .claims import NotInstalledError

__all__ = ["MODEL", "RealCache", "real_cache"]

MODEL = "smollm2"  # of which the claims speak that name none
N_TOKENS = 512
N_QUERIES = 16  # tokens after these, whose queries look back


@dataclass(frozen=True, eq=False)
class RealCache:
    """A full cache, and the queries of the tokens that come after it, in the layers that attend to everything.

    Attributes
    ----------
    title : the model's name.
    keys, values : (layers, kv_heads, tokens, dim), keys after RoPE.
    queries : (layers, kv_heads, queries, dim), of all query heads that share a KV head and of all later tokens.
    """

    title: str
    keys: Float32[np.ndarray, "layers kv_heads tokens dim"]
    values: Float32[np.ndarray, "layers kv_heads tokens dim"]
    queries: Float32[np.ndarray, "layers kv_heads queries dim"]


@functools.cache
def real_cache(model: str = MODEL) -> RealCache:
    """A model's after 512 tokens of the Python language reference, with the queries of the next 16.

    Parameters
    ----------
    model : a name that `kvcluster.evaluation.models` knows, or a folder.

    Raises
    ------
    NotInstalledError : no torch, no transformers or no such model.
    """
    try:
        import torch
        from torch.overrides import TorchFunctionMode

        from kvcluster.evaluation.errors import UnusableInputError
        from kvcluster.evaluation.layers import full_layers
        from kvcluster.evaluation.models import KNOWN, load_model
        from kvcluster.evaluation.texts import load_tokens
        from kvcluster.fast.huggingface.hooks import MODEL_TYPES
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"{error.name} is not installed") from error
    try:
        loaded, tokenizer = load_model(model, MODEL_TYPES)
        own, _ = full_layers(loaded)
    except (UnusableInputError, ValueError) as error:
        raise NotInstalledError(str(error)) from error
    heard: list[list[np.ndarray]] = []

    class Listen(TorchFunctionMode):
        """Notes query, keys and values of every attention, layer by layer."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                heard.append([tensor[0].numpy() for tensor in args[:3]])
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Listen():
        loaded(load_tokens(None, tokenizer, N_TOKENS + N_QUERIES), use_cache=False, logits_to_keep=1)
    of_own = [heard[layer] for layer in own]
    queries, keys, values = (np.stack(layers) for layers in zip(*of_own, strict=True))  # (layers, heads, tokens, dim)
    layers, kv_heads, _, dim = keys.shape
    return RealCache(
        title=KNOWN[model].title if model in KNOWN else model,
        keys=keys[:, :, :N_TOKENS],
        values=values[:, :, :N_TOKENS],
        queries=queries[:, :, N_TOKENS:].reshape(layers, kv_heads, -1, dim),
    )
