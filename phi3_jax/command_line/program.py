"""How every program runs: --help by topic, --version, errors as one line, Ctrl-C, the compilation cache."""

from __future__ import annotations

import logging
import platform
import re
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

import jax
from absl import app, flags
from tqdm import tqdm

import phi3_jax
import phi3_start
from phi3_jax.command_line import compiled_programs
from phi3_jax.spelling import did_you_mean

from . import interrupts, streams

_COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    compiled_programs.default_folder(),
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
    UserWarning is a line, too. Signals end it as `interrupts` tells; Ctrl-C, and a pipe that nobody reads any more,
    without a word.

    Args:
      topics: the program's flags as --help groups them.
      takes_arguments: `main` is called with the list of what stands beside the flags, which else is refused.
      more_help: what --help says behind the flags.
      instead: for names that users may take for flags, what to write instead.
    """
    phi3_start.make_ready()  # as the command has done already, if it is one
    streams.prepare()
    help_text = _help(sys.modules[main.__module__].__doc__ or "", topics, more_help)
    known = {holder.name for holders in topics.values() for holder in holders}
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
            compiled_programs.keep(
                _COMPILATION_CACHE_DIR.value, told=lambda text: print(f"{name}: {text}", file=sys.stderr)
            )
        _show_warnings_as_lines(name)
        return main(*([argv[1:]] if takes_arguments else []))

    code = 1
    with interrupts.handled():
        code = _exit_code(name, lambda: app.run(guarded, flags_parser=parse))
    if (number := interrupts.asked()) is not None:
        interrupts.end_by(number)
    sys.exit(code)


def _exit_code(name: str, run: Callable[[], Any]) -> int:
    """Runs until the program exits; tells errors, and signals but for those that came from who looks on."""
    try:
        try:
            run()
        finally:
            streams.flush()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        if (number := interrupts.asked()) is not None:  # compiled code makes other exceptions of an Interrupt
            if number not in (signal.SIGINT, signal.SIGPIPE):
                print(f"{name}: ended by {number.name}", file=sys.stderr)
        elif isinstance(error, ValueError | OSError | ImportError):
            print(f"{name}: {error}", file=sys.stderr)
        else:
            raise
        return 1
    return 0


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
        elif (text := compiled_programs.repair(str(message))) not in told_warnings:
            told_warnings.add(text)
            tqdm.write(f"{name}: warning: {text}", file=sys.stderr)

    warnings.simplefilter("always", UserWarning)
    warnings.showwarning = show_warning


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
