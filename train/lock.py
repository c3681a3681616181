"""A lock on a folder, so that one process at a time writes into it."""

import contextlib
import errno
import fcntl
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

FILE = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)


@contextlib.contextmanager
def hold(
    folder: Path, notify: Callable[[str], object] = lambda text: None, *, wait: bool = False
) -> Iterator[None]:
    """Locks a folder for this process.

    The kernel frees the lock when the process ends, even if it is killed: then only the file with
    its name stays behind.

    Args:
      folder: that exists.
      notify: called with a message if the file system has no locks, or before waiting.
      wait: wait until the process that holds the lock ends.

    Raises:
      ValueError: another process holds it, and `wait` is false.
    """
    # The file is never removed: a process that has it open would then lock a file without a name.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(folder / FILE, flags, 0o644), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = file.read().strip() or "another process"
            if not wait:
                raise ValueError(
                    f"{folder} is in use by {owner}: wait until it ends, or stop it, or choose "
                    "another --output.folder."
                ) from None
            notify(f"waiting for {owner}, which has {folder} in use")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            notify(f"{folder} is on a file system without locks: let nothing else write in it")
        file.seek(0)
        file.truncate()
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n"
        )
        file.flush()
        yield
        file.truncate(0)
