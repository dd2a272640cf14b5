"""A whole number of entries for each KV head, in proportion to what each should have."""

__all__ = ["shared_out"]


def shared_out(wanted: list[list[float]], total: int, *, least: int, most: int) -> list[list[int]]:
    """Whole numbers in proportion to `wanted`, from `least` to `most`, which together are at most `total`.

    Raises
    ------
    ValueError : `total` is too small for that.

    Examples
    --------
    >>> shared_out([[0.5, 2.0], [8.0, 30.0]], total=22, least=1, most=10)
    [[1, 2], [9, 10]]
    """
    n_heads = sum(map(len, wanted))
    if total < least * n_heads:
        raise ValueError(f"keep_ratio must leave an entry of a chunk for each of {n_heads} heads, got {total}")

    def at(scale: float) -> list[list[int]]:
        return [[min(most, max(least, int(scale * number))) for number in layer] for layer in wanted]

    low, high = 0.0, 1.0
    while sum(map(sum, at(high))) < total and high < 2**40:
        high *= 2
    for _ in range(64):  # until the two are neighbours
        middle = (low + high) / 2
        low, high = (middle, high) if sum(map(sum, at(middle))) <= total else (low, middle)
    return at(low)
