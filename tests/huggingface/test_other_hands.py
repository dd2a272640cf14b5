"""Models in other people's hands: wrapped, patched, differentiated, adapted, shared by threads."""

import contextlib
import functools
import threading

import pytest
import torch
from models import greedy, random_tokens, tiny_llama
from peft import LoraConfig, get_peft_model
from transformers.models.llama.modeling_llama import LlamaAttention

from kvcluster.fast.huggingface import ClusteredCache, RecallCache, hooks
from kvcluster.fast.huggingface.hooks import ModelHooks, decoder_of

SIZES = {"chunk_size": 16, "n_sink": 3, "n_recent": 40}
MAKERS = {
    "clustered": lambda model: ClusteredCache.for_model(model, keep_ratio=0.4, **SIZES),
    "all tokens": lambda model: ClusteredCache.for_model(model, keep_ratio=1),
    "recall": lambda model: RecallCache.for_model(model, budget=60, n_sink=3, segment_size=20),
}


def adapted(*names):
    """A model that PEFT has wrapped, with random adapters."""
    torch.manual_seed(3)
    lora = LoraConfig(target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    model = get_peft_model(tiny_llama(), lora, adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora)
    return model


def read(model, cache, tokens):
    with torch.no_grad():
        return model(tokens, past_key_values=cache).logits


@pytest.mark.parametrize("kind", ["all tokens", "clustered"])
def test_a_model_that_peft_has_wrapped_has_its_padding_left_out(kind):
    model, tokens = adapted("one"), random_tokens(60, batch=2)
    mask = torch.ones_like(tokens)
    mask[1, :7] = 0
    cache = MAKERS[kind](model)
    given = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    ours = model.generate(input_ids=tokens, past_key_values=cache, **given)
    assert cache.padding == [0, 7]
    if kind == "all tokens":
        assert torch.equal(ours, model.generate(input_ids=tokens, **given))


def test_the_hooks_are_on_what_runs_whatever_wraps_it():
    model = tiny_llama()
    assert decoder_of(model) is decoder_of(model.model) is model.model
    assert decoder_of(torch.compile(model)) is model.model
    assert decoder_of(torch.nn.ModuleDict({"inside": model})) is model.model
    peft = adapted("one")
    assert decoder_of(peft) is peft.base_model.model.model


@pytest.mark.parametrize("kind", MAKERS)
def test_attention_that_has_been_replaced_is_an_error(kind):
    """As by a library that patches `forward`, and asks neither our attention nor, in the second case, our cache."""

    def attends_to_new_tokens(asks_cache, self, hidden_states, past_key_values=None, **kwargs):
        shape = *hidden_states.shape[:-1], -1, self.head_dim
        query, key, value = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if asks_cache:
            past_key_values.update(key, value, self.layer_idx)
        key, value = (x.repeat_interleave(self.num_key_value_groups, 1) for x in (key, value))
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o_proj(output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)), None

    for asks_cache in (True, False):
        model, tokens = tiny_llama(), random_tokens(90)
        cache = MAKERS[kind](model)
        read(model, cache, tokens)
        patched = model.model.layers[1].self_attn
        patched.forward = functools.partial(attends_to_new_tokens, asks_cache, patched)
        with pytest.raises(RuntimeError, match="attention of layer 1 must be transformers' own"):
            read(model, cache, tokens[:, :3])
        with pytest.raises(RuntimeError, match="call failed halfway; call reset"):
            read(model, cache, tokens[:, :3])
        del patched.forward
        cache.reset()
        assert read(model, cache, tokens).shape == (1, 90, 97)


@pytest.mark.parametrize("kind", MAKERS)
def test_a_backward_pass_through_earlier_calls_is_refused(kind):
    model, tokens = tiny_llama(), random_tokens(90)
    model(tokens).logits.sum().backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    cache = MAKERS[kind](model)
    model(tokens, past_key_values=cache).logits.sum().backward()  # of one call alone it is right
    assert all(map(torch.equal, expected, [parameter.grad for parameter in model.parameters()]))
    logits = model(tokens[:, :3], past_key_values=cache).logits
    with pytest.raises(RuntimeError, match="no gradient flows through what a cache of kvcluster has seen"):
        logits.sum().backward()
    read(model, cache, tokens[:, :1])


