"""Mistakes that authors of compressors make: each is named in one line, and ends nothing of others."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipapp
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import images
import mistaken
import multifd
import peers
from multifd import hookspecs
from multifd.codec import discovery
from multifd.codec.compressor import Compressor
from multifd.codec.discovery import Provider
from multifd.codec.sessions import Sessions
from multifd.errors import CompressorError, MultifdError
from multifd.hookspecs import Channel
from multifd.jobs.relay.outcome import Relayed
from multifd.wire import flags
from multifd.wire.flags import method_name, name_method
from relaying import Relaying, closing
from sites import GOOD, IMPORTS, Site
from told import warns

TOP = Path(__file__).parents[2]


def quoted(text: str) -> str:
    """The sentence at the end of a message, which is the contract's."""
    found = re.search(r'; the contract: "(.*)"$', text)
    assert found, text
    texts = [hookspecs.__doc__, *(getattr(hookspecs, name).__doc__ for name in vars(hookspecs) if name[0] != "_")]
    assert found[1] in " ".join(" ".join(filter(None, texts)).split())
    return found[1]


# --- found when they are loaded ---


def test_what_is_found_on_load_is_a_row_with_its_sentence(tmp_path: Path) -> None:
    site = Site(tmp_path)
    for name in mistaken.ON_LOAD:
        site.install(name, mistaken.on_load(name))
    rows = site.rows()
    for name, (_, _, says, sentence) in mistaken.ON_LOAD.items():
        reason = rows[name]["reason"].partition("; flag 31 is taken")[0]
        assert not rows[name]["available"]
        assert re.search(says, reason) or says in reason, reason
        assert reason.startswith(f"{name} (multifd-{name} 1.0): ") or not sentence, reason
        assert not sentence or quoted(reason).startswith(sentence), reason
        assert "\n" not in reason
    assert rows["zlib"]["available"], "nobody else's row is another"


def test_a_wrong_group_is_told(site: Site) -> None:
    site.install("lost", mistaken.plain("lost"), group="multifd.compressor")
    says = "multifd-lost 1.0 has an entry point 'lost' in the group 'multifd.compressor', which nobody reads; the con"
    assert says in site.error("load('lost')")
    row = site.rows()["lost"]
    assert (row["available"], row["distribution"]) == (False, "multifd-lost 1.0")
    assert says in row["reason"]
    quoted(row["reason"])


def test_a_distribution_without_metadata_is_a_row(site: Site) -> None:
    site.good("gone")
    (info,) = site.folder.glob("*.dist-info")
    (info / "METADATA").unlink()
    rows = site.rows("--disable", "zlib")
    assert (rows["gone"]["available"], rows["gone"]["distribution"]) == (True, "multifd_gone 1.0")
    assert "multifd_gone-1.0.dist-info has no METADATA" in rows["gone"]["note"]
    (site.folder / "multifd_gone.py").unlink()
    assert "has no METADATA: install it again" in site.rows()["gone"]["reason"]
    assert "turned off" in site.rows("--disable", "multifd-gone")["gone"]["reason"]


def test_a_slow_import_is_told(site: Site) -> None:
    site.install("slow", f"import time; time.sleep(1.1)\n{mistaken.plain('slow')}")
    row = site.rows()["slow"]
    assert row["available"]
    assert re.match(r'importing it took \d+\.\d s; the contract: "The import takes', row["note"])
    quoted(row["note"])
    used = site.run("-c", f"{IMPORTS}select(Spec('slow'), sending=True)")
    assert used.returncode == 0
    (line,) = used.stderr.splitlines()
    assert line.startswith("slow: importing it took ")


def test_one_that_prints_for_ever_hangs(site: Site) -> None:
    site.install("shouts", "while True: print('no card \\x1b[2J')")
    code = f"{IMPORTS}print(probe_all(['shouts'], 3)[0]['reason'])"
    assert site.run("-c", code).stdout == "it did not answer within 3 s: no card \\x1b[2J\n"


def test_one_that_forks_is_one_row_and_nobody_elses(site: Site) -> None:
    site.install(
        "forks", "import os\n" + mistaken.plain("forks").replace("    return Probe", "    os.fork()\n    return Probe")
    )
    site.good("good")
    rows = site.rows()
    assert rows["forks"]["available"]
    assert rows["good"]["available"]
    code = "from multifd.codec.naming import learn\nfrom multifd.wire.flags import method_name\nlearn(31); "
    assert site.run("-c", code + "print(method_name(31))").returncode == 0


