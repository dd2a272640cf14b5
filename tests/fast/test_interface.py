"""What the package promises about itself: names, signatures, shapes, what it needs."""

import inspect
import subprocess
import sys

import pytest

from kvcluster import fast, reference

DATA = {"Attended", "Clustering", "Clusters", "Distinctive", "Selection", "SoftMatching"}  # dataclasses


def in_fresh_interpreter(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_reference_and_fast_have_the_same_names():
    assert fast.__all__ == reference.__all__ == sorted(reference.__all__)


@pytest.mark.parametrize("name", reference.__all__)
def test_reference_and_fast_have_the_same_signatures(name):
    ours, theirs = getattr(fast, name), getattr(reference, name)
    assert parameters(ours) == parameters(theirs)
    if inspect.isclass(ours) and name not in DATA:
        public = {method for method in vars(theirs) if not method.startswith("_")}
        assert public <= set(dir(ours))
        for method in public & {method for method in public if callable(getattr(theirs, method))}:
            assert parameters(getattr(ours, method)) == parameters(getattr(theirs, method))


def parameters(function):
    """Without `backend`, which only the fast path has; defaults that are methods have their spelling."""
    given = inspect.signature(function).parameters.values()
    return [(p.name, p.kind, repr(p.default)) for p in given if p.name != "backend"]


@pytest.mark.parametrize("name", reference.__all__)
def test_every_public_function_of_the_reference_has_an_example(name):
    assert ">>>" in (getattr(reference, name).__doc__ or "") or name in DATA


WITHOUT_TORCH = """
import sys
for name in ("torch", "triton", "transformers", "matplotlib"):
    sys.modules[name] = None
"""


def test_the_command_needs_no_torch_for_its_help():
    code = WITHOUT_TORCH + "import sys; sys.argv = ['kvcluster', '--help']\nfrom kvcluster.cli import main\nmain()"
    done = in_fresh_interpreter(code)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout


def test_the_demo_without_torch_says_what_to_install():
    code = WITHOUT_TORCH + "import sys; sys.argv = ['kvcluster', 'demo']\nfrom kvcluster.cli import main\nmain()"
    done = in_fresh_interpreter(code)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "is not installed; the demo needs: pip install 'kvcluster[hf]'" in done.stderr


SHAPES = """
from jaxtyping import install_import_hook
with install_import_hook(["kvcluster.reference", "kvcluster.fast"], "beartype.beartype"):
    import kvcluster.reference as reference, kvcluster.fast as fast
import numpy as np, torch
from jaxtyping import TypeCheckError
for dtype in (np.float16, np.float32):
    for lead in ((), (3,), (2, 3)):
        for tokens, dim, group in ((70, 16, 1), (64, 5, 4)):
            keys = np.random.default_rng(0).standard_normal((*lead, tokens, dim)).astype(dtype)
            query = keys[..., :group, :]
            for backend, convert in ((reference, np.asarray), (fast, torch.from_numpy)):
                keys_, query_ = convert(keys), convert(query)
                clustering = backend.chunked_soft_matching(keys_, keep_ratio=0.25, chunk_size=16)
                centroids = backend.merge(keys_, clustering)
                backend.similarity(keys_, query_)
                backend.attention(query_, keys_, keys_)
                backend.clustered_attention(convert(query.astype(np.float32)), centroids, centroids, clustering.counts)
                sizes = {"chunk_size": 16, "n_sink": 4, "n_recent": 4}
                whole = (1,) if lead else ()
                for cache in (
                    backend.BoundedCache(keep_ratio=0.25, budget=30, **sizes),
                    backend.ClusteredCache(keep_ratio=0.25, method=backend.Distinctive(), **sizes),
                    backend.ClusteredCache(keep_ratio=0.25, whole_heads=whole, **sizes),
                    backend.ChelseaCache(ratio=0.3, max_new_tokens=5, interval=2, whole_heads=whole, **sizes),
                ):
                    cache.append(keys_, keys_)
                    cache.attend(query_)
                clusters = backend.kmeans(keys_, n_clusters=7, is_centred=True)
                backend.kmeans(keys_, n_clusters=7, init=clusters.centroids)
                selection = backend.select_clusters(query_, clusters.centroids, clusters.counts, budget=20)
                selection.tokens(clusters)
                backend.recall_attention(query_, keys_, keys_, clusters, budget=20, centroids_for_rest=True)
                for options in ({}, {"init_seed": 1, "is_per_query_head": True}):
                    cache = backend.RecallCache(budget=30, n_sink=2, segment_size=9, **options)
                    cache.append(keys_, keys_)
                    cache.attend(query_)
                    cache.entries(cache.select_clusters(query_))
                backend.alternating_partition(5)
for backend, convert in ((reference, np.asarray), (fast, torch.from_numpy)):
    try:
        backend.attention(*(convert(np.ones(shape, dtype=np.float32)) for shape in ((1, 4), (5, 4), (6, 4))))
    except TypeCheckError:
        continue
    raise SystemExit("shapes in signatures are not checked")
"""


@pytest.mark.slow
def test_shapes_in_signatures_are_true():
    """Every public function runs under jaxtyping and beartype; a call whose shapes do not fit is told apart."""
    done = in_fresh_interpreter(SHAPES)
    assert done.returncode == 0, done.stderr + done.stdout
