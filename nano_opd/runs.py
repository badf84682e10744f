"""A run's folder: config.json, metrics.csv, checkpoint.pt and curves.png, and the table printed at the end."""

import contextlib
import csv
import dataclasses
import io
import json
import os
import signal
from collections.abc import Iterator

import torch
from torch import Tensor

from nano_opd import arithmetic, checkpoint, distributed, plots
from nano_opd.arithmetic import Problem
from nano_opd.config import Config
from nano_opd.evaluate import pass_at_k
from nano_opd.statistics import wilson

# Row n describes the student after n updates, then the update that follows. An empty cell was not measured.
COLUMNS = (
    "step rollouts seconds accuracy greedy_accuracy kl entropy response_length truncated loss grad_norm clip_fraction "
    "leak_rate information_gap reward zero_groups weight_clip_fraction"
).split()


class RunFolderError(ValueError):
    """A folder that this run cannot have; the message is one sentence that says why and what to do."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM arrived; the loop has saved everything, an unfinished warm start nothing."""


class StopRequest:
    """The first SIGINT or SIGTERM, kept until the step is finished; a second one ends the process at once."""

    signal: int | None = None

    def __init__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._keep)

    def _keep(self, number: int, frame) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.signal is not None:
            raise Interrupted


@contextlib.contextmanager
def claim(cfg: Config) -> Iterator[None]:
    """Hold the run's folder, with this run's config.json in it, for the length of a `with`.

    Raises RunFolderError, and changes nothing, for a folder that holds another run, or this one without --resume, or
    that another process is writing to. Rank 0 holds it for all ranks.
    """
    if distributed.rank() > 0:
        yield
        return
    path = cfg.run_dir / "config.json"
    if path.exists():
        try:
            saved = dict(json.loads(path.read_text()))
        except ValueError:
            raise RunFolderError(f"{path} is not a run's configuration: give another --out-dir") from None
        here = cfg.run_key()
        different = [
            f"{name} is {saved.get(name)} there and {here[name]} here" for name in here if saved.get(name) != here[name]
        ]
        if different:
            raise RunFolderError(f"{cfg.run_dir} holds another run ({'; '.join(different)}): give another --out-dir")
        if not cfg.resume:
            raise RunFolderError(
                f"{cfg.run_dir} holds this run already: add --resume to continue it, or give another --out-dir"
            )
    try:
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"--out-dir {cfg.out_dir}: cannot make {cfg.run_dir} ({error.strerror})") from None
    with _locked(cfg):
        for litter in cfg.run_dir.glob(".*.tmp"):  # a process that was killed while it wrote
            litter.unlink()
        if not path.exists():
            text = json.dumps(dataclasses.asdict(cfg), indent=2)
            checkpoint.write_atomically(path, lambda file: file.write(text.encode()))
        yield


@contextlib.contextmanager
def _locked(cfg: Config) -> Iterator[None]:
    """An advisory lock on the folder itself: it leaves no file behind and dies with its process, however that ends."""
    try:
        import fcntl
    except ImportError:  # Windows has no flock; there, two runs in one folder are the user's to avoid
        yield
        return
    folder = os.open(cfg.run_dir, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError:
        raise RunFolderError(
            f"another process is writing to {cfg.run_dir}: wait for it, or give another --out-dir"
        ) from None
    finally:
        os.close(folder)


def load(cfg: Config, device: torch.device) -> dict | None:
    """The state of the last checkpoint, or None before the first. Raises CheckpointError as checkpoint.load does."""
    path = cfg.run_dir / "checkpoint.pt"
    return checkpoint.load(path, cfg.run_key(), device) if path.exists() else None


def save(cfg: Config, state: dict) -> None:
    """checkpoint.pt, then metrics.csv from its rows, each whole or as it was; rank 0 writes them."""
    if distributed.rank() > 0:
        return
    checkpoint.save(cfg.run_dir / "checkpoint.pt", cfg.run_key(), state)
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(state["rows"])
    checkpoint.write_atomically(cfg.run_dir / "metrics.csv", lambda file: file.write(text.getvalue().encode()))


def report(
    cfg: Config, rows: list[dict], problems: list[Problem], teacher_correct: Tensor, correct: Tensor, texts: list[str]
) -> None:
    """Draw curves.png and print what the run did: start → end with 95 % intervals, then five of its answers.

    teacher_correct (problems, 1) and correct (problems, 4) bool, and texts, the student's first answers, are fresh
    samples on held-out problems, drawn after the last update.
    """
    figure = plots.training_curves(rows, cfg.eval_size, cfg.response_cap, cfg.run_dir.name)
    checkpoint.write_atomically(cfg.run_dir / "curves.png", lambda file: figure.savefig(file, format="png", dpi=120))

    n, start, end = len(problems), rows[0], rows[-1]

    def proportion(p: float) -> str:
        low, high = wilson(round(p * n), n)
        return f"{p:.3f} [{low:.3f}, {high:.3f}]"

    print(f"\n{cfg.run_dir.name}: {cfg.steps} updates of {cfg.batch_size} rollouts in {end['seconds']:.0f} s")
    print(f"{n} held-out problems, start → end with 95 % intervals:")
    print(f"  accuracy, sampled        {proportion(start['accuracy'])} → {proportion(end['accuracy'])}")
    print(f"  accuracy, greedy         {proportion(start['greedy_accuracy'])} → {proportion(end['greedy_accuracy'])}")
    for name, label in [
        ("kl", "KL to the teacher, nats"),
        ("entropy", "entropy, nats"),
        ("response_length", "response length, tokens"),
        ("truncated", "truncated, fraction"),
        *([("leak_rate", "answers that cite"), ("information_gap", "I(Y; R | X), nats")] if cfg.privileged else []),
    ]:
        print(f"  {label:<24} {start[name]:.3f} → {end[name]:.3f}")
    print(f"  pass@4                   {pass_at_k(correct, 4):.3f} at the end")
    print(
        f"  {'with reference' if cfg.privileged else 'the teacher'}, sampled".ljust(27)
        + proportion(teacher_correct.float().mean().item())
    )

    print("\nfive sampled answers, wrong ones first:")
    right = correct[:, 0].tolist()
    for i in sorted(range(n), key=right.__getitem__)[:5]:
        broken = arithmetic.first_broken_step(problems[i], texts[i])
        print(f"  {arithmetic.prompt(problems[i])}{texts[i]}   {'right' if right[i] else f'wrong: {broken}'}")
    print(f"\nfiles in {cfg.run_dir}/: config.json, metrics.csv, checkpoint.pt, curves.png")
