"""How every program runs: --help by topic, --version, errors as one line, Ctrl-C, the compilation cache."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import platform
import re
import signal
import sys
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import jax
from absl import app, flags
from tqdm import tqdm

import phi3_jax
from phi3_jax.spelling import did_you_mean

_COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "phi3_jax" / "compiled"),
    "Where compiled programs are kept, so that the next start need not compile them again; empty: nowhere.",
)
_VERSION = flags.DEFINE_bool("version", False, "Print the versions of the program, of jax and of Python, and end.")
Topics = Mapping[str, Sequence["flags.FlagHolder[Any]"]]

# The warnings that were shown, so that none is shown twice; a program that clears it wants to be warned anew.
told_warnings: set[str] = set()


def run_program(
    name: str,
    main: Callable[..., int],
    topics: Topics,
    *,
    takes_arguments: bool = False,
    more_help: str = "",
    instead: Mapping[str, str] | None = None,
) -> None:
    """Parses the flags and runs `main`, whose result is the exit code; bad input becomes one line and exit code 1.

    ValueError, OSError and ImportError count as bad input; other exceptions are bugs, shown with their traceback. A
    UserWarning is a line, too.
    If nobody reads standard output any more, the program ends without a word.

    Args:
      topics: the program's flags as --help groups them.
      takes_arguments: `main` is called with the list of what stands beside the flags, which else is refused.
      more_help: what --help says behind the flags.
      instead: for names that users may take for flags, what to write instead.
    """
    help_text = _help(sys.modules[main.__module__].__doc__ or "", topics, more_help)
    known = {holder.name for holders in topics.values() for holder in holders}
    if sys.stderr is None:  # it was closed, as by 2>&-; no other file may take its number
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            output.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    # absl shows INFO messages, and jax logs one for each accelerator that this machine does not have.
    logging.getLogger("jax").setLevel(logging.WARNING)

    def parse(argv: Sequence[str]) -> list[str]:
        # --help and --version come before the check of the flags, some of which may be required.
        if any(argument in ("-h", "-help", "--help") for argument in argv[1:]):
            print(help_text)
            sys.exit(0)
        if any(argument in ("-version", "--version") for argument in argv[1:]):
            print(f"{name} {phi3_jax.__version__} (jax {jax.__version__}, Python {platform.python_version()})")
            sys.exit(0)
        try:
            flags.FLAGS.set_gnu_getopt()  # flags may follow arguments
            return flags.FLAGS(argv)
        except flags.UnrecognizedFlagError as error:
            given = error.flagname
            near = did_you_mean(given, known | {_COMPILATION_CACHE_DIR.name, _VERSION.name, "help"}, "--")
            near = f"; write {instead[plain]}" if instead and (plain := given.replace("-", "_")) in instead else near
            sys.exit(f"{name}: there is no --{given}{near}; see {name} --help")
        except flags.Error as error:
            sys.exit(f"{name}: {error}; see {name} --help")

    def guarded(argv: Sequence[str]) -> int:
        if unknown := _present_flags() - known:
            sys.exit(f"{name}: there is no --{' and no --'.join(sorted(unknown))}; see {name} --help")
        if argv[1:] and not takes_arguments:
            sys.exit(f'{name}: unexpected arguments {list(argv[1:])}; quote text: --prompt "two words"')
        if _COMPILATION_CACHE_DIR.value:
            jax.config.update("jax_compilation_cache_dir", _COMPILATION_CACHE_DIR.value)
            # Keep small compiled programs, too: a start compiles dozens of them, which together takes seconds.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        _show_warnings_as_lines(name)
        try:
            return main(*([argv[1:]] if takes_arguments else []))
        except BrokenPipeError:
            raise
        except (ValueError, OSError, ImportError) as error:
            sys.exit(f"{name}: {error}")
        except KeyboardInterrupt:
            sys.exit(130)

    try:
        try:
            app.run(guarded, flags_parser=parse)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python still writes at its end
        if isinstance(error, BrokenPipeError):
            # Who read the output has left, as in `... | head -1`; other programs are ended then by the signal, quietly.
            sys.exit(128 + signal.SIGPIPE)
        sys.exit(f"{name}: cannot write to standard output: {error}")


@contextlib.contextmanager
def interruptible(*others: signal.Signals) -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C does not raise, but makes the yielded function return True. A second Ctrl-C raises.

    The signals in `others` do the same; with SIGTERM, for example, a scheduler asks a program to end.
    """
    pressed = threading.Event()

    def on_interrupt(number: int, frame: Any) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = {number: signal.signal(number, on_interrupt) for number in (signal.SIGINT, *others)}
    try:
        yield pressed.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def read_text(path: str) -> str:
    """A file's text. Raises ValueError if it is not UTF-8, OSError if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a text in UTF-8 ({error.reason} at byte {error.start}); convert it") from None


def _show_warnings_as_lines(name: str) -> None:
    show_other = warnings.showwarning

    def show_warning(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if not issubclass(category, UserWarning):
            show_other(message, category, filename, lineno, file, line)
        elif (text := _without_damaged_program(str(message))) not in told_warnings:
            told_warnings.add(text)
            tqdm.write(f"{name}: warning: {text}", file=sys.stderr)

    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = show_warning


def _without_damaged_program(warning: str) -> str:
    """Removes a compiled program that a kill has left half, which jax would find at each start -> what to tell."""
    folder = _COMPILATION_CACHE_DIR.value
    found = re.match(r"Error reading persistent compilation cache entry for '(\w+)'", warning)
    if not found or not folder:
        return warning
    for path in Path(folder).glob(f"{found[1]}-*-cache"):
        path.unlink(missing_ok=True)
    return f"{folder}: the compiled program {found[1]} was damaged, and is made again"


def _present_flags() -> set[str]:
    """The flags of programs that were given, but for those of this module.

    A program refuses those that it does not list: they come with modules that it imports, and it would not read them.
    """
    modules = flags.FLAGS.flags_by_module_dict()
    ours = [name for name in modules if name.startswith("phi3_jax.") and name != __name__]
    return {flag.name for name in ours for flag in modules[name] if flag.present}


def _help(title: str, topics: Topics, more: str) -> str:
    lines = [title.strip()]
    for topic, holders in {**topics, "Starting faster": [_COMPILATION_CACHE_DIR], "About": [_VERSION]}.items():
        lines += ["", topic]
        for holder in holders:
            flag = flags.FLAGS[holder.name]
            kinds = {"bool": "", "int": "=N", "float": "=X"}
            value = "=" + "|".join(flag.parser.enum_values) if hasattr(flag.parser, "enum_values") else None
            value = kinds.get(flag.flag_type().removeprefix("multi "), "=TEXT") if value is None else value
            default = "" if flag.default in (None, "", [], False) else f" (default: {flag.default})"
            lines.append(f"  --{flag.name}{value}")
            # Remove what absl adds to a help text.
            text = re.sub(r"^<[^>]*>: |;\s+repeat this option.*$", "", flag.help, flags=re.DOTALL)
            lines += textwrap.wrap(f"{text}{default}", 96, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, *(["", more] if more else [])])
