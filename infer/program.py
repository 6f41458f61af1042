"""What the programs have in common: --help, and errors as one line."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence

from absl import app, flags


def run_program(name: str, main: Callable[[], int]) -> None:
    """Parses the flags and runs `main`, whose result is the exit code; bad input becomes one line and exit code 1.

    Bad input raises ValueError, OSError or ImportError; anything else is a fault of ours and is shown whole.
    """
    module = sys.modules[main.__module__]
    # absl's --help describes the script that was started, which for a console script is a stub without text or flags.
    sys.modules["__main__"].__doc__ = module.__doc__
    for flag in flags.FLAGS.flags_by_module_dict().get(module.__name__, []):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    # absl shows messages from INFO on, and jax reports each accelerator that this machine does not have as one.
    logging.getLogger("jax").setLevel(logging.WARNING)

    def guarded(argv: Sequence[str]) -> int:
        if argv[1:]:
            sys.exit(f'{name}: unexpected arguments {list(argv[1:])}; quote text: --prompt "two words"')
        try:
            return main()
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"{name}: {error}")

    app.run(guarded)
