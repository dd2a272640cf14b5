"""A context is read once for all methods, those that see queries included."""

import pytest
import torch
from models import random_tokens, tiny_llama

from kvcluster.evaluation.quality.methods import Method
from kvcluster.evaluation.quality.reading import Context
from kvcluster.evaluation.quality.scoring import fill
from kvcluster.fast import Attended
from kvcluster.fast.huggingface import ClusteredCache

SIZES = {"chunk_size": 64, "n_sink": 4, "n_recent": 40, "method": Attended(n_shared=2)}
METHOD = Method(lambda model, keep, n_tokens: ClusteredCache.for_model(model, keep_ratio=keep, **SIZES), "")


@pytest.fixture
def context():
    return Context(tiny_llama(heads=4, kv_heads=2), random_tokens(400)[0].tolist())


def held(cache):
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values, layer.cache.caches[0].queries)]


def test_a_method_that_sees_queries_gets_them_again_without_reading(context):
    read = [held(context.cache(METHOD, keep)) for keep in (0.5, 0.3)]
    first = held(context.cache(METHOD, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(read[0], first, strict=True))
    assert [tensor.shape[-2] for tensor in read[0]] != [tensor.shape[-2] for tensor in read[1]]
    calls = []
    context.model.register_forward_hook(lambda *_: calls.append(1))
    filled = held(context.cache(METHOD, 0.3))
    assert not calls
    alone = Context(context.model, context.tokens)
    assert all(torch.equal(a, b) for a, b in zip(filled, held(alone.cache(METHOD, 0.3)), strict=True))


def test_other_queries_make_another_cache(context):
    right = held(context.cache(METHOD, 0.3))
    turned = [query.flip(1) for query in context.queries]
    wrong = held(fill(METHOD.make(context.model, 0.3, 400), context.full, queries=turned))
    assert not all(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


def test_without_queries_such_a_cache_cannot_be_filled(context):
    with pytest.raises(RuntimeError, match="needs the queries of all 400 tokens, got those of 0"):
        fill(METHOD.make(context.model, 0.3, 400), context.full)
