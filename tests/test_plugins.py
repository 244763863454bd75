"""Finding, probing and loading compressors: by name, one at a time, none disturbing another."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from multifd import hookspecs, plugins
from multifd.errors import HostError, UsageError

GOOD = """
from multifd.hookspecs import Facts, Option, Probe, hookimpl
@hookimpl
def multifd_compressor():
    return Facts("{name}", "{method}", {flag}, "for a test", range(1, 4), 2, (Option("fast", True, "h"),))
@hookimpl
def multifd_probe():
    return Probe(True, "lib", "1.0", hardware={hardware})
"""


class Site:
    """A directory of installed distributions, seen by child processes only."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def install(self, name: str, code: str, distribution: str | None = None) -> None:
        distribution = distribution or f"multifd-{name}"
        module = distribution.replace("-", "_")
        info = self.folder / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[multifd.compressors]\n{name} = {module}\n")
        (self.folder / f"{module}.py").write_text(code)

    def good(self, name: str, method: str | None = None, flag: int = 30, *, hardware: bool = False) -> None:
        self.install(name, GOOD.format(name=name, method=method or name, flag=flag, hardware=hardware))

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": str(self.folder)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def rows(self) -> dict[str, dict[str, Any]]:
        result = self.run("-m", "multifd", "compressors", "--json")
        assert result.returncode == 0, result.stderr
        return {row["name"]: row for row in json.loads(result.stdout)}

    def error(self, code: str) -> str:
        """What a snippet on `plugins` raises."""
        result = self.run("-c", f"from multifd import plugins\n{code}")
        assert result.returncode == 1
        return result.stderr.splitlines()[-1]


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_the_list_has_what_the_json_promises() -> None:
    rows = {row["name"]: row for row in plugins.rows()}
    assert set(rows) >= {"none", "zlib", "zstd", "qatzip", "qatzip-sw"}
    for name, flag in (("none", 0), ("zlib", 1), ("zstd", 2)):
        row = rows[name]
        assert {"name", "method", "flag", "available", "reason", "provider", "version", "distribution"} <= set(row)
        assert (row["method"], row["flag"], row["available"], row["reason"]) == (name, flag, True, "")
        assert row["provider"]
        assert row["version"]
        assert row["distribution"].startswith("multifd-")


