"""Mutated inputs for every reader: `make fuzz`, or

python tests/faults/fuzz.py --count 10000                           over all readers
python tests/faults/fuzz.py --reader gguf --count 300               over one
python tests/faults/fuzz.py --reader gguf --seed 17 --keep folder   the 17th input of it, kept, with the traceback

The exit code is 1 if there was a fault.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / "helpers" / each) for each in ("", "checkpoints"))]

from fuzzing import table, worker  # noqa: E402
from fuzzing.pool import LIMIT, Result, run  # noqa: E402
from fuzzing.reader import Reader  # noqa: E402

COMMAND = "python tests/faults/fuzz.py"


def shares(readers: dict[str, Reader], count: int) -> dict[str, int]:
    """How many inputs each reader gets: fewer where one takes longer."""
    total = sum(1 / reader.cost for reader in readers.values())
    return {name: max(1, round(count / reader.cost / total)) for name, reader in readers.items()}


def fuzz(
    readers: dict[str, Reader],
    module: str,
    counts: dict[str, int],
    seed: int,
    workers: int,
    keep: Path | None = None,
    tell: bool = True,
    limit: float = LIMIT,
) -> table.Table:
    """Reads `counts[name]` mutated inputs of each reader in other processes.

    Args:
      module: where the workers find READERS.
      seed: of the first input of each reader.
      keep: a folder for the inputs that made faults; with one input, for that.
      limit: seconds that reading one may take.
    """
    found = table.Table()
    jobs = [(name, seed + i) for i in range(max(counts.values())) for name in readers if i < counts[name]]

    def show(result: Result) -> None:
        found.add(result)
        if tell and (result.verdict in table.FAULTS or len(jobs) == 1):
            print(table.describe(result, COMMAND), *([result.trace] if len(jobs) == 1 else []), sep="\n", flush=True)

    def kept(result: Result) -> Path | None:
        wanted = keep is not None and (result.verdict in table.FAULTS or len(jobs) == 1)
        return keep / f"{result.reader}-{result.seed}" if keep is not None and wanted else None

    if keep is not None:
        keep.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="phi3-fuzz-") as work:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", work, "--readers", module]
        run(command, jobs, workers, Path(work), show, kept, limit)
    return found


def main() -> int:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reader", action="append", help="only this one; may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="of the first input (default: 0)")
    parser.add_argument("--count", type=int, help="how many inputs in all (default: 1 with --reader, else 10,000)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes that read")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that made faults")
    parser.add_argument("--readers", default="fuzzing.readers", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    readers: dict[str, Reader] = importlib.import_module(args.readers).READERS
    if args.worker:
        worker.serve(readers, Path(args.worker))
        return 0
    if unknown := set(args.reader or ()) - readers.keys():
        parser.error(f"there is no reader {', '.join(unknown)}; there are {', '.join(sorted(readers))}")
    chosen = {name: reader for name, reader in readers.items() if not args.reader or name in args.reader}
    counts = shares(chosen, args.count or (1 if args.reader else 10_000))
    found = fuzz(chosen, args.readers, counts, args.seed, args.workers, args.keep)
    kinds = found.kinds()
    print(*found.lines(), sep="\n")
    for (reader, verdict, shape), faults in kinds.items():
        print(f"{len(faults):4} x {verdict}: {reader}: {shape}; first: --reader '{reader}' --seed {faults[0].seed}")
    return int(bool(kinds))


if __name__ == "__main__":
    sys.exit(main())
