"""Batches with left padding: every row as if it were alone, to the bit where keys are the same."""

import copy

import pytest
import torch
from agreement import assert_same_bits
from caches import of_reference
from inputs import slowly, to_numpy
from models import greedy, random_tokens, save_llama, tiny_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, pipeline

from kvcluster import fast
from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache
from kvcluster.fast.huggingface.row_groups import RowGroups

CLUSTERED = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}
RECALL = {"budget": 40, "n_sink": 2, "n_recent": 2, "tokens_per_cluster": 4, "prompt_segment_size": 16}
CHELSEA = {"ratio": 0.25, "max_new_tokens": 24, "interval": 3, "chunk_size": 16, "n_sink": 2, "n_recent": 8}
FREE = {"ratio": 1, "max_new_tokens": 1000}  # of which nothing is ever compressed
HEADS = [(0, 1), (2, 0)]  # whole ones
RAGGED = {"keep_ratio": [[0.3, 0.9], 0.25, [1.0, 0.25]]}  # for each head
MAKERS = {
    "clustered": lambda model: ClusteredCache.for_model(model, **CLUSTERED),
    "clustered-budget": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"budget": 50}),
    "clustered-heads": lambda model: ClusteredCache.for_model(model, **CLUSTERED, whole_heads=HEADS),
    "clustered-ragged": lambda model: ClusteredCache.for_model(model, **CLUSTERED | RAGGED),
    "clustered-bits": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": 0.5, "bits": 4}),
    "ragged-bits": lambda model: ClusteredCache.for_model(model, **CLUSTERED | RAGGED, bits=(4, 2)),
    "chelsea": lambda model: ChelseaCache.for_model(model, **CHELSEA, whole_heads=()),
    "chelsea-heads": lambda model: ChelseaCache.for_model(model, **CHELSEA, whole_heads=HEADS),
    "recall": lambda model: RecallCache.for_model(model, **RECALL),
    "recall-dense": lambda model: RecallCache.for_model(model, **RECALL, n_dense_layers=1),
    "recall-offloaded": lambda model: RecallCache.for_model(model, **RECALL, offloading=True),
    "recall-published": lambda model: RecallCache.as_published(model, budget=24, seed=1),
}
WHOLE = {
    "clustered": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": 1}),
    "clustered-budget": lambda model: ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": 1, "budget": 300}),
    "clustered-ragged": lambda model: ClusteredCache.for_model(
        model, **CLUSTERED | {"keep_ratio": [1.0, [1.0, 1.0], 1.0]}
    ),
    "chelsea-heads": lambda model: ChelseaCache.for_model(model, **CHELSEA | FREE, whole_heads=HEADS),
    "recall": lambda model: RecallCache.for_model(model, **RECALL | {"budget": 400}),
    "recall-offloaded": lambda model: RecallCache.for_model(model, **RECALL | {"budget": 400}, offloading=True),
}
EAGER = [
    ("clustered", "eager"),
    ("clustered-budget", "eager"),
    ("chelsea-heads", "eager"),
    ("clustered-ragged", "eager"),
]  # RecallCache serves sdpa only
PADDING = [0, 37, 5, 37]


def padded_batch(*, n_tokens=130, padding=PADDING, seed=0):
    tokens = random_tokens(n_tokens, batch=len(padding), seed=seed)
    mask = torch.ones_like(tokens)
    for row, size in enumerate(padding):
        tokens[row, :size], mask[row, :size] = 0, 0
    return tokens, mask


def generate(model, tokens, mask, n_new=24, **kwargs):
    settings = {"max_new_tokens": n_new, "do_sample": False, "pad_token_id": 0} | kwargs
    return model.generate(tokens, attention_mask=mask, **settings)[:, tokens.shape[1] :]


@pytest.mark.parametrize("chunk", [None, slowly(30), slowly(64)])
@pytest.mark.parametrize("name", MAKERS)
def test_a_padded_row_generates_the_tokens_it_generates_alone(name, chunk):
    model = tiny_llama()
    tokens, mask = padded_batch()
    extra = {} if chunk is None else {"prefill_chunk_size": chunk}
    cache = MAKERS[name](model)
    together = generate(model, tokens, mask, past_key_values=cache, **extra)
    alone = [
        generate(model, tokens[row : row + 1, size:], mask[row : row + 1, size:], past_key_values=MAKERS[name](model))
        for row, size in enumerate(PADDING)
    ]
    if chunk is None:  # pieces of a prompt attend to what was clustered before: other pieces, other tokens
        assert torch.equal(together, torch.cat(alone))
    assert cache.n_seen == 130 + 23


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["clustered", "clustered-heads", "clustered-bits", "chelsea-heads"])
def test_eager_attention_masks_what_other_rows_hold(name, attention):
    model = tiny_llama(attention=attention)
    tokens, mask = padded_batch()
    together = generate(model, tokens, mask, past_key_values=MAKERS[name](model))
    alone = greedy(model, tokens[1:2, 37:], past_key_values=MAKERS[name](model))
    assert torch.equal(together[1:2], alone)


