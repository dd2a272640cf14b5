"""What a context loses in a cache: nats of the text that follows and of answers, over those of the full cache."""

import math
import time
from collections.abc import Callable
from typing import Any

from kvcluster.fast.huggingface.fingerprints import weights_digest

from ..quality.cases import Case
from ..quality.needles import needle_cases
from ..quality.reading import Context
from ..quality.scoring import fill, following_nll, score_needles
from ..runs import Runs
from ..texts import encode
from .shares import N_RECENT, N_SINK

__all__ = ["Losses", "loss_cases", "loss_of"]

N_NEEDLES, TOKENS_A_NEEDLE = 12, 300
N_FOLLOWING = 256  # tokens


def loss_cases(tokenizer: Any, text: str, *, n_contexts: int, n_tokens: int) -> list[Case]:
    """Contexts of the tuning half of `text`, with hidden sentences."""
    n_needles = max(1, min(N_NEEDLES, n_tokens // TOKENS_A_NEEDLE))
    sizes: dict[str, Any] = {"n_contexts": n_contexts, "n_needles": n_needles, "n_following": N_FOLLOWING}
    return needle_cases(tokenizer, encode(tokenizer, text), "tuning", lengths=[n_tokens], **sizes)


class Losses:
    """The losses of one case; what `runs` has is not measured again.

    `on_loss` is called after each; `seconds` are what each took when it was measured.
    """

    def __init__(self, model: Any, case: Case, runs: Runs, on_loss: Callable[[], object]) -> None:
        self.model, self.case, self.runs, self.on_loss = model, case, runs, on_loss
        self.context = Context(model, case.tokens)
        self.seconds: list[float] = []
        self.rule = {"n_sink": N_SINK, "n_recent": N_RECENT, "model": weights_digest(model)}
        self.full = self.nats({"head": None, "part": 1.0}, lambda: None)

    def over_full(self, own: dict[str, Any], make: Callable[[], Any]) -> float:
        """The nats in the cache of `make()`, empty, which `own` tells from others, over those of the full cache."""
        loss = round(self.nats(own, make) - self.full, 6)
        self.on_loss()
        return loss

    def nats(self, own: dict[str, Any], make: Callable[[], Any]) -> float:
        """As `loss_of`."""
        key = self.rule | {"case": self.case.fingerprint} | own
        run = self.runs.found(key)
        if run is None:
            begun = time.perf_counter()
            found = {"key": key, "loss": round(loss_of(self.model, self.context, self.case, make()), 6)}
            run = self.runs.add(found | {"seconds": round(time.perf_counter() - begun, 1)})
        self.seconds.append(run["seconds"])
        return float(run["loss"])


def loss_of(model: Any, context: Context, case: Case, cache: Any | None) -> float:
    """Nats a token of what follows, plus nats a token of the answers, after `case` in `cache`; None: a full one."""
    cache = context.full if cache is None else fill(cache, context.full)
    answers = score_needles(model, cache, case.needles, nbytes=sum(nbytes_of(layer) for layer in context.full.layers))
    nats = [nll for answer in answers for nll in answer.nll]
    following = following_nll(model, cache, case.following)
    return math.fsum(following) / len(following) + math.fsum(nats) / len(nats)


def nbytes_of(layer: Any) -> int:
    return int(layer.keys.nbytes + layer.values.nbytes)
