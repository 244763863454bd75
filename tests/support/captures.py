"""Recorded migrations of real QEMUs: the five in tests/captures, and more where they lie beside the project."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streams import other_zstd

OWN_CAPTURES = Path(__file__).parents[1] / "captures"
SHARED_CAPTURES = Path(__file__).parents[3] / "shared" / "captures"
READABLE = ("none", "zlib", "zstd", "qatzip", "qpl", "uadk")


@dataclass(frozen=True)
class Capture:
    """One recorded migration of a real QEMU and what its manifest says of it."""

    name: str
    directory: Path
    facts: dict[str, Any]

    def files(self) -> list[bytes]:
        """main, channel 0, channel 1, ...: unpacked."""
        zstd = other_zstd()
        paths = [self.directory / "main.bin.zst"]
        paths += [self.directory / f"ch{number}.bin.zst" for number in range(self.facts["channels"])]
        return [zstd.decompress(path.read_bytes()) for path in paths]


def load_captures(folder: Path) -> dict[str, Capture]:
    manifest = folder / "manifest.json"
    if not manifest.exists():
        return {}
    entries = json.loads(manifest.read_text())["captures"]
    return {
        entry["name"]: Capture(entry["name"], folder / entry["name"], entry)
        for entry in entries
        if entry["compression"] in READABLE
    }


CAPTURES = {**load_captures(SHARED_CAPTURES), **load_captures(OWN_CAPTURES)}


def check(snapshot: Path, capture: Capture) -> None:
    """That a snapshot is the memory, and the rest, of the capture's manifest."""
    index = json.loads((snapshot / "snapshot.json").read_text())
    facts = capture.facts
    expected = {block["name"]: block["sha256"] for block in facts["blocks"]}
    found = {}
    for block in index["blocks"]:
        content = (snapshot / block["file"]).read_bytes()
        assert len(content) == block["used_length"]
        found[block["idstr"]] = hashlib.sha256(content).hexdigest()
    assert found == expected
    assert (index["machine"], index["uuid"], f"per {index['sync']}") == (facts["machine"], facts["uuid"], facts["sync"])
    state = (snapshot / index["device_state"]).read_bytes()
    assert state == capture.files()[0][facts["device_state_offset"] :]
    configuration = (snapshot / index["configuration"]).read_bytes()
    assert capture.files()[0][8:].startswith(configuration)
