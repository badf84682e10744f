"""Atomic writes, and loads that refuse everything that is not exactly what was saved."""

import os
import pickle
import zipfile

import pytest
import torch

from nano_opd.system import checkpoint
from nano_opd.system.checkpoint import CheckpointError

KEY = {"who": "teacher", "digits": 3}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save(path, KEY, {"weight": torch.arange(1000.0), "rows": [{"step": 0, "kl": None}]})
    return path


def test_round_trip(path):
    state = checkpoint.load(path, KEY)
    assert torch.equal(state["weight"], torch.arange(1000.0)) and state["rows"] == [{"step": 0, "kl": None}]


def test_every_truncation_is_refused(path):
    content = path.read_bytes()
    for size in [0, 1, 10, *range(100, len(content), 97), len(content) - 1]:
        path.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match="truncated or not a checkpoint|damaged"):
            checkpoint.load(path, KEY)


def test_every_flipped_byte_of_the_data_is_refused_or_harmless(path):
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 41):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        try:
            assert torch.equal(checkpoint.load(path, KEY)["weight"], torch.arange(1000.0))  # padding or a time stamp
        except CheckpointError:
            refused += 1
    assert refused > 0.8 * len(range(0, len(content), 41))


def test_a_state_that_does_not_fit_is_refused(path):
    """A model that has changed since, no such part, or half of one."""
    model = torch.nn.Linear(2, 3)
    for state in ({}, {"model": {}}, {"model": torch.nn.Linear(2, 2).state_dict()}, {"model": [1]}, {"model": None}):
        checkpoint.save(path, KEY, state)
        with pytest.raises(CheckpointError, match="does not fit the code as it is now"):
            checkpoint.load(path, KEY, parts={"model": model})
    checkpoint.save(path, KEY, {"model": torch.nn.Linear(2, 3).state_dict()})
    state = checkpoint.load(path, KEY, parts={"model": model})
    assert torch.equal(state["model"]["weight"], model.weight)


class Malicious:
    """A pickle that would run a command when it is loaded."""

    def __reduce__(self):
        return os.system, ("touch executed",)


def foreign_files(path):
    """Ways to be no checkpoint, each with what its message must say."""
    path.write_bytes(b"hello, world\n" * 100)
    yield "truncated or not a checkpoint"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "not a torch archive")
    yield "truncated or not a checkpoint"
    path.write_bytes(pickle.dumps({"format": 1, "key": KEY, "state": {}}))
    yield "truncated or not a checkpoint"
    torch.save(torch.zeros(3), path)
    yield "not a nano_opd checkpoint of format"
    torch.save({"format": 999, "key": KEY, "state": {}}, path)
    yield "not a nano_opd checkpoint of format"
    torch.save({"format": checkpoint.FORMAT, "key": [], "state": {}}, path)
    yield "not a nano_opd checkpoint of format"
    torch.save({"format": checkpoint.FORMAT, "key": KEY, "state": Malicious()}, path)
    yield "more than tensors and plain data"
    torch.save({"format": checkpoint.FORMAT, "key": KEY, "state": torch.nn.Linear(2, 2)}, path)
    yield "more than tensors and plain data"
    checkpoint.save(path, KEY | {"digits": 4}, {})
    yield "digits is 4 there and 3 here"
    path.unlink()
    path.mkdir()
    yield "cannot be read .Is a directory."


def test_foreign_and_malicious_files_are_refused_and_nothing_runs(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    for message in foreign_files(path):
        with pytest.raises(CheckpointError, match=message):
            checkpoint.load(path, KEY)
    assert not (path.parent / "executed").exists()


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_fault_at_any_moment_of_a_write_leaves_the_old_file_and_no_litter(path, monkeypatch, where):
    before = path.read_bytes()

    def disk_full(*args):
        raise OSError(28, "No space left on device")

    def write(file):
        file.write(b"half")
        if where == "write":
            disk_full()

    if where != "write":
        monkeypatch.setattr(os, where, disk_full)
    with pytest.raises(OSError, match="No space left"):
        checkpoint.write_atomically(path, write)
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_reader_never_sees_half_a_file(path):
    """At the moment of every write call, the name still holds the whole old file."""
    before = path.read_bytes()

    def write(file):
        for _ in range(5):
            file.write(b"x" * 100_000)
            file.flush()
            assert path.read_bytes() == before

    checkpoint.write_atomically(path, write)
    assert path.read_bytes() == b"x" * 500_000
