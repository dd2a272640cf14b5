"""What a user of vLLM may ask for, and what cannot be done, refused before anything is served."""

import os
import platform
from dataclasses import dataclass, fields
from typing import Any

from ..methods import Method, method_of
from ..outside import check_plain, json_of, shown
from ..recent_queries import needs_queries
from ..scalars import check_integer, check_keep_ratio, entries_of_chunk
from .rule import PageRule

__all__ = ["Settings", "check_engine", "check_layer", "settings_of"]

LEAST_CHUNK, MOST_CHUNK = 256, 4096  # between which a chunk size is looked for if none is given
MOST_TOKENS = 2**31 - 1  # of a chunk, of sinks or of recent tokens: no request has more


@dataclass(frozen=True)
class Settings:
    """Parameters of the plugin.

    Parameters
    ----------
    keep_ratio : entries kept / tokens of a chunk, in (0, 1]; 1 clusters nothing.
    chunk_size : tokens of a chunk. It and `keep_ratio * chunk_size` must be multiples of vLLM's block size. By default
        the smallest such number from 256 on.
    n_sink : first tokens, kept exact, a multiple of the block size; one block by default.
    n_recent : last tokens, kept exact.
    method : how a chunk is clustered: the name of a method of `kvcluster.fast.methods.METHODS`, or a mapping of `name`
        and its parameters. "distinctive", or as published "soft_matching", which version 0.1 called "chunked".
    n_shared : short for that parameter of "distinctive": entries that the ordinary tokens of a chunk share.
    """

    keep_ratio: float
    chunk_size: int | None = None
    n_sink: int | None = None
    n_recent: int = 64
    method: str | dict[str, Any] = "distinctive"
    n_shared: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep_ratio", check_keep_ratio(self.keep_ratio))
        for name, least in (("chunk_size", 1), ("n_sink", 0), ("n_recent", 0)):
            number = getattr(self, name)
            if number is None and name != "n_recent":
                continue
            object.__setattr__(self, name, check_integer(name, number, least=least, most=MOST_TOKENS))
        self.value()

    def value(self) -> Method:
        """The method as a value.

        Raises
        ------
        ValueError : an unknown name, or a parameter that the method has not; a method that needs queries.
        """
        spelled: dict[str, Any] = self.method if isinstance(self.method, dict) else {"name": self.method}
        if spelled.get("name") == "chunked":
            spelled = {**spelled, "name": "soft_matching"}
        if self.n_shared is not None:
            spelled = {**spelled, "n_shared": self.n_shared}
        method = method_of(**spelled)
        if needs_queries(method):
            raise ValueError(f"method must be one that needs no queries, which vLLM does not show, got {method}")
        return method

    def rule(self, page: int) -> PageRule:
        """The rule for pages of `page` tokens.

        Raises
        ------
        ValueError : numbers that do not fit the page.
        """
        return PageRule(
            page=page,
            keep_ratio=self.keep_ratio,
            chunk_size=default_chunk(self.keep_ratio, page) if self.chunk_size is None else self.chunk_size,
            n_sink=page if self.n_sink is None else self.n_sink,
            n_recent=self.n_recent,
            method=self.value(),
        )


