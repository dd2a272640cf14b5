"""The fields of a profile from JSON that anybody may have written: of the right kinds, or the first that is not.

Other keys are not read: `kvcluster tune` says there, for people, how it was measured.
"""

import re
from typing import Any

from ..outside import shown

__all__ = ["fields_of"]

DIGEST = re.compile("[0-9a-f]{64}")
MOST_LAYERS = 10_000  # beyond which an index is none of a layer or head


def fields_of(result: Any) -> dict[str, Any]:
    """The arguments of `Profile`; how they fit each other is not looked at.

    Raises
    ------
    ValueError : names the key, what must be there and what is.
    """
    if not isinstance(result, dict):
        raise ValueError(f"it must be a JSON object, got {shown(result)}")
    name, weights = field(result, "name"), field(result, "weights")
    if not isinstance(name, str) or not name.isprintable():
        raise ValueError(f"name must be a text of one line, got {shown(name)}")
    if not isinstance(weights, dict) or not all(isinstance(x, str) and DIGEST.fullmatch(x) for x in weights.values()):
        raise ValueError(f"weights must be an object of SHA-256 digests in hex, by dtype, got {shown(weights)}")
    attended, bits = (None if result.get(key) is None else items(result, key) for key in ("attended", "bits"))
    return {
        "name": name,
        "weights": weights,
        "layers": tuple(index(x, "layers") for x in items(result, "layers")),
        "keeps": tuple(number(x, "keeps") for x in items(result, "keeps")),
        "shares": tuple(tuple(map(share_row, listed(layers, "shares"))) for layers in items(result, "shares")),
        "heads": tuple(pair(x) for x in items(result, "heads")),
        "attended": None if attended is None else tuple(index(x, "attended") for x in attended),
        "bits": None if not bits else tuple(map(bits_at, bits)),
    }


def field(result: dict[str, Any], key: str) -> Any:
    if key not in result:
        raise ValueError(f"{key} must be given, got nothing")
    return result[key]


def items(result: dict[str, Any], key: str) -> list[Any]:
    return listed(field(result, key), key)


def listed(value: Any, key: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{key} must be lists, got {shown(value)}")
    return value


def share_row(value: Any) -> tuple[float, ...]:
    return tuple(number(x, "shares") for x in listed(value, "shares"))


def number(value: Any, key: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be numbers, got {shown(value)}")
    return float(value)


def index(value: Any, key: str) -> int:
    if type(value) is not int or not 0 <= value < MOST_LAYERS:
        raise ValueError(f"{key} must be indexes from 0 to {MOST_LAYERS - 1}, got {shown(value)}")
    return value


def pair(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"heads must be pairs of a layer and a KV head, got {shown(value)}")
    return index(value[0], "heads"), index(value[1], "heads")


def bits_at(value: Any) -> tuple[float, int]:
    if not isinstance(value, dict) or not {"bytes_ratio", "bits"} <= set(value):
        raise ValueError(f"bits must be objects with bytes_ratio and bits, got {shown(value)}")
    return number(value["bytes_ratio"], "bytes_ratio of bits"), index(value["bits"], "bits")
