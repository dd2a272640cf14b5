"""What a step does with each of its requests: the rule, evaluated."""

from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Int, Int64
from torch import Tensor

from .rule import PageRule

__all__ = ["Due", "StepPlan", "plan_step"]


@dataclass
class Due:
    """Chunks that are clustered after a step's attention, as lists of rows.

    Attributes
    ----------
    blocks : of each chunk the blocks that hold its tokens.
    to : of each chunk the blocks that will hold its entries.
    """

    blocks: list[Int[np.ndarray, " pages"]] = field(default_factory=list)
    to: list[Int[np.ndarray, " entry_pages"]] = field(default_factory=list)

    def add(self, blocks: np.ndarray, to: np.ndarray) -> None:
        self.blocks.append(blocks)
        self.to.append(to)

    def tensors(self) -> tuple[Int64[Tensor, "chunks pages"], Int64[Tensor, "chunks entry_pages"]] | None:
        """Both as tensors; None if there are no chunks."""
        if not self.blocks:
            return None
        blocks, to = (torch.from_numpy(np.array(side, dtype=np.int64)) for side in (self.blocks, self.to))
        return blocks, to


@dataclass
class StepPlan:
    """The requests of a step, told apart by what they attend to.

    Attributes
    ----------
    paged : rows of the batch without clusters, whose tokens lie in vLLM's pages.
    own : rows whose whole prompt comes in this step and is then clustered. The scheduler gave no blocks for its holes:
        its tokens lie in pages of the worker's own.
    own_table : blocks of every row in these pages; only the rows of `own` mean something. `n_own` are used.
    clustered : rows with clusters.
    requests : of each row of `clustered` the five numbers that `attend_pages` asks for.
    tables : of each row of `clustered` the blocks that hold its entries.
    due, due_of_own : chunks that lie in vLLM's pages, and in the worker's own.
    """

    own_table: Int[np.ndarray, "requests pages"]
    n_own: int = 0
    paged: list[int] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    clustered: list[int] = field(default_factory=list)
    requests: list[tuple[int, int, int, int, int]] = field(default_factory=list)
    tables: list[np.ndarray] = field(default_factory=list)
    due: Due = field(default_factory=Due)
    due_of_own: Due = field(default_factory=Due)


def plan_step(
    rule: PageRule,
    starts: Int[np.ndarray, " requests_and_one"],
    lengths: Int[np.ndarray, " requests"],
    prompts: Int[np.ndarray, " requests"],
    table: Int[np.ndarray, "requests pages"],
) -> StepPlan:
    """The plan of a step.

    Parameters
    ----------
    starts : where the tokens of each request begin in the batch; one more for the end.
    lengths, prompts : tokens of each request with this step, and of its prompt.
    table : blocks of each request.

    Examples
    --------
    A prompt of 330 tokens at once, and a request that generates its 331st token.

    >>> rule = PageRule(page=32, keep_ratio=0.25, chunk_size=128, n_sink=32, n_recent=40)
    >>> table = np.arange(22).reshape(2, 11)
    >>> plan = plan_step(rule, np.array([0, 330, 331]), np.array([330, 331]), np.array([330, 330]), table)
    >>> plan.own, plan.clustered, plan.requests  # of 331 tokens 139 entries, two pages of them with counts
    ([0], [1], [(330, 1, 139, 1, 3)])
    >>> plan.due_of_own.to  # pages 1 and 5 of the first request
    [array([1]), array([5])]
    """
    plan, n_to = StepPlan(np.zeros_like(table)), rule.entries // rule.page
    for row, (n_tokens, n_prompt) in enumerate(zip(lengths.tolist(), prompts.tolist(), strict=True)):
        n_new = int(starts[row + 1] - starts[row])
        before, after = rule.n_chunks(n_tokens - n_new, n_prompt), rule.n_chunks(n_tokens, n_prompt)
        blocks, due = table[row], plan.due
        if before:
            counted = rule.n_sink // rule.page
            n_stored = rule.n_stored(n_tokens, before)
            plan.clustered.append(row)
            plan.requests.append((int(starts[row]), n_new, n_stored, counted, counted + before * n_to))
            plan.tables.append(blocks[rule.kept_pages(n_tokens, before)])
        elif after and n_new == n_tokens:
            n_pages = -(-n_tokens // rule.page)
            plan.own.append(row)
            plan.own_table[row, :n_pages] = np.arange(plan.n_own, plan.n_own + n_pages)
            plan.n_own += n_pages
            blocks, due = plan.own_table[row], plan.due_of_own
        else:
            plan.paged.append(row)
        for chunk in range(before, after):
            places = list(rule.pages_of(chunk))
            due.add(blocks[places], table[row][places[:n_to]])
    return plan
