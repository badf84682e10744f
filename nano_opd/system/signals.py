"""Keep the first signal that asks a run to end until its step is finished."""

import contextlib
import os
import signal
import threading

from nano_opd.system import distributed


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or a closed terminal: the loop has saved everything, an unfinished warm start nothing."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class StopRequest:
    """The first signal to end within a `with`, kept until somebody asks for it. A second one acts as before the `with`.

    Only the main thread can catch signals. In another thread no signal is kept, and the program's own handlers stay.
    """

    number: int | None = None  # of the signal that has come

    def __enter__(self):
        self.before = {}
        if threading.current_thread() is threading.main_thread():
            for number in signals_to_keep():
                self.before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *_):
        self._restore()

    def _keep(self, number: int, frame) -> None:
        self.number = number
        self._restore()
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(2, b"train.py: stopping after this step; a second signal stops at once\n")

    def _restore(self) -> None:
        """Give the signals back to the handlers that they had before."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)


def signals_to_keep() -> list[int]:
    """Return the signals that ask a program to end; a hang-up only if nobody has chosen to ignore it, as nohup does."""
    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)  # Windows has none
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:
        numbers.append(hangup)
    return numbers
