"""`kmeans`."""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from kvcluster.reference.similarity import similarity

from ..case import Case
from ..changes import shifted
from ..drawing import Drawing
from ..inputs import DTYPES, KINDS, TIES, make_array, refused_arrays
from ..mistake import Mistake
from ..operation import Operation
from .merge import MEANS
from .similarity import SIMILARITY

__all__ = ["CLUSTERS", "OPERATION", "lloyd_mistakes"]

CLUSTERS = ("labels", "counts", "centroids")
MODULE = sys.modules["kvcluster.reference.kmeans"]  # the name alone is the function
right_update, right_lloyd = MODULE.update, MODULE.lloyd


def cases(base: int) -> Iterator[Case]:
    for index, (dtype, kind) in enumerate((d, k) for d in DTYPES for k in KINDS):
        tokens, n_clusters = ((1, 1), (20, 20), (65, 5), (90, 11))[index % 4]
        keys = make_array(kind, (2, tokens, (5, 16, 64)[index % 3]), dtype, base + 70 + index)
        parameters = {"n_clusters": n_clusters, "max_iter": (1, 2, 3, 10)[index // 2 % 4]}
        yield Case("kmeans", f"{kind}-T{tokens}-K{n_clusters}-{dtype}", {"keys": keys}, parameters)
    keys = make_array("normal", (2, 50, 16), "f32", base + 80)
    yield Case("kmeans", "default-rounds", {"keys": keys}, {"n_clusters": 6})
    same = np.ones((1, 10, 4), np.float32)  # all go to the first cluster: the others keep their centroid
    yield Case("kmeans", "empty-clusters", {"keys": same}, {"n_clusters": 4})
    init = np.array([[49, 3, 3, 20], [0, 1, 2, 3]])
    yield Case("kmeans", "init-tokens", {"keys": keys, "init": init}, {"n_clusters": 4, "max_iter": 3})
    means = make_array("normal", (2, 4, 16), "f32", base + 81)
    yield Case("kmeans", "init-centroids", {"keys": keys, "init": means}, {"n_clusters": 4, "max_iter": 3})
    yield Case("kmeans", "centred", {"keys": keys + np.float32(3)}, {"n_clusters": 5, "is_centred": True})


def refused() -> Iterator[Case]:
    keys, bad = refused_arrays()
    for name, array in bad.items():
        yield Case("kmeans", f"refused-{name}", {"keys": array}, {"n_clusters": 2}, is_refused=True)
    for n_clusters in (0, 9):
        yield Case("kmeans", f"refused-K{n_clusters}", {"keys": keys}, {"n_clusters": n_clusters}, is_refused=True)


def small(draw: Drawing) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    tokens = draw.integer(1, 6)
    return {"keys": draw.rows(tokens)}, {"n_clusters": draw.integer(1, tokens), "max_iter": draw.integer(1, 3)}


def pattern(kinds: set[str], results: set[str]) -> tuple[str, str] | None:
    if "init" not in kinds and not kinds <= TIES and "labels" in results:
        return "only calls without init fail: the centroids begin at the tokens i * tokens // n_clusters", "10.1"
    return None


def update_to_zero(keys: np.ndarray, labels: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    is_empty = np.bincount(labels, minlength=len(centroids))[:, None] == 0
    return np.where(is_empty, np.float32(0), right_update(keys, labels, centroids))


def lloyd_from_first_tokens(keys: np.ndarray, centroids: np.ndarray, *options: Any) -> tuple[np.ndarray, np.ndarray]:
    return right_lloyd(keys, keys[: len(centroids)].astype(np.float32), *options)


def lloyd_that_assigns_last(keys: np.ndarray, *options: Any) -> tuple[np.ndarray, np.ndarray]:
    _, centroids = right_lloyd(keys, *options)
    return MODULE.assign(keys, centroids), centroids


def assign_to_the_last(keys: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    return len(centroids) - 1 - similarity(keys, centroids[::-1]).argmax(axis=-1)


def lloyd_mistakes(max_iter: int) -> tuple[Mistake, ...]:
    """Mistakes in k-means that does `max_iter` rounds by default."""
    return (
        Mistake(
            "an empty cluster becomes zero: it keeps the centroid that it last had",
            "10.5",
            (("kmeans", "update", update_to_zero),),
        ),
        Mistake(
            "there is one round too few: max_iter rounds", "10.6", change=shifted("max_iter", -1, default=max_iter)
        ),
        Mistake(
            "there is one round too many: max_iter rounds", "10.6", change=shifted("max_iter", 1, default=max_iter)
        ),
        Mistake(
            "tokens are assigned once more after the last update: labels are those that the centroids are means of",
            "10.6",
            (("kmeans", "lloyd", lloyd_that_assigns_last),),
        ),
        Mistake(
            "ties between clusters go to the largest index: the smallest wins",
            "10.3",
            (("kmeans", "assign", assign_to_the_last),),
        ),
        Mistake(
            "the centroids begin at the first tokens: they begin at tokens i * tokens // n_clusters",
            "10.1",
            (("kmeans", "lloyd", lloyd_from_first_tokens),),
        ),
    )


OPERATION = Operation(
    name="kmeans",
    section=10,
    results=CLUSTERS,
    shown=("members",),
    by_name=("init",),
    cases=cases,
    refused=refused,
    small=small,
    pattern=pattern,
    mistakes=(*SIMILARITY, *MEANS, *lloyd_mistakes(max_iter=10)),
    scaffold='''
def kmeans(keys, *, n_clusters, init=None, max_iter=10):
    """labels (..., tokens), counts (..., clusters), centroids (..., clusters, dim) float32."""
    return my_package.kmeans(keys, n_clusters, init, max_iter)
''',
)
