"""A run's folder, which one process at a time may write to, and the warm starts beside it, which all runs share."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

import torch

from nano_opd import arithmetic, gpt, policy_gradient, rollout, sft, streams, tokenizer
from nano_opd.system import batches, checkpoint, distributed, sources
from nano_opd.system.config import Config
from nano_opd.system.console import say

# What trains a warm start, beside the function that does. After an edit of it a warm start is trained again, but not
# after one of a comment or a docstring.
SOURCES = arithmetic, gpt, policy_gradient, rollout, sft, tokenizer, streams, batches
CODE = " ".join(sources.digest(module.__file__) for module in SOURCES)


class RunFolderError(ValueError):
    """A folder that this run cannot have; the message is one sentence that says why and what to do."""


def warm_start(cfg: Config, who: str, how: Callable) -> tuple[Path, dict]:
    """Return where the warm start of the "teacher" or the "student" is cached, and its key.

    The key is what determines its weights.

    how  the function that trains it
    """
    key = {
        "code": CODE,
        "how": sources.digest_of_function(how),
        "who": who,
        "gpt": dataclasses.asdict(cfg.gpt(who)),
        "steps": cfg.teacher_steps if who == "teacher" else cfg.student_steps,
        "task": cfg.task,
        "digits": cfg.digits,
        "seed": cfg.seed,
        "sft_batch_size": cfg.sft_batch_size,
        "sft_lr": cfg.sft_lr,
        "reference_slot": cfg.reference_slot,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{who}-{cfg.task}{cfg.digits}-seed{cfg.seed}-{digest}.pt"
    return Path(cfg.out_dir) / "warm_starts" / name, key


@contextlib.contextmanager
def claim(cfg: Config, code: Mapping[str, str]) -> Iterator[None]:
    """Hold the run's folder for the length of a `with`; rank 0 holds it for all ranks.

    code  the digest of each file that decides a number of the run (sources.py)

    Raises RunFolderError, and changes nothing, for a folder that cannot be used, that holds another run, or this one
    made by other code or without --resume, or that another process is writing to. A run that failed before its first
    checkpoint left nothing.
    """
    if distributed.rank() > 0:
        yield
        return
    saved = _make_or_read(cfg)
    _require_this_run(cfg, saved, code)
    with _locked(cfg.run_dir):
        _remove_unfinished_files(cfg.run_dir)
        yield


def _make_or_read(cfg: Config) -> dict:
    """Make the run's folder, if it is not there, and return what its config.json says; {} if there is none.

    Raises RunFolderError for a folder that cannot be used, and for a file that is no configuration.
    """
    path = cfg.run_dir / "config.json"
    saved = {}
    try:
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        if path.exists():
            saved = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunFolderError(f"--out-dir {cfg.out_dir}: cannot use {cfg.run_dir} ({error.strerror})") from None
    except (ValueError, RecursionError):  # no JSON, or too deep
        saved = None
    if not isinstance(saved, dict):
        raise RunFolderError(f"{path} is not a run's configuration: delete it, or give another --out-dir")
    return saved


def _require_this_run(cfg: Config, saved: dict, code: Mapping[str, str]) -> None:
    """Raise RunFolderError unless the folder is free, or holds this run, made by this code, which is to be resumed.

    saved  what its config.json says
    """
    folder = cfg.run_dir
    has_checkpoint = (folder / "checkpoint.pt").exists()
    has_metrics = (folder / "metrics.csv").exists()
    if not has_checkpoint and not has_metrics:
        return
    if saved:
        different = checkpoint.differences(saved, cfg.run_key(resumed=True))
        if different:
            raise RunFolderError(f"{folder} holds another run ({different}): give another --out-dir")
        require_same_code(folder, saved, code)
    if not has_checkpoint:
        raise RunFolderError(f"{folder} has metrics.csv and no checkpoint.pt to go on from: move it away to begin anew")
    if not cfg.resume:
        raise RunFolderError(f"{folder} holds this run already: add --resume to continue it, or give another --out-dir")


def _remove_unfinished_files(folder: Path) -> None:
    """Remove what a process that was killed while it wrote has left."""
    for path in folder.glob(".*.tmp"):
        if path.is_file():
            path.unlink(missing_ok=True)


def require_same_code(run_dir: Path, saved: Mapping, code: Mapping[str, str]) -> None:
    """Raise RunFolderError unless a run was made by this code.

    saved  the contents of the run's config.json
    code   the digest of each file that decides a number of the run, as it is now
    """
    there = saved.get("code")
    remedy = "move it away, or give another --out-dir, to train with the code as it is now"
    if not isinstance(there, dict):
        raise RunFolderError(f"{run_dir} does not say which code made it, so it may have been other code: {remedy}")
    changed = sorted(name for name in there.keys() | code.keys() if there.get(name) != code.get(name))
    if changed:
        names = ", ".join(changed[:3])
        if len(changed) > 3:
            names += f" and {len(changed) - 3} more"
        to_go_on = "to go on with the old run, undo the edit"
        raise RunFolderError(f"the code has changed since {run_dir} was made ({names}): {remedy}; {to_go_on}")


def say_if_nothing_is_resumed(cfg: Config) -> None:
    """Print a line if --resume finds no checkpoint: an option may be mistyped or forgotten. Rank 0 does."""
    if cfg.resume and distributed.rank() == 0 and not (cfg.run_dir / "checkpoint.pt").exists():
        say(f"no checkpoint in {cfg.run_dir}: this run starts from the beginning{_nearest_run(cfg)}")


def _nearest_run(cfg: Config) -> str:
    """Return the end of a sentence that names the last run in --out-dir that differs from this one in one option.

    It is empty if there is none: none with a checkpoint, or none that this code can read.
    """
    last = 0.0  # when the last one's checkpoint was written
    sentence = ""
    for path in Path(cfg.out_dir).glob("*/checkpoint.pt"):
        try:
            other = _configuration(path.with_name("config.json"))
            written = path.stat().st_mtime
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
        theirs = other.not_default
        ours = cfg.not_default
        different = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
        if len(different) == 1 and written > last:
            (name,) = different
            flag = "--" + name.replace("_", "-")
            there = getattr(other, name)
            here = getattr(cfg, name)
            last = written
            sentence = f"; {path.parent} differs in {flag} alone ({there} there and {here} here)"
    return sentence


def _configuration(path: Path) -> Config:
    """Return the options that a config.json holds. Raises an error of many types for any other file."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    options = {name: value for name, value in saved.items() if name not in ("code", "threads")}
    return Config(**options)


