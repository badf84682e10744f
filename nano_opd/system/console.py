"""How what a program says reaches any console, and that no console can end a run."""

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TextIO

PATIENCE = 30  # seconds


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one sentence and exit code 2, without the page of usage."""

    speaks = True  # one of several processes does

    def error(self, message: str):
        if not self.speaks:
            time.sleep(PATIENCE)  # the launcher ends all with the first to end, so the one that speaks is to be first
            self.exit(2)
        self.exit(2, f"{self.prog}: {message}\n")


def typed_path(text: str | Path) -> Path:
    """Return a path with the home folder for a ~ at its start, which a shell leaves in --out-dir=~/runs.

    Raises ValueError where there is no such home.
    """
    expanded = os.path.expanduser(text)
    if expanded.startswith("~"):
        raise ValueError(f"{text}: there is no such home folder; ./{text} is a folder of that name")
    return Path(expanded)


def accept_any_text() -> None:
    """Let stdout show ? for a λ or an → that its encoding lacks, as on a redirected Windows console."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's has no encoding
        sys.stdout.reconfigure(errors="replace")


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a line. Where it cannot be written (a closed pipe, a full disk), it and all that follow are dropped."""
    if stream is None:
        stream = sys.stdout
    try:
        print(text, file=stream, flush=True)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # or the flush at exit would fail again
        if stream is not sys.stderr:
            say(f"stdout cannot be written ({error.strerror}); the run goes on, and its files hold all", sys.stderr)
