"""Every mode of generate: the stock result where nothing is left out, and an end with the right count where much is.

Left padding, crop and what needs it (assisted decoding, prompt lookup) have tests of their own.
"""

import numpy as np
import pytest
import torch
import transformers
from agreement import equal_in_float32
from inputs import slowly
from models import random_tokens, save_llama, tiny_llama
from packaging.version import Version
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    MaxTimeCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextGenerationPipeline,
    TextIteratorStreamer,
)
from transformers.generation.streamers import BaseStreamer

from kvcluster.fast import SoftMatching
from kvcluster.fast.huggingface import ChelseaCache, ClusteredCache, RecallCache

CLUSTERED = {"chunk_size": 16, "n_sink": 2, "n_recent": 8, "method": SoftMatching()}
RECALLED = {"n_sink": 4, "tokens_per_cluster": 4, "segment_size": 16, "prompt_segment_size": 32}
CHELSEA = {"interval": 3, "chunk_size": 16, "n_sink": 2, "n_recent": 8, "whole_heads": [(0, 1), (1, 0)]}
# each cache: one that keeps everything, and one that leaves much out
WHOLE = {
    "clustered": lambda model: ClusteredCache.for_model(model, keep_ratio=1, **CLUSTERED),
    "chelsea": lambda model: ChelseaCache.for_model(model, ratio=1, max_new_tokens=1000, **CHELSEA),
    "recall": lambda model: RecallCache.for_model(model, budget=1000, **RECALLED),
    "ragged": lambda model: ClusteredCache.for_model(model, keep_ratio=[[1.0, 1.0], 1.0], **CLUSTERED),
}
SMALL = {
    "clustered": lambda model: ClusteredCache.for_model(model, keep_ratio=0.25, **CLUSTERED),
    "chelsea": lambda model: ChelseaCache.for_model(model, ratio=0.25, max_new_tokens=20, n_prompt=90, **CHELSEA),
    "recall": lambda model: RecallCache.for_model(model, budget=40, **RECALLED),
    "ragged": lambda model: ClusteredCache.for_model(model, keep_ratio=[[0.2, 0.3], 0.25], **CLUSTERED),
}
CACHES = pytest.mark.parametrize("name", WHOLE)
N_PROMPT, N_NEW = 90, 20

MODES = {
    "greedy": {},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "bad_words_ids": [[5], [6]]},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "sampling-several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "beams-several": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5, "early_stopping": True},
    "beams-sampling": {"num_beams": 2, "do_sample": True, "top_k": 20},
    "prompt-in-chunks": {"prefill_chunk_size": 32},
    "guidance": {"guidance_scale": 1.5},
}


def prompt(batch=2):
    return random_tokens(N_PROMPT, batch=batch)


def generate(model, cache, tokens=None, *, n_seen=0, **mode):
    """The new tokens of `tokens`, which follow `n_seen` others; with the same seed each time."""
    tokens = prompt() if tokens is None else tokens
    torch.manual_seed(7)
    mask = tokens.new_ones(len(tokens), n_seen + tokens.shape[1])
    mode = {"do_sample": False, "max_new_tokens": N_NEW, "pad_token_id": 0, "attention_mask": mask} | mode
    return model.generate(tokens, past_key_values=cache, **mode)[:, tokens.shape[1] :]


def prompt_of(mode):
    return prompt(batch=1 if mode == "guidance" else 2)  # guidance takes one row


@CACHES
@pytest.mark.parametrize("mode", MODES)
def test_a_cache_that_keeps_everything_generates_as_stock(mode, name):
    model, tokens = tiny_llama(layers=2), prompt_of(mode)
    cache = WHOLE[name](model)
    ours = generate(model, cache, tokens, **MODES[mode])
    assert torch.equal(ours, generate(model, None, tokens, **MODES[mode]))
    assert cache.n_seen == cache.n_stored == N_PROMPT + N_NEW - 1


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("mode", MODES)
def test_a_small_cache_runs_to_the_end(mode, name):
    model, tokens = tiny_llama(layers=2), prompt_of(mode)
    cache = SMALL[name](model)
    ours = generate(model, cache, tokens, **MODES[mode])
    assert ours.shape[1] == N_NEW
    assert cache.n_seen == N_PROMPT + N_NEW - 1
    assert (cache.n_stored < cache.n_seen / 2) == (name != "recall")
    assert not torch.equal(ours, generate(model, None, tokens, **MODES[mode]))


def skip_unless_right(made, expected):
    """What transformers before 5.5 gets wrong with a cache of its own is not asked of ours."""
    if not torch.equal(made, expected):
        pytest.skip("this transformers feeds the wrong tokens, to a cache of its own too")


def first_keys(model, cache, **mode):
    """The keys of the first layer after the prompt; they do not depend on what was attended to.

    Nor on how a product adds up: a key is half of the features as they are, without a sum that could be rounded.
    """
    model.model.layers[0].self_attn.k_proj.weight.data = torch.eye(32, 64)
    generate(model, cache, max_new_tokens=1, **mode)
    return cache.layers[0].keys


