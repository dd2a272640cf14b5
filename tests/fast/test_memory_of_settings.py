"""Memory follows the tokens, not the settings: no number that is asked for sizes an allocation."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).parents[1] / "settings_worker.py"


def outcome(*twin):
    run = subprocess.run([sys.executable, WORKER, *twin], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits the memory of a process")
def test_a_huge_setting_takes_no_memory(record_property):
    found = outcome()
    assert found["failed"] == {}
    assert found["calls"] > 150
    assert found["refused"] < found["calls"] / 2
    record_property("settings", found["calls"])


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux limits the memory of a process")
def test_wrong_twin_with_as_much_room_as_asked_for_is_caught():
    failed = outcome("as large as asked for")["failed"]
    assert {"ChelseaCache interval=2147483647", "RecallCache beside segment_size=2147483647"} <= set(failed)
