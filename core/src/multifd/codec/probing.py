"""What works on this machine: every compressor asked in a child process of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from multifd.codec.children import LIMIT, Died, Memory, Say, answers
from multifd.codec.discovery import Provider, choose, installed, misplaced, misplaced_text, providers, slow
from multifd.codec.hooks import HOOK_ERRORS
from multifd.codec.measure import measure
from multifd.codec.selection import load, why_not
from multifd.crew import Crew
from multifd.errors import MultifdError, describe
from multifd.hookspecs import ENTRY_POINT_GROUP
from multifd.wire.flags import DEFAULT_PAGE_SIZE, METHODS, THIRD_PARTY_FLAGS


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


def compressors(crew: Crew | None = None) -> list[dict[str, Any]]:
    """Every installed compressor with its facts and probe, as `multifd compressors` shows them.

    Each is loaded and probed in a child process, so that one that is broken, hangs, prints or
    crashes is a row with its reason.  One that is turned off is a row, and not loaded; so is one that no command finds,
    since its entry point's group is another.  The end of `crew` ends all of it: Cancelled.
    """
    found = probe_all(sorted({each.name for each in installed(ENTRY_POINT_GROUP)}), crew=crew)
    for row in found:
        if row["flag"] in THIRD_PARTY_FLAGS and (taken := taken_twice(row["flag"], found)):
            row["reason"] = "; ".join(filter(None, (row["reason"], taken)))
    known = {row["name"] for row in found}
    lost = [
        _empty_row(name, [each]) | {"reason": misplaced_text(each, group)}
        for name, (each, group) in misplaced().items()
        if name not in known
    ]
    return sorted(found + lost, key=lambda row: str(row["name"]))


def probe_all(
    names: Sequence[str],
    timeout: float = LIMIT,
    *,
    sample: bytes = b"",
    page_size: int = DEFAULT_PAGE_SIZE,
    crew: Crew | None = None,
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
    with Memory([sample]) as memory, ThreadPoolExecutor(max_workers=1 if sample else 2 * (os.cpu_count() or 1)) as pool:

        def probe(name: str) -> dict[str, Any]:
            task = {"name": name, "page_size": page_size}
            try:
                (row,) = answers(__name__, task, memory=memory, limit=timeout, crew=crew)
            except Died as died:
                return {"reason": str(died)}
            return row

        return [
            _empty_row(name, enabled.get(name) or [each for each in found if each.name == name]) | row
            for name, row in zip(names, pool.map(probe, names), strict=True)
        ]


def _empty_row(name: str, found: Sequence[Provider]) -> dict[str, Any]:
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
        "note": "; ".join(each.flaw for each in found if each.flaw),
        "summary": "",
        "levels": None,
        "default_level": None,
        "ladder": [],
    }


def child(task: Mapping[str, Any], data: memoryview, say: Say) -> None:
    """The child's part: one compressor, asked."""
    say(_row(task["name"], data, task["page_size"]))


def _row(name: str, sample: memoryview, page_size: int) -> dict[str, Any]:
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
        if name in slow:
            row["note"] = slow[name]
        settings = compressor.settings({}, sending=True)
        probe = compressor.probe(settings)
        if sample and probe.available:
            seconds, left = measure(compressor, settings, sample, page_size)
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
