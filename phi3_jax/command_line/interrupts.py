"""What ends a program from outside: Ctrl-C (SIGINT), SIGTERM, SIGHUP when a terminal closes, a pipe without a reader.

    signal -> our handler, in the main thread: raises Interrupt, or inside of `interruptible` sets a flag
           -> a byte in a pipe, at once, which the watcher reads, a thread

The first Ctrl-C ends a program in good order; a second one by its default action, at once. Handlers run between two
steps of Python only, so while the main thread is inside of a compiler the watcher sees to that.

An exception can get lost: Python drops those that are raised in __del__ and in callbacks, and compiled code makes other
exceptions of them. An Interrupt that disappears before `handled` has it therefore comes back, from the main thread's
next step. A signal that our parent ignores, as nohup does SIGHUP, stays ignored.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_POKE = signal.SIGURG  # wakes the main thread; without a handler it does nothing
_HANDLED, _LOOK = 0, 255  # bytes in the pipe beside the numbers of signals
_PERIOD = 0.05  # seconds between pokes, until the main thread has taken notice


class Interrupt(KeyboardInterrupt):
    """Raised in the main thread; comes back if it is lost."""

    def __del__(self) -> None:
        _interrupts.on_end_of_exception()


class _Interrupts:
    """The state of this process.

    Attributes:
      asked: by which signal the program was asked to end; None if it was not.
    """

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self._raises = False  # else a flag is enough, or nothing is handled
        self._is_lost = False
        self._before: dict[int, Any] = {}  # the handlers that ours stand for
        self._writing = -1

    def install(self) -> None:
        """From now on our handlers are called, in the main thread, which calls this."""
        self._wakeup = signal.set_wakeup_fd(-1)  # raises ValueError in another thread, before anything is changed
        self.asked, self._raises, self._is_lost = None, True, False
        self._main = threading.get_ident()
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._watch, args=[reading], daemon=True).start()
        self._hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._before[_POKE] = signal.signal(_POKE, self._on_poke)
        for number in _SIGNALS:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._before[number] = signal.signal(number, self._on_signal)

    def uninstall(self) -> None:
        """The handlers are what they were."""
        self._raises = False
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        signal.set_wakeup_fd(self._wakeup)
        sys.unraisablehook = self._hook
        writing, self._writing = self._writing, -1
        os.close(writing)  # which ends the watcher

    @property
    def is_installed(self) -> bool:
        return self._writing >= 0

    @contextlib.contextmanager
    def flagged(self) -> Iterator[None]:
        """Inside, nothing is raised."""
        before, self._raises = self._raises, False
        try:
            yield
        finally:
            self._raises = before

    def ask(self, number: signal.Signals) -> None:
        """Asks the program to end, from any thread."""
        if self.asked is None and self.is_installed:
            self.asked = number
            if threading.get_ident() != self._main:
                self._is_lost = True
                self._note(_LOOK)
            elif self._raises:
                raise Interrupt

    def forget(self) -> None:
        """Ctrl-C has had its effect, and the program goes on; raises Interrupt if another signal wants its end."""
        if self.asked is not None and self.asked != signal.SIGINT:
            raise Interrupt
        self.asked, self._is_lost = None, False
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, self._on_signal)

    def settle(self) -> None:
        """Raises nothing any more."""
        self._raises = False

    def on_end_of_exception(self) -> None:
        """An Interrupt is gone."""
        if self._raises and self.asked is not None:
            self._is_lost = True
            self._note(_LOOK)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._note(_HANDLED)
        if signal.SIGINT in self._before:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
        is_first = self.asked is None
        if is_first or number != signal.SIGINT:
            self.asked = signal.Signals(number)
        if is_first and self._raises:
            raise Interrupt

    def _on_poke(self, number: int, frame: FrameType | None) -> None:
        if self._is_lost:
            self._is_lost = False
            if self._raises:
                raise Interrupt

    def _on_unraisable(self, told: sys.UnraisableHookArgs) -> None:
        if not isinstance(told.exc_value, Interrupt):  # which comes back
            self._hook(told)

    def _note(self, byte: int) -> None:
        with contextlib.suppress(OSError):  # full, which is enough to wake the watcher
            os.write(self._writing, bytes([byte]))

    def _watch(self, reading: int) -> None:
        is_waiting = False  # for our handler
        while True:
            patience = _PERIOD if is_waiting or self._is_lost else None
            if not select.select([reading], [], [], patience)[0]:
                signal.pthread_kill(self._main, _POKE)
                continue
            if not (noted := os.read(reading, 4096)):
                os.close(reading)
                return
            for byte in noted:
                if byte == signal.SIGINT and is_waiting:
                    end_by(signal.SIGINT)
                is_waiting = byte in _SIGNALS or (is_waiting and byte != _HANDLED)


_interrupts = _Interrupts()


def asked() -> signal.Signals | None:
    """By which signal the program was asked to end; None if it was not."""
    return _interrupts.asked


def ask(number: signal.Signals) -> None:
    """Asks the program to end, as if this signal had come; in the main thread this may raise Interrupt."""
    _interrupts.ask(number)


def forget() -> None:
    """Ctrl-C has had its effect, and the program goes on. Raises Interrupt if another signal wants its end."""
    _interrupts.forget()


def settle() -> None:
    """An Interrupt has had its effect, and the program ends by itself: nothing is raised any more."""
    _interrupts.settle()


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Inside, signals raise Interrupt, which ends here; `asked` tells afterwards which one it was."""
    try:
        _interrupts.install()
        try:
            yield
        finally:
            _interrupts.uninstall()
    except Interrupt:
        if _interrupts.is_installed:
            _interrupts.uninstall()


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, signals do not raise, but make the yielded function return True.

    A second Ctrl-C ends the process. Unless `forget` is called, the program ends by the signal when `main` returns.
    """
    with contextlib.ExitStack() as stack:
        if not _interrupts.is_installed:  # not in a program, but in Python
            stack.callback(setattr, _interrupts, "asked", None)
            stack.enter_context(handled())
        stack.enter_context(_interrupts.flagged())
        yield lambda: _interrupts.asked is not None


def end_by(number: signal.Signals) -> None:
    """Ends the process at once. Of SIGINT it dies, or shells would go on with their loops; else the exit code tells."""
    if number == signal.SIGINT:
        # Not `signal.signal`, which only the main thread may call.
        libc = ctypes.CDLL(None)
        libc.signal.argtypes, libc.signal.restype = [ctypes.c_int, ctypes.c_void_p], ctypes.c_void_p
        libc.signal(number, None)  # SIG_DFL
        os.kill(os.getpid(), number)
    os._exit(128 + number)


def _forget_in_child() -> None:
    """A fork, whose bytes would go into our pipe."""
    if _interrupts.is_installed:
        _interrupts.uninstall()


os.register_at_fork(after_in_child=_forget_in_child)