def test_broken_plugins_are_rows_with_their_reason(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.good("good")
    site.install("raises", "raise RuntimeError('no such device\\nreally')")
    site.install("exits", "import sys; sys.exit(3)")
    site.install("crashes", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    site.install("prints", "print('{}' * 100)\n" + GOOD.format(name="prints", method="prints", flag=29, hardware=False))
    site.install("missing", "import no_such_library")
    site.install("empty", "")
    site.install("liar", GOOD.format(name="other", method="other", flag=30, hardware=False))
    site.install("badflag", GOOD.format(name="badflag", method="badflag", flag=3, hardware=False))
    site.install("zlib-x", GOOD.format(name="zlib-x", method="zlib", flag=2, hardware=False))
    site.install(
        "future",
        GOOD.format(name="future", method="future", flag=30, hardware=False).replace(
            '"h"),))', '"h"),), api_version=9)'
        ),
    )
    site.install(
        "typo",
        GOOD.format(name="typo", method="typo", flag=30, hardware=False) + "@hookimpl\ndef multifd_prepare(x): pass\n",
    )
    rows = site.rows()
    reasons = {name: row["reason"] for name, row in rows.items() if not row["available"]}
    assert reasons.pop("raises") == "raises (multifd-raises 1.0): import failed: RuntimeError: no such device really"
    assert "SystemExit: 3" in reasons.pop("exits")
    assert "SIGSEGV" in reasons.pop("crashes")
    assert "No module named 'no_such_library'" in reasons.pop("missing")
    assert "returned NoneType, not Facts" in reasons.pop("empty")
    assert "calls itself 'other'" in reasons.pop("liar")
    assert "flag 3 is not free, a method of its own takes 27..31" in reasons.pop("badflag")
    assert "flag 2, but QEMU's zlib has 1" in reasons.pop("zlib-x")
    assert "API version 9, this core has 1: upgrade multifd-core" in reasons.pop("future")
    assert "multifd_prepare" in reasons.pop("typo")
    reasons.pop("qatzip", None)  # libqatzip may be here or not
    assert reasons == {}
    assert rows["good"]["available"]
    assert rows["prints"]["available"]
    assert rows["zlib"]["available"]
    assert rows["crashes"]["distribution"] == "multifd-crashes 1.0"


def test_a_hanging_plugin_is_a_row_and_delays_nobody(site: Site) -> None:
    site.install("hangs", "import time; time.sleep(1000)")
    site.good("good")
    started = time.monotonic()
    code = "from multifd import plugins\nimport json\nprint(json.dumps(plugins.probe_all(plugins.names(), 3)))"
    result = site.run("-c", code)
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert "did not answer within 3 s" in rows["hangs"]["reason"]
    assert rows["good"]["available"]
    assert time.monotonic() - started < 30


def test_choosing_by_name_imports_that_one_only(site: Site) -> None:
    site.good("good")
    site.install("hangs", "import time; time.sleep(1000)")
    site.install("crashes", "import os; os.abort()")
    code = "import sys\nfrom multifd import plugins\n"
    code += "print(plugins.select(plugins.Spec('good'), sending=True)[0].facts.flag)\n"
    result = site.run("-c", code + "assert not {'multifd_hangs', 'multifd_zlib'} & set(sys.modules)")
    assert result.stdout == "30\n", result.stderr


def test_a_name_taken_twice_names_both_distributions(site: Site) -> None:
    site.good("good")
    site.install("good", "", distribution="acme-good")
    message = site.error("plugins.load('good')")
    assert "'good' is provided by acme-good 1.0 and multifd-good 1.0: uninstall one" in message
    assert "acme-good 1.0 and multifd-good 1.0" in site.rows()["good"]["reason"]


def test_a_packets_flag_finds_the_best_available(site: Site) -> None:
    choose = "print(plugins.select_for_flag({})[0].name)"
    site.good("zlib-card", "zlib", 1, hardware=True)
    site.good("zlib-slow", "zlib", 1)
    assert site.run("-c", f"from multifd import plugins\n{choose.format(1)}").stdout == "zlib-card\n"
    assert site.run("-c", f"from multifd import plugins\n{choose.format(2)}").stdout == "zstd\n"
    site.good("third", flag=30)
    assert site.run("-c", f"from multifd import plugins\n{choose.format(30)}").stdout == "third\n"
    assert "packets are method 29, and no compressor for it is installed" in site.error(choose.format(29))
    assert "packets are qpl, and no compressor" in site.error(choose.format(4))


def test_one_that_is_not_available_says_why(site: Site) -> None:
    code = GOOD.format(name="card", method="card", flag=31, hardware=True)
    site.install(
        "card", code.replace('Probe(True, "lib", "1.0"', 'Probe(False, reason="no device", install="plug one in"')
    )
    assert "card (multifd-card 1.0) is not available: no device; plug one in" in site.error(
        "plugins.select(plugins.Spec('card'), sending=True)"
    )


def test_a_name_nobody_provides() -> None:
    with pytest.raises(
        HostError,
        match="no compressor is named 'zlbi'; installed: none, qatzip, qatzip-sw, zlib, zstd: did you mean zlib",
    ):
        plugins.load("zlbi")
    with pytest.raises(UsageError, match="'adaptive' is reserved"):
        plugins.load("adaptive")


def test_without_the_plugin_the_message_has_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugins, "_entry_points", dict)
    with pytest.raises(HostError, match="pip install multifd-zstd"):
        plugins.load("zstd")
    with pytest.raises(
        HostError, match="packets are zlib, and no compressor for it is installed: pip install multifd-zlib"
    ):
        plugins.select_for_flag(1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("zlib,level", "'level' is not key=value"),
        ("zlib,level=1,level=2", "given twice"),
        (",level=1", "has no name"),
        ("zlib,=3", "not key=value"),
    ],
)
def test_specs_are_checked(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        plugins.Spec.parse(text)


def compressor() -> plugins.Compressor:
    class Plugin:
        @hookspecs.hookimpl
        def multifd_compressor(self) -> hookspecs.Facts:
            options = (
                hookspecs.Option("fast", True, "h"),
                hookspecs.Option("n", 3, "h"),
                hookspecs.Option("s", "x", "h"),
            )
            return hookspecs.Facts("toy", "toy", 31, "h", range(1, 4), 2, options)

        @hookspecs.hookimpl
        def multifd_send_cleanup(self) -> None:
            raise RuntimeError("cannot")

    return plugins.Compressor("toy", Plugin(), "toy 1")


def test_settings_are_checked_against_the_facts() -> None:
    toy = compressor()
    assert toy.settings({}, sending=True) == plugins.Settings(2, {"fast": True, "n": 3, "s": "x"})
    given = {"level": "3", "fast": "off", "n": "-7", "s": "y"}
    assert toy.settings(given, sending=True) == plugins.Settings(3, {"fast": False, "n": -7, "s": "y"})
    assert toy.settings({"level": "3"}, sending=False).level is None, "no level on decompression"
    for wrong, says in (
        ({"level": "4"}, "level 4 is outside 1..3"),
        ({"level": "x"}, "'x' is not a number"),
        ({"fast": "yes"}, "fast=yes is not on or off"),
        ({"n": "x"}, "n=x is not a number"),
        ({"speed": "1"}, "no option 'speed'; it has: level, fast, n, s"),
    ):
        with pytest.raises(UsageError, match=says):
            toy.settings(wrong, sending=True)
    with pytest.raises(UsageError, match="none has no level"):
        plugins.load("none").settings({"level": "1"}, sending=True)


def test_a_cleanup_that_raises_is_told_and_goes_no_further() -> None:
    toy = compressor()
    with pytest.warns(RuntimeWarning, match="multifd_send_cleanup raised RuntimeError: cannot"):
        toy.cleanup("send", hookspecs.Channel(0, 4096))


def test_one_manager_per_compressor() -> None:
    one, two = plugins.load("zlib"), plugins.load("zstd")
    assert one.hook is not two.hook
    assert one.hook.multifd_compressor().name == "zlib"
    assert two.hook.multifd_compressor().name == "zstd"


def test_every_hook_is_documented() -> None:
    names = [name for name in dir(hookspecs) if name.startswith("multifd_")]
    assert len(names) == 8
    for name in names:
        assert getattr(hookspecs, name).__doc__, name