@pytest.mark.parametrize("helper", ["multifd_send", "multifd_recv_page", "multifd_send_startup", "multifd_recv_packet"])
def test_a_helper_may_have_a_name_much_like_a_hooks(site: Site, helper: str) -> None:
    site.install("helps", f"{mistaken.plain('helps')}\ndef {helper}(): pass\n")
    assert site.rows()["helps"]["available"]


def test_what_pluggy_does_not_take_is_named(site: Site) -> None:
    text = mistaken.plain("cached").replace(
        "def multifd_compressor", "@__import__('functools').cache\ndef multifd_compressor"
    )
    site.install("cached", text)
    reason = site.rows()["cached"]["reason"]
    assert "multifd_compressor is a _lru_cache_wrapper and no function: put it into a def" in reason


# --- found on the hot path ---


def toy(where: str, mistake: Callable[[Any], Any]) -> Compressor:
    return Compressor("toy", mistaken.Toy(where, mistake), "toys 1.0")


@pytest.mark.parametrize("says", mistaken.HANDS_BACK)
def test_a_payload_that_is_none(says: str) -> None:
    bad = toy("send_prepare", mistaken.HANDS_BACK[says])
    pages = [memoryview(bytes(4096)).toreadonly()]
    with pytest.raises(CompressorError, match=re.escape(says)) as raised:
        bad.encode(bad.channel(0, 4096, bad.settings({}, sending=True)), pages)
    assert "toy (toys 1.0)" in str(raised.value)
    if says != "ValueError":
        quoted(str(raised.value))


def test_payloads_of_any_buffers_of_bytes() -> None:
    for payload in (
        (b"a", bytearray(b"b"), memoryview(b"c")),
        [memoryview(bytearray(2)).cast("c")],
        [memoryview(b"ab").toreadonly()] * 64,
    ):
        good = toy("send_prepare", lambda _, payload=payload: payload)  # type: ignore[misc]
        assert good.encode(good.channel(0, 4096, good.settings({}, sending=True)), []) is payload
    pages = [memoryview(bytearray(4096)), memoryview(bytearray(8192))]
    assert list(toy("send_prepare", lambda pages: pages).encode(Channel(0, 4096), pages)) == pages


@pytest.mark.parametrize(
    "counts", [None, dict.fromkeys(range(3), 1), {"a\nb": 1}, {"a": "many"}, {"a": -1}, {"x" * 65: 1}]
)
def test_what_cannot_be_a_count_is_left_out(counts: Any) -> None:
    bad = toy("", str)
    sessions = Sessions("send", 0)
    sessions.get(bad, bad.settings({}, sending=True), 4096).counts = counts
    with warns(r"toy \(toys 1.0\): it counted "):
        assert sessions.counts == {}
    sessions.close()


def test_too_many_counts_end_it() -> None:
    bad = toy("counts", lambda channel: channel.counts.update({str(number): 1 for number in range(65)}))
    with pytest.raises(CompressorError, match=r"toy \(toys 1.0\): it counted 65 ways") as raised:
        bad.encode(bad.channel(0, 4096, bad.settings({}, sending=True)), [memoryview(bytes(4096))])
    quoted(str(raised.value))


# --- a relay goes on ---

WORST = ("with 'abc' (str) in it", "a memoryview of 'B' in it, 2048 bytes", "ValueError")
PLACES = ("send_setup", "send_prepare", "send_cleanup", "recv_setup", "recv", "recv_cleanup")
LIVE = {
    **{f"{place} raises {what}": (place, mistaken.RAISES[what], what) for place in PLACES for what in ("Odd",)},
    **{f"recv raises {what}": ("recv", mistake, what) for what, mistake in mistaken.RAISES.items()},
    **{f"send_prepare {what}": ("send_prepare", mistaken.HANDS_BACK[what], what) for what in WORST},
    "counts None": ("counts", lambda channel: setattr(channel, "counts", None), "it counted None"),
    "set-up returns": ("send_setup", lambda _: object(), ""),
}


