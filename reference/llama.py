"""A whole Llama in NumPy that generates from a full or from a clustered cache.

One sequence, no batch, float64 inside; keys and values are rounded to float32 when they enter the cache.
Shapes: `tokens` new positions, `hidden` features, `heads` query heads in `kv_heads` groups of `group`.

The architecture is that of Llama 2 and 3, which SmolLM2 shares; the order of operations and the names of the weights
are those of Hugging Face transformers, so a checkpoint loads as it is.
Left out: batches, sampling, biases, attention other than causal.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, Float64

from .arguments import check_integer
from .cache import ClusteredCache
from .clustered_attention import clustered_attention
from .rotary import rope_frequencies, rotate
from .whole_changes import whole_or_not

__all__ = ["FullCache", "Llama", "LlamaConfig"]


@dataclass(frozen=True)
class LlamaConfig:
    """The numbers that shape a Llama, under the names of transformers' `config.json`."""

    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None = None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """From the content of a `config.json`, old (`rope_theta`, `rope_scaling`) or new (`rope_parameters`).

        Raises
        ------
        ValueError : another model type; biases; an activation other than SiLU; an unknown rope variant.
        """
        for name, rule in (
            ("model_type", "llama"),
            ("hidden_act", "silu"),
            ("attention_bias", False),
            ("mlp_bias", False),
            ("partial_rotary_factor", 1.0),
        ):
            if config.get(name, rule) != rule:
                raise ValueError(f"{name} must be {rule!r}, got {config[name]!r}")
        heads = config["num_attention_heads"]
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        parsed = cls(
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=rope.get("rope_theta") or config.get("rope_theta") or 10_000.0,
            rope_scaling=rope,
        )
        parsed.rope_frequencies()  # raises for an unknown variant
        return parsed

    def rope_frequencies(self) -> Float32[np.ndarray, " half_dim"]:
        """Radians per position of each pair of features of a head."""
        return rope_frequencies(self.head_dim, theta=self.rope_theta, scaling=self.rope_scaling)


