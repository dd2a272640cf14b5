"""The contexts, needles and texts of the quality page, the same for our methods and for the presses of kvpress."""

import argparse
from typing import Any

from kvcluster.evaluation.quality import Case, needle_cases
from kvcluster.evaluation.texts import built_in_text, encode

__all__ = ["add_case_arguments", "cases_of"]


def add_case_arguments(parser: argparse.ArgumentParser) -> None:
    """Shares that are kept, sizes, and threads of torch."""
    parser.add_argument("--keep", nargs="+", type=float, default=[0.5, 0.25, 0.2], metavar="SHARE")
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--needles", type=int, default=12, help="in each context")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--following", type=int, default=512)
    parser.add_argument("--part", default="reporting", help="half of the text, and its needles")
    parser.add_argument("--threads", type=int, default=1, help="of torch")


def cases_of(arguments: argparse.Namespace, tokenizer: Any) -> list[Case]:
    """The cases that the arguments ask for."""
    return needle_cases(
        tokenizer,
        encode(tokenizer, built_in_text()),
        arguments.part,
        lengths=[arguments.tokens],
        n_contexts=arguments.contexts,
        n_needles=arguments.needles,
        n_following=arguments.following,
    )
