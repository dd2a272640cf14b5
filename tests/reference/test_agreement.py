"""The bound where the plain formula overflows."""

import numpy as np
import pytest

from kvcluster.reference import agreement
from kvcluster.reference.agreement import attention_agreement

LARGE = [(np.float16, 300), (np.float32, 1e20), (np.float32, -3e38)]  # the squares are beyond the dtype


@pytest.mark.parametrize(("dtype", "number"), LARGE)
def test_the_exact_answer_holds_where_the_dtype_overflows(dtype, number):
    large, one = np.array([[number]], dtype), np.ones((1, 1), dtype)
    assert attention_agreement(one, large, large, one).holds
    assert not attention_agreement(one * dtype(1.01), large, large, one).holds


def test_where_the_dtype_overflows_a_wider_one_is_the_baseline():
    """The first head overflows float16; the second does not, and keeps its own bound."""
    rng = np.random.default_rng(0)
    query, keys, values = (rng.normal(size=(2, n, 8)).astype(np.float16) for n in (3, 20, 20))
    query[0] *= np.float16(1000)
    keys[0] *= np.float16(30)
    counts = np.ones((2, 20), np.int64)
    output = np.zeros((2, 3, 8), np.float16)
    bound = attention_agreement(output, query, keys, values, counts).bound
    assert bound[1] == attention_agreement(output[1], query[1], keys[1], values[1], counts[1]).bound
    of_float32 = [
        agreement.largest_difference(
            agreement.plain_attention(query[0], keys[0], values[0], counts[0], None, np.float32), output[0]
        )
    ]
    assert np.isfinite(of_float32).all()
    assert np.isfinite(bound).all()
    for each in agreement.baselines(query, keys, values, counts, None):
        assert np.isfinite(each).all()
    assert not np.isfinite(agreement.plain_attention(query, keys, values, counts, None)).all()
