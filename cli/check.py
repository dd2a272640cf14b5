"""`kvcluster check`: anybody's implementation against the reference."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from kvcluster.conformance.suite import Counterexample, Report

__all__ = ["check"]

SCAFFOLD = '''"""Adapter: my implementation under the names of kvcluster, for `kvcluster check {name}`.

Keep what you have, delete the rest. Parameters, shapes and rules: reference/SPECIFICATION.md.
"""

# import my_package

# ARRAYS = "torch"  # if the functions take torch tensors; or give both ways yourself:
# def from_numpy(array): return jax.numpy.asarray(array)
# def to_numpy(array): return numpy.asarray(array)
# DTYPES = ("f16", "f32")  # if not all of f16, bf16, f32 are taken


def alternating_partition(size):
    """sources, destinations: indices."""
    return my_package.partition(size)


def similarity(a, b):
    """(..., m, n) float64."""
    return my_package.similarity(a, b)


def chunked_soft_matching(keys, *, keep_ratio, chunk_size=64):
    """labels (..., tokens), counts (..., entries)."""
    return my_package.match(keys, keep_ratio, chunk_size)


def distinctive_matching(keys, values, *, keep_ratio, chunk_size=256, n_shared=4):
    """labels (..., tokens), counts (..., entries)."""
    return my_package.match_distinctive(keys, values, keep_ratio, chunk_size, n_shared)


def merge(array, clustering):
    """(..., entries, dim) float32; clustering has .labels and .counts."""
    return my_package.merge(array, clustering.labels, clustering.counts)


def attention(query, keys, values, *, scale=None):
    """(..., group, dim_value)."""
    return my_package.attention(query, keys, values, scale)


def clustered_attention(query, keys, values, counts, *, scale=None):
    """(..., group, dim_value)."""
    return my_package.clustered_attention(query, keys, values, counts, scale)


def kmeans(keys, *, n_clusters, init=None, max_iter=10):
    """labels (..., tokens), counts (..., clusters), centroids (..., clusters, dim) float32."""
    return my_package.kmeans(keys, n_clusters, init, max_iter)


def select_clusters(query, centroids, counts, *, budget):
    """Tokens taken of each cluster (..., clusters)."""
    return my_package.select(query, centroids, counts, budget)


def recall_attention(query, keys, values, clusters, *, budget, scale=None):
    """(..., group, dim_value); clusters has .labels, .counts, .centroids, .members and .first_member."""
    return my_package.recall(query, keys, values, clusters, budget, scale)


# append(keys, values), attend(query), n_seen, n_stored; without the parameters budget or n_shared, if you have none
# ClusteredCache = my_package.ClusteredCache
# RecallCache = my_package.RecallCache
'''


def check(
    target: Annotated[
        str, typer.Argument(help="package.module, or a path to a .py file, with some of the public names.")
    ],
    only: Annotated[list[str] | None, typer.Option(help="This operation only; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Puts other numbers into the same cases.")] = 0,
    max_seconds: Annotated[float, typer.Option(min=0, help="Begin no other case after this long.")] = float("inf"),
    scaffold: Annotated[
        bool, typer.Option("--scaffold", help="Write an adapter to fill in to TARGET, and stop.")
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write a JUnit report to this file.")] = None,
) -> None:
    """Hold an implementation against the reference: exit status 0 agrees, 1 differs, 2 cannot run.

    Decisions, caches and centroids must be equal bit for bit, attention outputs within the bound of the reference.
    """
    from rich.console import Console
    from rich.progress import Progress

    console = Console(width=None if sys.stdout.isatty() else 120)
    if scaffold:
        path = Path(target)
        if path.suffix != ".py" or path.exists():
            stop(f"TARGET must be a new .py file for --scaffold, got {target!r}")
        write(path, SCAFFOLD.format(name=target))
        console.print(f"{target} written: fill it in, then run kvcluster check {target}")
        return
    try:
        from kvcluster.conformance import OPERATIONS, all_cases, load_implementation
        from kvcluster.conformance import check as check_all
    except ModuleNotFoundError as error:
        stop(f"{error.name} is not installed: pip install 'kvcluster[oracle]'")
    try:
        implementation = load_implementation(target)
    except Exception as error:
        stop(f"{target} cannot be loaded: {type(error).__name__}: {error}")
    names = tuple(only or OPERATIONS)
    unknown = sorted(set(names) - set(OPERATIONS))
    if unknown:
        stop(f"--only must be of {', '.join(OPERATIONS)}, got {', '.join(unknown)}")
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("Check", total=sum(1 for _ in all_cases(names, seed)))
        report = check_all(
            implementation, only=names, seed=seed, max_seconds=max_seconds, on_case=lambda: progress.advance(task)
        )
    show(console, report)
    if json_file is not None:
        write(json_file, json.dumps(as_json(report), indent=1, allow_nan=False) + "\n")
    if junit is not None:
        write(junit, as_junit(report))
    if not any(each.n_cases for each in report.operations):
        stop(f"nothing of {target} could be checked")
    raise typer.Exit(0 if report.agrees else 1)


def stop(message: str) -> None:
    typer.echo(f"kvcluster check: {message}", err=True)
    raise typer.Exit(2)


def write(path: Path, text: str) -> None:
    """A file that cannot be written must not look like an implementation that differs."""
    try:
        path.write_text(text)
    except OSError as error:
        stop(f"{path} cannot be written: {error.strerror}")


def show(console: "Console", report: "Report") -> None:
    """A table, then a panel for each operation that differs."""
    from rich.table import Table

    table = Table(title=f"{report.implementation} against the reference ({report.seconds:.1f} s)")
    for column in ("operation", "cases", "differ", "not put to it", "verdict"):
        table.add_column(column, justify="right" if column in ("cases", "differ") else "left")
    for each in report.operations:
        skipped = ", ".join(f"{number}: {reason}" for reason, number in each.skipped.items())
        colour = {"agrees": "green", "differs": "red", "not checked": "dim"}[each.verdict]
        verdict = f"[{colour}]{each.verdict}[/{colour}]"
        table.add_row(each.operation, str(each.n_cases), str(each.n_failed), skipped, verdict)
    console.print(table)
    for each in report.operations:
        if each.counterexample is not None:
            show_counterexample(console, each.operation, each.counterexample)
    if report.is_stopped:
        console.print("Stopped by --max-seconds: not all cases were checked.")


def show_counterexample(console: "Console", operation: str, found: "Counterexample") -> None:
    from rich.panel import Panel
    from rich.text import Text

    from kvcluster.conformance.words import decisions

    lines = [f"What is wrong: {found.cause or 'no known mistake explains it'}"]
    lines += [f"Rule: {found.rule} of SPECIFICATION.md", "", f"Case: {found.case.name}"]
    lines += [f"  {name} = {written(array)}" for name, array in found.case.arrays.items()]
    lines += [f"  {name} = {value}" for name, value in found.case.parameters.items()]
    what = found.difference.what
    lines.append(f"Difference: {found.difference.text}")
    for title, arrays, one in (
        ("expected", found.expected, found.difference.expected),
        ("got", found.got, found.difference.got),
    ):
        lines.append(f"  {title} {what}: {written(arrays[what]) if what in arrays else one}")
    if all(array.size <= 64 for array in found.case.arrays.values()) and not found.case.is_refused:
        steps = decisions(found.case)
        lines += ["How the reference decides:", *steps] if steps else []
    console.print(Panel(Text("\n".join(lines)), title=f"{operation} differs", title_align="left", border_style="red"))


def written(array: Any) -> str:
    """A small array in full with its dtype, a large one as its shape."""
    kind = f"{array.dtype.name} {array.shape}"
    return f"{array.tolist()} ({kind})" if array.size <= 64 else kind


def listed(array: Any) -> Any:
    """An array as JSON has it, in strings where some numbers are not finite."""
    import numpy as np

    return array.tolist() if np.isfinite(array).all() else array.astype(str).tolist()


def as_json(report: "Report") -> dict[str, Any]:
    def of(found: "Counterexample | None") -> dict[str, Any] | None:
        if found is None:
            return None
        arrays = {
            name: {key: listed(array) for key, array in group.items()}
            for name, group in (("inputs", found.case.arrays), ("expected", found.expected), ("got", found.got))
        }
        parameters = {name: list(v) if isinstance(v, tuple) else v for name, v in found.case.parameters.items()}
        return {
            **arrays,
            "parameters": parameters,
            "cause": found.cause,
            "rule": found.rule,
            "difference": found.difference._asdict(),
            "case": found.case.name,
        }

    operations = [
        {
            "operation": each.operation,
            "verdict": each.verdict,
            "cases": each.n_cases,
            "differ": each.n_failed,
            "skipped": dict(each.skipped),
            "failed": each.failed,
            "counterexample": of(each.counterexample),
        }
        for each in report.operations
    ]
    return {
        "implementation": report.implementation,
        "agrees": report.agrees,
        "seconds": report.seconds,
        "is_stopped": report.is_stopped,
        "operations": operations,
    }


def as_junit(report: "Report") -> str:
    """One test case per operation."""
    from xml.etree import ElementTree

    failures = sum(each.verdict == "differs" for each in report.operations)
    skipped = sum(each.verdict == "not checked" for each in report.operations)
    attributes = {"name": f"kvcluster check {report.implementation}", "tests": str(len(report.operations))}
    attributes |= {"failures": str(failures), "skipped": str(skipped), "time": f"{report.seconds:.3f}"}
    root = ElementTree.Element("testsuite", attributes)
    for each in report.operations:
        case = ElementTree.SubElement(root, "testcase", {"classname": report.implementation, "name": each.operation})
        if each.verdict == "not checked":
            ElementTree.SubElement(case, "skipped", {"message": ", ".join(each.skipped)})
        if each.counterexample is not None:
            message = each.counterexample.cause or each.counterexample.difference.text
            failure = ElementTree.SubElement(
                case, "failure", {"message": f"{message} (rule {each.counterexample.rule})"}
            )
            failure.text = "\n".join(each.failed)
    return ElementTree.tostring(root, encoding="unicode", xml_declaration=True) + "\n"
