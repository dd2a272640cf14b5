"""The layers that attend to everything are those that our caches make their own."""

import pytest
from families import MODELS, tiny

from kvcluster.evaluation.layers import full_layers
from kvcluster.fast.huggingface import ClusteredCache


@pytest.mark.parametrize("name", MODELS)
def test_full_layers_are_those_of_our_caches(name):
    model, sliding = tiny(name)
    expected = [index for index in range(model.config.num_hidden_layers) if index not in sliding]
    if not expected:
        with pytest.raises(ValueError, match="model must have a layer that attends to everything, got one whose"):
            full_layers(model)
        return
    assert full_layers(model) == (expected, model.config.num_key_value_heads)
    cache = ClusteredCache.for_model(model, keep_ratio=0.5)
    assert [index for index, layer in enumerate(cache.layers) if not layer.is_sliding] == expected
