"""Caches in files: what comes back continues as what was saved, and no half of it is ever written."""

import copy
import errno
import gc
import os
import stat

import numpy as np
import pytest
import torch
from models import greedy, random_tokens, tiny_llama
from saved_caches import CACHES
from transformers import Qwen2Config, Qwen2ForCausalLM

from kvcluster import fast
from kvcluster.fast.huggingface import ClusteredCache, RecallCache, tensor_files
from kvcluster.fast.memory.packed import PackedBlocks
from kvcluster.fast.tiers import TieredRecallCache

KINDS = pytest.mark.parametrize("name", CACHES)
NOT_SAVED = (
    "_held",
    "_whole",
    "work",
    "_overwritten",
    "_before",
    "_n_last",
    "_rows",
    "_lost",
    "_memory",
    "_rooms",
    "held",
)  # memory, of which what is in use is; cost; what crop would undo


def feed(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


def prefilled(name, model, n_tokens=150, **more):
    kind, parameters = CACHES[name]
    cache = kind.for_model(model, **parameters, **more)
    if n_tokens:
        feed(model, cache, random_tokens(n_tokens, batch=2))
    return cache


def continued(model, cache):
    """The next tokens after five more, which `cache` takes in at once."""
    return greedy(model, random_tokens(cache.n_seen + 5, batch=2, seed=2), n_new=40, past_key_values=cache)


def told(thing):
    """All attributes that are saved, bit for bit; of memory with room to grow, what is in use."""
    if isinstance(thing, torch.Tensor):
        return thing.dtype, thing.shape, thing.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    if not hasattr(thing, "__dict__"):
        return thing
    n_rows = getattr(thing, "_n_stored", getattr(thing, "n_stored", 0))
    used = [told(array[..., :n_rows, :]) for array in getattr(thing, "_held", None) or ()]
    used += [told(thing.without_room())] if isinstance(thing, PackedBlocks) else []
    used += [told(thing.queries)] if hasattr(thing, "queries") else []
    used += [told(array[..., : thing.n_seen, :]) for array in getattr(thing, "_whole", None) or ()]
    return {name: told(value) for name, value in vars(thing).items() if name not in NOT_SAVED} | {"used": used}


def layers_of(cache):
    return [told(layer.cache.caches[0]) for layer in cache.layers]


@pytest.mark.slow
@pytest.mark.parametrize("turn", ["empty", "prompt", "decoded", "second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["f32", "bf16", "f16"])
@KINDS
def test_a_loaded_cache_continues_as_the_one_that_was_saved(name, dtype, turn, tmp_path):
    """With another model object of the same weights; saving changes nothing."""
    model, twin = tiny_llama().to(dtype), tiny_llama().to(dtype)
    cache = prefilled(name, model, 0 if turn == "empty" else 150)
    if turn in ("decoded", "second"):
        continued(model, cache)
    if turn == "second":
        feed(model, cache, random_tokens(30, batch=2, seed=3))
    before = layers_of(cache)
    cache.save(tmp_path / "cache")
    loaded = type(cache).load(tmp_path / "cache", twin)
    with open(tmp_path / "cache", "rb+") as file:
        file.write(bytes((tmp_path / "cache").stat().st_size))  # what was loaded is no view of the file
    assert layers_of(cache) == before == layers_of(loaded)
    assert (loaded.n_seen, loaded.nbytes, loaded.parameters) == (cache.n_seen, cache.nbytes, cache.parameters)
    assert torch.equal(continued(twin, loaded), continued(model, cache))
    assert layers_of(loaded) == layers_of(cache) != before
    assert {layer.keys.dtype for layer in loaded.layers} == {dtype}
    loaded.reset()
    assert torch.equal(continued(twin, loaded), continued(model, prefilled(name, model, 0)))


@KINDS
def test_a_loaded_prompt_can_be_repeated_before_it_is_continued(name, tmp_path):
    """Rows are reordered and repeated, as for beams, though the layers have not been called yet."""
    model = tiny_llama()
    cache = prefilled(name, model)
    cache.save(tmp_path / "cache")
    loaded = type(cache).load(tmp_path / "cache", model)
    for each in (cache, loaded):
        each.reorder_cache(torch.tensor([1, 0]))
        each.batch_repeat_interleave(2)
    assert layers_of(loaded) == layers_of(cache)
    assert loaded.layers[0].keys.shape[0] == 4


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"offloading": True, "n_steps": 2}], ids=["to-memory", "to-tiers"])
@pytest.mark.parametrize("saved", [{}, {"offloading": True}], ids=["memory", "tiers"])
def test_a_cache_moves_between_memory_and_tiers(saved, options, tmp_path):
    model = tiny_llama()
    cache = prefilled("recall-dense-rest", model, **saved)
    continued(model, cache)
    cache.save(tmp_path / "cache")
    loaded = RecallCache.load(tmp_path / "cache", model, **options, **({"folder": tmp_path} if options else {}))
    tiered = [isinstance(layer.cache.caches[0], TieredRecallCache) for layer in loaded.layers]
    assert tiered == [False, bool(options), bool(options)]
    assert torch.equal(continued(model, loaded), continued(model, cache))
    assert os.listdir(tmp_path) == ["cache"]
    with pytest.raises(ValueError, match="offloading must be True for a folder or n_steps"):
        RecallCache.load(tmp_path / "cache", model, n_steps=2)


