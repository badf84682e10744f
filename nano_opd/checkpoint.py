"""Files that are whole or not there: atomic writes, and loads that verify before they trust.

A checkpoint is an ordinary torch.save file with two entries, {"key": what determines it, "state": …}. Loading checks
the CRC-32 that the zip container keeps of every record, unpickles with weights_only=True (tensors and plain containers,
never code), and compares the key, all before anything of it is used.
"""

import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

FORMAT = 1


class CheckpointError(ValueError):
    """A file that cannot be used; the message is one sentence that says why and what to do."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Call `write` on a temporary file beside `path`, flush it to the disk, then rename it over `path`.

    Whoever opens `path` at any moment sees the old file or the new one, whole. Raises what `write` raises, and OSError.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)  # the rename itself must survive a power cut
    finally:
        os.close(directory)


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
            damaged = archive.testzip()
        if damaged is not None:
            raise CheckpointError(f"{path} is damaged (record {damaged}): {remedy}")
        content = torch.load(path, map_location=device, weights_only=True)
    except (zipfile.BadZipFile, RuntimeError, EOFError) as error:
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {remedy}") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors and plain data, so it was not loaded: {remedy}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not {"key", "state"} <= content.keys():
        raise CheckpointError(f"{path} is not a nano_opd checkpoint of format {FORMAT}: {remedy}")
    different = [
        f"{k} is {content['key'].get(k)!r} there and {v!r} here" for k, v in key.items() if content["key"].get(k) != v
    ]
    if different:
        raise CheckpointError(f"{path} belongs to another configuration ({'; '.join(different)}): {remedy}")
    return content["state"]
