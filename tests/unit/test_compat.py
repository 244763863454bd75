"""Names of 0.1: they import until 0.3, each with a warning that says the new one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from multifd._compat import PROMISED

CAPTURE = Path(__file__).parents[1] / "captures" / "q72-none-2ch"

#: What a 0.1 plugin, or the README's Python, used -> what it is now.
OLD = {
    "multifd.wire.Buffer": "multifd.hookspecs.Buffer",
    "multifd.wire.RamPacket": "multifd.wire.packet.RamPacket",
    "multifd.wire.INIT": "multifd.wire.packet.INIT",
    "multifd.wire.header_length": "multifd.wire.packet.header_length",
    "multifd.flags.METHODS": "multifd.hookspecs.METHODS",
    "multifd.flags.MAX_PAYLOAD": "multifd.hookspecs.MAX_PAYLOAD",
    "multifd.flags.PACKET_SIZE": "multifd.hookspecs.PACKET_SIZE",
    "multifd.flags.DEFAULT_PAGE_SIZE": "multifd.hookspecs.DEFAULT_PAGE_SIZE",
    "multifd.flags.COMPRESSION_SHIFT": "multifd.wire.flags.COMPRESSION_SHIFT",
    "multifd.plugins.Spec": "multifd.codec.settings.Spec",
    "multifd.plugins.Settings": "multifd.codec.settings.Settings",
    "multifd.plugins.Compressor": "multifd.codec.compressor.Compressor",
    "multifd.plugins.load": "multifd.codec.selection.load",
    "multifd.plugins.select": "multifd.codec.selection.select",
    "multifd.plugins.names": "multifd.codec.selection.names",
    "multifd.plugins.rows": "multifd.compressors",
    "multifd.plugins.select_for_flag": "multifd.codec.readers.select_for_flag",
    "multifd.deflate.inflate": "multifd.formats.deflate.inflate",
    "multifd.deflate.isal_zlib": "multifd.formats.deflate.isal_zlib",
    "multifd.plugins.HOOK_ERRORS": "multifd.codec.hooks.HOOK_ERRORS",
    "multifd.deflate.decompressobj": "multifd.formats.deflate.decompressobj",
    "multifd.deflate.crc32": "multifd.formats.deflate.crc32",
    "multifd.deflate.PROVIDER": "multifd.formats.deflate.PROVIDER",
    "multifd.stored.copy_stored": "multifd.formats.stored.copy_stored",
    "multifd.pagelist.SoftwareCompressor": "multifd.formats.pagelist.SoftwareCompressor",
    "multifd.pagedevice.DeviceCompressor": "multifd.formats.pagedevice.DeviceCompressor",
    "multifd.migrate.send": "multifd.send",
    "multifd.migrate.receive": "multifd.receive",
    "multifd.migrate.Result": "multifd.jobs.report.Result",
    "multifd.migrate.DEFAULT_TIMEOUT": "multifd.net.deadline.DEFAULT_TIMEOUT",
    "multifd.inspect.inspect": "multifd.inspect",
    "multifd.snapshot.open_source": "multifd.open_snapshot",
    "multifd.snapshot.SnapshotWriter": "multifd.snapshot.writer.SnapshotWriter",
    "multifd.relay.Relay": "multifd.Relay",
    "multifd.relay.Relayed": "multifd.jobs.relay.outcome.Relayed",
    "multifd.qmp.Monitor": "multifd.qemu.monitor.Monitor",
    "multifd.observers.Times": "multifd.observe.hooks.Times",
    "multifd.doctor.compare": "multifd.jobs.doctor.compare.compare",
}


def python(code: str, *options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *options, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


def test_every_old_name_is_the_new_one_and_warns_with_it() -> None:
    code = "import multifd, sys, warnings\nfrom importlib import import_module\n"
    for old, new in OLD.items():
        module, _, name = old.rpartition(".")
        home, _, its = new.rpartition(".")
        code += (
            "with warnings.catch_warnings(record=True) as told:\n"
            "    warnings.simplefilter('always')\n"
            f"    from {module} import {name} as found\n"
            f"assert found is getattr(import_module({PROMISED.get(its, home)!r}), {its!r}), {old!r}\n"
            f"(text,) = {{str(each.message) for each in told if each.category is DeprecationWarning}}\n"
            f"assert text == '{old} is {new} now; the old name goes with multifd 0.3', text\n"
            "assert all(each.filename == '<string>' for each in told), 'where it is imported is what is shown'\n"
        )
    result = python(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "code",
    [
        "from multifd import inspect\nfrom multifd.inspect import inspect as old\n",
        "from multifd.inspect import inspect as old\nfrom multifd import inspect\n",
        "import multifd.inspect\ninspect = multifd.inspect\nold = multifd.inspect.inspect\n",
        "import multifd\ninspect = multifd.inspect\nimport multifd.inspect\nold = multifd.inspect.inspect\n",
    ],
)
def test_inspect_was_a_module_and_is_a_function(code: str) -> None:
    code += f"import multifd\nfor f in (inspect, old, multifd.inspect): print(f({str(CAPTURE)!r})['machine'])"
    result = python(code)
    assert result.stdout == "pc-q35-7.2\n" * 3, result.stderr


def test_a_name_may_be_there_and_be_nothing() -> None:
    """`isal_zlib` is None where there is no ISA-L, and 0.1's multifd-zlib imports it so."""
    result = python(
        "import sys\nsys.modules['isal'] = None\nfrom multifd.deflate import isal_zlib as found\nprint(found)"
    )
    assert result.stdout == "None\n", result.stderr


