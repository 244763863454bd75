"""The real libqatzip: without a device, and over a stand-in for one that works, fails and dies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import images
import peers
from captures import CAPTURES, check
from qatdriver import in_child
from standin import QAT, build

BUSY, FAILED = "software (device busy)", "software (device failed)"


def multifd(*arguments: object, library: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "multifd", *map(str, arguments)],
        env=os.environ | ({"MULTIFD_LIBQATZIP": str(library)} if library else {}) | env,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def row(library: Path | None, **env: str) -> dict[str, Any]:
    """The row of qatzip in `multifd compressors`."""
    result = multifd("compressors", "--json", library=library, **env)
    (found,) = [row for row in json.loads(result.stdout) if row["name"] == "qatzip"]
    return dict(found)


# --- which library ---


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["-Wl,-soname,libqatzip.so.2"], "its soname is not libqatzip.so.3"),
        (["-Wl,-soname,libqatzip.so.3", "-DMISSING"], "has no qzCompress"),
        (["-Wl,-soname,libqatzip.so.3", "-DLAYOUT"], "its layout differs: hw_buff_sz is 0 by default instead of 65536"),
        (["-Wl,-soname,libqatzip.so.3", "-DBEHIND"], "its layout differs: QzSessionParamsDeflate_T has more than 56"),
    ],
)
def test_another_library_is_refused_by_name(cc: str, tmp_path: Path, options: Sequence[str], says: str) -> None:
    odd = build(QAT / "odd_libqatzip.c", tmp_path / "libqatzip.so.3.9.9", *options)
    found = row(odd)
    assert not found["available"]
    assert f"{odd}" in found["reason"]
    assert says in found["reason"]
    assert "libqatzip3 on Debian 13 and Ubuntu" in found["install"]
    assert "qatzip-libs on Fedora" in found["install"]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("-DHANG", "a trial of the device did not end within 6 s"),
        ("-DCRASH", "a trial of the device died (SIGABRT)"),
        ("-DLIE", "qzCompress: took 65536 of 65536 bytes and made something else: byte 0"),
        ("-DNOTHING", "qzCompress: took 65536 of 65536 bytes and made something else: the payload of 0 bytes"),
    ],
)
def test_one_that_does_not_do_its_job_is_not_used(cc: str, tmp_path: Path, option: str, says: str) -> None:
    odd = build(QAT / "odd_libqatzip.c", tmp_path / "libqatzip.so.3.9.9", "-Wl,-soname,libqatzip.so.3", option)
    found = row(odd)
    assert (found["available"], found["hardware"]) == (True, False)
    assert says in found["reason"]
    assert "libqatzip 3.9.9 (newer than tested)" in found["reason"]


def test_the_loaders_own_words_and_what_to_install(tmp_path: Path) -> None:
    missing = tmp_path / "libqatzip.so.3"
    assert "cannot open shared object file: No such file" in row(missing)["reason"]
    missing.write_text("text\n")
    assert "file too short" in row(missing)["reason"]
    assert "is not an absolute path" in row(Path("here/libqatzip.so.3"))["reason"]


# --- without a device ---


def test_without_a_device_software_does_it_and_says_why(libqatzip: Path, tmp_path: Path) -> None:
    found = row(libqatzip)
    assert (found["available"], found["hardware"]) == (True, False)
    assert "libqatzip 3." in found["reason"]
    assert "no QAT device here that qatlib drives" in found["reason"]
    table = multifd("compressors", library=libqatzip).stdout
    assert "no QAT device here" in table

    (tmp_path / "image.raw").write_bytes(bytes(4096))
    sent = multifd(
        "send", tmp_path / "image.raw", "unix:/nobody", "--compressor", "qatzip,sw-fallback=off", library=libqatzip
    )
    assert sent.returncode == 1
    (line,) = sent.stderr.splitlines()
    assert "qatzip (multifd-qatzip" in line
    assert "is not available: libqatzip 3." in line
    assert "no QAT device here" in line


def test_the_fallback_is_told_once(libqatzip: Path, tmp_path: Path) -> None:
    source, target = transfer(tmp_path, libqatzip, "qatzip")
    for side in (source, target):
        assert [line for line in side.stderr.splitlines() if "warning" in line] == [
            line for line in side.stderr.splitlines() if "qatzip works in software: libqatzip 3." in line
        ]
        assert side.stderr.count("works in software") == 1
    assert set(json.loads(source.stdout)["statistics"]) == {"software"}


def test_both_directions_against_libqatzip_itself(libqatzip: Path) -> None:
    """All levels, 1 to 128 pages, incompressible ones; and a pthread key per call of its own path."""
    found = in_child("against_itself", libqatzip)
    assert found["done"] == 9 * 11 * 2


def test_libqatzips_software_path_is_never_taken(libqatzip: Path) -> None:
    """It leaks a pthread key per call: 1,000 of them and the process has none."""
    found = in_child("growth", libqatzip, count=4000)
    assert found["last"]["keys"] > 1000
    assert found["counts"] == {"software": 100}


@pytest.mark.parametrize(
    "name", [name for name, capture in CAPTURES.items() if capture.facts["compression"] == "qatzip"]
)
@pytest.mark.parametrize("device", [True, False])
def test_real_qemus_bytes(name: str, device: bool, request: pytest.FixtureRequest, work: Path) -> None:
    library = request.getfixturevalue("standin" if device else "libqatzip")
    capture = CAPTURES[name]
    result = multifd(
        "receive", f"recording:{capture.directory}", "-o", work / "snap", "--compressor", "qatzip", library=library
    )
    assert result.returncode == 0, result.stderr
    check(work / "snap", capture)


# --- with a device ---


def test_a_device_is_said_to_be_there(standin: Path) -> None:
    found = row(standin)
    assert (found["available"], found["hardware"], found["reason"]) == (True, True, "")
    assert found["provider"] == "libqatzip"
    assert found["version"].startswith("3.")


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({"FAKE_QAT_DEVICES": "0"}, "no QAT device here that qatlib drives"),
        ({"FAKE_QAT_START": "fail"}, "no QAT device here that qatlib drives"),
        ({"FAKE_QAT_INSTANCES": "0"}, "no compression instance is free, or none offers compression (-103)"),
        ({"FAKE_QAT_JOBS": "fail"}, "QZ_FAIL: the job failed on the device (-2)"),
        ({"FAKE_QAT_JOBS": "submit"}, "QZ_FAIL: the job failed on the device (-2)"),
        ({"FAKE_QAT_PINNED": "1000000"}, "QZ_NOSW_LOW_MEM: not enough pinned memory (-104)"),
    ],
)
def test_a_device_that_cannot_work_is_said_why(standin: Path, env: dict[str, str], says: str) -> None:
    found = row(standin, **env)
    assert (found["available"], found["hardware"]) == (True, False)
    assert says in found["reason"]
    assert found["install"]
    assert in_child("traffic", standin, env=env, count=20)["counts"] == {"software": 40}


@pytest.mark.parametrize("channels", [1, 4])
def test_the_device_does_every_packet(standin: Path, channels: int) -> None:
    found = in_child("traffic", standin, env={"FAKE_QAT_INSTANCES": "4"}, channels=channels, count=1000 // channels)
    assert found["failures"] == found["told"] == []
    assert found["counts"] == {"hardware": 2000}


def test_four_channels_on_two_instances(standin: Path) -> None:
    found = in_child("traffic", standin, channels=4, count=250)
    assert found["failures"] == found["told"] == []
    assert found["counts"][BUSY] > 0
    assert sum(found["counts"].values()) == 2000


def test_without_fallback_four_channels_wait_for_one_instance(standin: Path) -> None:
    found = in_child("traffic", standin, env={"FAKE_QAT_INSTANCES": "1"}, channels=4, count=100, sw_fallback="off")
    assert found["failures"] == []
    assert found["counts"] == {"hardware": 800}


@pytest.mark.parametrize("every", [7, 50])
def test_jobs_that_fail_now_and_then_lose_nothing(standin: Path, every: int) -> None:
    found = in_child("traffic", standin, channels=4, count=250, later=f"FAKE_QAT_JOBS:every:{every}")
    assert found["failures"] == found["told"] == []
    assert found["counts"][FAILED] > 0
    assert found["counts"]["hardware"] > 0
    assert sum(found["counts"].values()) == 2000


@pytest.mark.parametrize("later", ["FAKE_QAT_JOBS:fail", "FAKE_QAT_JOBS:submit", "FAKE_QAT_PINNED:0"])
def test_a_device_that_dies_is_given_up_and_loses_nothing(standin: Path, later: str) -> None:
    found = in_child("traffic", standin, channels=4, count=250, later=later)
    assert found["failures"] == []
    assert 1 <= len(found["told"]) <= 2, "once for each direction"
    assert "the QAT device failed 8 jobs in a row, the last with qz" in found["told"][0]
    assert found["counts"]["software"] > 1500
    assert sum(found["counts"].values()) == 2000


@pytest.mark.parametrize("later", ["FAKE_QAT_JOBS:fail", "FAKE_QAT_JOBS:submit", "FAKE_QAT_PINNED:0"])
def test_without_fallback_a_device_that_dies_is_an_error(standin: Path, later: str) -> None:
    found = in_child("traffic", standin, channels=2, later=later, sw_fallback="off")
    assert len(found["failures"]) == 2
    for failure in found["failures"]:
        assert "the QAT device failed: qzCompress: QZ_" in failure
        assert "sw-fallback=off forbids software" in failure


@pytest.mark.parametrize("what", [0, 1])
def test_ok_with_another_length_is_not_believed(standin: Path, what: int) -> None:
    """What was given and what came out are both compared; after a lie the session is a new one."""
    assert in_child("lies", standin, what=what)["counts"] == {"hardware": 2, FAILED: 2}


def test_forks_in_between(standin: Path) -> None:
    found = in_child("traffic", standin, channels=2, count=500, fork=1)
    assert found["failures"] == []
    assert found["counts"] == {"hardware": 2000}


def test_a_forked_process_is_refused_and_harms_nothing(standin: Path) -> None:
    found = in_child("in_a_child", standin)
    assert found["status"] == 0
    *refusals, torn = found["said"]
    assert torn == "0 sessions of the parent torn down"
    assert len(refusals) == 3
    for line in refusals:
        assert "pinned memory does not follow a fork; start a new process instead" in line


def test_children_forked_at_any_moment_are_answered(standin: Path) -> None:
    found = in_child("forks_that_ask", standin, env={"FAKE_QAT_INSTANCES": "1"})
    assert found["statuses"] == {"0": 60}


def test_a_session_is_set_up_anew_until_it_is_closed(standin: Path) -> None:
    found = in_child("reopens", standin)
    assert found["counts"] == {FAILED: 1, "hardware": 4}
    assert found["said"] == "qzCompress: the session is closed"


def test_random_damage_is_the_payloads_fault_not_the_devices(standin: Path) -> None:
    found = in_child("corruptions", standin, count=4000)
    assert found["refused"] > 3500
    assert found["counts"].get(FAILED, 0) < 5, "few are right for software and not for a device"


def test_small_and_large_members_are_not_for_the_device(standin: Path) -> None:
    found = in_child("sizes", standin)
    assert found["software"] == {"software": 2}
    assert found["all"] == {"software": 2, "hardware": 1}
    assert found["made"] == [65536, 65536, 32768], "the device makes members of 64 KiB"
    assert found["error"] == "528384 bytes of pages to compress; a packet has 1 to 524288"


def test_against_libqatzips_hardware_path(standin: Path) -> None:
    assert in_child("against_itself", standin)["done"] == 9 * 11 * 2


def test_20000_packets_leave_nothing(standin: Path) -> None:
    found = in_child("growth", standin)
    first, last = found["first"], found["last"]
    assert found["counts"] == {"hardware": 100}
    assert (last["keys"], last["descriptors"]) == (first["keys"], first["descriptors"])
    assert last["threads"] <= first["threads"]
    assert last["KiB"] - first["KiB"] < 2048


def test_full_packets_with_jobs_that_fail_leave_nothing(standin: Path) -> None:
    found = in_child("growth", standin, env={"FAKE_QAT_JOBS": "every:9"}, count=3000, pages=128)
    first, last = found["first"], found["last"]
    assert (last["keys"], last["descriptors"]) == (first["keys"], first["descriptors"])
    assert last["KiB"] - first["KiB"] < 4096


def test_receiving_sets_no_level(standin: Path) -> None:
    """Direction, level, software allowed: the receiving session keeps libqatzip's default."""
    assert in_child("levels", standin)["seen"] == [[0, 7, 0], [1, 1, 0]]


