"""What works on this machine: every compressor asked in a child process of its own."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from multifd.codec import discovery
from multifd.codec.discovery import Provider, add_file, choose, installed, providers
from multifd.codec.hooks import HOOK_ERRORS
from multifd.codec.measure import measure
from multifd.codec.selection import load, why_not
from multifd.errors import MultifdError, describe
from multifd.hookspecs import ENTRY_POINT_GROUP
from multifd.wire.flags import DEFAULT_PAGE_SIZE, METHODS, THIRD_PARTY_FLAGS

#: Seconds a probe in a child process may take before it counts as hanging.
PROBE_TIMEOUT = 10.0


def preference(row: Mapping[str, Any]) -> tuple[bool, bool, str]:
    """The order of compressors that make the same bytes: hardware first, one that has nothing to say against itself."""
    return not row["hardware"], row["reason"] != "", row["name"]


def taken_twice(flag: int, rows: Sequence[Mapping[str, Any]]) -> str:
    """Why a packet with this flag cannot be read by any of these, where their methods differ; or empty."""
    mine = [row for row in rows if row["flag"] == flag]
    if len({row["method"] for row in mine}) < 2:
        return ""
    found = providers(ENTRY_POINT_GROUP)
    methods = " and ".join(sorted({row["method"] for row in mine}))
    owners = choose(each for row in mine for each in found[row["name"]])
    return f"flag {flag} is taken by the methods {methods}, of {owners}"


def compressors() -> list[dict[str, Any]]:
    """Every installed compressor with its facts and probe, as `multifd compressors` shows them.

    Each is loaded and probed in a child process, so that one that is broken, hangs, prints or
    crashes is a row with its reason.  One that is turned off is a row, and not loaded.
    """
    found = probe_all(sorted({each.name for each in installed(ENTRY_POINT_GROUP)}))
    for row in found:
        if row["flag"] in THIRD_PARTY_FLAGS and (taken := taken_twice(row["flag"], found)):
            row["reason"] = "; ".join(filter(None, (row["reason"], taken)))
    return found


def probe_all(
    names: Sequence[str],
    timeout: float = PROBE_TIMEOUT,
    *,
    sample: bytes = b"",
    page_size: int = DEFAULT_PAGE_SIZE,
) -> list[dict[str, Any]]:
    """The rows of these compressors, by name, each from a child process.

    With a sample of memory, `seconds` is what each takes to compress it and `ratio` what that
    gives; then children run one by one, so as not to disturb each other, otherwise at the same time.
    """
    if not names:
        return []
    from concurrent.futures import ThreadPoolExecutor  # not for those who only send or receive

    enabled = providers(ENTRY_POINT_GROUP)
    found = installed(ENTRY_POINT_GROUP)
    with ThreadPoolExecutor(max_workers=1 if sample else 2 * (os.cpu_count() or 1)) as pool:
        probed = pool.map(lambda name: _probe_in_child(name, timeout, sample, page_size), names)
        return [
            _empty_row(name, enabled.get(name) or [each for each in found if each.name == name]) | row
            for name, row in zip(names, probed, strict=True)
        ]


def _empty_row(name: str, found: Iterable[Provider]) -> dict[str, Any]:
    method = name.partition("-")[0]
    return {
        "name": name,
        "method": method,
        "flag": METHODS.get(method),
        "available": False,
        "hardware": False,
        "provider": "",
        "version": "",
        "distribution": " and ".join(sorted(map(str, found))),
        "reason": "",
        "install": "",
        "devices": [],
        "summary": "",
        "levels": None,
        "default_level": None,
        "ladder": [],
    }


def _probe_in_child(name: str, timeout: float, sample: bytes, page_size: int) -> dict[str, Any]:
    import signal
    import subprocess

    read_end, write_end = os.pipe()
    files = [each.path for each in discovery.files]
    with open(read_end, "rb") as answer, open(os.memfd_create("sample"), "wb") as memory:
        memory.write(sample)
        memory.flush()
        try:
            # The answer has a pipe of its own: a vendor's library may print what it likes.
            child = subprocess.Popen(
                [sys.executable, "-P", "-c", CHILD, name, str(write_end), str(page_size), *files],
                stdin=memory,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[write_end],
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        try:
            child.wait(timeout)
        except subprocess.TimeoutExpired:
            return {"reason": f"did not answer within {timeout:g} s", "install": "see what its library waits for"}
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        text = answer.read()
    try:
        row = json.loads(text)
        assert isinstance(row, dict)
        return row
    except (ValueError, AssertionError):
        status = child.returncode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
        return {"reason": f"its process died while it was probed ({how})"}


CHILD = "from multifd.codec.probing import child; child()"


def child() -> None:
    """The child's part: one compressor, asked."""
    name, write_end, page_size, *files = sys.argv[1:]
    sample = os.pread(0, os.fstat(0).st_size, 0)
    for path in files:
        add_file(path)
    row = _row(name, sample, int(page_size))
    with open(int(write_end), "w") as answer:
        json.dump(row, answer)


def _row(name: str, sample: bytes, page_size: int) -> dict[str, Any]:
    row: dict[str, Any] = {}
    try:
        compressor = load(name)
        facts = compressor.facts
        row = {
            "method": facts.method,
            "flag": facts.flag,
            "summary": facts.summary,
            "levels": [facts.levels.start, facts.levels.stop - 1] if facts.levels is not None else None,
            "default_level": facts.default_level,
            "ladder": list(facts.ladder),
        }
        settings = compressor.settings({}, sending=True)
        probe = compressor.probe(settings)
        if sample and probe.available:
            seconds, left = measure(compressor, settings, memoryview(sample), page_size)
            row |= {"seconds": seconds, "ratio": 1 / left}
    except HOOK_ERRORS as error:
        return row | {"reason": str(error) if isinstance(error, MultifdError) else f"{name}: {describe(error)}"}
    reason = probe.reason or ("" if probe.available else why_not(probe))
    return row | {
        "available": probe.available,
        "hardware": probe.hardware,
        "provider": probe.provider,
        "version": probe.version,
        "reason": reason,
        "install": probe.install,
        "devices": list(probe.devices),
    }
