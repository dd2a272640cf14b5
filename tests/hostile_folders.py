"""Folders of models with something wrong in them, and the line with which they are refused."""

import json

import pytest

from kvcluster.evaluation.errors import UnusableInputError
from kvcluster.evaluation.models import load_model
from kvcluster.fast.huggingface.hooks import MODEL_TYPES


def change(path, **changes):
    """Other values in a file of JSON; those that are `...` are taken out."""
    content = (json.loads(path.read_text()) if path.exists() else {}) | changes
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def why_not(folder, types=MODEL_TYPES):
    """The line with which a folder is refused."""
    with pytest.raises(UnusableInputError) as refusal:
        load_model(folder, types)
    line = str(refusal.value)
    assert line.isprintable()
    assert len(line) < 1000
    return line
