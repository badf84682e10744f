"""A run around its loop: its folder, its place in the loop, and what is saved and resumed.

A run's folder holds config.json, metrics.csv, checkpoint.pt and curves.png.
"""

import contextlib
import csv
import io
import os
import sys
import time
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from nano_opd.checks import NumericalFault, require_finite
from nano_opd.gpt import GPT
from nano_opd.policy_gradient import Fraction
from nano_opd.streams import torch_stream
from nano_opd.system import checkpoint, distributed, folder, threads
from nano_opd.system.config import Config
from nano_opd.system.console import say
from nano_opd.system.device import keep_freed_memory, resolve
from nano_opd.system.libraries import tqdm
from nano_opd.system.signals import StopRequest

# Row n describes the student after n updates, then the update that follows. An empty cell was not measured.
COLUMNS = (
    "step",
    "rollouts",
    "seconds",
    "accuracy",
    "greedy_accuracy",
    "kl",
    "entropy",
    "response_length",
    "truncated",
    "loss",
    "grad_norm",
    "clip_fraction",
    "leak_rate",
    "information_gap",
    "reward",
    "zero_groups",
    "weight_clip_fraction",
)
SILENCE = 12  # seconds after which a warm start without a bar prints its next line


@contextlib.contextmanager
def opened(cfg: Config, code: Mapping[str, str]) -> Iterator["Run"]:
    """Hold the folder, the device and the signals of a run for the length of a `with`.

    code  the digest of each file that decides a number of the run: sources.digests of the program

    Raises what folder.claim, checkpoint.load and distributed.group raise, and signals.Interrupted at the end of the
    `with` if a signal came after the last update.
    """
    device = distributed.own_device(resolve(cfg.device))
    with StopRequest() as stop, distributed.group(device), folder.claim(cfg, code):
        keep_freed_memory()
        folder.say_if_nothing_is_resumed(cfg)
        recorded = folder.recorded_threads(cfg) if distributed.rank() == 0 else None
        with threads.chosen(cfg, device, recorded):
            run = Run(cfg, code, device, stop)
            try:
                yield run
            except NumericalFault as fault:
                fault.step = run.step
                raise
            finally:
                run.finish()
            stop.check()


