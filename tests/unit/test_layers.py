"""The tree: each package of core imports only what stands above it, few modules touch the machine, none is a heap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
CORE = TOP / "core" / "src" / "multifd"

#: From those that import nothing of core to those that nobody imports.  Modules of one package may import each other,
#: though never in a circle.
LAYERS = [
    "errors",
    "log",
    "crew",
    "wire",
    "hookspecs",
    "formats",
    "memory",
    "net",
    "codec",
    "effort",
    "observe",
    "snapshot",
    "engine",
    "qemu",
    "jobs",
    "skeleton",
    "testing",
    "cli",
    "__main__",
]
#: Where old names and promised ones are looked up when they are asked for: no layer, but a table of all of them.
TABLES = {"__init__", "_compat"}
#: Names that only these may import, modules or whole packages.
ROOMS = {
    "socket": {"net"},
    "select": {"net", "codec.children", "cli.signals", "cli.lines"},
    "selectors": {"net.door"},
    "ssl": {"net.tls"},
    "threading": {
        "log",
        "crew",
        "cli.signals",
        "cli.lines",
        "cli.stdout",
        "net.tls",
        "net.door",
        "net.lookup",
        "net.rate",
        "codec.hooks",
        "codec.naming",
        "codec.readers",
        "effort.controller",
        "observe.observers",
        "engine.sender",
        "engine.receiver",
        "qemu.monitor",
        "jobs",
        "testing.checks",
    },
    "pluggy": {"hookspecs", "codec.hooks"},
    "subprocess": {"codec.children", "testing.pytest_plugin"},
}
MOST_LINES = 400
#: Longer ones, and why.
LONG = {
    "testing.checks": "one check after another, each a page to itself: it is read by the check, not from end to end",
    "testing.harness": "what all checks are made of; it is read beside them",
}


def name(path: Path) -> str:
    """A module's name within core; a package's is its `__init__`'s."""
    return ".".join(path.relative_to(CORE).with_suffix("").parts).removesuffix(".__init__")


FILES = {name(path): path for path in CORE.rglob("*.py")}
MODULES = sorted(FILES.keys() - TABLES)


def imports(module: Path) -> set[str]:
    """Full names of what a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(module.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole.removeprefix("multifd.") in FILES else str(node.module))
    return found


def own(module: str) -> set[str]:
    """What it imports of core, within core."""
    found = {wanted.removeprefix("multifd.") for wanted in imports(FILES[module]) if wanted.startswith("multifd.")}
    return found - {"_compat"}  # the tables of old names, for packages that were modules


def test_every_module_has_its_layer() -> None:
    assert {module.partition(".")[0] for module in MODULES} == set(LAYERS)


def test_imports_go_upwards_only() -> None:
    for module in MODULES:
        level = LAYERS.index(module.partition(".")[0])
        for wanted in own(module):
            assert LAYERS.index(wanted.partition(".")[0]) <= level, f"{module} imports {wanted}"


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, on_the_way: tuple[str, ...]) -> None:
        assert module not in on_the_way, " -> ".join([*on_the_way, module])
        if module not in done:
            for wanted in own(module) & set(MODULES):
                if FILES[wanted].name != "__init__.py":
                    visit(wanted, (*on_the_way, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_few_touch_the_machine() -> None:
    for module in MODULES:
        for wanted in imports(FILES[module]):
            rooms = ROOMS.get(wanted.partition(".")[0], {""})
            assert any(f"{module}.".startswith(f"{room}.".lstrip(".")) for room in rooms), f"{module} imports {wanted}"


def test_no_module_is_a_heap() -> None:
    lengths = {module: len(FILES[module].read_text().splitlines()) for module in MODULES}
    assert {module: lines for module, lines in lengths.items() if lines > MOST_LINES}.keys() == LONG.keys()


def test_the_systems_errors_are_told_in_one_place() -> None:
    """Everybody else says `with os_errors(...)`, or `reason(error)`."""
    assert [module for module, path in FILES.items() if "strerror" in path.read_text()] == ["errors"]


def test_hooks_are_called_in_one_place() -> None:
    """So that whatever a plugin raises is named: everybody else says `call`."""

    def calls_a_hook(node: ast.AST) -> bool:
        called = node.func if isinstance(node, ast.Call) else None
        return isinstance(called, ast.Attribute) and called.attr.startswith("multifd_")

    for module, path in FILES.items():
        assert not any(map(calls_a_hook, ast.walk(ast.parse(path.read_text())))), module


def test_core_names_no_plugin_of_its_own() -> None:
    """What to install for a method is a table in data; others bring what they like."""
    for module, path in FILES.items():
        assert "multifd-z" not in path.read_text(), module
        assert not {wanted for wanted in imports(path) if wanted.startswith("multifd_")}, module


@pytest.mark.parametrize("plugin", ["zlib", "zstd", "qatzip", "qpl", "uadk"])
def test_plugins_import_promised_names_only(plugin: str) -> None:
    for path in (TOP / "plugins" / plugin / "src").rglob("*.py"):
        for wanted in imports(path):
            if wanted.startswith("multifd."):
                promised = wanted.startswith("multifd.formats.") or wanted in {"multifd.hookspecs", "multifd.errors"}
                assert promised, f"{path.name} imports {wanted}"


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
    heavy = {"argparse", "pluggy", "socket", "json", "importlib.metadata", "multifd.cli", "multifd.hookspecs"}
    assert not loaded_by("--version") & heavy


def test_send_imports_no_compressor_but_its_own(tmp_path: Path) -> None:
    image = tmp_path / "image.raw"
    image.write_bytes(bytes(4096))
    loaded = loaded_by("send", str(image), f"unix:{tmp_path}/nobody", "--compressor", "zlib")
    assert "multifd_zlib" in loaded
    assert not loaded & {"multifd_zstd", "zstandard", "multifd.cli.receive", "multifd.jobs.relay.server"}
    assert not loaded_by("send", str(image), f"unix:{tmp_path}/nobody", "--compressor", "none") & {"isal"}


def test_importing_a_plugin_touches_no_other() -> None:
    code = "import sys, multifd_zstd\nassert not {'multifd_zlib', 'isal'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
