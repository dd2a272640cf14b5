"""The reference as an oracle: a conformance suite for anybody's implementation of the public names.

`kvcluster check my_package.my_module` runs it from the command line, `pytest --pyargs kvcluster.conformance
--implementation my_package.my_module` as tests. Needs NumPy and hypothesis; with `ml_dtypes`, bfloat16 is checked too.

`operations` has a file for each public name: what goes in, how it is called, what can have gone wrong. The others know
no operation by name: `port` and `implementation` call the subject, `isolated` in a process of its own, `guard` sees to
it that the arithmetic stays as it was, `comparing` decides whether an outcome is right, `explaining`, `patterns` and
`counterexamples` say what went wrong, `shrinking` makes cases small, `suite` does it all, `vectors` writes cases and
results to files, `report` is what is found, `reporting`, `writing`, `saving` and `scaffold` are what the commands show
and write. The rules are those of SPECIFICATION.md.
"""

from . import operations
from .case import Case
from .cases import all_cases
from .implementation import Implementation, load_implementation
from .isolated import Isolated
from .report import Report
from .suite import check

__all__ = ["OPERATIONS", "Case", "Implementation", "Isolated", "Report", "all_cases", "check", "load_implementation"]

OPERATIONS = tuple(operations.OPERATIONS)  # their names
