"""Finding, probing and loading compressors: by name, one at a time, none disturbing another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

import multifd
from multifd import hookspecs
from multifd.codec import discovery, readers, selection
from multifd.codec.compressor import Compressor
from multifd.codec.settings import Settings, Spec
from multifd.errors import HostError, UsageError
from sites import GOOD, IMPORTS, Site
from told import warns


def test_the_list_has_what_the_json_promises() -> None:
    rows = {row["name"]: row for row in multifd.compressors()}
    assert set(rows) >= {"none", "zlib", "zstd", "qatzip", "qatzip-sw", "qpl", "qpl-sw", "uadk", "uadk-sw"}
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
    site.install("list", GOOD.format(name="list", method="list", flag=30, hardware=False).replace("range(1, 4)", "[2]"))
    site.install("newer", "from multifd.hookspecs import Queue")
    site.install("badfacts", GOOD.format(name="badfacts", method="badfacts", flag="'30'", hardware=False))
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
    assert "cannot import name 'Queue'" in reasons["newer"]
    assert reasons.pop("newer").endswith("it is written for another multifd-core, upgrade the older of the two")
    assert "flag is '30' (str), not an int" in reasons.pop("badfacts")
    assert "levels is [2] (list), neither a range in steps of 1 nor None" in reasons.pop("list")
    assert "no function that is marked with @hookimpl" in reasons.pop("empty")
    assert "calls itself 'other'" in reasons.pop("liar")
    assert "flag 3 is not free, a method of its own takes 27..31" in reasons.pop("badflag")
    assert "flag 2, but QEMU's zlib has 1" in reasons.pop("zlib-x")
    assert "API version 9, this core has 1: upgrade multifd-core" in reasons.pop("future")
    assert "multifd_prepare" in reasons.pop("typo")
    for vendor in ("qatzip", "qpl", "uadk"):  # their libraries may be here or not
        reasons.pop(vendor, None)
    assert reasons == {}
    assert rows["good"]["available"]
    assert rows["prints"]["available"]
    assert rows["zlib"]["available"]
    assert rows["crashes"]["distribution"] == "multifd-crashes 1.0"


def test_a_hanging_plugin_is_a_row_and_delays_nobody(site: Site) -> None:
    site.install("hangs", "import time; time.sleep(1000)")
    site.good("good")
    started = time.monotonic()
    code = f"{IMPORTS}import json\n"
    code += "print(json.dumps(probe_all(['good', 'hangs', 'zlib'], 6)))"
    result = site.run("-c", code)
    rows = {row["name"]: row for row in json.loads(result.stdout)}
    assert "did not answer within 6 s" in rows["hangs"]["reason"]
    assert rows["good"]["available"]
    assert time.monotonic() - started < 30


def test_choosing_by_name_imports_that_one_only(site: Site) -> None:
    site.good("good")
    site.install("hangs", "import time; time.sleep(1000)")
    site.install("crashes", "import os; os.abort()")
    code = f"{IMPORTS}import sys\n"
    code += "print(select(Spec('good'), sending=True)[0].facts.flag)\n"
    result = site.run("-c", code + "assert not {'multifd_hangs', 'multifd_zlib'} & set(sys.modules)")
    assert result.stdout == "30\n", result.stderr


def test_a_name_taken_twice_names_both_distributions(site: Site) -> None:
    site.good("good")
    site.install("good", "", distribution="acme-good")
    message = site.error("load('good')")
    assert "'good' is provided by acme-good 1.0 and multifd-good 1.0: keep one, with --disable acme-good or " in message
    assert "acme-good 1.0 and multifd-good 1.0" in site.rows()["good"]["reason"]
    for row in (
        site.rows("--disable", "Acme.good")["good"],
        site.rows(MULTIFD_DISABLE="x, acme_good")["good"],
    ):
        assert (row["available"], row["reason"], row["distribution"]) == (True, "", "multifd-good 1.0")
    assert site.rows(MULTIFD_DISABLE="multifd-good")["good"]["reason"].startswith("good (acme-good 1.0): ")


def test_a_compressor_turned_off_is_not_loaded(site: Site) -> None:
    site.install("crashes", "import os; os.abort()")
    row = site.rows("--disable", "crashes")["crashes"]
    assert "'crashes' is turned off, by --disable or MULTIFD_DISABLE" in row["reason"]
    assert row["distribution"] == "multifd-crashes 1.0"
    choose = IMPORTS + "{}"
    named = site.run("-c", choose.format("load('zlib')"), MULTIFD_DISABLE="zlib")
    assert "'zlib' is turned off" in named.stderr
    by_flag = site.run("-c", choose.format("select_for_flag(1)"), MULTIFD_DISABLE="multifd-zlib")
    assert "packets are zlib, whose compressors are turned off" in by_flag.stderr


def test_a_distributions_name_means_only_what_it_provides(site: Site) -> None:
    site.install("fast", GOOD.format(name="fast", method="fast", flag=29, hardware=False), distribution="fast")
    site.install("fast", GOOD.format(name="fast", method="fast", flag=29, hardware=False), distribution="acme-fast")
    assert site.rows("--disable", "fast")["fast"]["distribution"] == "acme-fast 1.0"


def test_a_name_to_turn_off_that_nothing_has_is_told(site: Site) -> None:
    result = site.run("-m", "multifd", "compressors", "--disable", "zlbi")
    assert (result.returncode, result.stderr) == (
        0,
        "multifd: warning: --disable zlbi: nothing that is installed has this name\n",
    )


def test_a_flag_of_two_methods_names_both_distributions(site: Site) -> None:
    site.good("alpha", flag=28)
    site.good("beta", flag=28)
    site.good("beta-card", "beta", flag=28, hardware=True)
    choose = "print(select_for_flag(28)[0].name)"
    says = "flag 28 is taken by the methods alpha and beta, of multifd-alpha 1.0 and multifd-beta 1.0 and multifd-beta-"
    assert says in site.error(choose)
    rows = site.rows()
    for name in ("alpha", "beta", "beta-card"):
        assert rows[name]["available"], "by its name it works"
        assert says in rows[name]["reason"]
    assert rows["zlib"]["reason"] == ""
    chosen = site.run("-c", f"{IMPORTS}{choose}", MULTIFD_DISABLE="alpha")
    assert chosen.stdout == "beta-card\n", chosen.stderr
    assert site.rows(MULTIFD_DISABLE="alpha")["beta"]["reason"] == ""


#: Packs with zlib, so many times: how fast it is can be told from how often it does.
PACKS = (
    GOOD
    + """