@pytest.mark.parametrize(("name", "attention"), [*((name, "sdpa") for name in WHOLE), *EAGER])
@pytest.mark.parametrize("extra", [{}, slowly({"prefill_chunk_size": 30}), slowly({"num_beams": 3})])
def test_a_cache_that_forgets_nothing_gives_the_tokens_of_stock_generate(name, attention, extra):
    model = tiny_llama(attention=attention)
    tokens, mask = padded_batch()
    ours = generate(model, tokens, mask, past_key_values=WHOLE[name](model), **extra)
    stock = generate(model, tokens, mask, past_key_values=DynamicCache(config=model.config), **extra)
    assert torch.equal(ours, stock)


@pytest.mark.parametrize("pieces", [(130,), (20, 50, 60), (1,) * 5 + (125,)])
def test_real_entries_have_the_bits_of_a_row_without_padding(pieces):
    """Given the same keys and values. A cache that takes padding for tokens holds others."""
    rng = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(4, 2, 130, 16, generator=rng) for _ in range(2))
    groups = RowGroups(lambda: fast.ClusteredCache(**CLUSTERED))
    seen = 0
    for size in pieces:
        part = slice(seen, seen + size)
        seen += size
        groups.extend(keys[:, :, part], values[:, :, part], [min(n, seen) for n in PADDING])
        groups.cluster()
    assert (groups.n_seen, groups.padding) == (130, PADDING)
    for row, size in enumerate(PADDING):
        expected = of_reference(**CLUSTERED)
        expected.append(to_numpy(keys[row, :, size:]), to_numpy(values[row, :, size:]))
        entries, place = groups.of_row(row)
        for part in ("keys", "values", "counts"):
            assert_same_bits(getattr(entries, part)[place], getattr(expected, part))
            n_stored = expected.n_stored
            beside = groups.side_by_side(groups.n_stored, part)[row]
            assert_same_bits(beside[:, groups.n_stored - n_stored :], getattr(expected, part))
            assert not beside[:, : groups.n_stored - n_stored].any()
    padded = fast.ClusteredCache(**CLUSTERED)
    padded.append(keys, values)
    entries, place = groups.of_row(1)
    assert not torch.equal(padded.counts[1, :, -entries.n_stored :], entries.counts[place])


@pytest.mark.parametrize("name", MAKERS)
def test_rows_are_selected_saved_and_loaded_with_their_padding(name, tmp_path):
    model = tiny_llama()
    tokens, mask = padded_batch()
    cache = MAKERS[name](model)
    with torch.inference_mode():
        model(tokens, attention_mask=mask, past_key_values=cache)
    cache.save(tmp_path / "cache.safetensors")
    loaded = type(cache).load(tmp_path / "cache.safetensors", model)
    assert loaded.padding == PADDING
    rows = torch.tensor([3, 0, 0, 1, 2])
    chosen = copy.deepcopy(cache)
    chosen.reorder_cache(rows)
    assert chosen.padding == [PADDING[row] for row in rows]
    twice = copy.deepcopy(cache)
    twice.batch_repeat_interleave(2)
    assert twice.padding == [n for n in PADDING for _ in range(2)]
    following = random_tokens(1, batch=4, seed=1)
    longer = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)

    def next_logits(cache, rows=slice(None)):
        positions = longer[rows].sum(dim=1, keepdim=True) - 1
        with torch.inference_mode():
            return model(
                following[rows], attention_mask=longer[rows], position_ids=positions, past_key_values=cache
            ).logits

    expected = next_logits(cache)
    assert torch.equal(next_logits(loaded), expected)
    assert torch.equal(next_logits(twice, torch.arange(4).repeat_interleave(2))[::2].argmax(-1), expected.argmax(-1))
    assert torch.equal(next_logits(chosen, rows).argmax(-1), expected[rows].argmax(-1))


