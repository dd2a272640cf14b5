"""Every model that the transformers caches take: stock where nothing is merged, the reference's entries where it is."""

import inspect

import gguf
import pytest
import torch
import transformers
from agreement import assert_same_bits, equal_in_float32
from caches import of_reference
from families import MIXED, MODELS, WINDOW, tiny
from models import greedy, random_tokens, save_llama, tiny_llama
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ClusteredCache, RecallCache

pytestmark = pytest.mark.slow

PARAMETERS = {"keep_ratio": 0.25, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}
RECALLED = {"budget": 30, "n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32}
SERVED = pytest.mark.parametrize("name", MODELS)
CACHES = pytest.mark.parametrize(
    ("cache_class", "parameters"), [(ClusteredCache, PARAMETERS), (RecallCache, RECALLED)], ids=["clustered", "recall"]
)
ATTENTION = pytest.mark.parametrize("attention", ["sdpa", "eager"])


def after(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


def assert_stock_in_two_turns(model, cache, *, has_same_bits=True):
    """Token for token, in what transformers asks of the cache to make its masks, and in the bits of the keys."""
    stock = DynamicCache(config=model.config)
    tokens, more = random_tokens(80, batch=2), random_tokens(10, batch=2, seed=1)
    is_older = "cache_position" in inspect.signature(DynamicLayer.get_mask_sizes).parameters  # transformers before 5.4
    new = torch.arange(7) if is_older else 7
    for n_seen in (109, 149):
        made = greedy(model, tokens, n_new=30, past_key_values=stock)
        assert torch.equal(greedy(model, tokens, n_new=30, past_key_values=cache), made)
        assert (cache.n_seen, cache.get_seq_length()) == (n_seen, n_seen)
        for layer, stock_layer in zip(cache.layers, stock.layers, strict=True):
            assert layer.get_mask_sizes(new) == stock_layer.get_mask_sizes(new)
            assert layer.keys.shape == stock_layer.keys.shape
            assert torch.equal(layer.keys, stock_layer.keys) or not has_same_bits
        tokens = torch.cat([tokens, made, more], dim=1)


@ATTENTION
@SERVED
def test_keep_ratio_one_is_stock_generate(name, attention):
    model, _ = tiny(name, attention=attention)
    assert_stock_in_two_turns(model, ClusteredCache.for_model(model, **PARAMETERS | {"keep_ratio": 1}))


@SERVED
def test_a_budget_that_covers_everything_is_stock_generate(name):
    """The keys of later layers are rounded otherwise: a RecallCache attends in the order of memory."""
    model, _ = tiny(name)
    assert_stock_in_two_turns(model, RecallCache.for_model(model, **RECALLED | {"budget": 149}), has_same_bits=False)


@ATTENTION
@SERVED
def test_layers_hold_what_the_reference_makes_and_windows_what_stock_makes(name, attention):
    model, sliding = tiny(name, attention=attention)
    tokens = random_tokens(80, batch=2)
    cache, stock = ClusteredCache.for_model(model, **PARAMETERS), DynamicCache(config=model.config)
    after(model, cache, tokens)
    after(model, stock, tokens)
    assert [i for i, layer in enumerate(cache.layers) if type(layer) is DynamicSlidingWindowLayer] == sliding
    for index, (layer, stock_layer) in enumerate(zip(cache.layers, stock.layers, strict=True)):
        if index in sliding:
            assert layer.keys.shape[2] == WINDOW - 1
            assert torch.equal(layer.keys, stock_layer.keys)
            assert torch.equal(layer.values, stock_layer.values)
            continue
        expected = of_reference(**PARAMETERS)
        expected.append(stock_layer.keys.numpy(), stock_layer.values.numpy())
        assert cache.n_stored == expected.keys.shape[2] < 45
        for part in ("keys", "values", "counts"):
            assert_same_bits(getattr(layer.cache.caches[0], part), getattr(expected, part))
    held = [x for layer in cache.layers for x in (layer.keys, layer.values)]
    held += [layer.cache.caches[0].counts for layer in cache.own_layers]
    assert cache.nbytes == sum(x.nbytes for x in held) <= cache.nbytes_reserved


@CACHES
@SERVED
def test_the_text_goes_on_otherwise_only_where_something_is_clustered(name, cache_class, parameters):
    (model, sliding), tokens = tiny(name), random_tokens(80, batch=2)
    cache = cache_class.for_model(model, **parameters)
    ours, stock = greedy(model, tokens, n_new=30, past_key_values=cache), greedy(model, tokens, n_new=30)
    assert torch.equal(ours, stock) == (len(sliding) == 4)
    assert cache.n_seen == 109
    assert all(cache.layers[i].keys.shape[2] == WINDOW - 1 for i in sliding)


@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if len(model[2]) < 4])
def test_our_attention_agrees_with_eager_and_its_log_counts(name, queries):
    """Two routes, `attend_entries` and stock eager with a mask, see the same scale, positions and counts."""
    logits = {}
    for attention in ("sdpa", "eager"):
        model, _ = tiny(name, attention=attention)
        cache = ClusteredCache.for_model(model, **PARAMETERS)
        after(model, cache, random_tokens(80, batch=2))
        logits[attention] = after(model, cache, random_tokens(queries, batch=2, seed=1))
        cache.reset()
        after(model, cache, random_tokens(80, batch=2))
        with torch.no_grad():
            for layer in cache.own_layers:
                layer.cache.caches[0].counts[:] = 1
        forgetful = after(model, cache, random_tokens(queries, batch=2, seed=1))
        assert not equal_in_float32(forgetful.numpy(), logits[attention].numpy())
    assert equal_in_float32(logits["sdpa"].numpy(), logits["eager"].numpy())


