"""Pages of results in Markdown: sentences are written by hand, tables between marks are filled in by a program."""

import re
from collections.abc import Mapping

__all__ = ["fill", "numbers_of_sentences", "numbers_of_tables", "table"]

REGION = re.compile(r"(<!-- table: ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CODE = re.compile(r"```.*?```|`[^`]*`", re.DOTALL)
LINK = re.compile(r"\]\([^)]*\)")
NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)*(?:e-?\d+)?")


def fill(page: str, tables: Mapping[str, str]) -> str:
    """The page with each table between its marks.

    Raises
    ------
    ValueError : a mark without its table or a table without its mark.

    Examples
    --------
    >>> print(fill("It is so:\\n<!-- table: sizes -->\\nold\\n<!-- end -->", {"sizes": "new"}))
    It is so:
    <!-- table: sizes -->
    new
    <!-- end -->
    """
    marked = [name for _, name, _ in REGION.findall(page)]
    if sorted(marked) != sorted(tables):
        raise ValueError(f"page must have a mark for each of {sorted(tables)}, got {sorted(marked)}")
    return REGION.sub(lambda region: f"{region[1]}{tables[region[2]]}\n{region[3]}", page)


def numbers_of_sentences(page: str) -> set[str]:
    """Numbers that are written by hand: outside of tables, code and addresses.

    >>> sorted(numbers_of_sentences("Of 4,096 tokens `chunk_size=64`, 0.25 are kept; [see](a-5.md) 2.13.0."))
    ['0.25', '2.13.0', '4,096']
    """
    return numbers(LINK.sub("]", CODE.sub("", REGION.sub("", page))))


def numbers_of_tables(page: str) -> set[str]:
    return {number for region in REGION.finditer(page) for number in numbers(region[0])}


def numbers(text: str) -> set[str]:
    return {number.rstrip(",") for number in NUMBER.findall(text)}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown.

    >>> print(table(["kept", "bytes"], [["0.5", "10"]]))
    | kept | bytes |
    | --- | --- |
    | 0.5 | 10 |
    """
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
