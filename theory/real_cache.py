"""The keys, values and queries of a real model: SmolLM2-135M reading English text."""

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float32

from .claims import NotInstalledError

__all__ = ["RealCache", "real_cache"]

N_TOKENS = 512
N_QUERIES = 16  # tokens after these, whose queries look back


@dataclass(frozen=True, eq=False)
class RealCache:
    """A full cache, and the queries of the tokens that come after it.

    Attributes
    ----------
    keys, values : (layers, kv_heads, tokens, dim), keys after RoPE.
    queries : (layers, kv_heads, queries, dim), of all query heads that share a KV head and of all later tokens.
    """

    keys: Float32[np.ndarray, "layers kv_heads tokens dim"]
    values: Float32[np.ndarray, "layers kv_heads tokens dim"]
    queries: Float32[np.ndarray, "layers kv_heads queries dim"]


@functools.cache
def real_cache() -> RealCache:
    """SmolLM2-135M's after 512 tokens of the Python language reference, with the queries of the next 16.

    Raises
    ------
    NotInstalledError : no torch, no transformers or no SmolLM2.
    """
    try:
        import torch
        from torch.overrides import TorchFunctionMode

        from kvcluster.evaluation.errors import UnusableInputError
        from kvcluster.evaluation.models import load_model
        from kvcluster.evaluation.texts import load_tokens
    except ModuleNotFoundError as error:
        raise NotInstalledError(f"{error.name} is not installed") from error
    try:
        model, tokenizer = load_model(None)
    except UnusableInputError as error:
        raise NotInstalledError(str(error)) from error
    heard: list[list[np.ndarray]] = []

    class Listen(TorchFunctionMode):
        """Notes query, keys and values of every attention."""

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention:
                heard.append([tensor[0].numpy() for tensor in args[:3]])
            return func(*args, **(kwargs or {}))

    with torch.inference_mode(), Listen():
        model(load_tokens(None, tokenizer, N_TOKENS + N_QUERIES), use_cache=False, logits_to_keep=1)
    queries, keys, values = (np.stack(layers) for layers in zip(*heard, strict=True))  # (layers, heads, tokens, dim)
    layers, kv_heads, _, dim = keys.shape
    return RealCache(
        keys=keys[:, :, :N_TOKENS],
        values=values[:, :, :N_TOKENS],
        queries=queries[:, :, N_TOKENS:].reshape(layers, kv_heads, -1, dim),
    )
