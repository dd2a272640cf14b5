"""The scores of a second reading are the highest of the weights that transformers' own eager attention returns."""

import copy

import pytest
import torch
from agreement import equal_in_float32
from evaluation_inputs import character_tokenizer
from families import MODELS, tiny
from models import random_tokens

from kvcluster.evaluation.tuning import second_reading as reading
from kvcluster.evaluation.tuning.second_reading import pieces_to_repeat, second_reading
from kvcluster.fast.huggingface import ClusteredCache
from kvcluster.fast.huggingface.hooks import attention_modules

CONTEXT = random_tokens(61)[0].tolist()
PIECES = [random_tokens(n, seed=n)[0].tolist() for n in (7, 1, 40)]
LOOK_BACK = [name for name, model in MODELS.items() if len(model[2]) < 4]


def highest(weights, n_context):
    """Of weights (heads, queries, tokens): over queries, for each head."""
    of_context = weights[:, n_context:, :n_context]
    return (of_context / of_context.sum(dim=-1, keepdim=True)).amax(dim=1)


def mean(weights, n_context):
    of_context = weights[:, n_context:, :n_context]
    return (of_context / of_context.sum(dim=-1, keepdim=True)).mean(dim=1)


def over_all_keys(weights, n_context):
    return weights[:, n_context:, :n_context].amax(dim=1)


def of_the_first_reading_too(weights, n_context):
    of_context = weights[:, :, :n_context]
    return (of_context / of_context.sum(dim=-1, keepdim=True)).amax(dim=1)


def of_the_last_query(weights, n_context):
    return highest(weights[:, [*range(n_context), -1]], n_context)


def by_transformers(name, pieces, score=highest, of_group=lambda scores: scores.amax(dim=2)):
    """Scores of each layer that attends to everything, from `output_attentions` of whole texts."""
    model, sliding = tiny(name, attention="eager")
    found = []
    for piece in pieces:
        with torch.no_grad():
            weights = model(torch.tensor([CONTEXT + piece]), output_attentions=True, use_cache=False).attentions
        of_layers = [each[0] for i, each in enumerate(weights) if i not in sliding]  # (heads, queries, tokens)
        scores = torch.stack([score(each, len(CONTEXT)) for each in of_layers])  # (layers, heads, tokens)
        found.append(of_group(scores.unflatten(1, (2, 2))))  # (layers, kv_heads, group, tokens)
    return torch.stack(found).amax(dim=0)


def ours(name, pieces=PIECES):
    model, _ = tiny(name)
    return torch.stack(list(second_reading(model, CONTEXT, pieces).values()))


@pytest.mark.parametrize("name", LOOK_BACK)
def test_scores_are_the_highest_weights_of_eager_attention(name):
    model, sliding = tiny(name)
    scores = second_reading(model, CONTEXT, PIECES)
    assert list(scores) == [layer for layer in range(4) if layer not in sliding]
    assert equal_in_float32(torch.stack(list(scores.values())).numpy(), by_transformers(name, PIECES).numpy())
    assert all(((each >= 0) & (each <= 1)).all() for each in scores.values())


@pytest.mark.parametrize(
    "mistake",
    [
        {"score": mean},
        {"score": over_all_keys},
        {"score": of_the_first_reading_too},
        {"score": of_the_last_query},
        {"of_group": lambda scores: scores[:, :, 0]},
        {"pieces": PIECES[:2]},
        {"pieces": [PIECES[0], PIECES[0] + PIECES[1], [token for piece in PIECES for token in piece]]},
    ],
    ids=["mean", "keys of the piece", "first reading", "last query", "one head of a group", "a piece less", "stored"],
)
def test_other_scores_are_noticed(mistake):
    expected = by_transformers("gemma3_text", **{"pieces": PIECES} | mistake)
    assert not equal_in_float32(ours("gemma3_text").numpy(), expected.numpy())


def test_few_queries_at_once_give_the_same_scores(monkeypatch):
    whole = ours("qwen3")
    monkeypatch.setattr(reading, "LOGITS_AT_ONCE", 3 * 2 * len(CONTEXT))
    assert equal_in_float32(ours("qwen3").numpy(), whole.numpy())


def state_of(model):
    modules = attention_modules(model)
    return [(id(module.config), list(module._forward_pre_hooks)) for module in modules]


@pytest.mark.parametrize("has_cache", [False, True])
def test_the_model_is_as_it_was_even_after_an_error(has_cache):
    model, _ = tiny("llama")
    cache = ClusteredCache.for_model(model, keep_ratio=0.5) if has_cache else None
    before, tokens = state_of(model), random_tokens(30)
    with torch.no_grad():
        logits = model(tokens, past_key_values=copy.deepcopy(cache)).logits
    calls = iter([None])  # an error after the first piece, while the modules are observed
    with pytest.raises(StopIteration):
        second_reading(model, CONTEXT, PIECES, on_piece=lambda: next(calls))
    second_reading(model, CONTEXT, PIECES)
    assert state_of(model) == before
    with torch.no_grad():
        assert torch.equal(model(tokens, past_key_values=copy.deepcopy(cache)).logits, logits)


def test_an_observed_model_computes_what_it_always_does():
    model, _ = tiny("gemma3_text")
    scores = {layer: torch.zeros(2, 10) for layer in (1, 3)}
    tokens = random_tokens(50)
    with torch.no_grad():
        logits = model(tokens).logits
        with reading.observed(model, scores):
            assert torch.equal(model(tokens).logits, logits)
    assert all((each > 0).all() for each in scores.values())


def test_pieces_hold_the_context_and_say_what_to_do():
    tokenizer = character_tokenizer()
    context = tokenizer("Ann went home, and Bob stayed.").input_ids
    pieces = [tokenizer.decode(piece) for piece in pieces_to_repeat(tokenizer, context, n_piece=12)]
    told = "\n\nRepeat the part of the previous context exactly, starting with"
    assert pieces == [
        "\n\nRepeat the previous context exactly.Ann went hom",
        f"{told}went home, and Bob s",
        f"{told}nd Bob stayed.",
    ]


@pytest.mark.parametrize(
    ("name", "attention", "context", "message"),
    [
        ("llama", "eager", CONTEXT, "attention of model must be sdpa, got eager"),
        ("mistral-sliding", "sdpa", CONTEXT, "model must have a layer that attends to everything, got one whose"),
        ("llama", "sdpa", [], "context must have at least one token, got none"),
        ("llama", "sdpa", [1] * 985, "tokens must leave room for 40 more within the model's 1,024 positions, got 985"),
    ],
)
def test_what_cannot_be_read_again_is_refused(name, attention, context, message):
    model, _ = tiny(name, attention=attention)
    before = state_of(model)
    with pytest.raises(ValueError, match=message):
        second_reading(model, context, PIECES)
    assert state_of(model) == before
