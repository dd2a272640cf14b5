"""Every family of models that the caches for transformers take, tiny and random."""

import torch
import transformers

WINDOW = 24
ROPE = {"rope_theta": 10_000.0, "factor": 4.0}
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
SLIDING = {"use_sliding_window": True, "sliding_window": WINDOW}
MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
GEMMA = {"query_pre_attn_scalar": 64, "layer_types": MIXED, "sliding_window": WINDOW}
SIZES = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "max_position_embeddings": 1024, "head_dim": 16}
HEADS = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}
NO_IDS = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
# name: (model type, fields of its config, indices of the layers that slide)
MODELS = {
    "llama": ("llama", {}, []),
    "llama-llama3": ("llama", {"rope_parameters": {"rope_type": "llama3", **ROPE, **LLAMA3}}, []),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", **ROPE}}, []),
    "mistral": ("mistral", {"sliding_window": None}, []),
    "mistral-sliding": ("mistral", {"sliding_window": WINDOW}, [0, 1, 2, 3]),
    "qwen2": ("qwen2", {}, []),
    "qwen2-sliding": ("qwen2", {**SLIDING, "max_window_layers": 2}, [2, 3]),
    "qwen3": ("qwen3", {"head_dim": 32}, []),
    "qwen3-sliding": ("qwen3", {**SLIDING, "layer_types": MIXED}, [0, 2]),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}, []),
    "smollm3-sliding": ("smollm3", {**SLIDING, "no_rope_layers": [0, 1, 1, 0]}, [0, 3]),
    "gemma3_text": ("gemma3_text", GEMMA, [0, 2]),
}


def tiny(name, *, attention="sdpa"):
    """A random model of 4 layers with biases and norms that matter, and the indices of its sliding layers."""
    model_type, fields, sliding = MODELS[name]
    torch.manual_seed(0)
    fields = {**SIZES, **HEADS, **NO_IDS, **fields, "attn_implementation": attention}
    config = transformers.AutoConfig.for_model(model_type, **fields)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data = 0.1 * torch.randn_like(parameter) + (parameter.ndim == 1) * parameter.data
    return model, sliding
