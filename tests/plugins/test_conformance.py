"""The conformance suite: ours pass it, and for each check there is a compressor that fails just that one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import zlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from typing import Any

import pluggy
import pytest

import broken
import cut_captures
import streams
from multifd import hookspecs
from multifd.codec.settings import Spec
from multifd.testing import checks
from multifd.testing.checks import CHECKS
from multifd.testing.harness import Subject
from multifd_qatzip import library

TOP = Path(__file__).parents[2]
#: A third of a second and more, each.
SLOW = {"packet-sizes", "long-stream", "many-sessions", "many-packets", "expansion", "flipped", "bomb", "threads"}
MULTIFD = [sys.executable, "-m", "multifd"]


def conformance(name: str, *arguments: str, env: Mapping[str, str] = os.environ) -> dict[str, dict[str, Any]]:
    """What `multifd conformance` finds: each check's outcome."""
    result = subprocess.run(
        [*MULTIFD, "conformance", name, "--json", *arguments],
        env=env,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert result.stdout, result.stderr
    found = json.loads(result.stdout)
    outcomes = {outcome["check"]: outcome for outcome in found["checks"]}
    bad = {"failed", "not run"} & {outcome["result"] for outcome in outcomes.values()}
    assert (found["passed"], result.returncode) == (not bad, bool(bad))
    return outcomes


@pytest.fixture(scope="session")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return broken.install(tmp_path_factory.mktemp("toys"))


def kept(outcomes: Mapping[str, Mapping[str, Any]], *not_asked: str) -> None:
    """Everything was asked but this, and nothing failed."""
    assert {name: outcome for name, outcome in outcomes.items() if outcome["result"] == "failed"} == {}
    assert {name for name, outcome in outcomes.items() if outcome["result"] == "not asked"} == set(not_asked)
    assert set(outcomes) == {check.name for check in CHECKS}


# --- the suite itself ---


def test_the_good_one_keeps_the_contract(toys: dict[str, str]) -> None:
    kept(conformance("toy-good", env=toys), "captures")


@pytest.mark.timeout(600)
def test_a_broken_one_fails_its_check_and_no_other(toys: dict[str, str]) -> None:
    """The slow checks are asked of those only that have to fail them."""

    def failed(name: str) -> tuple[str, ...]:
        wanted = [check.name for check in CHECKS if check.name not in SLOW or check.name in broken.BROKEN[name]]
        outcomes = conformance(name, *(f"--check={check}" for check in wanted), env=toys)
        found = [outcome for outcome in outcomes.values() if outcome["result"] == "failed"]
        assert all(outcome["called"] and outcome["came"] for outcome in found)
        return tuple(outcome["check"] for outcome in found)

    with ThreadPoolExecutor(max_workers=2) as pool:
        found = dict(zip(broken.BROKEN, pool.map(failed, broken.BROKEN), strict=True))
    assert found == broken.BROKEN


def test_each_check_has_one_that_fails_it() -> None:
    assert {check for checks in broken.BROKEN.values() for check in checks} == {check.name for check in CHECKS}


def test_each_sentence_is_the_contracts() -> None:
    texts = [hookspecs.__doc__, *(getattr(hookspecs, name).__doc__ for name in vars(hookspecs) if name[0] != "_")]
    contract = " ".join(" ".join(filter(None, texts)).split())
    for check in CHECKS:
        assert check.sentence in contract, check.name


def test_the_page_of_the_contract_is_up_to_date_and_has_every_hook() -> None:
    subprocess.run([sys.executable, TOP / "tools" / "contract.py", "--check"], check=True, timeout=60)
    headings = re.findall(r"^### (multifd_\w+)$", (TOP / "docs" / "plugins.md").read_text(), re.MULTILINE)
    assert set(headings) == {name for name in vars(hookspecs) if name.startswith("multifd_")}


def test_every_hook_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()

    class Watched(pluggy.PluginManager):
        def __init__(self, name: str) -> None:
            super().__init__(name)
            self.add_hookcall_monitoring(lambda hook, *_: called.add(hook), lambda *_: None)

    monkeypatch.setattr(pluggy, "PluginManager", Watched)
    subject = Subject(Spec("zlib"))
    checks.facts(subject)
    checks.cleanup(subject)
    assert called == {name for name in vars(hookspecs) if name.startswith("multifd_")}


# --- what it says ---


def run(*arguments: str, env: Mapping[str, str] = os.environ) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*MULTIFD, *arguments], env=env, capture_output=True, text=True, timeout=110, check=False)


