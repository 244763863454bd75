"""Compressors qpl and uadk: the real libqpl, which has no device here, and stand-ins for both devices."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import qatdriver
from captures import CAPTURES, check
from standin import PAGELIST, Machine, build

FAKE = {"qpl": "FAKE_IAA", "uadk": "FAKE_UADK"}
LIBRARY = {"qpl": "libqpl 1.", "uadk": "libwd_comp 2.10.0"}
FAILED, RAW = "software (device failed)", "raw pages"
HERE = Machine("", sys.executable, {})


def run(machine: Machine, *arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [machine.python, "-m", *map(str, arguments)],
        env=os.environ | machine.env | env,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def row(machine: Machine, method: str, **env: str) -> dict[str, Any]:
    """The method's row in `multifd compressors`."""
    code = (
        "import json, sys\nfrom multifd.codec.probing import probe_all\nprint(json.dumps(probe_all([sys.argv[1]])[0]))"
    )
    command = [machine.python, "-c", code, method]
    environ = os.environ | machine.env | env
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    return dict(json.loads(result.stdout))


def traffic(
    machine: Machine,
    env: Mapping[str, str] = {},
    *,
    channels: int = 2,
    count: int = 40,
    later: str = "",
    sw_fallback: str = "on",
) -> dict[str, Any]:
    """Packets there and back on all channels at once."""
    return qatdriver.in_child(
        "traffic",
        env=machine.env | dict(env),
        python=machine.python,
        compressor=machine.method,
        channels=channels,
        count=count,
        later=later,
        sw_fallback=sw_fallback,
    )


# --- which library ---


@pytest.mark.parametrize(
    ("method", "setting", "soname"),
    [("qpl", "MULTIFD_LIBQPL", "libqpl.so.1"), ("uadk", "MULTIFD_LIBWD_COMP", "libwd_comp.so.2")],
)
def test_another_library_is_refused_by_name(cc: str, tmp_path: Path, method: str, setting: str, soname: str) -> None:
    source = tmp_path / "empty.c"
    source.write_text("int nothing;\n")
    other = build(source, tmp_path / "other.so", "-Wl,-soname,libother.so.1")
    empty = build(source, tmp_path / soname, f"-Wl,-soname,{soname}")
    for path, says in (
        (other, f"{other}: its soname is not {soname}, the one this plugin knows"),
        (empty, f"{empty} has no "),
        (tmp_path / "none", "cannot open shared object file: No such file or directory"),
        ("here/" + soname, f"{setting}=here/{soname} is not an absolute path"),
    ):
        found = row(HERE, method, **{setting: str(path)})
        assert not found["available"]
        assert says in found["reason"]
        assert found["install"].endswith(f"or {method}-sw")


def test_a_libqpl_of_another_layout_is_refused(cc: str, tmp_path: Path) -> None:
    odd = build(PAGELIST / "device_libqpl.c", tmp_path / "libqpl.so.1", "-Wl,-soname,libqpl.so.1", "-DLAYOUT", "-ldl")
    assert (
        "a new job is not empty (status 0): its layout is not the one known here"
        in row(HERE, "qpl", MULTIFD_LIBQPL=str(odd))["reason"]
    )


# --- the real libqpl, without a device ---


def test_libqpl_itself_and_the_software_codec_read_each_other(libqpl: Machine) -> None:
    """Its path in software; pages of 4 and 64 KiB, all levels, and so no match beyond 4 KiB."""
    result = run(libqpl, "multifd_qpl.check", "software")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith("libqpl 1.")
    assert "every byte the same" in result.stdout


def test_what_is_no_whole_page_libqpl_refuses(libqpl: Machine) -> None:
    """It does not see a byte behind the end, nor a missing end: the page is right all the same."""
    code = """
import zlib
from multifd.formats.pagedevice import DeviceError
from multifd.formats.pagelist import Job
from multifd_qpl.hardware import SOFTWARE, Libqpl
def deflate(data):
    stream = zlib.compressobj(9, zlib.DEFLATED, -12)
    return stream.compress(data) + stream.flush()
session = Libqpl(SOFTWARE).open(4096, compressing=False)
good = deflate(bytes(range(256)) * 16)
for data in (good + b"x", good[:-1], deflate(bytes(4095)), deflate(bytes(4097)), b"\\xff" * 50, good):
    page = bytearray(4096)
    try:
        session.decompress([Job(0, memoryview(data), memoryview(page))])
        print(page == bytes(range(256)) * 16)
    except DeviceError as error:
        print(error)
"""
    result = subprocess.run(
        [libqpl.python, "-c", code], env=os.environ | libqpl.env, capture_output=True, text=True, timeout=60, check=True
    )
    behind, cut, *refused, last = result.stdout.splitlines()
    assert (behind, cut, last) == ("True", "True", "True")
    assert len(refused) == 3
    assert "True" not in refused