class FullCache:
    """The cache that forgets nothing: every token is an entry of count 1."""

    def __init__(self) -> None:
        self.keys: np.ndarray | None = None  # (kv_heads, tokens, dim)
        self.values: np.ndarray | None = None
        self.n_seen = 0

    @whole_or_not
    def append(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Take the next tokens, (kv_heads, tokens, dim); return keys, values and counts of all."""
        if self.keys is not None:
            keys, values = np.concatenate([self.keys, keys], axis=-2), np.concatenate([self.values, values], axis=-2)
        self.keys, self.values = keys, values
        self.n_seen = keys.shape[-2]
        return keys, values, np.ones(keys.shape[:-1], dtype=np.int32)


class Llama:
    """A Llama made of a dict of weights.

    Parameters
    ----------
    weights : arrays by their name in transformers' safetensors (`model.layers.0.self_attn.q_proj.weight`, ...),
        float16 or float32. Without `lm_head.weight` the embeddings serve as output layer too (tied).
    config : LlamaConfig, or the content of a `config.json`.

    Raises
    ------
    ValueError : a weight that is missing or unknown, or an unsupported config.
    """

    def __init__(self, weights: Mapping[str, np.ndarray], config: LlamaConfig | Mapping[str, Any]) -> None:
        self.config = config if isinstance(config, LlamaConfig) else LlamaConfig.from_dict(config)
        self.weights = weights
        self.frequencies = self.config.rope_frequencies()
        expected = {"model.embed_tokens.weight", "model.norm.weight"} | {
            f"model.layers.{layer}.{name}.weight"
            for layer in range(self.config.num_hidden_layers)
            for name in LAYER_WEIGHTS
        }
        missing, unknown = expected - set(weights), set(weights) - expected - {"lm_head.weight"}
        unknown = {name for name in unknown if not name.endswith("rotary_emb.inv_freq")}  # old files carry them
        if missing or unknown:
            raise ValueError(
                f"weights must be those of a Llama, got missing {sorted(missing)}, unknown {sorted(unknown)}"
            )

    def full_caches(self) -> list[FullCache]:
        """An empty `FullCache` for each layer."""
        return [FullCache() for _ in range(self.config.num_hidden_layers)]

    def forward(
        self, tokens: Sequence[int], caches: Sequence[FullCache | ClusteredCache]
    ) -> Float64[np.ndarray, "tokens vocabulary"]:
        """Logits after each of `tokens`, the next positions of the sequence in `caches` (one per layer; they grow).

        The new tokens attend to the entries that the cache holds and, causally, to each other as they are; only then
        are they clustered. So a prompt given at once is attended to exactly, whatever the cache does later.

        Raises
        ------
        ValueError : no tokens, a token that is not in the vocabulary, a number of caches other than that of layers,
            caches that have seen different tokens, as after a call that failed halfway.
        """
        check_integer("number of tokens", len(tokens), least=1)
        vocabulary = len(self.weights["model.embed_tokens.weight"])
        if not 0 <= min(tokens) <= max(tokens) < vocabulary:
            raise ValueError(f"tokens must be from 0 to {vocabulary - 1}, got {min(tokens)} to {max(tokens)}")
        if len(caches) != self.config.num_hidden_layers:
            raise ValueError(f"caches must be one a layer, {self.config.num_hidden_layers}, got {len(caches)}")
        n_seen = sorted({cache.n_seen for cache in caches})
        if len(n_seen) > 1:
            raise ValueError(f"caches must have seen the same tokens, got {n_seen}: an earlier call failed halfway")
        positions = caches[0].n_seen + np.arange(len(tokens))
        hidden = self.weights["model.embed_tokens.weight"][np.asarray(tokens)].astype(np.float64)  # (tokens, hidden)
        for layer, cache in enumerate(caches):
            hidden = hidden + self._attention(layer, self._norm(layer, "input_layernorm", hidden), positions, cache)
            hidden = hidden + self._mlp(layer, self._norm(layer, "post_attention_layernorm", hidden))
        hidden = rms_norm(hidden, self.weights["model.norm.weight"], self.config.rms_norm_eps)
        output = self.weights.get("lm_head.weight", self.weights["model.embed_tokens.weight"])
        return hidden @ output.T.astype(np.float64)  # (tokens, vocabulary)

    def generate(self, tokens: Sequence[int], n_new: int, caches: Sequence[FullCache | ClusteredCache]) -> list[int]:
        """`n_new` tokens after `tokens`, always the most likely one (of ties the smallest id)."""
        check_integer("n_new", n_new, least=0)
        new: list[int] = []
        while len(new) < n_new:
            logits = self.forward(tokens if not new else new[-1:], caches)
            new.append(int(logits[-1].argmax()))
        return new

    def _linear(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        return x @ self.weights[f"model.layers.{layer}.{name}.weight"].T.astype(np.float64)

    def _norm(self, layer: int, name: str, x: np.ndarray) -> np.ndarray:
        return rms_norm(x, self.weights[f"model.layers.{layer}.{name}.weight"], self.config.rms_norm_eps)

    def _mlp(self, layer: int, x: np.ndarray) -> np.ndarray:
        """SwiGLU: `down(silu(gate(x)) * up(x))`."""
        gate = self._linear(layer, "mlp.gate_proj", x)
        return self._linear(layer, "mlp.down_proj", silu(gate) * self._linear(layer, "mlp.up_proj", x))

    def _attention(
        self, layer: int, x: np.ndarray, positions: np.ndarray, cache: FullCache | ClusteredCache
    ) -> np.ndarray:
        """Causal attention of the new tokens `x` (tokens, hidden) to `cache` and to each other."""
        kv_heads = self.config.num_key_value_heads
        query, keys, values = (
            split_heads(self._linear(layer, f"self_attn.{name}_proj", x), self.config.head_dim) for name in "qkv"
        )  # (heads, tokens, dim), (kv_heads, tokens, dim) twice
        query = rotate(query, positions, self.frequencies).astype(np.float32)
        keys = rotate(keys, positions, self.frequencies).astype(np.float32)
        query = query.reshape(kv_heads, -1, *query.shape[1:])  # (kv_heads, group, tokens, dim)
        all_keys, all_values, counts = cache.append(keys, values.astype(np.float32))  # (kv_heads, entries, dim)
        outputs = []
        for token in range(len(x)):
            visible = all_keys.shape[1] - len(x) + token + 1  # what the cache held, the new tokens up to this one
            output = clustered_attention(
                query[:, :, token], all_keys[:, :visible], all_values[:, :visible], counts[:, :visible]
            )  # (kv_heads, group, dim)
            outputs.append(output.reshape(-1))
        return self._linear(layer, "self_attn.o_proj", np.stack(outputs))  # (tokens, hidden)


LAYER_WEIGHTS = (
    *("input_layernorm", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
)


def rms_norm(
    x: Float[np.ndarray, "tokens hidden"], weight: np.ndarray, eps: float
) -> Float64[np.ndarray, "tokens hidden"]:
    """Each row divided by its root mean square, times `weight`."""
    return weight * x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def silu(x: np.ndarray) -> np.ndarray:
    """`x * sigmoid(x)`; written with tanh, which does not overflow."""
    return x * (1 + np.tanh(x / 2)) / 2


def split_heads(x: Float[np.ndarray, "tokens features"], head_dim: int) -> Float[np.ndarray, "heads tokens dim"]:
    """Features of each head apart."""
    return x.reshape(len(x), -1, head_dim).transpose(1, 0, 2)
