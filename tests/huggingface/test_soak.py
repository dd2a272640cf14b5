"""Random use of caches, each compared with what it must hold; a minute, or as long as `make soak` lasts."""

import functools
import os
import threading
from collections import Counter

import pytest
from models import tiny_gemma, tiny_llama
from peft import LoraConfig, get_peft_model
from soaking import Kind, Soak, recording, what_lives

from kvcluster import fast, reference
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache, saving
from kvcluster.fast.huggingface.row_groups import RowGroups

SEEDS = range(40 if os.environ.get("KVCLUSTER_SOAK") else 1)
N_STEPS = 100 if os.environ.get("KVCLUSTER_SOAK") else 40
SIZES = {"chunk_size": 16, "n_sink": 3, "n_recent": 40}
EXACT = {"chunk_size": 32, "n_sink": 3, "n_recent": 70, "bits": 4, "n_exact": 9}
RECALL = {"budget": 30, "n_sink": 3, "tokens_per_cluster": 4, "segment_size": 20, "prompt_segment_size": 40}


def clustered(*, method=None, **options):
    """Both packages' caches, the fast one with the method of the same name."""
    ours = getattr(fast, type(method).__name__)(**vars(method)) if method else fast.SoftMatching()
    for_model = {"method": ours, "profile": None, "recent_share": 0.0} | options
    of_reference = {"method": method or reference.SoftMatching()} | options
    return Kind(
        lambda model: ClusteredCache.for_model(model, **for_model), lambda _: reference.ClusteredCache(**of_reference)
    )


def recall(*, offloading=False, **options):
    return Kind(
        lambda model: RecallCache.for_model(model, **options, offloading=offloading),
        lambda _: reference.RecallCache(**options),
    )


CHELSEA = {"ratio": 0.5, "max_new_tokens": 0, "interval": 4, **SIZES}
RATIOS = (0.3, 0.7)
KINDS = {
    "soft": clustered(keep_ratio=0.4, **SIZES),
    "distinctive": clustered(keep_ratio=0.4, method=reference.Distinctive(n_shared=2), **SIZES),
    "attended": clustered(keep_ratio=0.4, method=reference.Attended(n_shared=2), **SIZES),
    "growing": clustered(keep_ratio=0.4, **SIZES | {"recent_share": 0.2}),
    "bits": clustered(keep_ratio=0.4, **SIZES, bits=4),
    "recent in bits": clustered(keep_ratio=0.5, **EXACT),
    "budget": Kind(
        lambda model: ClusteredCache.for_model(model, keep_ratio=0.5, budget=90, method=fast.SoftMatching(), **SIZES),
        lambda _: reference.BoundedCache(keep_ratio=0.5, budget=90, **SIZES),
    ),
    "ragged": Kind(
        lambda model: ClusteredCache.for_model(
            model, keep_ratio=[RATIOS] * model.config.num_hidden_layers, method=fast.SoftMatching(), **SIZES
        ),
        lambda _: reference.RaggedCache(keep_ratios=RATIOS, **SIZES),
    ),
    "whole heads": Kind(
        lambda model: ClusteredCache.for_model(
            model, keep_ratio=0.4, whole_heads=[(0, 1), (2, 0)], method=fast.SoftMatching(), **SIZES
        ),
        lambda index: reference.ClusteredCache(keep_ratio=0.4, whole_heads={0: (1,), 2: (0,)}.get(index, ()), **SIZES),
    ),
    "chelsea": Kind(
        lambda model: ChelseaCache.for_model(model, whole_heads=(), **CHELSEA),
        lambda _: reference.ChelseaCache(**CHELSEA),
    ),
    "recall": recall(**RECALL),
    "recall in bits": recall(bits=4, **RECALL),
    "offloaded": recall(offloading=True, **RECALL),
}


def adapted():
    lora = LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora, adapter_name="one")
    model.add_adapter("two", lora)
    return model.eval()


MODELS = {"llama": tiny_llama, "gemma": tiny_gemma, "adapted": adapted}


