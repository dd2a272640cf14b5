"""Question and answer, token by token, after a context that was read before: how well a method answers.

The model's own layers, with attention by a method of `methods.py`. The answer is teacher-forced: each token is
predicted after the true ones before it. All questions of a context run as one batch.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.recall.methods import Exact, Full
from benchmarks.recall.needles import Context
from kvcluster.evaluation.quality.llama import Attend, forward, logits_of
from kvcluster.evaluation.quality.scoring import judged

__all__ = ["Attention", "Score", "score"]

N_TOP = 64  # true top tokens of which the recall rate is the share
N_LEFT_OUT = 2  # first layers, not measured: some settings attend to all tokens there


@dataclass
class Attention:
    """Means over all measurements so far.

    Attributes
    ----------
    recall_rate : share of the 64 tokens of the largest true weights, summed over the group, that are attended to.
    mass : share of the true weights that falls on what is attended to.
    error : length of the output's difference to that of full attention, over the length of the latter.
    entries : entries attended to.
    """

    sums: dict[str, float] = field(default_factory=dict)
    n: int = 0

    def add(self, exact: Exact, query: Tensor, output: Tensor, attended: Tensor) -> None:
        weights = exact.weights(query)  # (batch, kv_heads, group, tokens)
        true = exact.output(weights)
        shared = weights.mean(dim=-2)
        top = shared.topk(min(N_TOP, shared.shape[-1]), dim=-1).indices
        measured = {
            "recall_rate": attended.gather(-1, top).float().mean(),
            "mass": (shared * attended).sum(dim=-1).mean(),
            "error": ((output - true).norm(dim=-1) / true.norm(dim=-1)).mean(),
            "entries": attended.sum(dim=-1).float().mean(),
        }
        self.sums = {name: self.sums.get(name, 0.0) + float(value) for name, value in measured.items()}
        self.n += 1

    def means(self) -> dict[str, float]:
        return {name: value / self.n for name, value in self.sums.items()}


@dataclass(frozen=True)
class Score:
    """`is_right` and `nll`, nats, of each token of each answer; `attention` measured while the answers were made."""

    is_right: list[list[bool]]
    nll: list[list[float]]
    attention: dict[str, float]


@torch.inference_mode()
def score(
    model: Any,
    context: Context,
    read: list[tuple[Tensor, Tensor]],
    make: Callable[[Exact, int], Full],
) -> Score:
    """Score of the methods that `make` gives for the keys and values of each layer and the layer's number."""
    batch = len(context.questions)
    exacts = [Exact(keys, values, batch) for keys, values in read]
    methods = [make(exact, number) for number, exact in enumerate(exacts)]
    attention = Attention()
    rows = [question + answer for question, answer in zip(context.questions, context.answers, strict=True)]
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    n_answer = len(context.answers[0])
    first = torch.tensor([len(question) - 1 for question in context.questions])  # where answers begin to be predicted
    hidden = []
    for place in range(longest - 1):
        is_measured = bool(((first <= place) & (place < first + n_answer)).any())
        attend = attention_by(exacts, methods, attention if is_measured else None)
        position = torch.tensor([[exacts[0].n_context + place]])
        hidden.append(forward(model, tokens[:, place : place + 1], position, attend))
    predicting = first[:, None] + torch.arange(n_answer)  # (batch, n_answer)
    chosen = torch.cat(hidden, dim=1).gather(1, predicting.unsqueeze(-1).expand(-1, -1, hidden[0].shape[-1]))
    answers = torch.tensor(context.answers)
    is_right, nll = judged(logits_of(model, chosen).flatten(0, 1), answers.flatten())
    return Score(is_right.view_as(answers).tolist(), nll.view_as(answers).tolist(), attention.means())


def attention_by(exacts: list[Exact], methods: list[Full], attention: Attention | None) -> Attend:
    """Attention by the method of each layer, for one new token a row."""

    def attend(number: int, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        exact, method = exacts[number], methods[number]
        grouped = query.squeeze(-2).unflatten(1, (keys.shape[1], -1))  # (batch, kv_heads, group, dim)
        exact.append(keys, values)
        method.append(keys, values)
        output = method.attend(grouped)
        if attention is not None and number >= N_LEFT_OUT:
            attention.add(exact, grouped, output, method.attended(grouped))
        return output.flatten(1, 2).unsqueeze(-2)  # (batch, heads, 1, dim)

    return attend