@pytest.mark.parametrize("name", ["clustered", "recall"])
def test_a_prompt_in_chunks_leaves_the_entries_of_a_prompt_at_once(name):
    model, chunks = tiny_llama(layers=2), {"prefill_chunk_size": 37}
    stock = [first_keys(model, DynamicCache(config=model.config), **mode) for mode in (chunks, {})]
    skip_unless_right(*stock)
    assert torch.equal(first_keys(model, SMALL[name](model), **chunks), first_keys(model, SMALL[name](model)))


@pytest.mark.slow
@CACHES
@pytest.mark.parametrize("mode", ["greedy", "sampling", "prompt-in-chunks"])
@pytest.mark.parametrize("feeds_all", [True, False])
def test_a_second_turn_goes_on_from_the_cache(feeds_all, mode, name):
    """Whether the whole conversation is passed to generate, of which it feeds what is new, or the new tokens only."""
    model, more = tiny_llama(layers=2), random_tokens(30, batch=2, seed=1)

    def second_turn(cache):
        conversation = torch.cat([prompt(), generate(model, cache, **MODES[mode]), more], dim=1)
        n_seen = 0 if feeds_all else N_PROMPT + N_NEW - 1
        return conversation, generate(model, cache, conversation[:, n_seen:], n_seen=n_seen, **MODES[mode])

    conversation = torch.cat([prompt(), generate(model, None, **MODES[mode]), more], dim=1)
    expected = generate(model, None, conversation, **MODES[mode])
    if Version(transformers.__version__) < Version("5.5"):
        try:
            skip_unless_right(second_turn(DynamicCache(config=model.config))[1], expected)
        except IndexError:
            pytest.skip("this transformers finds no token to feed, with a cache of its own too")
    cache = WHOLE[name](model)
    fed, ours = second_turn(cache)
    assert torch.equal(fed, conversation)
    assert torch.equal(ours, expected)
    assert cache.n_seen == conversation.shape[1] + N_NEW - 1


@CACHES
def test_embeddings_instead_of_tokens(name):
    model = tiny_llama(layers=2)
    embedded = model.get_input_embeddings()(prompt()).detach()
    made = {}
    for which, cache in (("ours", WHOLE[name](model)), ("stock", None)):
        made[which] = model.generate(
            inputs_embeds=embedded, past_key_values=cache, max_new_tokens=N_NEW, do_sample=False, pad_token_id=0
        )
    assert torch.equal(made["ours"], made["stock"])


@CACHES
def test_inference_mode_is_as_no_grad(name):
    model = tiny_llama(layers=2)
    for make in (WHOLE[name], SMALL[name]):
        with torch.inference_mode():
            inside = generate(model, make(model))
        assert torch.equal(inside, generate(model, make(model)))


