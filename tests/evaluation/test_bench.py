"""`kvcluster bench`: it counts what it says, its full cache is a full one, and a missed target is told."""

import json

import pytest
import torch
from agreement import equal_in_float32
from models import greedy, random_tokens, tiny_llama
from transformers import DynamicCache
from typer.testing import CliRunner

from kvcluster.cli import app
from kvcluster.evaluation.speed.attention import attention_alone, n_stored
from kvcluster.evaluation.speed.contenders import CONTENDERS, IN_FEW_BITS, filled, stored_bytes
from kvcluster.evaluation.speed.decoding import decoding, end_to_end
from kvcluster.evaluation.speed.figures import draw_decoding, draw_serving
from kvcluster.evaluation.speed.linear import hasten_linear_layers
from kvcluster.evaluation.speed.serving import serving
from kvcluster.fast.exact.blocks import BlockLayout


def nothing():
    pass


@pytest.mark.parametrize("name", CONTENDERS)
def test_caches_hold_what_they_are_said_to_hold(name):
    model = tiny_llama()
    cache = filled(CONTENDERS[name](model), 2, 1000, model)
    assert cache.get_seq_length() == 1000
    keep_ratio = next((float(word) for word in name.split() if word[:2] == "0."), 1.0)
    stored = n_stored(1000, keep_ratio)
    assert all(layer.keys.shape[2] == stored for layer in cache.layers)
    of_entry = 2 * 16 * 4 + (0 if isinstance(cache, DynamicCache) else 4)
    n_quantized = cache.layers[0].cache.caches[0].n_quantized if name == IN_FEW_BITS else 0
    block = BlockLayout(16, 16, (4, 4)).nbytes  # of 32 entries
    assert (n_quantized > 0) == (name == IN_FEW_BITS)
    assert stored_bytes(cache) == 3 * 2 * 2 * ((stored - n_quantized) * of_entry + n_quantized // 32 * block)


def test_the_full_cache_generates_stocks_tokens():
    model = tiny_llama()
    tokens = random_tokens(100, batch=2)
    stock = greedy(model, tokens)
    assert torch.equal(greedy(model, tokens, past_key_values=CONTENDERS["full"](model)), stock)


@pytest.mark.parametrize("rows", [1, 3, 4, 16, 17])
def test_hastened_linear_layers_give_the_same_sums(rows):
    model = tiny_llama()
    layer = model.model.layers[0].mlp.up_proj
    hidden = torch.randn(rows, 1, 64)
    expected = layer(hidden)
    hasten_linear_layers(model)
    assert equal_in_float32(layer(hidden).detach().numpy(), expected.detach().numpy())


def test_every_section_measures_and_draws(tmp_path):
    model = tiny_llama()
    attention = attention_alone(300, (1,), 1, nothing, {"kv_heads": 2, "group": 3, "dim": 64})
    assert [run["entries"]["full"] for run in attention.numbers["runs"]] == [300, 300]
    decoded = decoding(model, (200, 300), (1, 2), 1, nothing)
    assert len(decoded.claims) == 5
    assert len(end_to_end(model, random_tokens(150), 3, 1, nothing).claims) == 2
    served = serving(model, 200, (2**20, 2**21), 1, nothing)
    draw_decoding(tmp_path / "decoding.png", decoded.numbers["runs"])
    draw_serving(tmp_path / "serving.png", served.numbers["runs"], 200)
    json.dumps([section.as_json() for section in (attention, decoded, served)])


def test_input_that_cannot_be_used_is_refused(tmp_path):
    for arguments, message in (
        (["--only", "6"], "only must be numbers from 1 to 5, got 6"),
        (["--json", tmp_path / "no" / "file"], "must be a file in an existing folder"),
        (["--figures", tmp_path / "no"], "must be a folder that exists"),
    ):
        result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
