"""A snapshot's directory: its files are regular ones, opened below it and through no link; how they are read."""

from __future__ import annotations

import grp
import os
import re
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from multifd.errors import CallerError, HostError, os_errors
from multifd.wire.packet import Buffer

#: What a file is that is no regular one, in words.
_KINDS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (stat.S_ISLNK, "a link"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a FIFO"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


@dataclass(frozen=True, slots=True)
class Access:
    """Who may read a snapshot besides its owner: a group of the system, by its number, or nobody."""

    group: int | None = None

    @classmethod
    def of(cls, group: str | int | None) -> Access:
        """By the group's name or number.  Raises CallerError where there is none of this name."""
        if isinstance(group, str) and not re.fullmatch("[0-9]{1,10}", group):
            try:
                group = grp.getgrnam(group).gr_gid
            except (KeyError, ValueError):
                raise CallerError(f"there is no group {group!r} here: `getent group` lists them") from None
        number = None if group is None else int(group)
        if number is not None and not 0 <= number < (1 << 32) - 1:  # the last one says "as it is"
            raise CallerError(f"{number} is no group's number")
        return cls(number)

    def give(self, fd: int, mode: int) -> None:
        """The owner has `mode`, whatever the umask; the group may read, and others nothing.  Raises OSError."""
        if self.group is not None:
            os.fchown(fd, -1, self.group)
            mode |= (mode & 0o500) >> 3
        os.fchmod(fd, mode)


class Directory:
    """A directory, held open until `close`; used after that, it is opened again, and has to be the same one."""

    def __init__(self, path: Path, access: Access | None = None) -> None:
        """`path` is where it is by now; `access` is for what is made here.  Raises OSError."""
        self.path = path
        self._access = access or Access()
        self._made: set[str] = set()
        self._fd = os.open(path, _DIRECTORY)
        self._same = _identity(self._fd)

    def close(self) -> None:
        """Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            with suppress(OSError):
                os.close(fd)

    @contextmanager
    def _opened(self) -> Iterator[int]:
        if self._fd >= 0:
            yield self._fd
            return
        fd = os.open(self.path, _DIRECTORY)
        try:
            if _identity(fd) != self._same:
                raise CallerError(f"{self.path} was replaced while it was used: start again")
            yield fd
        finally:
            os.close(fd)

    def give(self) -> None:
        """To its owner, and to who may read.  Raises OSError."""
        with self._opened() as here:
            self._access.give(here, 0o700)

    def look(self, name: str) -> os.stat_result:
        """What the system says of a regular file.  Raises CallerError."""
        with os_errors(self.path / name, CallerError), self._opened() as here:
            found = os.stat(name, dir_fd=here, follow_symlinks=False)
        self._check_regular(name, found)
        return found

    def open(self, name: str) -> int:
        """A regular file's descriptor, for reading.  Raises CallerError."""
        self.look(name)  # before: to open a device may be to do something with it
        with os_errors(self.path / name, CallerError), self._opened() as here:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=here)
        try:
            self._check_regular(name, os.fstat(fd))
        except BaseException:
            os.close(fd)
            raise
        return fd

    def _check_regular(self, name: str, found: os.stat_result) -> None:
        for is_one, kind in _KINDS:
            if is_one(found.st_mode):
                raise CallerError(f"{self.path / name} is {kind}, not a regular file")

    def read(self, name: str, limit: int) -> bytes:
        """All of a file.  Raises CallerError, also for one that is longer than `limit`, bytes."""
        with os_errors(self.path / name, CallerError), os.fdopen(self.open(name), "rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise CallerError(f"{self.path / name} has more than {limit} bytes: it is not a snapshot's")
        return data

    def create(self, name: str) -> int:
        """A new file's descriptor, for reading and writing.  Raises OSError."""
        self._made.add(name)
        with self._opened() as here:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600, dir_fd=here)
        try:
            self._access.give(fd, 0o600)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def write_whole(self, name: str, data: Buffer) -> None:
        """A file that is on the disk when this returns, instead of what there was; or else is as before.

        Raises OSError.
        """
        draft = name + ".new"
        with self._opened() as here:
            with suppress(FileNotFoundError):
                os.unlink(draft, dir_fd=here)  # somebody's who was killed
            try:
                with os.fdopen(self.create(draft), "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self._made.add(name)
                os.replace(draft, name, src_dir_fd=here, dst_dir_fd=here)
            except BaseException:
                with suppress(OSError):
                    os.unlink(draft, dir_fd=here)
                raise
            os.fsync(here)

    def remove_made(self) -> None:
        """Remove what was made here.  Takes no descriptor while it is held open: there may be none left."""
        with suppress(OSError), self._opened() as here:
            for name in self._made:
                with suppress(OSError):
                    os.unlink(name, dir_fd=here)


def _identity(fd: int) -> tuple[int, int]:
    found = os.fstat(fd)
    return found.st_dev, found.st_ino


def open_file(path: Path) -> int:
    """The descriptor of a memory image by its path, links followed: a file or a block device.

    Raises OSError, CallerError where it is neither.
    """
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a FIFO waits for nobody then
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
        os.close(fd)
        raise CallerError(f"{path} is neither a file nor a block device nor a snapshot's directory")
    return fd


def read_head(path: Path, size: int) -> bytes:
    """The first bytes of a memory image, or all of a shorter one.  Raises OSError, CallerError."""
    with os.fdopen(open_file(path), "rb") as file:
        return file.read(size)


def next_data(fd: int, offset: int, length: int) -> int:
    """Where the first byte at or after `offset` is that is not in a hole; the file's length where none is."""
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError:
        # Past the last data, or a file system that knows no holes: then look at everything.
        try:
            end = os.lseek(fd, 0, os.SEEK_END)
            os.lseek(fd, offset, os.SEEK_HOLE)
        except OSError:
            return offset
        return length if end >= length else offset


def read_into(fd: int, offset: int, buffer: memoryview, path: Path, length: int) -> None:
    """Fill `buffer` with the bytes from `offset` on of a file that had `length` bytes.  Raises HostError.

    Read, not mapped: a mapped file that shrinks or fails kills the process with SIGBUS.
    """
    done = 0
    while done < len(buffer):
        at = offset + done
        with os_errors(f"{path} cannot be read at byte {at}"):
            count = os.preadv(fd, [buffer[done:]], at)
        if not count:
            raise HostError(
                f"{path} shrank to {at} bytes while it was read; it had {length}: nothing was confirmed, start again"
            )
        done += count
