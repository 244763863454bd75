"""Plugins' code in a process of its own, where it may crash, hang, print and take memory.

The child calls the module's `child(task, data, say)`, and what it `say`s comes out here, one by one.  It finds the
same packages: it has this process's sys.path, a one-file build's too.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from importlib import import_module
from typing import Any, Self

from multifd.codec import discovery
from multifd.crew import Crew, undone
from multifd.errors import CompressorError, os_errors
from multifd.log import escaped
from multifd.wire.packet import Buffer

#: Seconds in which a child says something, or else it hangs.
LIMIT = 10.0
#: Characters of the last line that it printed which are told, and bytes in which that is looked for.
LAST_LINE = 200
TAIL = 4096
CHILD = (
    "import json, os, sys; task = json.loads(os.pread(0, os.fstat(0).st_size, 0)); sys.path[:] = task['path']; "
    "from multifd.codec.children import begin; begin(task)"
)

Say = Callable[[Mapping[str, Any]], None]


class Died(CompressorError):
    """A child has ended before it was done: how, and its last words."""


class Memory:
    """Bytes that several children see, none a copy."""

    def __init__(self, buffers: Iterable[Buffer]) -> None:
        self.descriptor = os.memfd_create("sample")
        with open(self.descriptor, "wb", closefd=False) as file:
            file.writelines(buffers)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)


def answers(
    module: str,
    task: Mapping[str, Any],
    *,
    memory: Memory | None = None,
    limit: float = LIMIT,
    crew: Crew | None = None,
) -> Iterator[dict[str, Any]]:
    """What a child says, until it is done.

    Each answer comes within `limit` seconds of the one before.  The end of the crew, and of this process, ends the
    child.  Raises Died where it crashes, exits or hangs, Cancelled.
    """
    import select
    import signal
    import subprocess

    crew = crew or Crew()
    with ExitStack() as stack:
        crew.check()
        with os_errors("a child process for a compressor"):
            given = stack.enter_context(Memory([json.dumps(_whole(module, task, memory)).encode()]))
            said, say = os.pipe()
            out = stack.enter_context(open(said, "rb", 0))
            with open(say, "wb", 0):
                child = subprocess.Popen(
                    [sys.executable, "-P", "-c", CHILD, str(say)],
                    stdin=given.descriptor,
                    stdout=subprocess.PIPE,  # what it prints, or its library, is no answer
                    stderr=subprocess.STDOUT,
                    bufsize=0,
                    pass_fds=[say, *([memory.descriptor] if memory else [])],
                    start_new_session=True,
                )
        assert child.stdout is not None
        printed = stack.enter_context(child.stdout)
        group = [child.pid]

        def kill() -> None:  # and what it has started; once
            with suppress(IndexError, ProcessLookupError):
                os.killpg(group.pop(), signal.SIGKILL)

        stack.callback(child.wait)
        stack.enter_context(undone(kill))
        crew.on_end(kill)
        words = b""
        begun = b""
        done = False
        poll = select.poll()
        poll.register(out, select.POLLIN)
        poll.register(printed, select.POLLIN)
        deadline = time.monotonic() + limit
        while True:
            ready = [descriptor for descriptor, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000)]
            if out.fileno() not in ready and time.monotonic() >= deadline:  # it may print for ever
                raise Died(_with_words(f"it did not answer within {limit:g} s", words))
            if printed.fileno() in ready:
                if text := os.read(printed.fileno(), 65536):
                    words = (words + text)[-TAIL:]
                else:
                    poll.unregister(printed)
            if out.fileno() in ready:
                text = os.read(out.fileno(), 65536)
                if not text:
                    break
                deadline = time.monotonic() + limit
                *lines, begun = (begun + text).split(b"\n")
                try:
                    found = list(map(json.loads, lines))
                except ValueError:
                    raise Died(_with_words("it wrote into its connection to this process", words)) from None
                done = found[-1:] == [None]
                yield from found[: -1 if done else None]
        crew.check()
        if not done:
            with suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
            os.set_blocking(printed.fileno(), False)  # another process of its may hold it open
            with suppress(BlockingIOError):
                words += os.read(printed.fileno(), 65536)
            raise Died(_with_words(f"its process died ({_how(child.returncode)})", words))


def _whole(module: str, task: Mapping[str, Any], memory: Memory | None) -> dict[str, Any]:
    return {
        "path": sys.path,
        "module": module,
        "plugins": [each.path for each in discovery.files],
        "memory": memory.descriptor if memory else None,
        "task": task,
    }


def _how(status: int | None) -> str:
    import signal

    if status is None:
        return "it closed its connection to this one"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _with_words(how: str, words: bytes) -> str:
    lines = [line for line in words.decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        return how
    last = escaped(lines[-1].strip())
    return f"{how}: {last[: LAST_LINE - 3] + '...' if len(last) > LAST_LINE else last}"


def begin(whole: Mapping[str, Any]) -> None:
    """The child's part."""
    for path in whole["plugins"]:
        discovery.add_file(path)
    data = memoryview(b"")
    if whole["memory"] is not None and (length := os.fstat(whole["memory"]).st_size):
        data = memoryview(mmap.mmap(whole["memory"], length, access=mmap.ACCESS_READ))
    with open(int(sys.argv[1]), "wb", 0) as out:
        child = os.getpid()

        def say(answer: Mapping[str, Any] | None) -> None:
            if os.getpid() != child:  # a plugin has forked, and here comes the other one
                os._exit(0)
            out.write(json.dumps(answer).encode() + b"\n")

        import_module(whole["module"]).child(whole["task"], data, say)
        say(None)
    # Not through what a plugin does at exit: it has answered.
    sys.stderr.flush()
    os._exit(0)
