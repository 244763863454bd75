"""The examples in docstrings run, as they stand, where what they name is there."""

from __future__ import annotations

import threading
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import images
import multifd
import peers
from captures import OWN_CAPTURES, load_captures
from examples import examples

FOUND = {where: code for where, code in examples().items() if ".qmp" not in code}
CAPTURE = "q72-none-2ch"


def test_there_are_examples() -> None:
    """Those with a monitor run in tests/qemu."""
    assert {"multifd", "multifd.jobs.source.send:send", "multifd.jobs.relay.server"} <= set(FOUND)


@pytest.mark.parametrize("where", FOUND)
def test_it_runs(where: str, work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    content = images.write_memory(work)
    (work / "image.raw").rename(work / "guest.raw")
    (work / "tests").symlink_to(Path(__file__).parents[1])
    code = FOUND[where]
    monkeypatch.chdir(work)
    if '"snap")\nfor' in code:
        multifd.receive(f"recording:tests/captures/{CAPTURE}", "snap")
    there = peers.Receiving(work / "there", f"unix:{work}/there.sock") if "there.sock" in code else None
    source = threading.Thread(target=migrate, args=(work,)) if "here.sock" in code.replace("there.sock", "") else None
    if source is not None:
        source.start()
    names: dict[str, Any] = {
        **vars(import_module(where.partition(":")[0])),
        "multifd": multifd,
        "data": load_captures(OWN_CAPTURES)[CAPTURE].files()[0],
    }
    exec(compile(code, where, "exec"), names)
    if source is not None:
        source.join()
    if there is not None:
        there.join()
        assert (work / "there" / "0-pc.ram.raw").read_bytes() == content
    assert capsys.readouterr().out, "each shows something"


def migrate(work: Path) -> None:
    """To a relay, as soon as it listens."""
    assert peers.eventually((work / "here.sock").exists)
    multifd.send(work / "guest.raw", f"unix:{work}/here.sock", "zlib")
