"""What each layer of a `ClusteredCache` keeps: ratios of layers and heads, budgets, whole heads, the recent window."""

from collections.abc import Sequence
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple

from ..arguments import check_method
from ..attended_matching import Attended
from ..distinctive_matching import Distinctive
from ..methods import Method
from ..recent_queries import QUERY_STEP, needs_queries
from ..scalars import check_integer, check_keep_ratio, check_recent_share
from ..soft_matching import SoftMatching
from .head_pairs import HeadPairs, heads_of_layers, is_sharded
from .layers import check_dense_layers
from .profiles import Profile, profile_for

__all__ = ["NEEDED_FOR_QUERIES", "N_RECENT", "OF_KEPT_RECENT", "LayerChoices", "choose_layers"]

N_RECENT = 252  # with 4 sinks a whole chunk of 256
NEEDED_FOR_QUERIES = ("sdpa",)  # attention that shows its queries
LEAST_ATTENDED = 0.1  # with fewer entries of a chunk there are too few exact ones to share out: docs/attended.md
OF_KEPT_RECENT = 0.1  # the least of the recent tokens / what is kept of a long text: more loses needles


class LayerChoices(NamedTuple):
    """What follows from the arguments of `ClusteredCache.for_model`.

    Attributes
    ----------
    of_layer : for each layer its ratio, or those of its KV heads; its budget; its whole heads; its recent share; its
        method.
    keep_ratio, budget, n_dense_layers, recent_share, method : as they would have to be given, without a profile, to get
        the same.
    """

    of_layer: list[tuple[float | tuple[float, ...], int | None, tuple[int, ...], float, Method]]
    keep_ratio: Any
    budget: Any
    n_dense_layers: int
    recent_share: Any
    method: Any

    @property
    def needs_queries(self) -> bool:
        """Whether any layer has to be given queries."""
        return any(needs_queries(method) for *_, method in self.of_layer)


def choose_layers(
    model: Any,
    *,
    keep_ratio: Any,
    budget: Any,
    n_dense_layers: int,
    method: Method | Sequence[Method] | None,
    chunk_size: int,
    n_recent: int | None,
    recent_share: Any,
    whole_heads: HeadPairs,
    bits: int | tuple[int, int],
    profile: Profile | str | Path | None,
) -> LayerChoices:
    """The choices for every layer of `model`; arguments and errors are those of `ClusteredCache.for_model`."""
    keep_ratio, budget, recent_share = map(in_python, (keep_ratio, budget, recent_share))
    if keep_ratio is None and budget is None:
        raise ValueError("keep_ratio, bytes_ratio or budget must be given, got none of them")
    n_layers = model.config.num_hidden_layers
    is_chosen = method is not None
    method = Distinctive() if method is None else method
    methods = one_for_each_layer("method", method, n_layers)
    for each in methods:
        check_method(each)
    n_dense_layers = check_dense_layers(n_dense_layers, n_layers)
    heads = heads_of_layers(model, whole_heads)
    is_number = isinstance(keep_ratio, Real)
    if is_number:
        keep_ratio = check_keep_ratio(keep_ratio)
    if recent_share is None:
        grows = n_recent is None and budget is None and is_number
        recent_share = OF_KEPT_RECENT * keep_ratio if grows else 0.0
    is_simple = is_number and budget is None and not n_dense_layers and not any(heads)
    if profile is not None and (profile != "known" or takes_what_ships(model, keep_ratio, methods, is_simple)):
        if not is_simple:
            raise ValueError(
                "profile needs a single keep_ratio, no budget, no whole_heads and no n_dense_layers: it tells all "
                f"layers and heads apart, got {profile}"
            )
        found = profile_for(model, profile)
        if found is not None:
            if not is_chosen and takes_attended(model, found, keep_ratio, n_recent):
                method = Attended()
            keep_ratio = found.keep_ratios(keep_ratio, chunk_size=chunk_size, n_layers=n_layers)
            if isinstance(method, Attended):
                method = methods = methods_of_layers(method, found, n_layers)
    ratios = one_for_each_layer("keep_ratio", 1.0 if keep_ratio is None else keep_ratio, n_layers)
    ratios = [tuple(map(check_keep_ratio, x)) if isinstance(x, tuple) else check_keep_ratio(x) for x in ratios]
    budgets = one_for_each_layer("budget", budget, n_layers)
    if budget is not None:
        budgets = [check_integer("budget", x, least=1) for x in budgets]
    recent_shares = list(map(check_recent_share, one_for_each_layer("recent_share", recent_share, n_layers)))
    asked = (
        keep_ratio if keep_ratio is None else as_given(keep_ratio, ratios),
        as_given(budget, budgets),
        n_dense_layers,
        as_given(recent_share, recent_shares),
    )
    if budget is not None and not all(isinstance(each, SoftMatching) for each in methods):
        raise ValueError(f"method must be SoftMatching() with a budget, which merges all tokens, got {method}")
    if budget is not None and len(whole_heads):
        raise ValueError(f"whole_heads must be empty with a budget, got {list(whole_heads)}")
    if budget is not None and bits != 16:
        raise ValueError(f"bits must be 16 with a budget, which merges entries again, got {bits}")
    if budget is not None and any(recent_shares):
        raise ValueError(f"recent_share must be 0 with a budget, got {recent_share}")
    if len(whole_heads) and (bits != 16 or any(map(needs_queries, methods))):
        kv_heads = model.config.num_key_value_heads
        pairs = [with_whole_heads(*pair, kv_heads) for pair in zip(ratios, heads, strict=True)]
        ratios, heads = [ratio for ratio, _ in pairs], [rest for _, rest in pairs]
    of_layer = list(zip(ratios, budgets, heads, recent_shares, methods, strict=True))
    of_layer[:n_dense_layers] = [(1.0, None, (), 0.0, how) for how in methods[:n_dense_layers]]
    check_head_ratios(model, of_layer)
    if is_sharded(model):
        check_heads_are_apart(of_layer)
    return LayerChoices(of_layer, *asked, method)


