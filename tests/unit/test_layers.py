"""The tree: each module of core imports only what stands above it, and few touch the machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

CORE = Path(__file__).parents[2] / "core" / "src" / "multifd"

LAYERS = [
    {"__init__"},
    {"errors", "flags"},
    {"wire"},
    {"ram", "transport", "deflate"},
    {"hookspecs", "stream", "snapshot", "tls"},
    {"nocomp", "plugins", "pagelist", "stored"},
    {"pagedevice"},
    {"observers", "effort"},
    {"stats", "trace", "record"},
    {"send", "recv"},
    {"qmp"},
    {"migrate"},
    {"relay", "inspect", "doctor", "bench"},
    # For those who write compressors:
    {"skeleton", "testing"},
    {"testing.harness"},
    {"testing.checks"},
    {"testing.runner"},
    {"testing.pytest_plugin"},
    {"metrics"},
    {"cli"},
    {"__main__"},
]
#: Names that only these modules may import.
ROOMS = {
    "socket": {"transport"},
    "ssl": {"tls"},
    "threading": {"tls", "observers", "effort", "send", "recv", "migrate", "relay", "metrics", "testing.checks"},
    "pluggy": {"hookspecs", "plugins", "observers"},
}


def name(path: Path) -> str:
    """A module's name within core; a package's is its `__init__`'s."""
    return ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name(path): path for path in CORE.rglob("*.py")}


def imports(module: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found |= {f"multifd.{name.name}" for name in node.names} if node.module == "multifd" else {str(node.module)}
    return found


def test_every_module_has_its_layer() -> None:
    assert {name(path) for path in CORE.rglob("*.py")} == set().union(*LAYERS)


@pytest.mark.parametrize("module", sorted(set().union(*LAYERS)))
def test_imports_go_upwards_only(module: str) -> None:
    (level,) = (number for number, names in enumerate(LAYERS) if module in names)
    above = set().union(*LAYERS[:level])
    for wanted in imports(FILES[module]):
        package, _, part = wanted.partition(".")
        if package == "multifd" and part and part != "__version__":
            assert part in above, f"{module} imports {wanted}"
        elif package in ROOMS:
            assert module in ROOMS[package], f"{module} imports {wanted}"


def loaded_by(*arguments: str) -> set[str]:
    code = (
        "import sys\nfrom multifd.__main__ import main\n"
        f"sys.argv = ['multifd', *{arguments!r}]\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        "print(*sys.modules, file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(result.stderr.splitlines()[-1].split())


def test_the_version_costs_nothing() -> None:
    heavy = {"argparse", "pluggy", "socket", "json", "importlib.metadata", "multifd.cli", "multifd.plugins"}
    assert not loaded_by("--version") & heavy


def test_send_imports_no_compressor_but_its_own(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(4096))
    loaded = loaded_by("send", str(image), f"unix:{tmp_path}/nobody", "--compressor", "zlib")
    assert "multifd_zlib" in loaded
    assert not loaded & {"multifd_zstd", "zstandard"}
    assert not loaded_by("send", str(image), f"unix:{tmp_path}/nobody", "--compressor", "none") & {"isal"}


def test_importing_a_plugin_touches_no_other() -> None:
    code = "import sys, multifd_zstd\nassert not {'multifd_zlib', 'isal'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
