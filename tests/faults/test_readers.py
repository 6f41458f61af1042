"""Some hundred mutated inputs of each reader; `make fuzz` tries thousands."""

import sys

import pytest
from fuzz import fuzz
from fuzzing.readers import READERS
from fuzzing.table import describe

COUNT = 300  # of each reader; of one whose inputs take longer, that many times fewer


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured by /proc")
def test_no_mutated_input_does_more_than_it_may():
    counts = {name: max(3, round(COUNT / reader.cost)) for name, reader in READERS.items()}
    found = fuzz(READERS, "fuzzing.readers", counts, seed=1_000_000, workers=2, tell=False)
    print(*found.lines(), sep="\n")
    assert {name: found.counts[name].total() for name in READERS} == counts
    assert not found.faults, "\n" + "\n".join(describe(fault, "python tests/faults/fuzz.py") for fault in found.faults)
