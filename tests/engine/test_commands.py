"""Commands that other packages bring, by entry points of group `multifd.commands`."""

from __future__ import annotations

from sites import Site

PS = """
import argparse
print("imported")

def configure(parser):
    parser.description = "List them."
    parser.add_argument("path")
    return run

def run(arguments):
    if arguments.path == "fails":
        raise ZeroDivisionError("no such process")
    if arguments.path == "refuses":
        from multifd.errors import CallerError
        raise CallerError("refuses: no snapshot")
    print(arguments.path, arguments.json)
    return 3
"""


TAKES = """
def configure(parser):
    parser.add_argument("--run")
    parser.add_argument("--plugin")
    parser.add_argument("--disable")
    return lambda arguments: print(arguments.run, arguments.plugin, arguments.disable) or 0
"""


def bring(
    site: Site, name: str, code: str = PS, distribution: str | None = None, target: str = "{module}:configure"
) -> None:
    site.install(name, code, distribution, group="multifd.commands", target=target)


def test_it_runs_as_one_of_multifds_own(site: Site) -> None:
    bring(site, "ps")
    result = site.run("-m", "multifd", "ps", "snap", "--json")
    assert (result.returncode, result.stdout) == (3, "imported\nsnap True\n"), result.stderr
    said = site.run("-m", "multifd", "ps", "--help").stdout
    assert "List them." in said
    assert "--debug" in said
    assert site.run("-m", "multifd", "ps").returncode == 2


def test_its_options_may_have_any_name(site: Site) -> None:
    bring(site, "takes", TAKES)
    result = site.run("-m", "multifd", "takes", "--run", "a", "--plugin", "b", "--disable", "zlib")
    assert (result.returncode, result.stdout) == (0, "a b zlib\n"), result.stderr


def test_what_it_raises_is_one_line(site: Site) -> None:
    bring(site, "ps")
    result = site.run("-m", "multifd", "ps", "fails")
    assert result.returncode == 1
    assert result.stderr == "multifd: the command ps (multifd-ps 1.0) failed: ZeroDivisionError: no such process\n"
    assert ", in run\n" in site.run("-m", "multifd", "ps", "fails", "--debug").stderr
    result = site.run("-m", "multifd", "ps", "refuses")
    assert (result.returncode, result.stderr) == (1, "multifd: refuses: no snapshot\n")


def test_broken_ones_are_lines_of_the_help_and_nothing_is_imported(site: Site) -> None:
    bring(site, "ps")
    bring(site, "raises", "raise RuntimeError('no such device')")
    bring(site, "gone", target="no_such_package.main:configure")
    bring(site, "odd", target="???")
    bring(site, "send")
    bring(site, "twice")
    bring(site, "twice", distribution="acme-twice")
    result = site.run("-m", "multifd", "--help")
    assert result.returncode == 0, result.stderr
    assert "imported" not in result.stdout
    said = " ".join(result.stdout.split())
    assert "ps of multifd-ps 1.0" in said
    assert "raises of multifd-raises 1.0" in said
    assert "gone cannot be used: of multifd-gone 1.0: there is no module 'no_such_package'" in said
    assert "odd cannot be used: of multifd-odd 1.0: its entry point '???' is no module:attribute" in said
    assert "(send) of multifd-send 1.0: not used, multifd has a command of this name" in said
    assert "acme-twice 1.0 and multifd-twice 1.0: keep one, with MULTIFD_DISABLE=acme-twice or MULTIFD_DISABLE=" in said
    for name, says in (
        ("raises", "raises (multifd-raises 1.0): import failed: RuntimeError: no such device"),
        ("gone", "gone (multifd-gone 1.0): import failed: ModuleNotFoundError: No module named 'no_such_package'"),
        ("odd", "odd (multifd-odd 1.0): import failed: "),
        ("twice", "the command 'twice' is provided by acme-twice 1.0 and multifd-twice 1.0: keep one, with MULTIFD_"),
    ):
        result = site.run("-m", "multifd", name, "x")
        assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
        assert says in result.stderr
    assert "raw memory image" in site.run("-m", "multifd", "send", "--help").stdout, "core's names win"
    assert "twice of acme-twice 1.0" in " ".join(
        site.run("-m", "multifd", "--help", MULTIFD_DISABLE="multifd-twice").stdout.split()
    )


def test_who_asks_for_one_of_multifds_own_looks_for_no_other(site: Site) -> None:
    code = (
        "import sys\nfrom multifd.cli.main import main\n"
        "assert main(['inspect', '/nothing']) == 1\n"
        "assert 'importlib.metadata' not in sys.modules"
    )
    result = site.run("-c", code)
    assert result.stderr == "multifd: /nothing: No such file or directory\n"
    assert result.returncode == 0