def test_a_set_up_that_fails_leaves_nothing_and_cleanup_is_safe(standin: Path) -> None:
    found = in_child("set_up_that_fails", standin)
    assert len(found["errors"]) == 2
    for error in found["errors"]:
        assert "qzSetupSessionDeflate: QZ_NOSW_LOW_MEM: not enough pinned memory (-104)" in error
    assert found["torn after failed set-ups"] == 2
    assert found["torn"] == 4, "both sessions are torn down, though it reports failure"


def test_two_processes_over_a_socket(standin: Path, tmp_path: Path) -> None:
    source, target = transfer(tmp_path, standin, "qatzip,level=6,sw-fallback=off")
    sent, received = json.loads(source.stdout), json.loads(target.stdout)
    assert set(sent["statistics"]) == set(received["statistics"]) == {"hardware"}
    assert sent["normal_pages"] == received["normal_pages"]
    assert (sent["compressor"], received["compressor"]) == ("qatzip", "qatzip")


def transfer(folder: Path, library: Path, compressor: str) -> tuple[Any, Any]:
    """Send an image between two processes, and make sure that it arrives."""
    image = images.memory()
    (folder / "image.raw").write_bytes(image)
    env = os.environ | {"MULTIFD_LIBQATZIP": str(library), "FAKE_QAT_INSTANCES": "4"}
    command = [sys.executable, "-m", "multifd"]
    common: list[Any] = ["--channels", "4", "--compressor", compressor, "--json"]
    uri = f"unix:{folder}/socket"
    with subprocess.Popen(
        [*command, "receive", uri, "-o", folder / "snap", *common, "--timeout", "30"],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as target:
        assert peers.eventually((folder / "socket").exists, 30)
        source = subprocess.run(
            [*command, "send", folder / "image.raw", uri, *common],
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        out, err = target.communicate(timeout=60)
    assert (source.returncode, target.returncode) == (0, 0), (source.stderr, err)
    (raw,) = (folder / "snap").glob("0-*.raw")
    assert raw.read_bytes() == image
    return source, subprocess.CompletedProcess([], 0, out, err)
