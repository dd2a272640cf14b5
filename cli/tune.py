"""`kvcluster tune`: the profile of a model, which says how many entries each of its KV heads should get."""

from pathlib import Path
from typing import Annotated

import typer

from .lists import items, number
from .refusing import check_places, fail

__all__ = ["tune"]


def tune(
    model: Annotated[
        str, typer.Argument(help="Folder of a local model in transformers' format, smollm2 or gemma3-270m.")
    ],
    text: Annotated[
        Path | None, typer.Option(help="Text file, UTF-8. [default: the Python language reference, from pydoc]")
    ] = None,
    json: Annotated[
        Path | None,
        typer.Option(help="Write the result here, and each context beside it; what is there is not read again."),
    ] = None,
    figure: Annotated[Path | None, typer.Option(help="Where the figure is saved.")] = None,
    contexts: Annotated[int, typer.Option(min=1, help="Contexts, of the first half of the text.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens of a context.")] = 4096,
    rule: Annotated[
        str, typer.Option(help="reading, direct, or auto: direct where at most eight heads attend to everything.")
    ] = "auto",
    parts: Annotated[
        str | None,
        typer.Option(
            help="Parts of its tokens that a head alone keeps by the rule direct. [default: 0.02 to 0.7, six]"
        ),
    ] = None,
    bits: Annotated[bool, typer.Option(help="Find which number of bits loses least at equal bytes, too.")] = True,
    threads: Annotated[int | None, typer.Option(min=1, help="Of torch.")] = None,
) -> None:
    """Find how a model's KV heads should share what is kept, and which should rather keep every token.

    By what the model looks back at when it reads a text again, or directly: by what is lost when one head alone is
    compressed, and when it alone is not. Then at equal bytes: fewer entries, or fewer bits? The result is for
    profile=FILE of ClusteredCache.for_model, for kvcluster eval --profile FILE and for whole_heads_of(FILE, model).
    """
    try:
        from kvcluster.evaluation.demo.figure import check_figure_path
        from kvcluster.evaluation.tuning.run import Settings, run_tune
    except ModuleNotFoundError as error:
        fail("tune", f"{error.name} is not installed: pip install 'kvcluster[hf]'")

    check_places(json, None)
    of_direct = None if parts is None else tuple(number("tune", "parts", part, float) for part in items(parts))
    source = None if text is None else str(text)
    settings = Settings(model, source, n_contexts=contexts, n_tokens=tokens, rule=rule, parts=of_direct, with_bits=bits)
    try:
        if figure is not None:
            check_figure_path(figure)
        run_tune(settings, json_path=json, figure=figure, threads=threads)
    except ValueError as error:
        fail("tune", str(error))