@functools.cache
def model_of(name):
    return MODELS[name]()


def soak(kind, model, seed, folder, n_steps=N_STEPS, **options):
    """What was done, after nothing differed and nothing was left."""
    before = what_lives(model, folder)
    with recording():
        counted = one_soak(kind, model, seed, folder, n_steps, **options)
    assert what_lives(model, folder) == before
    return counted


def one_soak(kind, model, seed, folder, n_steps, **options):
    run = Soak(kind, KINDS[kind], model, seed, folder, **options)
    run.run(n_steps)
    return run.counted


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", KINDS)
def test_no_cache_differs_from_its_record(kind, seed, tmp_path, record_property):
    model = model_of(list(MODELS)[(list(KINDS).index(kind) + seed) % len(MODELS)])
    if kind == "whole heads" and model is model_of("gemma"):
        model = model_of("llama")  # gemma's first and third layers slide
    record_property("soak", {"runs": 1} | soak(kind, model, seed, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_threads_with_caches_of_their_own_on_one_model_are_as_alone(seed, tmp_path, record_property):
    model, found = model_of("llama"), []

    def run(kind, folder):
        folder.mkdir()
        try:
            found.append(one_soak(kind, model, seed, folder, N_STEPS // 2, has_faults=False))
        except BaseException as error:
            found.append(error)

    before = what_lives(model, tmp_path)
    with recording():
        kinds = ("soft", "bits", "recall", "offloaded")
        threads = [threading.Thread(target=run, args=(kind, tmp_path / str(i))) for i, kind in enumerate(kinds)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [each for each in found if isinstance(each, BaseException)] == []
    assert what_lives(model, tmp_path) == before
    record_property("soak", {"runs": len(kinds)} | sum(found, Counter()))


def crop_that_forgets(monkeypatch):
    """The last token of what is left is lost, and a token counted that is not there."""
    right = fast.ClusteredCache._crop

    def crop(cache, n_tokens):
        right(cache, n_tokens)
        if cache._held is not None and cache._n_stored:
            cache._held[0][..., cache._n_stored - 1, :] = 0

    monkeypatch.setattr(fast.ClusteredCache, "_crop", crop)


def load_that_drops(monkeypatch):
    """The last token that is read from a file is another one."""
    right = saving.restore

    def restore(layer, tensors, *rest):
        right(layer, {n: x.roll(1, -2) if n == "keys" else x for n, x in tensors.items()}, *rest)

    monkeypatch.setattr(saving, "restore", restore)


def rows_that_are_all_the_first(monkeypatch):
    right = fast.ClusteredCache._select
    monkeypatch.setattr(fast.ClusteredCache, "_select", lambda cache, indices: right(cache, 0 * indices))


def padding_that_is_stored(monkeypatch):
    right = RowGroups.extend
    monkeypatch.setattr(RowGroups, "extend", lambda groups, keys, values, padding=None: right(groups, keys, values))


def a_copy_that_shares(monkeypatch):
    """What is done with a copy is done with the cache."""
    monkeypatch.setattr(ClusteredCache, "__deepcopy__", lambda cache, memo: cache, raising=False)


TWINS = (crop_that_forgets, load_that_drops, rows_that_are_all_the_first, padding_that_is_stored, a_copy_that_shares)


def some_soaks(folder):
    for seed in range(5):
        one_soak("soft", model_of("llama"), seed, folder, 40, has_faults=False)


@pytest.mark.parametrize("mistake", TWINS)
def test_wrong_twins_are_found(mistake, tmp_path, monkeypatch):
    with recording(), monkeypatch.context() as patch:
        mistake(patch)
        with pytest.raises(AssertionError, match="soft after"):
            some_soaks(tmp_path)


def test_a_cache_that_is_kept_is_a_leak(tmp_path):
    model = model_of("llama")
    before = what_lives(model, tmp_path)
    kept = KINDS["soft"].make(model)
    assert what_lives(model, tmp_path) != before
    del kept
    assert what_lives(model, tmp_path) == before