def test_report_and_plot_know_the_rows():
    model = tiny_llama()
    tokens, mask = padded_batch()
    cache = RecallCache.for_model(model, **RECALL, offloading=True)
    generate(model, tokens, mask, past_key_values=cache)
    report = cache.report().as_dict()
    assert [layer["kind"] for layer in report["layers"]] == ["recalled"] * 3
    assert report["layers"][0]["n_seen"] == 153
    assert 0 < report["layers"][0]["hit_rate"] < 1
    assert cache.plot(row=1).axes
    with pytest.raises(ValueError, match="row must be from 0 to 3, got 4"):
        cache.plot(row=4)


def test_sliding_layers_keep_to_stock_padding():
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(0)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=20,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Gemma3ForCausalLM(config).eval()
    tokens, mask = padded_batch()
    whole = ClusteredCache.for_model(model, **CLUSTERED | {"keep_ratio": 1})
    assert torch.equal(generate(model, tokens, mask, past_key_values=whole), generate(model, tokens, mask))


def test_a_pipeline_pads_its_batches(tmp_path):
    folder = save_llama(tmp_path)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", "left"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = [" ".join(f"w{1 + (i * 7 + n) % 96}" for i in range(n)) for n in (20, 90)]
    settings = {"max_new_tokens": 8, "do_sample": False, "return_full_text": False}
    together = pipe(texts, batch_size=2, past_key_values=MAKERS["clustered"](model), **settings)
    for text, made in zip(texts, together, strict=True):
        alone = pipe(text, past_key_values=MAKERS["clustered"](model), **settings)
        assert made[0]["generated_text"] == alone[0]["generated_text"]


@pytest.mark.parametrize("name", ["clustered", "recall"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda mask: None, "attention_mask with a .*Cache must repeat the padding of earlier calls, got None"),
        (lambda mask: torch.ones_like(mask), r"must repeat the padding of earlier calls, \[0, 37, 5, 37\], got \[0, 0"),
        (lambda mask: mask.flip(1), "must have its padding on the left, before all tokens of a row, got zeros after"),
        (lambda mask: mask[:, None, None], r"must be \(batch, tokens\), got \(4, 1, 1, 131\)"),
    ],
)
def test_a_later_mask_must_repeat_the_padding(name, change, message):
    model = tiny_llama()
    tokens, mask = padded_batch()
    cache = MAKERS[name](model)
    with torch.inference_mode():
        model(tokens, attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
    with pytest.raises(ValueError, match=message):
        model(tokens[:, :1], attention_mask=change(longer), past_key_values=cache)
    assert cache.n_seen == 130


def test_holes_and_padding_on_the_right_are_refused_before_anything_is_lost():
    model = tiny_llama()
    cache = MAKERS["clustered"](model)
    tokens, mask = padded_batch()
    with pytest.raises(ValueError, match="must have its padding on the left"):
        model(tokens, attention_mask=mask.flip(1), past_key_values=cache)
    assert cache.n_seen == 0
    generate(model, tokens, torch.ones_like(mask), past_key_values=cache)
    longer = torch.ones(4, cache.n_seen + 6, dtype=torch.long)
    longer[1, cache.n_seen : cache.n_seen + 3] = 0
    with pytest.raises(ValueError, match="must have its padding on the left"):
        model(random_tokens(6, batch=4), attention_mask=longer, past_key_values=cache)


def test_a_call_that_is_refused_for_one_row_leaves_all_rows_as_they_were():
    model = tiny_llama()
    tokens, mask = padded_batch()
    cache = MAKERS["clustered"](model)
    with torch.inference_mode():
        model(tokens, attention_mask=mask, past_key_values=cache)
    untouched = copy.deepcopy(cache)
    embedding = model.model.embed_tokens.weight.data
    right = embedding[3].clone()
    embedding[3] = torch.nan
    longer = torch.cat([mask, torch.ones(4, 1, dtype=torch.long)], dim=1)
    following = torch.tensor([[1], [3], [1], [3]])  # the second group is refused
    with pytest.raises(ValueError, match="keys must be finite"):
        model(following, attention_mask=longer, past_key_values=cache)
    embedding[3] = right
    with torch.inference_mode():
        ours, theirs = (
            model(following, attention_mask=longer, past_key_values=each).logits for each in (cache, untouched)
        )
    assert torch.equal(ours, theirs)