@CACHES
def test_a_dictionary_holds_the_cache_and_stock_logits(name):
    model, cache = tiny_llama(layers=2), WHOLE[name](tiny_llama(layers=2))
    cache = WHOLE[name](model)
    options = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    options |= {"output_hidden_states": True, "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompt())
    ours, stock = (model.generate(prompt(), past_key_values=made, **options) for made in (cache, None))
    assert ours.past_key_values is cache
    assert torch.equal(ours.sequences, stock.sequences)
    assert all(equal_in_float32(*(x.numpy() for x in pair)) for pair in zip(ours.logits, stock.logits, strict=True))
    assert len(ours.hidden_states) == 5


def attentions(model, cache):
    options = {"return_dict_in_generate": True, "output_attentions": True, "max_new_tokens": 5, "do_sample": False}
    options |= {"attention_mask": torch.ones_like(prompt()), "pad_token_id": 0}
    return model.generate(prompt(), past_key_values=cache, **options).attentions


def test_attention_weights_of_eager_are_over_what_is_stored():
    model = tiny_llama(layers=2, attention="eager")
    whole, stock = attentions(model, WHOLE["clustered"](model)), attentions(model, None)
    for ours, expected in zip(whole, stock, strict=True):
        assert all(torch.equal(*pair) for pair in zip(ours, expected, strict=True))
    cache = SMALL["clustered"](model)
    weights = attentions(model, cache)[-1][0]  # (batch, heads, 1, entries)
    assert weights.shape == (2, 4, 1, cache.n_stored)
    assert equal_in_float32(weights.sum(-1).numpy(), np.ones((2, 4, 1), dtype=np.float32))


@CACHES
def test_without_eager_there_are_no_attention_weights_as_in_stock(name):
    model = tiny_llama(layers=2)
    assert attentions(model, None) == attentions(model, SMALL[name](model))
    assert not any(attentions(model, None))


@CACHES
def test_use_cache_false_is_refused(name):
    """Every step would feed all tokens again, after those that the cache holds: with a stock cache too it is wrong."""
    model = tiny_llama(layers=2)
    cache = SMALL[name](model)
    with pytest.raises(ValueError, match="use_cache must not be False with a "):
        generate(model, cache, use_cache=False)
    assert cache.n_seen == 0
    assert torch.equal(generate(model, None, use_cache=False), generate(model, None))
    assert not torch.equal(generate(model, DynamicCache(), use_cache=False), generate(model, None))


@CACHES
def test_a_cache_implementation_beside_our_cache_is_refused(name):
    model = tiny_llama(layers=2)
    cache = SMALL[name](model)
    for implementation in ("static", "dynamic", "offloaded"):
        with pytest.raises(ValueError, match="Passing both `cache_implementation`"):
            generate(model, cache, cache_implementation=implementation)
    assert cache.n_seen == 0


@CACHES
@pytest.mark.parametrize("mode", [{"num_beams": 4, "num_beam_groups": 2}, {"penalty_alpha": 0.6, "top_k": 4}])
def test_modes_that_transformers_gave_away_are_absent(mode, name):
    """Group beams and contrastive search live in repositories of their own, whose code generate would fetch."""
    model = tiny_llama(layers=2)
    for cache in (None, SMALL[name](model)):
        with pytest.raises(ValueError, match="requires `trust_remote_code=True` in your `generate` call"):
            generate(model, cache, **mode)


@CACHES
def test_an_end_of_text_and_a_time_limit_stop(name):
    model = tiny_llama(layers=2)
    stock = generate(model, None, prompt(1))
    seventh = int(stock[0, 6])
    n_new = stock[0].tolist().index(seventh) + 1
    cache = WHOLE[name](model)
    assert torch.equal(generate(model, cache, prompt(1), eos_token_id=seventh), stock[:, :n_new])
    assert cache.n_seen == N_PROMPT + n_new - 1
    limit = StoppingCriteriaList([MaxTimeCriteria(0)])
    assert generate(model, SMALL[name](model), stopping_criteria=limit).shape[1] == 1


@CACHES
def test_a_stopping_string_stops(name):
    model = tiny_llama(layers=2)
    characters = {chr(32 + i): i for i in range(95)} | {"<unk>": 95, "<end>": 96}
    tokenizer = Tokenizer(models.BPE(vocab=characters, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    stock = generate(model, None, prompt(1))
    stops = {"stop_strings": [tokenizer.decode(stock[0, 5:7])], "tokenizer": tokenizer}
    cache = WHOLE[name](model)
    assert torch.equal(generate(model, cache, prompt(1), **stops), stock[:, :7])
    assert cache.n_seen == N_PROMPT + 6


class Listening(BaseStreamer):
    def __init__(self):
        self.heard, self.has_ended = [], False

    def put(self, value):
        self.heard += value.flatten().tolist()

    def end(self):
        self.has_ended = True


@CACHES
def test_a_streamer_hears_every_token(name, tmp_path):
    model, tokens = tiny_llama(layers=2), prompt(1)
    streamer = Listening()
    new = generate(model, SMALL[name](model), tokens, streamer=streamer)
    assert streamer.heard == torch.cat([tokens, new], dim=1)[0].tolist()
    assert streamer.has_ended
    texts = TextIteratorStreamer(AutoTokenizer.from_pretrained(save_llama(tmp_path)), skip_prompt=True)
    generate(model, SMALL[name](model), tokens, streamer=texts)
    assert "".join(texts).split() == [f"w{token}" for token in new[0].tolist()]


@CACHES
def test_a_text_generation_pipeline(name, tmp_path):
    model, tokenizer = tiny_llama(layers=2), AutoTokenizer.from_pretrained(save_llama(tmp_path))
    text = " ".join(f"w{1 + token % 96}" for token in prompt(1)[0].tolist())
    made = []
    for make in (lambda _: None, WHOLE[name], SMALL[name]):
        cache = make(model)
        write = TextGenerationPipeline(model=model, tokenizer=tokenizer)
        made += write(text, past_key_values=cache, max_new_tokens=N_NEW, do_sample=False)
    assert made[0] == made[1] != made[2]
    assert cache.n_seen == N_PROMPT + N_NEW - 1


@CACHES
def test_weights_that_accelerate_fetches_layer_by_layer(name):
    accelerate = pytest.importorskip("accelerate", reason="weights are offloaded by accelerate")
    model, plain = tiny_llama(layers=2), tiny_llama(layers=2)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    for make in (WHOLE[name], SMALL[name]):
        assert torch.equal(generate(model, make(model)), generate(plain, make(plain)))


@pytest.mark.parametrize("name", ["clustered", slowly("recall")])
def test_continuous_batching_manages_its_own_memory(name):
    """It takes no cache: one that is passed is left as it is, and one that lives meanwhile does not disturb it."""
    if not hasattr(getattr(transformers, "ContinuousBatchingConfig", None), "page_size"):
        pytest.skip("this transformers gives continuous batching all the memory there is")
    model = tiny_llama(layers=2)
    cache = SMALL[name](model)
    config = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=-1)
    memory = transformers.ContinuousBatchingConfig(page_size=16, num_blocks=32, max_batch_tokens=256)
    made = model.generate_batch(
        prompt().tolist(), generation_config=config, continuous_batching_config=memory, past_key_values=cache
    )
    ours = [made[request].generated_tokens for request in sorted(made)]
    assert ours == generate(model, None, max_new_tokens=5).tolist()
    assert cache.n_seen == 0
