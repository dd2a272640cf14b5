"""Tiny models of transformers, random but lively enough that clustering matters."""

import json

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def tiny_llama(*, seed=0, heads=4, kv_heads=2, head_dim=16, layers=3, tied=False, attention="sdpa", **config):
    """A random Llama; all matrices with a standard deviation of 0.1, so that logits are far from equal."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=heads * 16,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=1024,
        tie_word_embeddings=tied,
        attn_implementation=attention,
        bos_token_id=None,
        eos_token_id=None,
        **config,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def tiny_gemma(*, seed=0, window=48):
    """A random Gemma 3: layers 0 and 2 slide over `window` tokens, layers 1 and 3 attend to all."""
    torch.manual_seed(seed)
    config = Gemma3TextConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        query_pre_attn_scalar=16,
        max_position_embeddings=4096,
        sliding_window=window,
        tie_word_embeddings=False,
        layer_types=["sliding_attention", "full_attention"] * 2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = Gemma3ForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def random_tokens(n_tokens, *, batch=1, seed=0):
    return torch.randint(0, 97, (batch, n_tokens), generator=torch.Generator().manual_seed(seed))


def greedy(model, tokens, n_new=24, **kwargs):
    """The new tokens, (batch, n_new), of transformers' own generate."""
    made = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=n_new, do_sample=False, pad_token_id=0, **kwargs
    )
    return made[:, tokens.shape[1] :]


def save_llama(folder, *, model_type="llama"):
    """A folder in transformers' format with a tiny Llama and a tokenizer of single words."""
    model = tiny_llama()
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, 97)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    if model_type != "llama":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": model_type}))
    return folder
