"""A transformers `Cache` whose layers are clustered caches."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..bounded_cache import BoundedCache
from ..cache import ClusteredCache as LayerCache
from ..entry_cache import EntryCache
from ..exact.quantization import GROUP, check_bits_of_entries, check_n_exact, plain_bits
from ..methods import Method
from ..ragged_cache import RaggedCache
from ..recent_queries import needs_queries
from ..scalars import check_integer
from .bytes_ratio import N_EXACT, chosen_for_bytes
from .entry_layer import ClusteredLayer
from .head_pairs import HeadPairs, is_sharded
from .hooks import ModelHooks, check_model
from .layer_choices import N_RECENT, NEEDED_FOR_QUERIES, choose_layers
from .layers import layers_of_model
from .model_cache import ModelCache
from .profiles import Profile, profile_for

__all__ = ["ClusteredCache"]


class ClusteredCache(ModelCache):
    """The key-value cache of a whole model, clustered layer by layer; made by `for_model`.

    Every layer holds a `kvcluster.fast.ClusteredCache` (batch, kv_heads, entries, dim), see `RowGroups`, but for
    layers that attend to a sliding window (all those of a `mistral` that has one): they stay transformers' own.

    Notes
    -----
    A prompt given at once is attended to exactly and clustered afterwards; later tokens attend to what is stored. With
    `keep_ratio` 1 every bit is that of a stock cache.
    Positions stay those of the tokens seen. Attention to what is stored is this package's own (`attend_entries`),
    reached by forward hooks on the model that exist as long as a cache made for it does and that leave calls with other
    caches alone. Only a model that runs `eager` attention keeps it: there the log counts are an additive mask, for
    several new tokens of shape (batch, heads, new tokens, entries + new tokens) per layer.
    Batches may have padding on the left: the rows' caches are those of the rows alone. Beams may be reordered; tokens
    of the last call may be taken out again by `crop`, as assisted decoding does. See docs/modes.md.
    """

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        *,
        keep_ratio: float | Sequence[float | Sequence[float]] | None = None,
        bytes_ratio: float | None = None,
        budget: int | Sequence[int] | None = None,
        n_dense_layers: int = 0,
        method: Method | Sequence[Method] | None = None,
        chunk_size: int = 256,
        n_sink: int = 4,
        n_recent: int | None = None,
        recent_share: float | Sequence[float] | None = None,
        whole_heads: HeadPairs = (),
        bits: int | tuple[int, int] = 16,
        n_exact: int | None = None,
        profile: Profile | str | Path | None = "known",
    ) -> "ClusteredCache":
        """An empty cache for `model`, to be passed as `past_key_values=` to its `generate` or `forward`.

        Parameters
        ----------
        model : a transformers model of type `llama`, `mistral`, `qwen2`, `qwen3`, `smollm3` or `gemma3_text`, with
            `sdpa` or `eager` attention.
        keep_ratio : entries kept / tokens of what is clustered; 1 by default if there is a budget.
        bytes_ratio : in place of `keep_ratio` and `bits`, the memory that clustered entries take over what their tokens
            would take in the dtype of the model: the profile says with which bits least is lost, without one
            `chosen_for_bytes`, and `report` what has been chosen. `n_exact` is then 32 if it can be, unless it is
            given.
        budget : the most entries that a KV head stores between two calls, sinks and recent tokens included. As tokens
            come, clusters are merged further. Without it entries grow with the tokens. Needs
            `method=SoftMatching()`.
            Both may be sequences, of one number for each layer of the model; that of a layer's `keep_ratio` may be a
            sequence again, of one for each KV head.
        n_dense_layers : first layers that keep every token (sliding ones are counted, but keep to their window).
        method : how chunks are clustered. `Distinctive()` keeps distinctive tokens exact, which loses far less of what
            may be asked later: see benchmarks/quality/QUALITY.md. `Attended()` keeps beside these what the tokens
            behind a chunk look at, which the text that follows needs; the model must run `sdpa` attention. The
            published method is `SoftMatching()`, in this project's examples with `n_sink=16, n_recent=64`. May be a
            sequence, of one method for each layer. None: `Attended()` in the layers where the profile says that it
            loses less, if `keep_ratio` is 0.1 or more and the model runs `sdpa`; else `Distinctive()`.
        chunk_size, n_sink, n_recent, recent_share : as in `kvcluster.reference.ClusteredCache`, for every layer;
            `recent_share` may be a sequence, of one number for each layer. Without `n_recent` it is 252, and without
            `recent_share` too, that is a tenth of a single `keep_ratio`, so that the window grows with a long text.
            Else it is 0.
        whole_heads : (layer, KV head) of heads that keep every token, such as `known_whole_heads(model)`. They hold far
            more than `keep_ratio`, the others what they would hold without them.
        bits : of each number of clustered entries, 8, 4, 3 or 2, or a pair of these for keys and for values; 16 leaves
            them as they are. Sinks always are, and recent tokens unless `n_exact` is given. With `keep_ratio=1` nothing
            else is done: a quantized cache of all tokens. Not with a budget. See docs/bits.md.
        n_exact : with `bits`, the last tokens that stay exact, at most `n_recent`. Recent tokens before these are in
            few bits too, and are clustered as they are read back; `chunk_size` must be a multiple of 32. None: all
            recent tokens stay exact.
        profile : shares out `keep_ratio`, then the mean of all KV heads, among them: a file that `kvcluster tune`
            wrote, or what `Profile.read` made of it. "known": the one that ships for this model, where `keep_ratio` is
            a single number below 1, the method is one of these two and nothing else tells layers or heads apart; for a
            model without one all heads are alike, and the log says once where a profile would come from. None: all
            heads are alike.

        Raises
        ------
        ValueError : another type of model or of attention; a field of its config that is not served; a parameter out
            of range; neither `keep_ratio` nor `bytes_ratio` nor `budget`; `bytes_ratio` with what follows from it; a
            budget with another method, with bits, with whole heads or with ratios for each head; a sequence of another
            length than the model's layers or KV heads; a profile of another model, or one where something else tells
            layers or heads apart; heads that differ, or a method that chooses for all of them together, in a model
            that is sharded; else as `heads_of_layers`.
        FileNotFoundError : no such profile.

        Examples
        --------
        ::

            cache = ClusteredCache.for_model(model, keep_ratio=0.25)
            tokens = model.generate(**inputs, past_key_values=cache, max_new_tokens=100)
        """
        config = check_model(model)
        chunk_size, n_sink = check_integer("chunk_size", chunk_size, least=1), check_integer("n_sink", n_sink, least=0)
        n_recent = None if n_recent is None else check_integer("n_recent", n_recent, least=0)
        if bytes_ratio is not None:
            if keep_ratio is not None or budget is not None or bits != 16:
                raise ValueError("bytes_ratio must be given without keep_ratio, budget and bits, which follow from it")
            dtype: Any = model.dtype
            found = None if is_sharded(model) else profile_for(model, profile)
            keep_ratio, bits = chosen_for_bytes(bytes_ratio, config, dtype.itemsize, found)
            if n_exact is None and chunk_size % GROUP == 0:
                n_exact = min(N_EXACT, N_RECENT if n_recent is None else n_recent)
        given: dict[str, Any] = {"keep_ratio": keep_ratio, "budget": budget, "n_dense_layers": n_dense_layers}
        given |= {"method": method, "chunk_size": chunk_size, "n_recent": n_recent, "recent_share": recent_share}
        given["bits"] = bits
        chosen = choose_layers(model, **given, whole_heads=whole_heads, profile=profile)
        if chosen.needs_queries:
            check_model(model, attention=NEEDED_FOR_QUERIES)
        n_recent = N_RECENT if n_recent is None else n_recent
        shared: dict[str, Any] = {"chunk_size": chunk_size, "n_sink": n_sink, "n_recent": n_recent}
        of_bits = check_bits_of_entries(bits, chunk_size=chunk_size)
        bits, n_exact = (
            plain_bits(bits),
            check_n_exact(n_exact, bits=of_bits, chunk_size=chunk_size, n_recent=n_recent),
        )

        def make(index: int) -> EntryCache | RaggedCache:
            ratio, most, whole, recent, how = chosen.of_layer[index]
            if isinstance(ratio, tuple):
                of_heads: dict[str, Any] = {"recent_share": recent, "bits": bits, "n_exact": n_exact}
                return RaggedCache(keep_ratios=ratio, method=how, **of_heads, **shared)
            if most is not None:
                return BoundedCache(budget=most, keep_ratio=ratio, **shared)
            of_layer: dict[str, Any] = {"recent_share": recent, "bits": bits, "n_exact": n_exact}
            return LayerCache(keep_ratio=ratio, method=how, whole_heads=whole, **of_layer, **shared)

        are_alike = len(set(chosen.of_layer)) == 1

        def make_layer(index: int) -> ClusteredLayer:
            *_, how = chosen.of_layer[index]
            return ClusteredLayer(partial(make, index), are_alike=are_alike, needs_queries=needs_queries(how))

        layers = layers_of_model(config, make_layer)
        parameters: dict[str, Any] = {
            "keep_ratio": chosen.keep_ratio,
            "budget": chosen.budget,
            "n_dense_layers": chosen.n_dense_layers,
            "method": chosen.method,
            "recent_share": chosen.recent_share,
            "whole_heads": [list(map(int, pair)) for pair in whole_heads],
            "bits": list(bits) if isinstance(bits, tuple) else bits,
            "n_exact": n_exact,
            "profile": None,  # what it says is in keep_ratio
        }
        cache = cls(layers, ModelHooks.of(model), parameters | shared)
        if chosen.needs_queries:
            cache.attention = NEEDED_FOR_QUERIES
        return cache
