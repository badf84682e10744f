"""A run's folder, which one process at a time may write to, and the warm starts beside it, which all runs share."""

import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from nano_opd import arithmetic, gpt, policy_gradient, rollout, sft, streams, tokenizer
from nano_opd.system import checkpoint, distributed, sources
from nano_opd.system.config import Config
from nano_opd.system.console import say

# What trains a warm start, beside the function that does. After an edit of it a warm start is trained again, but not
# after one of a comment or a docstring.
SOURCES = arithmetic, gpt, policy_gradient, rollout, sft, tokenizer, streams
CODE = " ".join(sources.digest(module.__file__) for module in SOURCES)


class RunFolderError(ValueError):
    """A folder that this run cannot have; the message is one sentence that says why and what to do."""


def warm_start(cfg: Config, who: str, how: Callable) -> tuple[Path, dict]:
    """Where the warm start of the "teacher" or the "student" is cached, and its key: what determines its weights.

    how  the function that trains it
    """
    names = ("task", "digits", "seed", "sft_batch_size", "sft_lr", "reference_slot")
    key = {"code": CODE, "who": who, "gpt": dataclasses.asdict(cfg.gpt(who)), "steps": getattr(cfg, f"{who}_steps")}
    key |= {name: getattr(cfg, name) for name in names} | {"how": sources.digest_of_function(how)}
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    return Path(cfg.out_dir) / "warm_starts" / f"{who}-{cfg.task}{cfg.digits}-seed{cfg.seed}-{digest}.pt", key


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
    path = cfg.run_dir / "config.json"
    try:
        cfg.run_dir.mkdir(parents=True, exist_ok=True)
        there = [name for name in ("checkpoint.pt", "metrics.csv") if (cfg.run_dir / name).exists()]
        saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    except OSError as error:
        raise RunFolderError(f"--out-dir {cfg.out_dir}: cannot use {cfg.run_dir} ({error.strerror})") from None
    except (ValueError, RecursionError):
        saved = None
    if not isinstance(saved, dict):
        raise RunFolderError(f"{path} is not a run's configuration: delete it, or give another --out-dir")
    if there and saved and (different := checkpoint.differences(saved, cfg.run_key(resumed=True))):
        raise RunFolderError(f"{cfg.run_dir} holds another run ({different}): give another --out-dir")
    if there and saved:
        require_same_code(cfg.run_dir, saved, code)
    if there == ["metrics.csv"]:
        raise RunFolderError(
            f"{cfg.run_dir} has metrics.csv and no checkpoint.pt to go on from: move it away to begin anew"
        )
    if there and not cfg.resume:
        raise RunFolderError(
            f"{cfg.run_dir} holds this run already: add --resume to continue it, or give another --out-dir"
        )
    with _locked(cfg.run_dir):
        for litter in cfg.run_dir.glob(".*.tmp"):  # a process that was killed while it wrote
            if litter.is_file():
                litter.unlink(missing_ok=True)
        yield


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
    found = []
    for checkpoint_file in Path(cfg.out_dir).glob("*/checkpoint.pt"):
        try:
            saved = json.loads(checkpoint_file.with_name("config.json").read_text(encoding="utf-8"))
            other = Config(**{name: value for name, value in saved.items() if name not in ("code", "threads")})
            written = checkpoint_file.stat().st_mtime
        except (OSError, ValueError, TypeError, AttributeError, RecursionError):
            continue
        theirs, ours = other.not_default, cfg.not_default
        different = [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]
        if len(different) == 1:
            found.append((written, checkpoint_file.parent, different[0], other))
    if not found:
        return ""
    _, folder, name, other = max(found, key=lambda run: run[0])
    flag = "--" + name.replace("_", "-")
    return f"; {folder} differs in {flag} alone ({getattr(other, name)} there and {getattr(cfg, name)} here)"


def write_config(cfg: Config, code: Mapping[str, str]) -> None:
    """Write config.json: the options of this run, its number of threads, and the digests of the code that trains it."""
    options = dataclasses.asdict(cfg) | {"threads": torch.get_num_threads()}
    text = json.dumps(options | {"code": dict(code)}, indent=2)
    checkpoint.write_atomically(cfg.run_dir / "config.json", lambda file: file.write(text.encode()))


def recorded_threads(cfg: Config) -> int | None:
    """Return the number of threads of the run that is resumed; None for one that begins.

    A run whose config.json names none was made with the number that PyTorch takes. Raises RunFolderError if --threads
    gives another number, with which the run would go on to other last bits.
    """
    path = cfg.run_dir / "config.json"
    if not (cfg.run_dir / "checkpoint.pt").exists():
        return None
    saved = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
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
    """An advisory lock on the folder itself: it leaves no file behind and dies with its process, however that ends.

    Windows has none, and some network file systems refuse it; there, two runs in one folder are the user's to avoid.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunFolderError(
                    f"another process is writing to {folder}: wait for it, or give another --out-dir"
                ) from None
        yield