@pytest.mark.parametrize("name", ["qwen3-sliding", "gemma3_text"])
def test_crop_takes_tokens_until_a_window_has_lost_some_and_reset_empties_windows_too(name):
    model, _ = tiny(name)
    cache = ClusteredCache.for_model(model, **PARAMETERS)
    after(model, cache, random_tokens(20))
    cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [19] * 4
    after(model, cache, random_tokens(30))
    with pytest.raises((RuntimeError, ValueError), match="liding"):  # transformers' own layers say so
        cache.crop(-1)
    assert [layer.get_seq_length() for layer in cache.layers] == [49] * 4
    cache.reset()
    assert (cache.n_seen, cache.n_stored, cache.nbytes, cache.nbytes_reserved) == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("name", "field", "value", "message"),
    [
        ("gemma3_text", "attn_logit_softcapping", 50.0, "attn_logit_softcapping of model must be None, got 50.0"),
        ("gemma3_text", "use_bidirectional_attention", True, "use_bidirectional_attention of model must be False"),
        ("qwen3", "is_causal", False, "is_causal of model must be True, got False"),
        ("mistral", "layer_types", MIXED, "layer_types of model must be absent, as mistral masks all layers alike"),
        ("qwen2", "layer_types", ["chunked_attention"] * 4, "must be full_attention or sliding_attention, got"),
        ("qwen2", "layer_types", MIXED, "sliding_window of model must be set for the sliding layers"),
        ("llama", "model_type", "phi3", "model must be of type llama or mistral or .*, got phi3"),
        (
            "llama",
            "num_hidden_layers",
            10**9,
            "num_hidden_layers of model must be its attention modules, .*, got 10000",
        ),
    ],
)
@CACHES
def test_refusals_name_what_is_unsupported(cache_class, parameters, name, field, value, message):
    model, _ = tiny(name)
    setattr(model.config, field, value)
    with pytest.raises(ValueError, match=message):
        cache_class.for_model(model, **parameters)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text"])
def test_a_pipeline_passes_the_cache_to_generate(name, tmp_path):
    model, _ = tiny(name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(save_llama(tmp_path))
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    text = " ".join(f"w{i}" for i in random_tokens(80)[0].clamp(min=1).tolist())
    cache, other = (ClusteredCache.for_model(model, **PARAMETERS) for _ in range(2))
    made = pipe(text, past_key_values=cache, max_new_tokens=20, do_sample=False, return_tensors=True)
    tokens = tokenizer(text, return_tensors="pt").input_ids
    ours = greedy(model, tokens, n_new=20, past_key_values=other)[0].tolist()
    assert made[0]["generated_token_ids"][80:] == ours != greedy(model, tokens, n_new=20)[0].tolist()
    assert cache.n_seen == 99


def write_gguf(model, path):
    """A tiny Llama in the format of llama.cpp."""
    config, names = model.config, gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, model.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    for name, weight in model.state_dict().items():
        module, _, kind = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(module)}.{kind}", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_model_from_a_gguf_file_is_served(tmp_path):
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf").eval()
    tokens = random_tokens(100)
    whole = ClusteredCache.for_model(model, keep_ratio=1)
    assert torch.equal(greedy(model, tokens, past_key_values=whole), greedy(model, tokens))
    cache = ClusteredCache.for_model(model, keep_ratio=0.25, chunk_size=16, n_recent=8, method=SoftMatching())
    greedy(model, tokens, past_key_values=cache)
    assert cache.n_stored < cache.n_seen
