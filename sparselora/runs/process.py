"""The process of a command: streams that take every character, readers that leave, and the signals that end it.

`start` is called before anything heavy is imported, `end` last; between them `cancelled_by_signals` lets a run record
that it was stopped. A program that only imports the package keeps its own streams and handlers.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import errno
import gc
import io
import os
import signal
import sys
import threading
import time
import unicodedata
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

PARENT = "SPARSELORA_PARENT"
"""Variable of the environment: the id of the process with which this one ends."""
_POLL_S = 0.2
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
_IN_ASCII = {
    "→": "->", "←": "<-", "×": "x", "·": "*", "…": "...", "−": "-", "–": "-", "—": "-", "±": "+/-", "‖": "||",
    "≤": "<=", "≥": ">=", "≈": "~", "√": "sqrt", "∂": "d", "∞": "inf", "Σ": "sum ", "⟨": "<", "⟩": ">",
    "Ŵ": "W^", "ᵀ": "^T", "²": "^2", "³": "^3", "½": "1/2", "‘": "'", "’": "'", "“": '"', "”": '"', "§": "section ",
}  # fmt: skip
"""What a terminal or a redirect of another encoding than UTF-8 shows in place of our own symbols."""


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP: stops a run as Ctrl-C does, and is recorded so; only the exit status is another."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def start(program: str) -> None:
    """Make this process one of ours; call it before the imports that take time.

    What its output cannot encode is written in ASCII; a closed stream is none; a reader that leaves does not stop the
    work. Until `run_command` takes over, a signal ends it with one line and the usual status, and no traceback. The
    process also ends soon after the one that `PARENT` names.
    """
    _prepare_streams()

    def leave(number: int, _: FrameType | None) -> NoReturn:
        say_cancelled(program, number)
        os._exit(128 + number)

    _handle(leave)
    # Registered first, hence called last: what Python still does then takes no interrupt.
    atexit.register(_handle, signal.SIG_IGN)
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_handle_as_python_does)
    parent = os.environ.pop(PARENT, "")
    if parent.isdecimal():
        _end_with(int(parent))


def end(status: int) -> NoReturn:
    """End the process with ``status``, at once and without a word if a signal comes while it goes.

    Where the output cannot be written to its end, the status of a success becomes 1.
    """
    try:
        flush_output()
    except OSError as error:
        complain(f"failed: the output cannot be written ({error.strerror})")
        status = status or 1
    _handle(lambda *_: os._exit(status))
    gc.freeze()  # else the interpreter looks through all that torch and transformers have made, several times: 2 s
    sys.exit(status)


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Load modules without collections of garbage, and have later ones leave alone what is there by then.

    torch, peft and transformers make some million objects that stay, in 4.5 s; looking through them again and again
    while they come took 2 s more. For commands: a program that imports the package has its own collections. Of several
    commands in one process only the first sets objects apart: later ones would keep what their predecessors leave.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        if not gc.get_freeze_count():
            gc.freeze()
    finally:
        if was_enabled:
            gc.enable()


_stopped_by: int | None = None


def stopped_by() -> int | None:
    """Return the number of the signal that stopped the block of `cancelled_by_signals` that runs; None without one."""
    return _stopped_by


@contextlib.contextmanager
def cancelled_by_signals() -> Iterator[None]:
    """Raise KeyboardInterrupt for Ctrl-C, and `Terminated` for the first SIGTERM or SIGHUP, in the block.

    A closed terminal sends SIGHUP more than once: what comes after the first must not disturb the record of it. Where
    the block turns the interrupt into another exception, as an import of an extension module does, it is raised again.
    """
    global _stopped_by
    _stopped_by = None

    def stop(number: int, _: FrameType | None) -> NoReturn:
        global _stopped_by
        _stopped_by = number
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        for later in _SIGNALS[1:]:
            signal.signal(later, signal.SIG_IGN)
        raise Terminated(number)

    previous = _handle(stop)
    try:
        yield
    except Exception as error:
        if _stopped_by is None:
            raise
        raise (KeyboardInterrupt() if _stopped_by == signal.SIGINT else Terminated(_stopped_by)) from error
    finally:
        _stopped_by = None
        for number, handler in previous.items():
            signal.signal(number, handler)


def cancel_status(error: KeyboardInterrupt) -> int:
    """Return the exit status of a process that was stopped so: 130 for Ctrl-C, 143 for SIGTERM, 129 for SIGHUP."""
    return 128 + (error.number if isinstance(error, Terminated) else signal.SIGINT)


def say_cancelled(program: str, number: int) -> None:
    """Say on stderr that a signal stopped ``program``."""
    name = "" if number == signal.SIGINT else f" ({signal.Signals(number).name})"
    complain(f"{program}: cancelled{name}")


def complain(line: str) -> None:
    """Write a line to stderr; nothing where that is closed, since nobody reads it."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        print(line, file=sys.stderr, flush=True)


