"""Coverage-guided inputs for the readers of headers, by atheris: pip install 'phi3_jax[fuzz]'

python tests/faults/fuzz_headers.py gguf 60           for a minute
python tests/faults/fuzz_headers.py safetensors 60
python tests/faults/fuzz_headers.py gguf FILE         one input again, such as build/crash-... that a run has left

Begins with the small files of fuzzing/readers, and ends with exit code 1 at the first input that is not refused in one
line, takes 5 s or 600 MB, or is read although tensors overlap or lie beyond the file's end.
"""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), *(str(HERE.parent / "helpers" / each) for each in ("", "checkpoints"))]

try:
    import atheris
except ImportError:
    sys.exit("atheris is not installed, so nothing is fuzzed by coverage: pip install 'phi3_jax[fuzz]'")

READ = ["phi3_jax.checkpoint.gguf.header", "phi3_jax.checkpoint.gguf.parts", "phi3_jax.checkpoint.gguf.reader"]
READ += ["phi3_jax.checkpoint.gguf.tensors", "phi3_jax.checkpoint.safetensors_files"]
with atheris.instrument_imports(include=READ):
    from phi3_jax.checkpoint.gguf.header import read_header
    from phi3_jax.checkpoint.gguf.reader import read_gguf
    from phi3_jax.checkpoint.safetensors_files import read_file

import gguf  # noqa: E402
import safetensors  # noqa: E402
from fuzzing.readers import checkpoints  # noqa: E402
from fuzzing.verdicts import REFUSALS  # noqa: E402


def _gguf(path: Path) -> None:
    read_gguf(path)
    _, table = read_header(path)
    blocks = [gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(tensor.kind)] for tensor in table.values()]
    sizes = [math.prod(t.shape) // values * size for t, (values, size) in zip(table.values(), blocks, strict=True)]
    ends = [tensor.offset + size for tensor, size in zip(table.values(), sizes, strict=True)]
    found = sorted(zip((tensor.offset for tensor in table.values()), ends, strict=True))
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(found)), "tensors overlap"
    assert max(ends) <= path.stat().st_size, "a tensor lies beyond the end"


def _safetensors(path: Path) -> None:
    for source in read_file(path).values():
        source.read()
    try:
        safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise AssertionError(f"the safetensors package refuses what was read: {error}") from error


LARGEST = 150_000  # bytes of an input
TARGETS = {"gguf": (_gguf, "*.gguf"), "safetensors": (_safetensors, "*.safetensors")}


def main() -> None:
    """See above."""
    if len(sys.argv) != 3 or sys.argv[1] not in TARGETS:
        sys.exit(__doc__)
    read, pattern = TARGETS[sys.argv[1]]
    warnings.simplefilter("ignore")
    Path("build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = folder / f"case{pattern[1:]}"

        def one_input(content: bytes) -> None:
            case.write_bytes(content)
            try:
                read(case)
            except REFUSALS as error:
                if len(str(error).splitlines()) != 1 or str(case) not in str(error):
                    raise AssertionError(f"not one line that names the file: {error}") from error

        options = [
            "-timeout=5",
            "-rss_limit_mb=4000",
            "-malloc_limit_mb=600",
            f"-max_len={LARGEST}",
            "-verbosity=0",
            "-print_final_stats=1",
        ]
        if Path(sys.argv[2]).exists():
            options.append(sys.argv[2])
        else:
            options += [f"-max_total_time={int(sys.argv[2])}", str(_corpus(folder / "corpus", pattern))]
        atheris.Setup([sys.argv[0], *options], one_input)
        atheris.Fuzz()


def _corpus(corpus: Path, pattern: str) -> Path:
    """Valid files to begin with."""
    corpus.mkdir()
    reader = checkpoints.READERS[pattern[2:]]
    for variant in range(reader.variants):
        made = corpus.with_name(f"made{variant}")
        made.mkdir()
        reader.make(made, variant)
        for number, path in enumerate(sorted(made.glob(pattern))):
            if path.stat().st_size < LARGEST:
                path.rename(corpus / f"{variant}-{number}")
    return corpus


if __name__ == "__main__":
    main()
