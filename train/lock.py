"""One process at a time writes into a run's folder."""

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
def hold(folder: Path, notify: Callable[[str], object] = lambda text: None) -> Iterator[None]:
    """Keeps a folder for this process; the kernel frees it when the process ends, however it does.

    So a killed run leaves no lock behind, only the file with its name in it.

    Args:
      folder: exists.
      notify: told where the file system knows no locks.

    Raises:
      ValueError: another process holds it.
    """
    # Never removed: another process may have it open, and would then lock a file without a name.
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
    with os.fdopen(os.open(folder / FILE, flags, 0o644), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{folder} is in use by {file.read().strip() or 'another process'}: wait until it "
                "ends, or stop it, or choose another --run.folder."
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            notify(f"{folder} is on a file system without locks: start no second run in it")
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n"
        )
        file.flush()
        yield
        file.truncate(0)
