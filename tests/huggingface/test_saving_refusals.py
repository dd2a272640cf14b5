"""What `load` refuses, with the first difference named: other models, other files, and whatever was damaged."""

import gc
import hashlib
import json
import os

import numpy as np
import pytest
import torch
from models import greedy, random_tokens, tiny_llama
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvcluster.fast import Distinctive, SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, RecallCache

SMALL = {"budget": 40, "n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32}


def saved(path, model, kind=RecallCache):
    parameters = (
        SMALL
        if kind is RecallCache
        else {"keep_ratio": 0.25, "chunk_size": 16, "n_recent": 8, "method": SoftMatching()}
    )
    cache = kind.for_model(model, **parameters)
    with torch.no_grad():
        model(random_tokens(150, batch=2), past_key_values=cache)
    cache.save(path)
    return path


def changed(name):
    model = tiny_llama()
    model.model.get_submodule(name).weight.data *= 1.01
    return model


OTHERS = {
    "num_hidden_layers": lambda: tiny_llama(layers=4),
    "num_attention_heads": lambda: tiny_llama(heads=2),
    "num_key_value_heads": lambda: tiny_llama(kv_heads=4),
    "head_dim": lambda: tiny_llama(head_dim=32),
    "rope_parameters": lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "dtype": lambda: tiny_llama().to(torch.bfloat16),
    "weights": lambda: tiny_llama(seed=1),
    "weights of the first layer": lambda: changed("layers.0.self_attn.k_proj"),
    "weights of the last layer": lambda: changed("layers.2.self_attn.v_proj"),
    "weights of the embedding": lambda: changed("embed_tokens"),
}


@pytest.mark.parametrize("difference", OTHERS)
def test_another_model_is_refused_by_its_first_difference(difference, tmp_path):
    model = tiny_llama()
    path = saved(tmp_path / "cache", model)
    field = difference.split()[0]
    with pytest.raises(ValueError, match=f"^{field} of the model that path was saved with must be that of model, "):
        RecallCache.load(path, OTHERS[difference]())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors, header: header.update(format_version="2"), "format_version of path must be 1, got 2 in "),
        (lambda tensors, header: header.clear(), "path must be a file that save wrote, got "),
        (lambda tensors, header: header.update(description="{}"), "got a damaged description in "),
        (lambda tensors, header: tensors.pop("layers.1.members"), r"got \['layers.1.members'\] missing, \[\] more in "),
        (lambda tensors, header: tensors.update(x=torch.ones(1)), r"got \[\] missing, \['x'\] more in "),
        (lambda tensors, header: tensors["layers.2.values"][1, 1, 7, 3:4].neg_(), "got a damaged layers.2.values in "),
    ],
    ids=["format", "foreign", "description", "missing", "more", "tensor"],
)
def test_what_differs_in_a_file_is_named(change, message, tmp_path):
    model = tiny_llama()
    path = saved(tmp_path / "cache", model)
    with pytest.raises(ValueError, match="path must hold a ClusteredCache, got a RecallCache in "):
        ClusteredCache.load(path, model)
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    tensors = load_file(path)
    save_file(tensors, path, header)
    RecallCache.load(path, model)
    change(tensors, header)
    save_file(tensors, path, header)
    with pytest.raises(ValueError, match=message):
        RecallCache.load(path, model)


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/null"):
        with pytest.raises(ValueError, match="path must be a file, got "):
            ClusteredCache.load(path, tiny_llama())


@pytest.mark.parametrize("kind", [ClusteredCache, RecallCache])
def test_flipped_bits_and_cut_files_are_refused_wherever_they_are(kind, tmp_path):
    """And nothing of the attempt stays on the model."""
    model = tiny_llama()
    path = saved(tmp_path / "cache", model, kind)
    whole = path.read_bytes()
    end = 8 + int.from_bytes(whole[:8], "little")  # of the header
    rng = np.random.default_rng(0)
    for place in [*rng.integers(0, end, 60), *rng.integers(end, len(whole), 40), len(whole) - 1]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        path.write_bytes(flipped)
        with pytest.raises(ValueError, match=r"path must |format_version of path must"):
            kind.load(path, model)
    for cut in (
        whole[:0],
        whole[:7],
        whole[:100],
        whole[:end],
        whole[: end + 1000],
        whole[:-1],
        b"a text, no cache" * 9,
    ):
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="path must be a whole safetensors file, got "):
            kind.load(path, model)
    gc.collect()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def as_version_0_1_wrote_it(path, **parameters):
    """The same file with the parameters of `for_model` that version 0.1 had in it, which had no methods."""
    with safe_open(path, framework="pt") as file:
        header = file.metadata()
    description = json.loads(header["description"])
    description["parameters"].pop("method", None)
    description["parameters"] |= parameters
    text = json.dumps(description)
    header |= {"description": text, "description_sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(load_file(path), path, header)
    return path


@pytest.mark.parametrize(("n_shared", "method"), [(None, SoftMatching()), (3, Distinctive(n_shared=3))])
def test_a_clustered_cache_that_version_0_1_saved_is_loaded(n_shared, method, tmp_path):
    model = tiny_llama()
    cache = ClusteredCache.for_model(model, keep_ratio=0.5, method=method, chunk_size=16, n_recent=8)
    with torch.no_grad():
        model(random_tokens(150, batch=2), past_key_values=cache)
    cache.save(tmp_path / "cache")
    loaded = ClusteredCache.load(as_version_0_1_wrote_it(tmp_path / "cache", n_shared=n_shared), model)
    assert loaded.parameters == cache.parameters
    tokens = random_tokens(155, batch=2)
    assert torch.equal(*(greedy(model, tokens, n_new=20, past_key_values=each) for each in (loaded, cache)))


def test_a_recall_cache_that_version_0_1_saved_is_loaded_if_it_had_no_option_that_is_gone(tmp_path):
    model = tiny_llama()
    path = as_version_0_1_wrote_it(saved(tmp_path / "cache", model), mass=None, is_centred=False)
    assert RecallCache.load(path, model).n_seen == 150
    for gone, value, only in (("mass", 0.9, None), ("is_centred", True, False)):
        path = as_version_0_1_wrote_it(saved(tmp_path / "cache", model), **{gone: value})
        with pytest.raises(ValueError, match=f"{gone} must be {only}, which is all that this version has, got {value}"):
            RecallCache.load(path, model)


def test_a_method_without_a_spelling_is_not_saved(tmp_path):
    model = tiny_llama()
    own = type("Own", (SoftMatching,), {})()
    cache = ClusteredCache.for_model(model, keep_ratio=0.5, method=own)
    with pytest.raises(ValueError, match="one of soft_matching, distinctive, attended to have a spelling, got "):
        cache.save(tmp_path / "cache")
    assert list(tmp_path.iterdir()) == []