def default_chunk(keep_ratio: float, page: int) -> int:
    """The smallest chunk of at least 256 tokens that is whole pages before and after."""
    for size in range(-(-LEAST_CHUNK // page) * page, MOST_CHUNK + 1, page):
        if entries_of_chunk(keep_ratio, size) % page == 0:
            return size
    raise ValueError(
        f"keep_ratio * chunk_size must be a multiple of the block size {page} for a chunk_size of at most "
        f"{MOST_CHUNK}, got keep_ratio {keep_ratio}"
    )


def settings_of(vllm_config: Any) -> Settings | None:
    """What `additional_config` or the environment asks for; None if they say nothing.

    Raises
    ------
    ValueError : an unknown parameter, a wrong value, or a profile, which pages have no room for.
    """
    asked = getattr(vllm_config, "additional_config", None) or {}
    asked = asked.get("kvcluster") if isinstance(asked, dict) else None
    if asked is None:
        text = os.environ.get("KVCLUSTER_VLLM", "")
        if not text:
            return None
        asked = json_of(text, "KVCLUSTER_VLLM")
    check_plain(asked, "kvcluster")
    known = [field.name for field in fields(Settings)]
    if isinstance(asked, dict) and "profile" in asked:
        raise ValueError(
            "profile must be absent in vLLM, whose pages hold as many entries of each layer and KV head (shares of "
            f"their own would leave holes): give keep_ratio, for all heads, got {shown(asked['profile'])}"
        )
    if not isinstance(asked, dict) or "keep_ratio" not in asked:
        raise ValueError(
            f"kvcluster must be a mapping with keep_ratio and maybe {', '.join(known[1:])}, got {shown(asked)}"
        )
    for name in asked:
        if name not in known:
            raise ValueError(f"kvcluster must have parameters among {', '.join(known)}, got {shown(name)}")
    try:
        return Settings(**asked)
    except TypeError as error:  # a value of another kind
        raise ValueError(f"kvcluster: {error}") from error


def check_engine(vllm_config: Any) -> None:
    """Refuse engines whose caches the plugin does not understand, by name.

    Raises
    ------
    ValueError : names the option of vLLM, the rule and the value.
    """
    model, cache, parallel = vllm_config.model_config, vllm_config.cache_config, vllm_config.parallel_config
    machine = platform.machine()
    rules = (
        (machine in ("x86_64", "AMD64"), "the processor must be x86, whose layout of pages is known", machine),
        (vllm_config.kv_transfer_config is None, "kv_transfer_config must be None", vllm_config.kv_transfer_config),
        (vllm_config.speculative_config is None, "speculative_config must be None", vllm_config.speculative_config),
        (not is_quantized(cache.cache_dtype), "kv_cache_dtype must not be quantized", cache.cache_dtype),
        (not model.use_mla, "the model must not use MLA", model.model),
        (not model.is_hybrid, "the model must have attention in every layer", model.model),
        (not model.is_encoder_decoder, "the model must be a decoder", model.model),
        (
            parallel.decode_context_parallel_size == 1,
            "decode_context_parallel_size must be 1",
            parallel.decode_context_parallel_size,
        ),
        (
            parallel.prefill_context_parallel_size == 1,
            "prefill_context_parallel_size must be 1",
            parallel.prefill_context_parallel_size,
        ),
    )
    for holds, rule, value in rules:
        if not holds:
            raise ValueError(f"kvcluster: {rule}, got {value}")


def check_layer(
    *,
    head_size: int,
    sliding_window: int | None,
    alibi_slopes: Any,
    logits_soft_cap: float | None,
    sinks: Any,
    attn_type: str,
    kv_sharing_target: str | None,
) -> None:
    """Refuse attention layers that attend in another way than by a plain softmax over all tokens before.

    Raises
    ------
    ValueError : names what the layer has.
    """
    rules = (
        (head_size % 16 == 0, "head_size must be a multiple of 16", head_size),
        (sliding_window is None, "layers must not have a sliding window", sliding_window),
        (alibi_slopes is None, "layers must not have ALiBi slopes", "some"),
        (not logits_soft_cap, "layers must not cap their logits", logits_soft_cap),
        (sinks is None, "layers must not have learned attention sinks", "some"),
        (attn_type == "decoder", "layers must be a decoder's", attn_type),
        (kv_sharing_target is None, "layers must not share the cache of another", kv_sharing_target),
    )
    for holds, rule, value in rules:
        if not holds:
            raise ValueError(f"kvcluster: {rule}, got {value}")


def is_quantized(cache_dtype: str) -> bool:
    return cache_dtype not in ("auto", "float32", "float16", "bfloat16", "half", "float")