@pytest.mark.may_warn("toy .*cleanup raised")
@pytest.mark.parametrize("case", LIVE)
def test_a_relay_serves_the_next_migration(work: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """The mistake is made in the first migration only."""
    where, mistake, says = LIVE[case]
    bad = mistaken.Toy(where, mistake)
    monkeypatch.setattr(discovery, "files", [Provider("toy", lambda: bad, path="toys 1.0")])
    content = images.write_memory(work)
    reads = where.startswith("recv")
    method = {"source": "toy", "to": "none"} if reads else {"to": "toy"}
    good = mistaken.Toy()

    def migrate(number: int) -> None:
        compressor = "none" if reads else "toy"
        there = peers.Receiving(
            work / f"snap{number}", f"unix:{work}/there", compressor=compressor, crew=(crew := multifd.Crew())
        )
        try:
            multifd.send(work / "image.raw", relaying.uri, "toy" if reads else "none")
        except MultifdError:
            crew.cancel()  # it may not have heard of it, and wait for the next one
            raise
        finally:
            there.join()

    with closing(Relaying(f"unix:{work}/there", migrations=2, **method)) as relaying:
        monkeypatch.setattr(discovery, "files", [Provider("toy", lambda: good, path="toys 1.0")])
        first: Exception | None = None
        try:
            migrate(0)
        except MultifdError as error:
            first = error
        bad.where = ""
        migrate(1)
        one, two = relaying.join()
    if "cleanup" in where or not says:
        assert (first, isinstance(one, Relayed)) == (None, True)
    else:
        assert first is not None
        assert isinstance(one, CompressorError), one
        assert "toy" in str(one)
        assert says in str(one)
    assert isinstance(two, Relayed), two
    assert (work / "snap1" / "0-pc.ram.raw").read_bytes() == content


# --- bench ---

MISTAKES = {
    "crashes": "import os; print('the card is on fire', flush=True); os.abort()",
    "exits": "import os; os._exit(0)",
    "hangs": "import ctypes; ctypes.CDLL(None).sleep(1000)",
    "interrupts": "raise KeyboardInterrupt",
    "str": "return 'abc'",
    "warns": "import warnings; warnings.warn('the card gave up', RuntimeWarning)",
}


def in_prepare(name: str, body: str) -> str:
    return mistaken.plain(name).replace("    return [zlib", f"    {body}\n    return [zlib")


def test_bench_goes_on_without_those_that_fail(site: Site, work: Path) -> None:
    for name, body in MISTAKES.items():
        site.install(name, in_prepare(name, body))
    site.install("late", in_prepare("late", "if channel.level == 2: import os; os.abort()"))
    (work / "image.raw").write_bytes(os.urandom(4096) * 16)
    code = (
        "import json, sys\nfrom multifd.jobs.bench import measure\nmeasure.LIMIT = 3.0\nmeasure.LEVELS = (1, 2, 3)\n"
        "print(json.dumps(measure.bench(sys.argv[1]).report([1e9])))"
    )
    result = site.run(
        "-c", code, str(work / "image.raw"), MULTIFD_DISABLE="zstd,multifd-qatzip,multifd-qpl,multifd-uadk"
    )
    assert result.returncode == 0, result.stderr
    rows = {row["setting"]: row for row in json.loads(result.stdout)["settings"]}
    assert rows["crashes,level=1"]["reason"] == "its process died (signal SIGABRT): the card is on fire"
    assert rows["exits,level=1"]["reason"] == "its process died (exit status 0)"
    assert rows["hangs,level=1"]["reason"] == "it did not answer within 3 s"
    assert "KeyboardInterrupt" in rows["interrupts,level=1"]["reason"]
    assert "returned 'abc' (str); the contract: " in rows["str,level=1"]["reason"]
    assert all("ratio" in rows[f"late,level={level}"] for level in (1, 3, 9))
    assert "SIGABRT" in rows["late,level=2"]["reason"]
    assert rows["zlib,level=1"]["ratio"] > 1
    assert "warns,level=1: the card gave up\n" in result.stderr


def test_bench_ends_with_the_first_signal_and_its_child_with_it(site: Site, work: Path) -> None:
    site.install(
        "hangs",
        in_prepare(
            "hangs", f"import os; open({str(work / 'pid')!r}, 'w').write(str(os.getpid())); {MISTAKES['hangs']}"
        ),
    )
    (work / "image.raw").write_bytes(os.urandom(4096) * 16)
    command = [sys.executable, "-m", "multifd", "bench", str(work / "image.raw"), "--disable", "zstd"]
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": str(site.folder)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as bench:
        assert peers.eventually(lambda: (work / "pid").exists() and (work / "pid").read_text() != "", 40)
        child = int((work / "pid").read_text())
        started = time.monotonic()
        bench.send_signal(signal.SIGTERM)
        assert bench.wait(10) == 128 + signal.SIGTERM
        assert time.monotonic() - started < 2
    assert peers.eventually(lambda: not Path(f"/proc/{child}").exists())


# --- what is printed, and where it runs ---


def test_what_a_plugin_prints_is_marked_and_on_standard_error(work: Path) -> None:
    plugin = work / "prints.py"
    plugin.write_text(
        "import ctypes, os, sys\nprint('loaded', 1)\nctypes.CDLL(None).puts(b'from C')\n"
        "class Closing:\n    def __del__(self): print('closed')\n"
        + in_prepare("prints", "print('packs'); sys.stdout.buffer.write(b'raw'); channel.compress_data = Closing()")
    )
    (work / "image.raw").write_bytes(os.urandom(4096) * 16)
    common = ("--plugin", str(plugin), "--json")
    base = [sys.executable, "-m", "multifd"]
    receive = [*base, "receive", f"unix:{work}/s", "-o", str(work / "snap"), *common]
    with subprocess.Popen(receive, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as there:
        assert peers.eventually((work / "s").exists, 20)
        send = [*base, "send", str(work / "image.raw"), f"unix:{work}/s", "--compressor", "prints", *common]
        sent = subprocess.run(send, capture_output=True, text=True, timeout=60, check=False)
        received, _ = there.communicate(timeout=60)
    assert (sent.returncode, there.returncode) == (0, 0), sent.stderr
    for output in (sent.stdout, received):
        assert json.loads(output)["compressor"] == "prints"
    assert f"multifd: {plugin} printed: loaded 1\n" in sent.stderr
    assert f"multifd: prints ({plugin}) printed: packs\n" in sent.stderr
    assert "multifd: a plugin printed: closed\n" in sent.stderr, "nobody called it"
    assert "from C" in sent.stderr


def test_a_build_of_one_file(work: Path) -> None:
    """Its children find what it finds."""
    app = work / "app"
    for source in (TOP / "core/src/multifd", TOP / "plugins/zlib/src/multifd_zlib"):
        shutil.copytree(source, app / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    for name, entry in (("multifd_core", "none = multifd.codec.none"), ("multifd_zlib", "zlib = multifd_zlib")):
        info = app / f"{name}-0.2.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.2.0\n")
        (info / "entry_points.txt").write_text(f"[multifd.compressors]\n{entry}\n")
    import pluggy

    shutil.copytree(Path(pluggy.__file__).parent, app / "pluggy")
    zipapp.create_archive(app, work / "app.pyz", main="multifd.__main__:main")
    shutil.rmtree(app)
    (work / "image.raw").write_bytes(os.urandom(4096) * 4)

    def run(*arguments: object) -> Any:
        # -S: nothing of this environment.
        command = [sys.executable, "-S", str(work / "app.pyz"), *map(str, arguments), "--json"]
        result = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=100, check=False)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    rows = {row["name"]: row["available"] for row in run("compressors")}
    assert rows == {"none": True, "zlib": True}
    settings = {row["setting"]: row for row in run("bench", work / "image.raw")["settings"]}
    assert "ratio" in settings["zlib,level=9"]


# --- names ---


@pytest.fixture
def third(site: Site) -> Site:
    site.install("lz4", GOOD.format(name="lz4", method="lz4", flag=28, hardware=False))
    site.install("crashes", "import os; os.abort()")
    return site


def test_an_installed_method_has_its_name(third: Site) -> None:
    code = "from multifd.codec.naming import learn\nfrom multifd.wire.flags import method_name\n"
    code += "learn(28); learn(27); print(method_name(28), method_name(27))"
    assert third.run("-c", code).stdout == "lz4 method 27\n"
    third.install("two", GOOD.format(name="two", method="two", flag=28, hardware=False))
    assert third.run("-c", code).stdout == "method 28 method 27\n", "it may be either"


def test_a_loaded_method_has_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags, "_named", {})  # other tests have loaded others
    assert method_name(31) == "method 31"
    toy("", str)
    assert method_name(31) == "toy"
    name_method(1, "mine")
    assert method_name(1) == "zlib"
