"""What the conformance suite finds wrong with the reference once that makes one of the known mistakes."""

import warnings

from kvcluster import reference
from kvcluster.conformance import Implementation
from kvcluster.conformance.cases import cases_of
from kvcluster.conformance.comparing import compare
from kvcluster.conformance.counterexamples import counterexample
from kvcluster.conformance.explaining import Failure, outcome_with


def failures(operation, mistake):
    """Case, outcome and difference of each case that the mistake makes wrong."""
    failed = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for case in cases_of(operation.name, 0):
            if not case.is_refused:
                outcome = outcome_with(mistake, case)
                difference = compare(case, outcome)
                if difference is not None:
                    failed.append(Failure(case, outcome, difference))
    return failed


def assert_caught_and_named(operation, mistake):
    """Some case is wrong, and the suite takes this mistake, no other one, for the cause."""
    failed = failures(operation, mistake)
    assert failed
    found = counterexample(Implementation(reference), failed, {}, None)
    assert (found.cause, found.rule) == (mistake.cause, mistake.rule)
