"""Numbered claims: prose with proofs (`*.md`) beside the code that tries to break them (`*.py`).

`python -m kvcluster.theory` prints every claim with its check and verdict; `--claim M5` runs one, `--figures DIR` draws
the figures. Claims E1 to E9 and measured times need torch, the partition's optima SciPy, the figures matplotlib, and
whatever is said of SmolLM2 needs that model; what is missing is said, and ends the command with 2.

| page | claims | modules |
|---|---|---|
| `notation.md` | what the signs mean; N1, rounding of attention | `rounding`, `claims`, `catalogue` |
| `complexity.md` | C1 to C5 | `closed_forms`, `counting`, `complexity` |
| `partition.md` | P1 to P8 | `partition`, `stationary`, `optimal` |
| `merging.md` | M1 to M5 | `merging`, `certificate`, `certified` |
| `exactness.md` | E1 to E9 | `exactness`, `recalling` |
| `recall.md` | R1 to R4 | `recall` |
"""