class Run:
    """One run: its configuration, its code, its device, its step, and the rows of metrics.csv so far."""

    def __init__(self, cfg: Config, code: Mapping[str, str], device: torch.device, stop: StopRequest):
        self.cfg = cfg
        self.code = dict(code)
        self.device = device
        self.stop = stop
        self.step = 0
        self.rows = []
        # `resume` fills these in, when the loop begins.
        self.parts = {}  # what has a state, by name
        self.started = 0.0  # when the first step of the run began, on the clock of this process
        self.seconds = 0.0  # from then to the beginning of the step
        self.watch = None
        self.bar = None

    # ---------------------------------------------------------------------------------------------------- warm starts

    def new_model(self, who: str) -> GPT:
        """Return the "teacher" or the "student" with the random weights of the run's seed."""
        torch.manual_seed(torch_stream(self.cfg.seed, f"{who} weights").initial_seed())
        return GPT(self.cfg.gpt(who)).to(self.device)

    def load_warm_start(self, who: str, model: GPT, how) -> bool:
        """Load the weights of a warm start that has been made before; return whether there is one.

        how  the function that makes it: after an edit of it the warm start is another
        """
        path, key = folder.warm_start(self.cfg, who, how)
        try:
            there = path.exists()
        except OSError as error:  # another user's folder
            raise checkpoint.CheckpointError(f"{path} cannot be read ({error.strerror})") from error
        if there:
            state = checkpoint.load(path, key, self.device, {"model": model})
            self._say_if_made_with_other_threads(who, state.get("threads"))
        return there

    def save_warm_start(self, who: str, model: GPT, how) -> None:
        """Keep a warm start for all runs that begin with it. Raises NumericalFault for weights that are not finite."""
        for weight in model.parameters():
            require_finite(f"warm start of the {who}", weight, "--sft-lr is too high")
        path, key = folder.warm_start(self.cfg, who, how)
        checkpoint.save(path, key, {"model": model.state_dict(), "threads": torch.get_num_threads()})

    def _say_if_made_with_other_threads(self, who: str, number: int | None) -> None:
        """Print a line if a warm start was made with another number of threads; it is taken as it is.

        Training it again in a busy hour would change what the next run with the same seed starts from.
        """
        now = torch.get_num_threads()
        if self.device.type == "cpu" and number not in (None, now):
            say(
                f"the {who}'s warm start was made with --threads {number} and is taken as it is; "
                f"training it again with {now} would change its last bits"
            )

    # ------------------------------------------------------------------------------------------------------- the loop

    def resume(self, **parts: nn.Module | torch.optim.Optimizer) -> int:
        """Begin the loop: load the run's last checkpoint, if there is one, and return the step to go on from, else 0.

        It also writes config.json, starts the clock and shows the progress bar.

        parts  what has a state, by name: from here on, each checkpoint holds it

        Raises CheckpointError for a file that is damaged or another run's, and RunFolderError for a run that has made
        more than --steps updates, or had another number of threads.
        """
        self.parts = parts
        self.started = time.monotonic()
        first = 0
        path = self.cfg.run_dir / "checkpoint.pt"
        if path.exists():
            state = checkpoint.load(path, self.cfg.run_key(resumed=True) | self.code, self.device, parts)
            self._require_resumable(state)
            first = state["step"]
            self.started -= state["seconds"]
            self.rows = state["rows"][:first]  # the row of the step itself is measured again
        if distributed.rank() == 0:
            # Not before the checkpoint is known to be this run's. --steps may be others.
            folder.write_config(self.cfg, self.code)
        self.watch = threads.Watch(self.cfg, self.device)
        self.bar = progress_bar(self.cfg.run_dir.name, self.cfg.steps)
        self.bar.update(first)
        return first

    def _require_resumable(self, state: dict) -> None:
        """Raise RunFolderError if a checkpoint's run has gone further, or was made with other threads."""
        if state["step"] > self.cfg.steps:
            raise folder.RunFolderError(
                f"{self.cfg.run_dir} has made {state['step']} updates: give --steps as many or more"
            )
        now = torch.get_num_threads()
        made_with = state.get("threads", now)  # a run from before it was recorded has none
        if made_with != now:
            raise folder.RunFolderError(
                f"{self.cfg.run_dir / 'checkpoint.pt'} was made with {made_with} threads, not {now}: "
                f"add --threads {made_with}, and delete config.json if it names another number"
            )

    def begin(self, step: int) -> None:
        """Begin the row of a step, which describes the student after that many updates."""
        self.step = step
        self.seconds = time.monotonic() - self.started
        row = dict.fromkeys(COLUMNS)
        row["step"] = step
        row["rollouts"] = step * self.cfg.batch_size
        self.rows.append(row)

    def log_evaluation(self, measured: dict[str, float]) -> None:
        """Write what an evaluation measured into the row of its step, and show accuracy and KL."""
        self.rows[-1] |= measured
        self.rows[-1]["seconds"] = round(self.seconds, 3)
        shown = f"accuracy {measured['accuracy']:.3f}  kl {measured['kl']:.3f}"
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            say(f"step {self.step:5d} {self.seconds:7.1f} s  {shown}")

    def log_update(self, measured: dict[str, Tensor | Fraction]) -> None:
        """Write what an update measured into the row of its step; of several processes, the mean.

        Raises KeyError for a name that is no column.
        """
        unknown = set(measured) - set(COLUMNS)
        if unknown:
            raise KeyError(
                f"{', '.join(sorted(unknown))}: no column of metrics.csv; add it to COLUMNS in system/runs.py"
            )
        self.rows[-1] |= distributed.mean(measured)
        self.bar.update()

    def save(self, step: int) -> None:
        """Write checkpoint.pt, then metrics.csv from its rows, each whole or as it was. Rank 0 writes them.

        step  how many updates the saved student has had
        """
        if distributed.rank() > 0:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state["step"] = step
        state["seconds"] = time.monotonic() - self.started
        state["rows"] = self.rows
        state["threads"] = torch.get_num_threads()
        if not os.path.exists(self.cfg.run_dir / "config.json"):  # somebody has deleted it, or the folder
            folder.write_config(self.cfg, self.code)
        checkpoint.save(self.cfg.run_dir / "checkpoint.pt", self.cfg.run_key() | self.code, state)
        table = as_csv(self.rows)
        checkpoint.write_atomically(self.cfg.run_dir / "metrics.csv", lambda file: file.write(table))

    def warn_if_slow(self) -> None:
        """Print a line, once in a run, if its threads wait for cores that other programs use."""
        sentence = self.watch.look()
        if sentence:
            self.bar.clear()
            say(sentence)
            self.bar.refresh()

    def stop_if_asked(self) -> None:
        """Save the state after the update just made and raise Interrupted, if a signal to end has come to any rank."""
        number = distributed.first_value(self.stop.number)
        if number is not None:
            self.stop.number = number
            with distributed.rank_0_first():
                self.save(self.step + 1)
            self.stop.check()

    def finish(self) -> None:
        """Close the progress bar."""
        if self.bar is not None:
            self.bar.close()


def as_csv(rows: list[dict]) -> bytes:
    """Return the rows as metrics.csv."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


# ------------------------------------------------------------------------------------------------------------ progress


def progress_bar(label: str, total: int) -> tqdm:
    """Return a bar with its ETA on a terminal; it shows nothing where the output is a file."""
    hidden = distributed.rank() > 0 or sys.stderr is None or not sys.stderr.isatty()  # a daemon has none
    return tqdm(total=total, desc=label, disable=hidden, leave=False)


class Progress:
    """The progress of a warm start within a `with`: a bar on a terminal, and elsewhere a line now and then."""

    def __init__(self, label: str, total: int, stop: StopRequest):
        self.label = label
        self.total = total
        self.stop = stop

    def __enter__(self):
        self.done = 0
        self.started = time.monotonic()
        self.said = self.started
        self.bar = progress_bar(self.label, self.total)
        self.hidden = self.bar.disable
        if self.hidden:
            say(f"{self.label}: {self.total} updates")
        return self

    def __exit__(self, error, *_):
        self.bar.close()
        if self.hidden and error is None:
            say(f"{self.label}: done after {time.monotonic() - self.started:.0f} s")

    def update(self) -> None:
        """Count an update. Raises Interrupted if a signal to end has come."""
        self.done += 1
        self.bar.update()
        now = time.monotonic()
        if self.hidden and now - self.said >= SILENCE:
            say(f"{self.label}: {self.done} of {self.total} updates after {now - self.started:.0f} s")
            self.said = now
        self.stop.check()