def test_a_prompt_that_is_cached_already_is_not_read_behind_itself():
    model, tokens = tiny_llama(), random_tokens(60)
    cache, fresh = MAKERS["clustered"](model), MAKERS["clustered"](model)
    read(model, cache, tokens)
    with pytest.raises(ValueError, match=r"input_ids must be new tokens, .* got just those .* crop\(-1\) the cache"):
        greedy(model, tokens, past_key_values=cache)
    cache.crop(-1)
    assert torch.equal(greedy(model, tokens, past_key_values=cache), greedy(model, tokens, past_key_values=fresh))
    read(model, cache, tokens)  # later the same tokens may come again


@pytest.mark.parametrize("n_columns", [1, 5, 64, 66])
def test_a_mask_of_other_tokens_is_refused(n_columns):
    model, tokens = tiny_llama(), random_tokens(60)
    cache = MAKERS["clustered"](model)
    read(model, cache, tokens)
    rule = "attention_mask with a ClusteredCache must have a column for each of 60 tokens seen and 5 new ones"
    with pytest.raises(ValueError, match=f"{rule}, got {n_columns}"):
        model(tokens[:, :5], past_key_values=cache, attention_mask=torch.ones(1, n_columns))
    with torch.no_grad():
        model(tokens[:, :5], past_key_values=cache, attention_mask=torch.ones(1, 65))


def test_a_file_of_other_adapters_is_refused(tmp_path):
    model, path = adapted("one", "two"), tmp_path / "cache"
    cache = MAKERS["clustered"](model)
    read(model, cache, random_tokens(60))
    cache.save(path)
    assert ClusteredCache.load(path, model).n_seen == 60
    model.set_adapter("two")
    with pytest.raises(ValueError, match=r"adapters of the model that path was saved with .*'two'.* got .*'one'"):
        ClusteredCache.load(path, model)
    model.set_adapter("one")
    with model.disable_adapter(), pytest.raises(ValueError, match="adapters of the model"):
        ClusteredCache.load(path, model)
    model.base_model.model.model.layers[1].mlp.up_proj.weight.data[0, 0] += 1
    with pytest.raises(ValueError, match="layers of the model that path was saved with"):
        ClusteredCache.load(path, model)


def test_threads_may_make_and_drop_caches_of_one_model():
    model, tokens = tiny_llama(), random_tokens(70)
    expected, failed, is_over = greedy(model, tokens, n_new=4), [], threading.Event()

    def make_and_drop():
        while not is_over.is_set():
            MAKERS["clustered"](model)

    def use():
        try:
            for _ in range(40):
                cache = MAKERS["all tokens"](model)
                assert torch.equal(greedy(model, tokens, n_new=4, past_key_values=cache), expected)
        except BaseException as error:
            failed.append(error)

    makers, users = [threading.Thread(target=make_and_drop) for _ in range(2)], [threading.Thread(target=use)]
    for thread in (*makers, *users):
        thread.start()
    users[0].join()
    is_over.set()
    for thread in makers:
        thread.join()
    assert not failed, failed
    assert ModelHooks.known(model.model) is None
    assert {type(module).__name__ for module in model.modules() if module._forward_hooks} == set()
    attention = [module for module in model.modules() if isinstance(module, LlamaAttention)]
    assert {module.config._attn_implementation for module in attention} == {"sdpa"}


@pytest.mark.parametrize(("lock", "n_made"), [(threading.RLock(), 1), (contextlib.nullcontext(), 2)])
def test_the_lock_lets_two_threads_make_the_hooks_of_a_model_once(lock, n_made, monkeypatch):
    """The wrong twin has no lock: both threads are seen within the making of hooks, and each has its own."""
    model, made, both = tiny_llama(), [], threading.Barrier(2)
    right = ModelHooks.__init__

    def init(made_hooks, base):
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=5 if n_made == 2 else 0.5)
        right(made_hooks, base)

    monkeypatch.setattr(hooks, "LOCK", lock)
    monkeypatch.setattr(ModelHooks, "__init__", init)
    threads = [threading.Thread(target=lambda: made.append(ModelHooks.of(model))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({id(each) for each in made}) == n_made