import zlib
@hookimpl
def multifd_send_prepare(pages):
    for _ in range({times}):
        packed = zlib.compress(b"".join(pages), 1)
    return [packed]
@hookimpl
def multifd_recv(channel, pages):
    payload = bytearray(channel.next_packet_size)
    channel.read_into(payload)
    pages[:] = zlib.decompress(payload)
"""
)


def packs(name: str, flag: int, times: int = 1, *, hardware: bool = False) -> str:
    return PACKS.format(name=name, method=name, flag=flag, times=times, hardware=hardware)


def best(site: Site, arguments: str) -> str:
    code = f"{IMPORTS}import os, sys\nprint(best({arguments}))\n"
    result = site.run("-c", code + "assert not [name for name in sys.modules if name.startswith('multifd_')]")
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_auto_takes_the_fastest(site: Site) -> None:
    site.install("slow", packs("slow", 29, 30))
    site.install("fast", packs("fast", 28))
    breaks = GOOD.format(name="breaks", method="breaks", flag=27, hardware=True)
    site.install("breaks", breaks.replace("return pages", "raise RuntimeError('no')"))
    text = "open(os.__file__, 'rb').read(32768)"
    assert best(site, f"{text}, 4096, ['slow', 'fast', 'breaks', 'none']") == "fast"
    assert best(site, f"{text}, 4096, ['slow', 'none']") == "slow", "none only where nothing is smaller"
    assert best(site, "os.urandom(65536)") == "none"
    assert best(site, "b'', 4096, ['fast', 'slow']") == "fast"
    site.install("card", packs("card", 31, 30, hardware=True))
    assert best(site, text) != "card", "what it says of itself is not what it does"
    assert "no method 'fsat'; installed: breaks, card, fast," in site.error("best(b'', 4096, ['fsat'])")
    assert "no compressor that the peer accepts works here: none is installed" in site.error(
        "import os; os.environ['MULTIFD_DISABLE'] = 'multifd-qpl'; best(b'', 4096, ['qpl'])"
    )
    assert "auto has no option 'level'; it has: accepts=METHOD+METHOD" in site.error(
        "Choice.parse('auto,level=1', bytes)"
    )


def test_auto_and_a_single_file_carry_a_migration(site: Site, work: Path) -> None:
    plugin = work / "zlib.py"  # not everybody's zlib
    plugin.write_text("print('loud')\n" + packs("mine", 31, hardware=True))
    (work / "image.raw").write_bytes(Path(os.__file__).read_bytes()[:32768] * 100)
    arguments = ["--plugin", str(plugin), "--json"]
    receive = ["-m", "multifd", "receive", f"unix:{work}/there", "-o", str(work / "snap"), "--compressor", "auto"]
    with subprocess.Popen(
        [sys.executable, *receive, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as there:
        assert there.stderr is not None
        assert there.stderr.readline() == f"multifd: {plugin} printed: loud\n"
        assert there.stderr.readline() == f"multifd: listening on unix:{work}/there\n"
        send = ["send", str(work / "image.raw"), f"unix:{work}/there", "--compressor", "auto,accepts=mine", *arguments]
        sent = site.run("-m", "multifd", *send)
        received, errors = there.communicate(timeout=60)
    assert sent.returncode == there.returncode == 0, sent.stderr + errors
    for output in (sent.stdout, received):
        assert json.loads(output.splitlines()[-1])["compressor"] == "mine"
    assert (work / "snap" / "0-pc.ram.raw").read_bytes() == (work / "image.raw").read_bytes()


def test_a_single_file_is_listed_and_clashes_as_any(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "single.py"
    file.write_text("from __future__ import annotations\n" + packs("good", 30))
    row = site.rows("--plugin", str(file))["good"]
    assert (row["available"], row["flag"], row["distribution"]) == (True, 30, str(file))
    site.good("good", flag=30)
    assert (
        f"keep one, with no --plugin {file} or --disable multifd-good"
        in site.rows("--plugin", str(file))["good"]["reason"]
    )
    assert site.rows("--plugin", str(file), "--disable", "multifd-good")["good"]["reason"] == ""
    for content, says in (
        ("raise RuntimeError('no')", f"{file}: import failed: RuntimeError: no"),
        ("", f"{file}): its module has no function that is marked with @hookimpl"),
        (packs("x", 3), "flag 3"),
    ):
        file.write_text(content)
        result = site.run("-m", "multifd", "compressors", "--plugin", str(file))
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert says in result.stderr
    result = site.run("-m", "multifd", "compressors", "--plugin", str(tmp_path / "nothing.py"))
    assert "nothing.py is not a Python file: --plugin takes FILE.py" in result.stderr


def test_a_packets_flag_finds_the_best_available(site: Site) -> None:
    choose = "print(select_for_flag({})[0].name)"
    site.good("zlib-card", "zlib", 1, hardware=True)
    site.good("zlib-slow", "zlib", 1)
    assert site.run("-c", f"{IMPORTS}{choose.format(1)}").stdout == "zlib-card\n"
    assert site.run("-c", f"{IMPORTS}{choose.format(2)}").stdout == "zstd\n"
    site.good("third", flag=30)
    assert site.run("-c", f"{IMPORTS}{choose.format(30)}").stdout == "third\n"
    assert "packets are method 29, and no compressor for it is installed" in site.error(choose.format(29))


def test_one_that_is_not_available_says_why(site: Site) -> None:
    code = GOOD.format(name="card", method="card", flag=31, hardware=True)
    site.install(
        "card", code.replace('Probe(True, "lib", "1.0"', 'Probe(False, reason="no device", install="plug one in"')
    )
    assert "card (multifd-card 1.0) is not available: no device; plug one in" in site.error(
        "select(Spec('card'), sending=True)"
    )


def test_a_name_nobody_provides() -> None:
    with pytest.raises(
        HostError,
        match="no compressor is named 'zlbi'; installed: none, .*, qpl, qpl-sw, .*, zlib, zstd: did you mean zlib",
    ):
        selection.load("zlbi")
    with pytest.raises(UsageError, match="'adaptive' is reserved"):
        selection.load("adaptive")


def test_without_the_plugin_the_message_has_the_pip_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(discovery, "_entry_points", lambda _: ())
    source = Path(__file__).parents[2] / "plugins"
    where = "./plugins" if Path.cwd() == source.parent else str(source)
    with pytest.raises(HostError, match=f"pip install {re.escape(where)}/zstd"):
        selection.load("zstd")
    with pytest.raises(
        HostError, match=f"packets are zlib, and no compressor for it is installed: pip install {re.escape(where)}/zlib"
    ):
        readers.select_for_flag(1)


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
        Spec.parse(text)


def compressor() -> Compressor:
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
        def multifd_probe(self) -> hookspecs.Probe:
            return hookspecs.Probe(True, "toy")

        @hookspecs.hookimpl
        def multifd_send_prepare(self, pages: Sequence[memoryview]) -> Sequence[memoryview]:
            return pages

        @hookspecs.hookimpl
        def multifd_recv(self, channel: hookspecs.Channel, pages: memoryview) -> None:
            channel.read_into(pages)

        @hookspecs.hookimpl
        def multifd_send_cleanup(self) -> None:
            raise RuntimeError("cannot")

    return Compressor("toy", Plugin(), "toy 1")


def test_settings_are_checked_against_the_facts() -> None:
    toy = compressor()
    assert toy.settings({}, sending=True) == Settings(2, {"fast": True, "n": 3, "s": "x"})
    given = {"level": "3", "fast": "off", "n": "-7", "s": "y"}
    assert toy.settings(given, sending=True) == Settings(3, {"fast": False, "n": -7, "s": "y"})
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
        selection.load("none").settings({"level": "1"}, sending=True)


def test_a_cleanup_that_raises_is_told_and_goes_no_further() -> None:
    toy = compressor()
    with warns("multifd_send_cleanup raised RuntimeError: cannot"):
        toy.cleanup("send", hookspecs.Channel(0, 4096))


def test_one_manager_per_compressor() -> None:
    one, two = selection.load("zlib"), selection.load("zstd")
    assert one.hook is not two.hook
    assert one.hook.multifd_compressor().name == "zlib"
    assert two.hook.multifd_compressor().name == "zstd"


def test_every_hook_is_documented() -> None:
    names = [name for name in dir(hookspecs) if name.startswith("multifd_")]
    assert len(names) == 8
    for name in names:
        assert getattr(hookspecs, name).__doc__, name
