"""One compressor by its name, or by its method's, loaded and ready."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path

from multifd.codec.compressor import Compressor
from multifd.codec.discovery import load_plugin, misplaced, misplaced_text, provider_of, providers
from multifd.codec.settings import RESERVED, Settings, Spec
from multifd.errors import HostError, UsageError
from multifd.hookspecs import ENTRY_POINT_GROUP, Probe
from multifd.log import log


@cache
def distributions() -> Mapping[str, str]:
    """The compressors of this project, and the distribution that brings each: what to install."""
    import tomllib  # for who lacks one; not for those who send
    from importlib import resources

    return tomllib.loads((resources.files("multifd.codec") / "distributions.toml").read_text())


def names() -> list[str]:
    """The names of all installed compressors that are not turned off; imports none of them."""
    return sorted(providers(ENTRY_POINT_GROUP))


def names_of_method(method: str) -> list[str]:
    """The installed compressors of one method: METHOD and METHOD-suffix; imports none."""
    return [name for name in names() if name == method or name.startswith(method + "-")]


def load(name: str) -> Compressor:
    """Import the one compressor of this name, and no other.

    Raises HostError where nobody provides it, CompressorError where its plugin is broken or
    two distributions claim the name, UsageError for a reserved name and one that is turned off.
    """
    if name in RESERVED:
        raise UsageError(f"{name!r} is reserved for {RESERVED[name]}: name a compressor")
    found = provider_of(ENTRY_POINT_GROUP, "compressor", name)
    if found is None:
        raise HostError(_nobody_provides(name, names()))
    return Compressor(name, load_plugin(found), str(found))


def _nobody_provides(name: str, installed: list[str]) -> str:
    import difflib

    ours = distributions()
    text = f"no compressor is named {name!r}; installed: {', '.join(installed) or 'none'}"
    if name in misplaced():
        return f"{text}; {misplaced_text(*misplaced()[name])}"
    if name in ours:
        return f"{text}: {how_to_install(ours[name])}"
    near = difflib.get_close_matches(name, [*installed, *ours], n=1)
    if not near:
        return text
    return f"{text}: did you mean {near[0]}?" + ("" if near[0] in installed else f" {how_to_install(ours[near[0]])}")


def how_to_install(distribution: str) -> str:
    """What to do to have a distribution of this project: a command, where its source is on this machine.

    It is on no index: pip would look for it in vain, or find somebody else's.
    """
    import json
    import shlex
    import sysconfig
    from importlib import metadata
    from urllib.parse import unquote, urlsplit

    folder = distribution.removeprefix("multifd-")
    try:
        core = metadata.distribution("multifd-core")
        url = urlsplit(json.loads(core.read_text("direct_url.json") or "{}").get("url", ""))  # PEP 610
        source = Path(unquote(url.path)).parent / "plugins" / folder
        known = str(core.locate_file("")) == sysconfig.get_path("purelib")  # to pip: not in a one-file build
        if known and url.scheme == "file" and (source / "pyproject.toml").is_file():
            where = f"./plugins/{folder}" if Path.cwd() == source.parents[1] else shlex.quote(str(source))
            return f"pip install {where}"
    except (metadata.PackageNotFoundError, OSError, ValueError, AttributeError):
        pass
    return f"install {distribution}, plugins/{folder} of multifd's source"


def select(spec: Spec, *, sending: bool) -> tuple[Compressor, Settings]:
    """Load a compressor, check its settings and make sure it works here with them, in this process.

    Warns of one that works, but not as its name promises.  Raises as `load`, UsageError for wrong
    settings, HostError where it does not work.
    """
    compressor = load(spec.name)
    settings = compressor.settings(spec.settings, sending=sending)
    probe = compressor.probe(settings)
    if not probe.available:
        raise HostError(f"{compressor} is not available: {why_not(probe)}")
    if probe.reason:
        log.warning(f"{spec.name} works in software: {why_not(probe)}")
    return compressor, settings


def why_not(probe: Probe) -> str:
    return "; ".join(filter(None, (probe.reason, probe.install))) or "it does not say why"