@pytest.mark.parametrize("name", ["clustered", "recall"])
def test_sliding_layers_of_transformers_come_back_too(name, tmp_path):
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
    slides = {"use_sliding_window": True, "sliding_window": 24, "max_window_layers": 2}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **slides)).eval()
    cache = prefilled(name, model)
    cache.save(tmp_path / "cache")
    loaded = type(cache).load(tmp_path / "cache", model)
    assert [layer.is_sliding for layer in loaded.layers] == [False, False, True]
    tokens = random_tokens(30, batch=2, seed=3)
    assert torch.equal(feed(model, loaded, tokens), feed(model, cache, tokens))
    assert torch.equal(continued(model, loaded), continued(model, cache))


@pytest.mark.parametrize("n_clustered", [0, 95])
def test_a_layer_remembers_whether_its_prompt_was_clustered(n_clustered):
    """A prompt has segments of its own size; what is saved between the halves of `append` is clustered as one."""
    keys = torch.from_numpy(np.random.default_rng(0).standard_normal((2, 100, 16), dtype=np.float32))
    cache, restored = (fast.RecallCache(**CACHES["recall"][1]) for _ in range(2))
    if n_clustered:
        cache.append(keys, keys)
    cache.extend(keys, keys)
    restored.restore(*copy.deepcopy(cache.state()))
    cache.cluster()
    restored.cluster()
    assert told(restored) == told(cache)
    assert cache.n_clustered == (191 if n_clustered else 95)


@pytest.mark.parametrize("broken", ["save_file", "fsync", "replace"])
def test_a_failure_while_saving_leaves_the_old_file_and_no_other(broken, monkeypatch, tmp_path):
    model, path = tiny_llama(), tmp_path / "cache"
    cache = prefilled("clustered", model)
    cache.save(path)
    old = path.read_bytes()
    feed(model, cache, random_tokens(30, batch=2))

    def fail(*arguments):
        if broken == "save_file":
            arguments[1].write_bytes(old[:1000])
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patch:
        patch.setattr(tensor_files if broken == "save_file" else os, broken, fail)
        with pytest.raises(OSError, match="no space"):
            cache.save(path)
    assert (path.read_bytes(), os.listdir(tmp_path)) == (old, ["cache"])
    cache.save(path)
    assert (ClusteredCache.load(path, model).n_seen, os.listdir(tmp_path)) == (180, ["cache"])


def test_who_may_read_a_file_is_kept_and_new_ones_are_private(tmp_path):
    """It holds the conversation."""
    model, path = tiny_llama(), tmp_path / "cache"
    cache = prefilled("clustered", model)
    cache.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    path.chmod(0o640)
    link = tmp_path / "link"
    link.symlink_to(path)
    cache.save(link)
    assert link.is_symlink()
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["cache", "link"]
    assert ClusteredCache.load(link, model).n_seen == cache.n_seen


def test_what_cannot_be_saved_is_refused(tmp_path):
    model, path = tiny_llama(), tmp_path / "cache"
    cache = prefilled("clustered", model)
    with pytest.raises(FileNotFoundError, match="path must lie in an existing folder, got "):
        cache.save(tmp_path / "none" / "cache")
    with pytest.raises(FileNotFoundError):
        ClusteredCache.load(path, model)
    halfway = copy.deepcopy(cache)
    halfway.layers[0].cache.caches[0].append(*torch.ones(2, 2, 2, 1, 16))
    with pytest.raises(RuntimeError, match="must have seen the same tokens, got 150 to 151"):
        halfway.save(path)
    del model
    gc.collect()
    with pytest.raises(RuntimeError, match="the model that the cache was made for must exist"):
        cache.save(path)
    assert not os.listdir(tmp_path)
