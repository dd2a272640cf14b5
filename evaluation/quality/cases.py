"""A case of an evaluation: a context, and what is asked about it."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property

__all__ = ["Case", "Needle", "Prompt"]


@dataclass(frozen=True)
class Needle:
    """A sentence hidden in the context; `question` repeats it up to its `answer`.

    Attributes
    ----------
    question, answer : tokens; the answer is what follows the question.
    kind : "digits" or "words", what the answer is made of.
    depth : where the sentence begins / tokens of the context, in [0, 1).
    """

    question: list[int]
    answer: list[int]
    kind: str
    depth: float


@dataclass(frozen=True)
class Prompt:
    """A question that is answered by generation.

    Attributes
    ----------
    question : tokens; they stand behind the context.
    answers : the right ones; the metric decides what that means.
    metric : a name of `METRICS`.
    n_new : the most tokens to generate.
    classes : the possible answers, for metrics that ask for a class.
    """

    question: list[int]
    answers: list[str]
    metric: str
    n_new: int
    classes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Case:
    """One context and everything that is asked about it, each question alone.

    Attributes
    ----------
    task : what results are summarized by, such as "needles" or "ruler-single".
    number : tells cases of one task and length apart.
    tokens : the context; unless questions come first, all that a cache sees before it is asked.
    following : tokens of the text after the context, for perplexity: all but the first are predicted.
    """

    task: str
    number: int
    tokens: list[int]
    following: list[int] = field(default_factory=list)
    needles: list[Needle] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.task}, {len(self.tokens):,} tokens, {self.number}"

    @property
    def asked(self) -> list[Needle | Prompt]:
        """Everything that has a question."""
        return [*self.needles, *self.prompts]

    @cached_property
    def fingerprint(self) -> str:
        """A digest of all tokens and answers; cases with equal digests have equal results."""
        return hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()[:16]