def test_old_names_import_from_many_threads_at_once() -> None:
    """The import system holds a lock of its own while it looks for a module."""
    code = (
        "import multifd, threading\n"
        "names = 'multifd.migrate multifd.plugins multifd.relay multifd.wire dataclasses typing re json socket'\n"
        "go = threading.Barrier(len(names.split()))\n"
        "def load(name):\n"
        "    go.wait()\n"
        "    __import__(name)\n"
        "threads = [threading.Thread(target=load, args=(name,), daemon=True) for name in names.split()]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join(20)\n"
        "print(sum(thread.is_alive() for thread in threads))"
    )
    for _ in range(8):
        assert python(code).stdout == "0\n"


def test_every_promised_name_is_there_when_it_is_asked_for() -> None:
    import multifd

    for name in multifd.__all__:
        result = python(f"import multifd\nprint(multifd.{name}.__name__)")
        assert result.stdout.strip().rpartition(".")[2] == name, result.stderr


def test_what_never_was_is_no_module() -> None:
    for code in ("import multifd.nothing", "from multifd import nothing", "from multifd.flags import NOTHING"):
        assert "Error: " in python(code).stderr
    assert "cannot import name 'NOTHING'" in python("from multifd.flags import NOTHING").stderr


def test_nothing_of_multifds_own_uses_old_names() -> None:
    code = (
        "import importlib, pkgutil, multifd\n"
        "for found in pkgutil.walk_packages(multifd.__path__, 'multifd.'):\n"
        "    if found.name not in ('multifd.__main__', 'multifd.testing.pytest_plugin'):\n"
        "        importlib.import_module(found.name)\n"
        "import multifd_zlib, multifd_zstd, multifd_qatzip.hardware, multifd_qpl.hardware, multifd_uadk.hardware\n"
        "import multifd_qatzip.software, multifd_qpl.software, multifd_uadk.software\n"
    )
    result = python(code, "-W", "error::DeprecationWarning:multifd")
    assert result.returncode == 0, result.stderr
    result = python(code, "-W", "error")
    assert result.returncode == 0, result.stderr


def test_the_promised_names_are_in_the_docs() -> None:
    import multifd
    from multifd import hookspecs

    page = (Path(__file__).parents[2] / "docs" / "plugins.md").read_text()
    promised = page.partition("## What is promised")[2].partition("\n## ")[0]
    for name in multifd.__all__:
        assert f"`multifd.{name}" in promised, name
    for name in hookspecs.__all__:
        assert f"`{name}`" in promised, name
