"""Files that are whole or not there: atomic writes, and loads that verify before they trust.

A checkpoint is an ordinary torch.save file with two entries, {"key": what determines it, "state": …}. Loading checks
the CRC-32 that the zip container keeps of every record, unpickles with weights_only=True (tensors and plain containers,
never code), and compares the key, all before anything of it is used.
"""

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

FORMAT = 1


class CheckpointError(ValueError):
    """A file that cannot be used; the message is one sentence that says why and what to do."""


class WriteError(OSError):
    """A file that could not be written; the one that was there before is untouched."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to the disk, then rename it over `path`.

    Whoever opens `path`, at any moment and after any crash, finds the old file or the new one, whole.
    Raises WriteError for a full disk, a missing permission and the like.
    """
    try:
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)
    except OSError as error:
        raise WriteError(f"cannot write {path} ({error.strerror}); what was there before is intact") from error


def save(path: Path, key: dict, state: dict) -> None:
    """Write a checkpoint atomically; `key` is compared when it is loaded."""
    write_atomically(path, lambda file: torch.save({"format": FORMAT, "key": key, "state": state}, file))


def load(path: Path, key: dict, device: torch.device | str = "cpu") -> dict:
    """The state saved at `path`, once the file is intact, of this format, and saved with an equal `key`.

    Raises CheckpointError otherwise; nothing is executed and nothing changed.
    """
    remedy = "delete it to train again, or choose another --out-dir"
    try:
        with zipfile.ZipFile(path) as archive:
            if damaged := archive.testzip():
                raise CheckpointError(f"{path} is damaged (record {damaged}): {remedy}")
        content = torch.load(path, map_location=device, weights_only=True)
    except CheckpointError:
        raise
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain data, so it was not loaded: {remedy}"
        ) from error
    except Exception as error:  # zipfile and torch answer damage with a dozen kinds of exception
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {remedy}") from error

    if (
        not isinstance(content, dict)
        or content.get("format") != FORMAT
        or not isinstance(content.get("key"), dict)
        or not isinstance(content.get("state"), dict)
    ):
        raise CheckpointError(f"{path} is not a nano_opd checkpoint of format {FORMAT}: {remedy}")
    saved = content["key"]
    different = [
        f"{name} is {saved.get(name)!r} there and {key[name]!r} here" for name in key if saved.get(name) != key[name]
    ]
    if different:
        raise CheckpointError(f"{path} belongs to another configuration ({'; '.join(different)}): {remedy}")
    return content["state"]