def test_without_a_device_software_does_it_and_says_why(libqpl: Machine, tmp_path: Path) -> None:
    found = row(libqpl, "qpl")
    assert (found["available"], found["hardware"]) == (True, False)
    assert "libqpl 1." in found["reason"]
    assert "has no device to use: qpl_init_job: status 50" in found["reason"]
    assert "accel-config" in found["install"]
    result = run(libqpl, "multifd_qpl.check")
    assert result.returncode == 1
    assert "does NOT work: qpl_init_job: status 50" in result.stderr

    (tmp_path / "image.raw").write_bytes(bytes(4096))
    sent = run(libqpl, "multifd", "send", tmp_path / "image.raw", "unix:/no", "--compressor", "qpl,sw-fallback=off")
    assert sent.returncode == 1
    (line,) = sent.stderr.splitlines()
    assert "is not available: libqpl 1." in line

    found = traffic(libqpl)
    assert found["failures"] == []
    assert set(found["counts"]) == {"software", RAW}
    assert len(found["told"]) == 1
    assert "qpl works in software: libqpl 1." in found["told"][0]


@pytest.mark.parametrize("name", [name for name, one in CAPTURES.items() if one.facts["compression"] == "qpl"])
@pytest.mark.parametrize("device", [False, True])
def test_real_qemus_bytes(name: str, device: bool, cc: str, libqpl: Machine, tmp_path: Path, work: Path) -> None:
    from standin import make_page_device

    machine = make_page_device("qpl", tmp_path) if device else libqpl
    capture = CAPTURES[name]
    recording = f"recording:{capture.directory}"
    result = run(machine, "multifd", "receive", recording, "-o", work / "snap", "--compressor", "qpl", "--json")
    assert result.returncode == 0, result.stderr
    check(work / "snap", capture)
    assert set(json.loads(result.stdout)["statistics"]) == {"hardware" if device else "software"}


# --- with a device ---


def test_a_device_is_said_to_be_there(page_device: Machine) -> None:
    found = row(page_device, page_device.method)
    assert (found["available"], found["hardware"], found["reason"]) == (True, True, "")
    assert f"{found['provider']} {found['version']}".startswith(LIBRARY[page_device.method])
    result = run(page_device, f"multifd_{page_device.method}.check")
    assert (result.returncode, result.stderr) == (0, "")
    assert "works: " in result.stdout


@pytest.mark.parametrize("how", ["fail", "lie", "every:5"])
def test_a_device_that_does_not_do_its_job_is_not_used(page_device: Machine, how: str) -> None:
    method = page_device.method
    fake = {FAKE[method]: how}
    found = row(page_device, method, **fake)
    assert (found["available"], found["hardware"]) == (True, False)
    assert f"{LIBRARY[method].split()[0]} " in found["reason"]
    assert "has no device to use: " in found["reason"]
    result = run(page_device, f"multifd_{method}.check", **fake)
    assert result.returncode == 1
    assert "does NOT work: " in result.stderr
    assert set(traffic(page_device, env=fake)["counts"]) == {"software", RAW}


def test_no_device_of_uadk_is_said_in_words(cc: str, tmp_path: Path) -> None:
    from standin import make_page_device

    found = row(make_page_device("uadk", tmp_path), "uadk", FAKE_UADK="none")
    assert "libwd_comp 2.10.0 has no device to use: wd_comp_init2: status -19: No such device" in found["reason"]
    assert "hisi_zip" in found["install"]


@pytest.mark.parametrize("channels", [1, 4])
def test_the_device_does_every_packet(page_device: Machine, channels: int) -> None:
    found = traffic(page_device, channels=channels, count=200 // channels)
    assert found["failures"] == found["told"] == []
    assert found["counts"].pop(RAW) < 120
    assert set(found["counts"]) == {"hardware"}
    assert found["counts"]["hardware"] > 280


def test_jobs_that_fail_now_and_then_lose_nothing(page_device: Machine) -> None:
    found = traffic(page_device, later=f"{FAKE[page_device.method]}:every:150")
    assert found["failures"] == found["told"] == []
    assert found["counts"][FAILED] > 0
    assert found["counts"]["hardware"] > 0
    assert sum(found["counts"].values()) == 160


def test_a_device_that_dies_is_given_up_and_loses_nothing(page_device: Machine) -> None:
    found = traffic(page_device, later=f"{FAKE[page_device.method]}:fail")
    assert found["failures"] == []
    assert (found["counts"].pop(FAILED), sum(found["counts"].values())) == (32, 128)
    assert set(found["counts"]) == {"software", RAW}
    assert 1 <= len(found["told"]) <= 4
    assert "the device failed 8 packets in a row, the last with " in found["told"][0]


def test_without_fallback_a_device_that_dies_is_an_error(page_device: Machine) -> None:
    found = traffic(page_device, later=f"{FAKE[page_device.method]}:fail", sw_fallback="off")
    assert len(found["failures"]) == 2
    for failure in found["failures"]:
        assert "the device failed: " in failure
        assert "sw-fallback=off forbids software" in failure


def test_importing_them_loads_no_library() -> None:
    code = """
import re, multifd_qpl.hardware, multifd_qpl.check, multifd_uadk.hardware, multifd_uadk.check
print(re.findall(r"libqpl|libwd|_cffi_backend", open("/proc/self/maps").read()))
"""
    command: Sequence[str] = [sys.executable, "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout == "[]\n"


@pytest.mark.parametrize("method", ["qpl", "uadk"])
def test_without_cffis_backend_the_probe_says_so(method: str) -> None:
    code = f"""
import sys
sys.modules["_cffi_backend"] = None
from multifd.codec.selection import load
found = load({method!r})
print(found.probe(found.settings({{}}, sending=True)).reason)
"""
    command: Sequence[str] = [sys.executable, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert "_cffi_backend" in result.stdout
