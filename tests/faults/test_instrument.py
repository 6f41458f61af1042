"""The instrument finds what is planted, so that no faults means something."""

import sys

import planted
import pytest
from fuzz import fuzz

# What comes of inputs that the planted reader does not take.
EXPECTED = {
    "good": "refused",
    "told": "told",
    "silent": "silent",
    "no checksum": "silent",
    "KeyError": "traceback",
    "MemoryError": "traceback",
    "two lines": "vague",
    "no name": "vague",
    "hang": "hang",
    "loop": "hang",
    "memory": "memory",
    "abort": "crash",
    "exit": "crash",
    "killed": "crash",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_every_planted_fault_is_found_and_no_other():
    assert planted.READERS.keys() == EXPECTED.keys()
    slow = dict.fromkeys(("hang", "loop", "memory"), 2) | dict.fromkeys(("abort", "exit", "killed"), 3)
    counts = dict.fromkeys(EXPECTED, 12) | slow | dict.fromkeys(("good", "told", "no checksum"), 40)
    found = fuzz(planted.READERS, "planted", counts, 2, workers=2, tell=False, limit=1)
    assert found.counts["good"].keys() <= {"same", "refused", "other"}
    for name, verdict in EXPECTED.items():
        verdicts = found.counts[name]
        assert verdicts.total() == counts[name], name
        assert verdicts[verdict], (name, verdicts)
        assert verdicts.keys() <= {verdict, "same", "refused", "told", "other"}, (name, verdicts)
