"""Whole heads are found by a model's weights: those that ship, and those of a file of `kvcluster tune`."""

import copy
import json

import pytest
import torch
from models import tiny_llama

from kvcluster.fast.huggingface import known_whole_heads, whole_heads, whole_heads_of
from kvcluster.fast.huggingface.saving import fingerprint, weights_digest

HEADS = [[2, 1], [0, 0], [1, 1], [2, 0], [1, 0], [0, 1]]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def result_for(model):
    """What matters of a result of `kvcluster tune`."""
    weights = {str(dtype).removeprefix("torch."): weights_digest(model, dtype) for dtype in DTYPES}
    return {"name": "tiny", "weights": weights, "heads": HEADS}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "tuned.json"
    path.write_text(json.dumps(result_for(tiny_llama())))
    return path


@pytest.fixture
def ships(monkeypatch, tmp_path):
    """Let the package ship the heads of one tiny model."""
    (tmp_path / whole_heads.DATA).write_text(json.dumps([result_for(tiny_llama())]))
    monkeypatch.setattr(whole_heads, "files", lambda package: tmp_path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_digest_of_another_dtype_is_that_of_the_model_in_it(dtype):
    model = tiny_llama()
    assert fingerprint(copy.deepcopy(model).to(dtype))["weights"] == weights_digest(model, dtype)
    assert len({weights_digest(model, each) for each in DTYPES}) == 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_are_known_of_a_model_in_every_dtype(ships, path, dtype):
    model = tiny_llama().to(dtype)
    for find in (known_whole_heads, lambda *given: whole_heads_of(path, *given)):
        assert find(model) == [(2, 1)]
        assert find(model, 3) == [(2, 1), (0, 0), (1, 1)]
        assert find(model, 6) == [tuple(pair) for pair in HEADS]


def test_a_model_with_other_weights_has_no_known_heads(ships, path):
    model = tiny_llama(seed=1)
    with pytest.raises(LookupError, match=r"known \(tiny\), got a llama with other weights: `kvcluster tune MODEL"):
        known_whole_heads(model)
    with pytest.raises(
        ValueError, match=rf"tune` for model, whose weights are {weights_digest(model)[:12]}\.\.\., got"
    ):
        whole_heads_of(path, model)


@pytest.mark.parametrize(
    ("n_heads", "error", "message"),
    [
        (0, ValueError, "n_heads must be at least 1, got 0"),
        (7, ValueError, "n_heads must be at most 6, the KV heads that attend to everything, got 7"),
        (1.5, TypeError, "n_heads must be an integer, got 1.5"),
    ],
)
def test_a_number_of_heads_out_of_range_is_refused(ships, path, n_heads, error, message):
    for find in (known_whole_heads, lambda *given: whole_heads_of(path, *given)):
        with pytest.raises(error, match=message):
            find(tiny_llama(), n_heads)


@pytest.mark.parametrize("content", ["no JSON", "{}", '{"weights": {}}', "[]", "3"])
def test_another_file_is_refused(tmp_path, content):
    (tmp_path / "file").write_text(content)
    with pytest.raises(ValueError, match="path must be a file that `kvcluster tune --json` wrote, got .*file: "):
        whole_heads_of(tmp_path / "file", tiny_llama())
    (tmp_path / "file").write_bytes(b"\xff")
    with pytest.raises(ValueError, match="path must be a file that `kvcluster tune --json` wrote"):
        whole_heads_of(tmp_path / "file", tiny_llama())
    with pytest.raises(FileNotFoundError):
        whole_heads_of(tmp_path / "none", tiny_llama())


def test_what_ships_has_every_head_of_its_layers_once():
    shipped = json.loads((whole_heads.files(whole_heads.__package__) / whole_heads.DATA).read_text())
    assert len(shipped) > 0
    for each in shipped:
        assert sorted(each["weights"]) == ["bfloat16", "float16", "float32"]
        kv_heads = len(each["shares"][0])
        assert sorted(map(tuple, each["heads"])) == [(i, head) for i in each["layers"] for head in range(kv_heads)]
        shares = [each["shares"][each["layers"].index(layer)][head] for layer, head in each["heads"]]
        assert sorted(shares, reverse=True) == shares
