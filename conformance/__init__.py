"""The reference as an oracle: a conformance suite for anybody's implementation of the public names.

`kvcluster check my_package.my_module` runs it from the command line, `pytest --pyargs kvcluster.conformance
--implementation my_package.my_module` as tests. Needs NumPy and hypothesis; with `ml_dtypes`, bfloat16 is checked too.

`inputs` and `cases` say what goes in, `implementation` calls the subject, `comparing` decides whether it is right,
`mistakes` knows what can have gone wrong, `shrinking` makes counterexamples small, `suite` does it all. The rules are
those of SPECIFICATION.md.
"""

from .case import OPERATIONS, Case
from .cases import all_cases
from .implementation import Implementation, load_implementation
from .suite import Report, check

__all__ = ["OPERATIONS", "Case", "Implementation", "Report", "all_cases", "check", "load_implementation"]
