"""The adapter that `kvcluster check --scaffold` writes, to be filled in."""

from .operations import OPERATIONS

__all__ = ["scaffold"]

HEAD = '''"""Adapter: my implementation under the names of kvcluster, for `kvcluster check {name}`.

Keep what you have, delete the rest. Parameters, shapes and rules: reference/SPECIFICATION.md.
"""

# import my_package

# ARRAYS = "torch"  # if the functions take torch tensors; or give both ways yourself:
# def from_numpy(array): return jax.numpy.asarray(array)
# def to_numpy(array): return numpy.asarray(array)
# DTYPES = ("f16", "f32")  # if not all of f16, bf16, f32 are taken
# REFUSES = False  # if bad input is not refused; SUBNORMALS = False if tiny numbers are flushed to zero
'''


def scaffold(name: str) -> str:
    """Its text: functions first, classes last."""
    parts = [operation.scaffold for operation in OPERATIONS.values()]
    functions = ["\n" + part for part in parts if part.startswith("\ndef ")]
    others = [part for part in parts if not part.startswith("\ndef ")]
    return HEAD.format(name=name) + "".join(functions) + "\n" + "".join(others)
