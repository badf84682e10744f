"""A run around its loop: its folder, its place in the loop, what is saved and resumed, and how it ends.

A run's folder holds config.json, metrics.csv, checkpoint.pt and curves.png.
"""

import contextlib
import csv
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NoReturn

import torch
from torch import Tensor, nn

from nano_opd.checks import NumericalFault, require_finite
from nano_opd.gpt import GPT
from nano_opd.streams import torch_stream
from nano_opd.system import checkpoint, distributed, folder, threads
from nano_opd.system.config import Config
from nano_opd.system.console import say
from nano_opd.system.device import keep_freed_memory, resolve
from nano_opd.system.libraries import tqdm

# Row n describes the student after n updates, then the update that follows. An empty cell was not measured.
COLUMNS = (
    "step rollouts seconds accuracy greedy_accuracy kl entropy response_length truncated loss grad_norm clip_fraction "
    "leak_rate information_gap reward zero_groups weight_clip_fraction"
).split()
SILENCE = 12  # seconds after which a warm start without a bar prints its next line


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or a closed terminal; the loop has saved everything, an unfinished warm start nothing."""


class StopRequest:
    """The first signal to end within a `with`, kept until the step is finished; a second one acts as before it.

    Only the main thread can catch signals. In another thread no signal is kept, and the program's own handlers stay.
    """

    signal: int | None = None

    def __enter__(self):
        kept, hangup = [signal.SIGINT, signal.SIGTERM], getattr(signal, "SIGHUP", None)  # Windows has none
        if hangup and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup's choice stays
            kept.append(hangup)
        if threading.current_thread() is not threading.main_thread():
            kept = []
        self.before = {number: signal.signal(number, self._keep) for number in kept}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _keep(self, number: int, frame) -> None:
        self.signal = number
        self.__exit__()
        if distributed.rank() == 0:
            with contextlib.suppress(OSError):  # a closed terminal
                os.write(2, b"train.py: stopping after this step; a second signal stops at once\n")

    def check(self) -> None:
        """Raises Interrupted if a signal has arrived."""
        if self.signal is not None:
            raise Interrupted


class LinesOfProgress:
    """What a warm start prints where no bar is shown: a line at the start, one now and then, and one at the end."""

    def __init__(self, label: str, total: int):
        self.label = label
        self.total = total
        self.done = 0
        self.started = time.monotonic()
        self.said = self.started
        say(f"{label}: {total} updates")

    def update(self) -> None:
        """Count an update, and print a line if the last one is SILENCE seconds old."""
        self.done += 1
        now = time.monotonic()
        if now - self.said >= SILENCE:
            say(f"{self.label}: {self.done} of {self.total} updates after {now - self.started:.0f} s")
            self.said = now

    def end(self) -> None:
        """Print how long it took."""
        say(f"{self.label}: done after {time.monotonic() - self.started:.0f} s")


class Run:
    """One run: its configuration, its code, its device, its step, and the rows of metrics.csv so far."""

    def __init__(self, cfg: Config, code: Mapping[str, str], device: torch.device, stop: StopRequest):
        self.cfg, self.code, self.device, self.stop = cfg, dict(code), device, stop
        self.step, self.rows = 0, []

    def cached(self, who: str, train: Callable[[Config, str, GPT], Iterator[None]]) -> GPT:
        """The "teacher" or the "student" as its warm start leaves it: trained once, then read from its file.

        train  trains a new model in place and yields after each update
        """
        path, key = folder.warm_start(self.cfg, who, train)
        with distributed.rank_0_first():
            torch.manual_seed(torch_stream(self.cfg.seed, f"{who} weights").initial_seed())
            model = GPT(self.cfg.gpt(who)).to(self.device)
            try:
                there = path.exists()
            except OSError as error:  # another user's folder
                raise checkpoint.CheckpointError(f"{path} cannot be read ({error.strerror})") from error
            if there:
                state = checkpoint.load(path, key, self.device, {"model": model})
                self._say_if_made_with_other_threads(who, state.get("threads"))
                return model
            with self._bar(f"{who} warm start", key["steps"]) as bar:
                lines = LinesOfProgress(f"{who} warm start", key["steps"]) if bar.disable else None
                for _ in train(self.cfg, who, model):
                    bar.update()
                    if lines:
                        lines.update()
                    self.stop.check()
                if lines:
                    lines.end()
            for weight in model.parameters():
                require_finite(f"warm start of the {who}", weight, "--sft-lr is too high")
            checkpoint.save(path, key, {"model": model.state_dict(), "threads": torch.get_num_threads()})
            return model

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

    def steps(self, parts: dict[str, nn.Module | torch.optim.Optimizer]) -> Iterator[int]:
        """Steps 0 … --steps, or those after the last checkpoint; no update follows the last one.

        parts  name → what has a state that is resumed here and saved at each evaluation

        Raises Interrupted, everything saved, after the step in which a signal came.
        """
        self.parts, self.started, first = parts, time.monotonic(), 0
        path = self.cfg.run_dir / "checkpoint.pt"
        if path.exists():
            state = checkpoint.load(path, self.cfg.run_key(resumed=True) | self.code, self.device, parts)
            if state["step"] > self.cfg.steps:
                raise folder.RunFolderError(
                    f"{self.cfg.run_dir} has made {state['step']} updates: give --steps as many or more"
                )
            made_with = state.get("threads", torch.get_num_threads())  # a run from before it was recorded has none
            if made_with != torch.get_num_threads():
                raise folder.RunFolderError(
                    f"{path} was made with {made_with} threads, not {torch.get_num_threads()}: "
                    f"add --threads {made_with}, and delete config.json if it names another number"
                )
            first, self.started = state["step"], self.started - state["seconds"]
            self.rows = state["rows"][:first]  # the row of the step itself is measured again
        if distributed.rank() == 0:
            # Not before the checkpoint is known to be this run's. --steps may be others.
            folder.write_config(self.cfg, self.code)
        self.watch = threads.Watch(self.cfg, self.device)
        with self._bar(self.cfg.run_dir.name, self.cfg.steps) as self.bar:
            self.bar.update(first)
            for step in range(first, self.cfg.steps + 1):
                self.step, self.seconds = step, time.monotonic() - self.started
                self.rows.append(dict.fromkeys(COLUMNS) | {"step": step, "rollouts": step * self.cfg.batch_size})
                yield step
                if step < self.cfg.steps:
                    self.bar.update()
                    if number := distributed.first_value(self.stop.signal):
                        self.stop.signal = number
                        with distributed.rank_0_first():
                            self._save(step + 1)
                        self.stop.check()

    def is_due(self) -> bool:
        """Whether the student is to be evaluated at this step."""
        return self.step % self.cfg.eval_every == 0 or self.step == self.cfg.steps

    def log(self, measured: dict[str, Tensor]) -> None:
        """What an update measured, as columns of the row of its step; of several processes, the mean."""
        self.rows[-1] |= distributed.mean(measured)

    def log_evaluation(self, measured: dict[str, float]) -> None:
        """The same for an evaluation, which is shown, and followed by a checkpoint."""
        self.rows[-1] |= measured | {"seconds": round(self.seconds, 3)}
        shown = "accuracy {accuracy:.3f}  kl {kl:.3f}".format(**measured)
        self.bar.set_postfix_str(shown)
        if self.bar.disable:
            say(f"step {self.step:5d} {self.seconds:7.1f} s  {shown}")
        self._save(self.step)
        if slow := self.watch.look():
            self.bar.clear()
            say(slow)
            self.bar.refresh()

    def _save(self, step: int) -> None:
        """checkpoint.pt, then metrics.csv from its rows, each whole or as it was; rank 0 writes them."""
        if distributed.rank() > 0:
            return
        states = {name: part.state_dict() for name, part in self.parts.items()}
        state = {"step": step, "seconds": time.monotonic() - self.started, "rows": self.rows} | states
        if not os.path.exists(self.cfg.run_dir / "config.json"):  # somebody has deleted it, or the folder
            folder.write_config(self.cfg, self.code)
        state["threads"] = torch.get_num_threads()
        checkpoint.save(self.cfg.run_dir / "checkpoint.pt", self.cfg.run_key() | self.code, state)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        checkpoint.write_atomically(self.cfg.run_dir / "metrics.csv", lambda file: file.write(text.getvalue().encode()))

    def _bar(self, label: str, total: int) -> tqdm:
        """A bar with its ETA on a terminal; nothing where the output is a file."""
        hidden = distributed.rank() > 0 or not (sys.stderr and sys.stderr.isatty())  # a daemon has none
        return tqdm(total=total, desc=label, disable=hidden, leave=False)


@contextlib.contextmanager
def start(cfg: Config, code: Mapping[str, str]) -> Iterator[Run]:
    """A run in its folder, among its ranks. Its known ways to fail end the program: one sentence and an exit code.

    code  the digest of each file that decides a number of the run: sources.digests of the program
    """
    run = None

    def end(code: int, sentence: str) -> NoReturn:
        if distributed.rank() == 0:
            say(f"train.py: {sentence}", sys.stderr)
        sys.exit(code)

    again = f"the same command with --resume continues {cfg.run_dir}"
    try:
        device = distributed.own_device(resolve(cfg.device))
        with StopRequest() as stop, distributed.group(device), folder.claim(cfg, code):
            keep_freed_memory()
            folder.say_if_nothing_is_resumed(cfg)
            recorded = folder.recorded_threads(cfg) if distributed.rank() == 0 else None
            with threads.chosen(cfg, device, recorded):
                run = Run(cfg, code, device, stop)
                yield run
                stop.check()  # a signal after the last update
    except (checkpoint.CheckpointError, checkpoint.WriteError, folder.RunFolderError) as error:
        end(2, str(error))
    except NumericalFault as error:
        kept = f"The last good state, if one was saved, is in {cfg.run_dir / 'checkpoint.pt'}"
        end(1, f"step {run.step}: {error}. {kept}")
    except distributed.RankLost as error:
        end(1, f"{error}; {again}")
    except (MemoryError, RuntimeError) as error:
        of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not of_memory and "DefaultCPUAllocator" not in str(error):  # torch has no type for a CPU without memory
            raise
        end(2, f"out of memory: choose a lower --batch-size, --eval-size or width; {again}")
    except KeyboardInterrupt:
        end(130, f"stopped at once; {again}")
    except Interrupted:
        end(128 + stop.signal, f"stopped; {again}")
