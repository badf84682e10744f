"""Files that are whole or not there: atomic writes, and loads that verify before they trust.

A checkpoint is a torch.save file of {"key": what determines it, "state": …, "digest": of both}. Before anything of it
is used, loading checks the CRC-32 of every record, unpickles tensors and plain containers only, never code, and
compares the digest and the key: an edited file would be another run's, or crash in the middle of an update.
"""

import contextlib
import hashlib
import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

FORMAT = 2
REMEDY = "delete it to train again, or choose another --out-dir"


class CheckpointError(ValueError):
    """A file that cannot be used; the message is one sentence that says why and what to do."""


class WriteError(OSError):
    """A file that could not be written; the one that was there before is untouched."""


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file so that, whatever happens, `path` is the old file or the new one, and whole.

    write  writes the content into a buffer in memory, which then goes to a temporary file, is flushed and renamed

    Raises WriteError for a full disk, a missing permission and the like.
    """
    content = io.BytesIO()  # torch's zip writer, writing to the disk itself, hides a full one behind another error
    write(content)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "xb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(f"cannot write {path} ({error.strerror}); what was there before is intact") from error
    with contextlib.suppress(OSError):  # Windows and some network file systems open or flush no folder
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)  # the rename itself must survive a power cut
        finally:
            os.close(directory)


def save(path: Path, key: dict, state: dict) -> None:
    """Write a checkpoint atomically; `key` is compared when it is loaded."""
    content = {"format": FORMAT, "key": key, "state": state, "digest": digest([key, state])}

    def write(file: BinaryIO) -> None:
        torch.save(content, file)

    write_atomically(path, write)


def digest(content) -> str:
    """Return the SHA-256 of nested containers of tensors and plain values."""
    if isinstance(content, torch.Tensor):
        part = f"{content.dtype} {tuple(content.shape)}".encode()
        part += content.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()  # drops nothing: it is only read
    elif isinstance(content, dict):
        part = "".join(f"{name!r}: {digest(value)}" for name, value in content.items()).encode()
    elif isinstance(content, (list, tuple)):
        part = "".join(digest(value) for value in content).encode()
    else:
        part = repr(content).encode()
    return hashlib.sha256(part).hexdigest()


def load(path: Path, key: dict, device: torch.device | str = "cpu", parts: dict | None = None) -> dict:
    """Return the state saved at `path`, of which each of `parts`, such as a model, has then loaded what has its name.

    Raises CheckpointError unless the file is intact, was saved with an equal `key`, and fits the parts.
    """
    content = _read(path, device)
    _require_as_saved(path, content)
    state = content["state"]
    different = differences(content["key"], key)
    if different:
        raise CheckpointError(f"{path} belongs to another configuration ({different}): {REMEDY}")
    if parts is not None:
        try:
            for name, part in parts.items():
                part.load_state_dict(state[name])
        except Exception as error:  # another model's, since the code was edited
            raise CheckpointError(f"{path} does not fit the code as it is now: {REMEDY}") from error
    return state


def _read(path: Path, device: torch.device | str):
    """Return what a file holds, if it is tensors and plain data. Raises CheckpointError for any other file."""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged is None:
            return torch.load(path, map_location=device, weights_only=True)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path} holds more than tensors and plain data: {REMEDY}") from error
    except Exception as error:  # zipfile and torch answer damage with a dozen kinds of exception
        raise CheckpointError(f"{path} is truncated or not a checkpoint: {REMEDY}") from error
    raise CheckpointError(f"{path} is damaged (record {damaged}): {REMEDY}")


def _require_as_saved(path: Path, content) -> None:
    """Raise CheckpointError unless the content of a file is what `save` has written."""
    foreign = CheckpointError(f"{path} is not a nano_opd checkpoint of format {FORMAT}: {REMEDY}")
    if not isinstance(content, dict):
        raise foreign
    key = content.get("key")
    state = content.get("state")
    if not isinstance(key, dict) or not isinstance(state, dict):
        raise foreign
    if repr(content.get("format")) != str(FORMAT):  # repr, since a tensor may stand there
        raise foreign
    if digest([key, state]) != content.get("digest"):
        raise CheckpointError(f"{path} was edited after it was saved: {REMEDY}")


def differences(there: dict, here: dict) -> str:
    """Return what of `here` is another value there, in words; empty where nothing is."""
    names = [name for name in here if there.get(name) != here[name]]
    said = [f"{name} is {there.get(name)} there and {here[name]} here" for name in names[:3]]
    if len(names) > 3:
        said.append(f"and {len(names) - 3} more")
    return "; ".join(said)
