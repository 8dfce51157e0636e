"""Locks on folders, held by the kernel: they end with the process that holds them, however it ends."""

import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class InUseError(Exception):
    """A folder belongs to another process, which the text names."""


@contextmanager
def own(folder: Path) -> Iterator[None]:
    """Keep other commands out of a folder as long as this one lives. Raises InUseError that names the owner."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            remedy = "wait until it has ended, stop it, or set another OUTPUT_DIR"
            raise InUseError(f"{folder} is in use by {file.read()}: {remedy}") from error
        except OSError as error:
            print(f"{folder} cannot be locked on this file system ({error.strerror}): start no second process in it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield


def check_free(folder: Path) -> None:
    """Raise InUseError where a process owns the folder; nothing is written where none ever did."""
    if (folder / "lock").exists():
        with own(folder):
            pass


@contextmanager
def take_turns(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block about this folder: recipes side by side may end together."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)  # frees the lock
