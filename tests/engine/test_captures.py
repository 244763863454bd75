"""Real QEMUs' bytes: every capture gives the RAM of its manifest, from files and over sockets."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path

import pytest

import multifd
import peers
import streams
from captures import CAPTURES, OWN_CAPTURES, SHARED_CAPTURES, Capture, check, load_captures
from multifd.errors import MultifdError

every_capture = pytest.mark.parametrize("capture", CAPTURES.values(), ids=CAPTURES.keys())


def test_all_captures_are_here() -> None:
    if not SHARED_CAPTURES.exists():
        pytest.skip("../shared/captures is not there: only the captures in tests/ are tested")
    assert len(load_captures(OWN_CAPTURES)) == 5
    assert len(CAPTURES) == 13


@every_capture
def test_from_files(work: Path, capture: Capture) -> None:
    result = multifd.receive(f"recording:{capture.directory}", work / "snap")
    check(work / "snap", capture)
    facts = capture.facts
    packets = facts["packets"]
    assert result.normal_pages == packets["normal"]
    assert result.zero_pages == packets.get("zero", 0) + facts["main_channel_zero_pages"]
    assert result.packets == packets["packets"]
    assert result.wire_bytes == sum(file["size"] for file in facts["files"])
    assert result.channels == facts["channels"]


@every_capture
@pytest.mark.parametrize("piece", [65521])
def test_over_sockets_in_pieces_of_a_prime_length(work: Path, capture: Capture, piece: int) -> None:
    job = peers.Receiving(work / "snap")
    answer = peers.play(job.uri, capture.files(), piece)
    result = job.join()
    check(work / "snap", capture)
    # Of QEMU 10.0: its switchover is acknowledged, too.
    answers = bytes.fromhex("0002000400000001 00070000 0001000400000000")
    assert answer == (answers if capture.facts["return_path"] else b"")
    assert result.normal_pages == capture.facts["packets"]["normal"]


def test_one_in_small_pieces_and_in_every_order_of_arrival(work: Path, own_capture: dict[str, Capture]) -> None:
    capture = own_capture["q100-zstd-nozero-rp-2ch"]
    files = capture.files()
    for number, order in enumerate(itertools.permutations(range(3))):
        job = peers.Receiving(work / f"snap{number}", f"unix:{work}/socket")
        peers.play(job.uri, files, 1009, order)
        job.join()
        check(work / f"snap{number}", capture)


@pytest.mark.timeout(300)
def test_one_byte_by_byte(work: Path, own_capture: dict[str, Capture]) -> None:
    capture = own_capture["q100-zstd-nozero-rp-2ch"]
    job = peers.Receiving(work / "snap", f"unix:{work}/socket")
    peers.play(job.uri, capture.files(), 1)
    job.join()
    check(work / "snap", capture)


@every_capture
def test_inspect_says_what_the_manifest_says(capture: Capture) -> None:
    found = multifd.inspect(capture.directory)
    facts = capture.facts
    packets = facts["packets"]
    assert found["ended"] == "complete"
    assert (found["machine"], found["uuid"], found["channels"]) == (facts["machine"], facts["uuid"], facts["channels"])
    assert found["method"] == facts["compression"]
    assert (found["packets"], found["normal_pages"]) == (packets["packets"], packets["normal"])
    assert found["sync_points"] == facts["sync_points"]
    assert found["syncs"] == packets["sync"]
    assert found["wire_bytes"] == sum(file["size"] for file in facts["files"])
    assert [(block["idstr"], block["used_length"]) for block in found["blocks"]] == [
        (block["name"], block["length"]) for block in facts["blocks"]
    ]


def channel_boundaries(data: bytes) -> list[int]:
    """Where each field of each packet begins, by the specification."""
    cuts = [0, 4, 8, 24, 25, 64]
    at = 64
    while at < len(data):
        cuts += [at + field for field in (0, 4, 8, 12, 16, 20, 24, 32, 36, 64, 320, 328)]
        normal, size = struct.unpack_from(">II", data, at + 16)
        at += streams.header_length(4096)
        cuts.append(at)
        at += size if normal else 0
    return [cut for cut in cuts if cut < len(data)]


def main_boundaries(data: bytes, state: int) -> list[int]:
    name = 13 + struct.unpack_from(">I", data, 9)[0]
    in_ram = [name + step for step in (0, 1, 5, 6, 9, 13, 17, 25, 26)]
    return [0, 4, 8, 9, 13, *in_ram, state - 5, state - 4, state, state + 1, len(data) - 1]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["q72-none-2ch", "q100-m72-zlib-2ch", "q100-zstd-nozero-rp-2ch"])
def test_a_real_stream_cut_at_a_field_is_refused(work: Path, own_capture: dict[str, Capture], name: str) -> None:
    """Every boundary of main and channel 0; what is cut after a channel's last SYNC is whole."""
    capture = own_capture[name]
    files = capture.files()
    recording = streams.Stream(files[0], files[1:]).write(work / "recording")
    last_sync = len(files[1]) - streams.header_length(4096)
    if capture.facts["packets"].get("empty"):
        last_sync -= streams.header_length(4096)
    cuts = [("ch0.bin", cut) for cut in channel_boundaries(files[1])]
    cuts += [("main.bin", cut) for cut in main_boundaries(files[0], capture.facts["device_state_offset"])]
    if name == "q72-none-2ch":
        cuts = cuts[::5]  # its channels are raw pages, 8 MB each: every fifth boundary will do
    for file, cut in cuts:
        whole = files[0] if file == "main.bin" else files[1]
        (recording / file).write_bytes(whole[:cut])
        if file == "ch0.bin" and cut > last_sync + streams.header_length(4096) - 1:
            continue
        with pytest.raises(MultifdError) as caught:
            multifd.receive(f"recording:{recording}", work / "snap", digests=False)
        assert "\n" not in str(caught.value)
        assert [path.name for path in work.iterdir()] == ["recording"]
        (recording / file).write_bytes(whole)