def process_rank() -> int:
    """Return the number of this process among those that `accelerate launch` or torchrun started; 0 if it is alone."""
    return int(os.environ.get("RANK", "0"))


def process_count() -> int:
    """Return how many processes `accelerate launch` or torchrun started; 1 without them."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def flush_output() -> None:
    """Flush stdout.

    Raises:
        OSError: the disk is full. What is left is dropped, so that Python does not complain of it again at exit.
    """
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)
        raise


# --- signals ------------------------------------------------------------------------------------------------------

Handler = Callable[[int, Any], Any] | int


def _handle(handler: Handler) -> dict[int, Any]:
    """Set the handler of every signal that ends a process; return the previous ones.

    What was ignored from the start (``nohup``, a job in the background) stays ignored. Python takes handlers in the
    main thread only; elsewhere nothing is set.
    """
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                previous[number] = signal.signal(number, handler)
    return previous


def _handle_as_python_does() -> None:
    """In a forked worker: our handlers would raise in the midst of whoever forked it."""
    if _handle(signal.SIG_DFL).get(signal.SIGINT):
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end_with(parent: int) -> None:
    """Send this process SIGTERM soon after its parent, the process ``parent``, is gone.

    Systems that keep the number of a parent that is gone (Windows) do not tell.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True, name="parent").start()


# --- streams ------------------------------------------------------------------------------------------------------


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace what an encoding lacks by `_IN_ASCII`, a letter without its accents, the name of a Greek letter, or a
    question mark; for `codecs.register_error`."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    words = []
    for character in error.object[error.start : error.end]:
        name, plain = unicodedata.name(character, ""), unicodedata.normalize("NFKD", character)
        greek = name.rpartition(" ")[2].lower() if name.startswith("GREEK") else "?"
        words.append(_IN_ASCII.get(character) or plain.encode("ascii", "ignore").decode() or greek)
    return "".join(words), error.end


class _Pipe(io.FileIO):
    """A stream whose reader may leave, as ``head`` does: what is written then is dropped."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            # Windows says EINVAL.
            if error.errno == errno.EPIPE or (sys.platform == "win32" and error.errno == errno.EINVAL):
                return memoryview(data).nbytes
            raise


def _prepare_streams() -> None:
    codecs.register_error("in_ascii", _in_ascii)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            # Closed by the caller (`>&-`): else the next file that is opened has its number.
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, number)
            if null != number:
                os.close(null)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == 0 else "w", encoding="utf-8", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream.isatty():
            stream.reconfigure(errors="in_ascii")
            continue
        raw = _Pipe(stream.fileno(), "wb", closefd=False)
        buffering = {"line_buffering": stream.line_buffering, "write_through": stream.write_through}
        setattr(sys, name, io.TextIOWrapper(io.BufferedWriter(raw), stream.encoding, "in_ascii", **buffering))
