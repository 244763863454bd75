"""One loaded compressor: its facts, checked, and the settings that it takes."""

from __future__ import annotations

from collections.abc import Mapping

from multifd import hookspecs
from multifd.codec.hooks import Hooks
from multifd.codec.settings import EFFORTS, Settings
from multifd.errors import CompressorError, MultifdError, UsageError, describe
from multifd.hookspecs import API_VERSION, Channel, Facts, OptionValue, Probe
from multifd.log import log
from multifd.wire.flags import METHODS, THIRD_PARTY_FLAGS


class Compressor(Hooks):
    """A compressor that was loaded: its facts, its settings, its hooks."""

    def __init__(self, name: str | None, plugin: object, distribution: str) -> None:
        """`name` is None where only its facts say it.  Raises CompressorError where it is broken."""
        self.name = name or "the compressor"
        self.distribution = distribution
        try:
            super().__init__(hookspecs, plugin)
        except Exception as error:
            raise CompressorError(f"{self}: its hooks do not fit this multifd: {error}") from error
        facts = self.call("multifd_compressor")
        if name is None and isinstance(facts, Facts):
            self.name = facts.name
        try:
            self.facts = self._check_facts(facts)
        except (TypeError, AttributeError) as error:
            raise CompressorError(f"{self}: its facts make no sense: {error}") from error

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution})"

    def failed(self, doing: str, error: BaseException) -> MultifdError:
        if isinstance(error, CompressorError):
            return CompressorError(f"{doing}: {self.name}: {error}")
        if isinstance(error, MultifdError):
            return error
        return CompressorError(f"{doing}: {self} failed: {describe(error)}")

    def cleanup(self, direction: str, channel: Channel) -> None:
        """Call a cleanup hook; one that raises all the same is told on standard error."""
        try:
            self.call(f"multifd_{direction}_cleanup", channel=channel)
        except MultifdError as error:
            raised = (error.__cause__ if isinstance(error, CompressorError) else None) or error
            log.warning(f"{self}: multifd_{direction}_cleanup raised {describe(raised)}")

    def _check_facts(self, facts: object) -> Facts:
        if not isinstance(facts, Facts):
            raise CompressorError(f"{self}: multifd_compressor returned {type(facts).__name__}, not Facts")
        if facts.api_version != API_VERSION:
            older = facts.api_version < API_VERSION
            raise CompressorError(
                f"{self}: written for API version {facts.api_version}, this core has {API_VERSION}: "
                f"upgrade {self.distribution.split()[0] if older else 'multifd-core'}"
            )
        if facts.name != self.name:
            raise CompressorError(f"{self}: calls itself {facts.name!r}")
        if facts.name != facts.method and not facts.name.startswith(facts.method + "-"):
            raise CompressorError(
                f"{self}: a compressor of method {facts.method} is named so, or {facts.method}-suffix"
            )
        known = METHODS.get(facts.method)
        if known is not None and facts.flag != known:
            raise CompressorError(f"{self}: flag {facts.flag}, but QEMU's {facts.method} has {known}")
        if known is None and facts.flag not in THIRD_PARTY_FLAGS:
            raise CompressorError(
                f"{self}: flag {facts.flag} is not free, a method of its own takes "
                f"{THIRD_PARTY_FLAGS.start}..{THIRD_PARTY_FLAGS.stop - 1}"
            )
        if facts.levels is not None and facts.default_level not in facts.levels:
            raise CompressorError(f"{self}: default level {facts.default_level} is not one of its levels")
        if len(facts.ladder) == 1 or (facts.ladder and facts.levels is None):
            raise CompressorError(f"{self}: a ladder of {facts.ladder} is no choice of levels")
        return facts

    def probe(self, settings: Settings) -> Probe:
        """Ask whether it works here, in this process.  Raises CompressorError where it breaks."""
        probe = self.call("multifd_probe", options=settings.options)
        if not isinstance(probe, Probe):
            raise CompressorError(f"{self}: multifd_probe returned {type(probe).__name__}, not Probe")
        return probe

    def channel(self, number: int, page_size: int, settings: Settings, *, live: bool = False) -> Channel:
        """A fresh channel for this compressor's hooks; `live` where its level may change."""
        return Channel(number, page_size, settings.level, settings.options, live=live)

    def settings(self, given: Mapping[str, str], *, sending: bool) -> Settings:
        """Check settings against the facts.

        Raises UsageError for a key, level or value that this compressor does not have.
        """
        options: dict[str, OptionValue] = {option.name: option.default for option in self.facts.options}
        level = self.facts.default_level if sending else None
        effort = ""
        for key, text in given.items():
            if key == "level" and text in EFFORTS and self.facts.ladder:
                effort = text if sending else ""
                continue
            if key == "level":
                wanted = self._level(text)
                level = wanted if sending else None
                continue
            if key not in options:
                known = ", ".join([*(["level"] if self.facts.levels else []), *options]) or "none"
                raise UsageError(f"{self.name} has no option {key!r}; it has: {known}")
            options[key] = self._option(key, options[key], text)
        return Settings(level, options, effort)

    def _level(self, text: str) -> int:
        levels = self.facts.levels
        if levels is None:
            raise UsageError(f"{self.name} has no level: leave level={text} out")
        try:
            level = int(text)
        except ValueError:
            words = f", {' or '.join(EFFORTS)}" if self.facts.ladder else ""
            raise UsageError(f"{self.name}: level {text!r} is not a number{words}") from None
        if level not in levels:
            raise UsageError(f"{self.name}: level {level} is outside {levels.start}..{levels.stop - 1}")
        return level

    def _option(self, key: str, default: OptionValue, text: str) -> OptionValue:
        try:
            if isinstance(default, bool):
                return {"on": True, "off": False}[text]
            if isinstance(default, int):
                return int(text)
        except (KeyError, ValueError):
            kind = "on or off" if isinstance(default, bool) else "a number"
            raise UsageError(f"{self.name}: {key}={text} is not {kind}") from None
        return text