def test_what_a_failed_check_says(toys: dict[str, str]) -> None:
    result = run("conformance", "toy-cannot-77", "--check", "packet-sizes", "--check", "facts", env=toys)
    assert result.returncode == 1
    what, sentence, *others = result.stdout.splitlines()
    assert what == (
        "packet-sizes            failed     multifd_recv(channel 0, pages of 4096 bytes, window=15, fast=False, "
        "note='', packet of 77 pages: 315432 bytes of payload for 315392 of pages) page 0 of 77 is another: "
        "byte 0 is 0x00 instead of 0x55"
    )
    assert sentence == '    The contract: "1 to PACKET_SIZE (512 KiB) bytes in all, each a multiple of the page size."'
    assert others == ["facts                   passed", "toy-cannot-77: 1 failed, 1 passed: it breaks the contract"]


def test_one_that_crashes_is_a_check_that_failed(toys: dict[str, str]) -> None:
    (outcome,) = conformance("toy-crashes", "--check", "anything", env=toys).values()
    assert outcome["came"] == "killed its process (SIGABRT)"


def test_one_that_hangs_is_a_check_that_failed(toys: dict[str, str]) -> None:
    code = (
        "from multifd.testing import checks, runner\nrunner.TIMEOUT = 4\n"
        "chosen = [check for check in checks.CHECKS if check.name in ('contents', 'facts')]\n"
        "print([(o.result, o.came) for o in runner.run(runner.Spec('toy-hangs'), chosen)])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env=toys, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.stdout == "[('passed', ''), ('failed', 'did not end within 4 s')]\n", result.stderr


def test_one_that_is_not_available_is_not_said_to_conform(toys: dict[str, str]) -> None:
    result = run("conformance", "toy-unavailable", "--check", "probe", "--check", "contents", env=toys)
    assert result.returncode == 1
    assert result.stdout.splitlines() == [
        "probe                   passed",
        "contents                not run    it is not available here: there is no device",
        "toy-unavailable: 1 passed, 1 not run: not all of it could be checked",
    ]


def test_wrong_names() -> None:
    nobody = run("conformance", "zlip")
    assert (nobody.returncode, nobody.stdout) == (1, "")
    assert "no compressor is named 'zlip'" in nobody.stderr
    assert "did you mean zlib?" in nobody.stderr
    wrong = run("conformance", "zlib", "--check", "fact")
    assert wrong.returncode == 2
    assert "no check is named 'fact'; there are: facts, hooks, " in wrong.stderr


def in_pytest(folder: Path, *arguments: str, env: Mapping[str, str]) -> str:
    """What pytest says in an empty directory."""
    command = [sys.executable, "-m", "pytest", "-W", "error", "-rfs", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=110, check=False).stdout


def test_the_pytest_plugin(tmp_path: Path, toys: dict[str, str]) -> None:
    chosen = "contents or levels or options or padded"
    both = ("--multifd-compressor", "zlib", "--multifd-compressor=toy-looks-away-at-the-end")
    said = in_pytest(tmp_path, *both, "-k", chosen, env=toys)
    assert "1 failed, 6 passed, 1 skipped, " in said
    assert "not asked: it has no options" in said
    assert "FAILED conformance[toy-looks-away-at-the-end-padded]" in said
    assert 'The contract: "bytes of a payload that are left over are an error, whether' in said
    assert "Traceback" not in said
    assert "no tests ran" in in_pytest(tmp_path, env=toys), "without the option it does nothing"


# --- the captures ---


@pytest.mark.parametrize("method", streams.METHODS)
def test_the_captures_are_what_another_decoder_finds(method: str) -> None:
    folder = resources.files("multifd.testing") / "captures"
    known = json.loads((folder / "captures.json").read_text())[method]
    data = zlib.decompress((folder / f"{method}.z").read_bytes())
    assert len(data) == known["bytes"]
    assert cut_captures.digests(method, data) == known["sha256"]


# --- ours ---


@pytest.mark.parametrize(
    ("name", "not_asked"),
    [
        ("none", {"levels", "ladder", "options"}),
        ("zlib", {"options"}),
        ("zstd", {"options"}),
        ("qatzip-sw", {"options"}),
        ("qpl-sw", {"options"}),
        ("uadk-sw", set()),
    ],
)
def test_ours_keep_the_contract(name: str, not_asked: set[str]) -> None:
    kept(conformance(name), *not_asked)


def test_qatzip_keeps_it_in_software(libqatzip: Path) -> None:
    kept(conformance("qatzip", env=os.environ | {library.SETTING: str(libqatzip)}), "ladder")


@pytest.mark.parametrize("settings", ["", ",sw-fallback=off"])
def test_qatzip_keeps_it_on_a_device(standin: Path, settings: str) -> None:
    env = os.environ | {library.SETTING: str(standin), "FAKE_QAT_INSTANCES": "4"}
    kept(conformance(f"qatzip{settings}", env=env), "ladder")


def test_qatzip_without_its_library_is_not_run(tmp_path: Path) -> None:
    found = conformance("qatzip", env=os.environ | {library.SETTING: str(tmp_path / "libqatzip.so.3")})
    assert {outcome["result"] for outcome in found.values()} == {"passed", "not run", "not asked"}
    assert "cannot open shared object file" in found["contents"]["reason"]