def write_config(cfg: Config, code: Mapping[str, str]) -> None:
    """Write config.json: the options of this run, its number of threads, and the digests of the code that trains it."""
    content = dataclasses.asdict(cfg)
    content["threads"] = torch.get_num_threads()
    content["code"] = dict(code)
    text = json.dumps(content, indent=2)

    def write(file: BinaryIO) -> None:
        file.write(text.encode())

    checkpoint.write_atomically(cfg.run_dir / "config.json", write)


def recorded_threads(cfg: Config) -> int | None:
    """Return the number of threads of the run that is resumed; None for one that begins.

    If its config.json names none, --threads decides or, without it, PyTorch. Raises RunFolderError if --threads
    gives another number, with which the run would go on to other last bits.
    """
    if not (cfg.run_dir / "checkpoint.pt").exists():
        return None
    path = cfg.run_dir / "config.json"
    saved = {}
    if path.exists():
        saved = json.loads(path.read_text(encoding="utf-8"))
    if "threads" not in saved:
        return torch.get_num_threads() if cfg.threads == "auto" else int(cfg.threads)
    number = saved["threads"]
    if type(number) is not int or number < 1:
        raise RunFolderError(f"{path} is not a run's configuration: delete it, or give another --out-dir")
    if cfg.threads != "auto" and int(cfg.threads) != number:
        raise RunFolderError(
            f"{cfg.run_dir} was made with --threads {number}, and with {cfg.threads} it would go on to other bits: "
            f"leave --threads out, or give another --out-dir"
        )
    return number


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on the folder itself for the length of a `with`.

    It leaves no file behind and dies with its process, however that ends.
    Windows has none, and some network file systems refuse it; there, two runs in one folder are the user's to avoid.
    """
    descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(folder: Path) -> int | None:
    """Lock a folder, and return the open descriptor that holds the lock; None if the folder cannot be opened.

    Raises RunFolderError if another process has locked it.
    """
    try:
        import fcntl

        descriptor = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        remedy = "wait for it, or give another --out-dir"
        raise RunFolderError(f"another process is writing to {folder}: {remedy}") from None
    except OSError:  # a file system without locks
        pass
    return descriptor