def with_whole_heads(ratio: Any, heads: tuple[int, ...], kv_heads: int) -> tuple[Any, tuple[int, ...]]:
    """The ratio of a layer as those of its KV heads, 1 for whole ones, which are quantized too then; no heads left."""
    if not heads or isinstance(ratio, tuple):
        return ratio, heads
    return tuple(1.0 if head in heads else ratio for head in range(kv_heads)), ()


def methods_of_layers(method: Attended, profile: Profile, n_layers: int) -> Any:
    """`method`, or where the profile says so one for each layer: distinctive matching where the next tokens mislead."""
    if profile.attended is None:
        return [method] * n_layers
    return [method if layer in profile.attended else Distinctive(method.n_shared) for layer in range(n_layers)]


def takes_attended(model: Any, profile: Profile, keep_ratio: float, n_recent: int | None) -> bool:
    """Whether attended matching is what loses least, and can be served, where no method is asked for."""
    has_queries = n_recent is None or n_recent >= QUERY_STEP
    shows_queries = model.config._attn_implementation in NEEDED_FOR_QUERIES
    return bool(profile.attended) and keep_ratio >= LEAST_ATTENDED and has_queries and shows_queries


def takes_what_ships(model: Any, keep_ratio: Any, methods: list[Method], is_simple: bool) -> bool:
    """Whether the profile that ships for a model, if there is one, is used without being asked for."""
    are_served = all(isinstance(method, Distinctive | Attended) for method in methods)
    return is_simple and keep_ratio < 1 and are_served and not is_sharded(model)


def in_python(value: Any) -> Any:
    """NumPy's numbers, arrays and tensors as Python's own numbers and lists; all else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def as_given(value: Any, of_layers: list[Any]) -> Any:
    """What has been made of `value`, one number or one for each layer."""
    return of_layers if isinstance(value, Sequence) else of_layers[0]


def one_for_each_layer(name: str, value: Any, n_layers: int) -> list[Any]:
    """`value` for every layer, or the numbers of a sequence; sequences in it become tuples."""
    if isinstance(value, str) or not isinstance(value, Sequence):
        return [value] * n_layers
    if len(value) != n_layers:
        raise ValueError(f"{name} must be one number or one for each of the {n_layers} layers, got {len(value)}")
    of_layers = map(in_python, value)
    return [tuple(x) if isinstance(x, Sequence) and not isinstance(x, str) else x for x in of_layers]


def check_head_ratios(model: Any, of_layer: list[tuple[Any, ...]]) -> None:
    """Refuse ratios of single heads where they cannot be served."""
    kv_heads = model.config.num_key_value_heads
    for index, (ratio, budget, whole_heads, *_) in enumerate(of_layer):
        if not isinstance(ratio, tuple):
            continue
        if len(ratio) != kv_heads:
            rule = f"keep_ratio must be one for each of the {kv_heads} KV heads"
            raise ValueError(f"{rule}, got {len(ratio)} in layer {index}")
        if budget is not None or whole_heads:
            raise ValueError(
                "keep_ratio must be one number for a layer with a budget or whole_heads (1 is a whole head), got "
                f"{ratio} in layer {index}"
            )
        if is_sharded(model):
            raise ValueError(f"keep_ratio must be one number for a layer whose KV heads are sharded, got {ratio}")


def check_heads_are_apart(of_layer: list[tuple[Any, ...]]) -> None:
    """Refuse methods that choose for all KV heads of a layer together, where each process has but some of them."""
    for ratio, *_, method in of_layer:
        if ratio != 1 and not isinstance(method, SoftMatching):
            rule = "method must be SoftMatching() for a model whose KV heads are sharded"
            raise ValueError(f"{rule}, as others choose tokens for all heads of a layer together, got {method}")
