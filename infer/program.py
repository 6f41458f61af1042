"""What the programs have in common: --help, and errors as one line."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from absl import app, flags

_COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3_jax" / "compiled"),
    "Where compiled programs are kept, so that the next start need not compile them again; empty: nowhere.",
)


def run_program(name: str, main: Callable[[], int]) -> None:
    """Parses the flags and runs `main`, whose result is the exit code; bad input becomes one line and exit code 1.

    Bad input raises ValueError, OSError or ImportError; anything else is a fault of ours and is shown whole.
    """
    module = sys.modules[main.__module__]
    # absl's --help describes the script that was started, which for a console script is a stub without text or flags.
    sys.modules["__main__"].__doc__ = module.__doc__
    for name_of_module in (module.__name__, __name__):
        for flag in flags.FLAGS.flags_by_module_dict().get(name_of_module, []):
            flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    # absl shows messages from INFO on, and jax reports each accelerator that this machine does not have as one.
    logging.getLogger("jax").setLevel(logging.WARNING)

    def guarded(argv: Sequence[str]) -> int:
        if argv[1:]:
            sys.exit(f'{name}: unexpected arguments {list(argv[1:])}; quote text: --prompt "two words"')
        if _COMPILATION_CACHE_DIR.value:
            jax.config.update("jax_compilation_cache_dir", _COMPILATION_CACHE_DIR.value)
            # Small programs too: there are dozens of them in a start, and together they take seconds.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        try:
            return main()
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"{name}: {error}")

    app.run(guarded)
