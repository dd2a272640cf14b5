"""What a cache of a whole model holds and has cost, layer by layer: as a table, or as a dictionary."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from ..recall_cache import RecallCache
from ..tiers import TieredRecallCache, TierStatistics

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["CacheReport", "LayerReport", "report_cache"]


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes
    ----------
    layer : its index; kind : "clustered", "recalled", "dense" or "stock" (left to transformers, as sliding windows).
    n_seen, n_stored : tokens seen, padding included; entries held per KV head, by the row that holds most, with whole
        heads the mean of all heads.
    nbytes, ratio : bytes of what is held; `n_stored / n_seen`.
    bytes_ratio : `nbytes` over what all tokens would take in the dtype of the model; None before the first.
    bits : of keys and of values of clustered entries; None where they have the dtype of the model.
    rescored : share of the clustering decisions that needed canonical scores; None before the first.
    seconds : time spent on clustering.
    hit_rate : of the fast tier; None without tiers.
    """

    layer: int
    kind: str
    n_seen: int
    n_stored: float
    nbytes: int
    ratio: float | None
    bytes_ratio: float | None
    bits: list[int] | None
    rescored: float | None
    seconds: float
    hit_rate: float | None


@dataclass(frozen=True)
class CacheReport:
    """All layers. Print it with rich for a table, or take `as_dict()`."""

    layers: list[LayerReport]

    @property
    def bytes_ratio(self) -> float | None:
        """Bytes of all layers but those left to transformers, over what their tokens would take; None before any."""
        ours = [layer for layer in self.layers if layer.kind != "stock" and layer.bytes_ratio]
        full = sum(layer.nbytes / layer.bytes_ratio for layer in ours if layer.bytes_ratio)
        return sum(layer.nbytes for layer in ours) / full if full else None

    def as_dict(self) -> dict[str, Any]:
        """Totals, and the layers as dictionaries: ready for JSON."""
        stored, seen = (sum(getattr(layer, name) for layer in self.layers) for name in ("n_stored", "n_seen"))
        return {
            "n_seen": max((layer.n_seen for layer in self.layers), default=0),
            "nbytes": sum(layer.nbytes for layer in self.layers),
            "ratio": stored / seen if seen else None,
            "bytes_ratio": self.bytes_ratio,
            "seconds": sum(layer.seconds for layer in self.layers),
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __rich__(self) -> "Table":
        from rich.table import Table

        total = self.as_dict()
        table = Table(title=f"Cache of {total['n_seen']:,} tokens", show_footer=True)
        columns = {
            "layer": "all",
            "kind": "",
            "entries": "",
            "bytes": f"{total['nbytes']:,}",
            "ratio": shown(total["ratio"], ".3f"),
            "bits": "",
            "bytes / full": shown(total["bytes_ratio"], ".3f"),
            "rescored": "",
            "clustering": f"{total['seconds']:.3f} s",
            "hit rate": "",
        }
        for name, footer in columns.items():
            table.add_column(name, footer=footer, justify="left" if name == "kind" else "right")
        for layer in self.layers:
            table.add_row(
                str(layer.layer),
                layer.kind,
                f"{layer.n_stored:,.0f}",
                f"{layer.nbytes:,}",
                shown(layer.ratio, ".3f"),
                "" if layer.bits is None else "/".join(map(str, dict.fromkeys(layer.bits))),
                shown(layer.bytes_ratio, ".3f"),
                shown(layer.rescored, ".2%"),
                f"{layer.seconds:.3f} s",
                shown(layer.hit_rate, ".0%"),
            )
        return table


def shown(number: float | None, form: str) -> str:
    return "" if number is None else format(number, form)


def report_cache(cache: Any) -> CacheReport:
    """The report of a `ClusteredCache` or `RecallCache` made by `for_model`."""
    return CacheReport([report_layer(index, layer) for index, layer in enumerate(cache.layers)])


def report_layer(index: int, layer: Any) -> LayerReport:
    cache = getattr(layer, "cache", None)
    if cache is None:
        seen = layer.get_seq_length()
        window = [x for x in (layer.keys, layer.values) if isinstance(x, torch.Tensor)]
        stored = window[0].shape[-2] if window else 0
        nbytes = sum(x.nbytes for x in window)
        ratio = stored / seen if seen else None
        return LayerReport(index, "stock", seen, stored, nbytes, ratio, ratio, None, None, 0.0, None)
    kind = "clustered"
    if isinstance(cache.caches[0], RecallCache):
        kind = "dense" if layer.is_dense else "recalled"
    tiers = sum((x.statistics for x in cache.caches if isinstance(x, TieredRecallCache)), TierStatistics())
    pairs = ((each.n_seen, x) for each in cache.caches for x in each.like or ())
    full = sum(n_seen * x.shape[:-2].numel() * x.shape[-1] * x.itemsize for n_seen, x in pairs)
    bits = getattr(cache.caches[0], "bits", None)
    work, n_stored = cache.work, max((x.mean_entries for x in cache.caches), default=0)
    return LayerReport(
        index,
        kind,
        cache.n_seen,
        n_stored,
        cache.nbytes,
        n_stored / cache.n_seen if cache.n_seen else None,
        cache.nbytes / full if full else None,
        None if bits is None else list(bits),
        work.n_scored_rows / work.n_rows if work.n_rows else None,
        work.seconds,
        tiers.hit_rate if tiers.n_asked else None,
    )
