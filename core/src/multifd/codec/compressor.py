"""One loaded compressor: its facts, checked, the settings that it takes, and its answers, checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from multifd import hookspecs
from multifd.codec import contract
from multifd.codec.contract import WrongFacts, WrongHooks
from multifd.codec.hooks import Hooks, check_own
from multifd.codec.settings import EFFORTS, Settings
from multifd.errors import CompressorError, MultifdError, UsageError, describe
from multifd.hookspecs import Channel, Facts, OptionValue, Probe
from multifd.log import log
from multifd.wire.flags import name_method
from multifd.wire.packet import Buffer


class Compressor(Hooks):
    """A compressor that was loaded: its facts, its settings, its hooks."""

    facts: Facts

    def __init__(self, name: str | None, plugin: object, distribution: str) -> None:
        """`name` is None where only its facts say it.  Raises CompressorError where it is broken."""
        self.name = name or "the compressor"
        self.distribution = distribution
        try:
            fault = contract.hooks_fault(plugin)
            if not fault:
                super().__init__(hookspecs, plugin)
        except BaseException as error:
            check_own(error)
            raise CompressorError(f"{self}: its hooks do not fit this multifd: {describe(error)}") from error
        if fault:
            raise WrongHooks(f"{self}: {fault}")
        facts = self.call("multifd_compressor")
        if name is None and isinstance(facts, Facts) and isinstance(facts.name, str):
            self.name = facts.name
        if fault := contract.facts_fault(facts, self.name, distribution):
            raise WrongFacts(f"{self}: {fault}")
        self.facts = facts
        name_method(facts.flag, facts.method)

    def __str__(self) -> str:
        return f"{self.name} ({self.distribution})"

    def failed(self, doing: str, error: BaseException) -> MultifdError:
        if isinstance(error, MultifdError) and type(error).__module__.startswith("multifd."):
            return CompressorError(f"{doing}: {self.name}: {error}") if isinstance(error, CompressorError) else error
        if isinstance(error, CompressorError):  # a plugin's own kind of it
            return CompressorError(f"{doing}: {self.name}: {describe(error).partition(': ')[2] or describe(error)}")
        return CompressorError(f"{doing}: {self} failed: {describe(error)}")

    def encode(self, channel: Channel, pages: Sequence[memoryview]) -> Sequence[Buffer]:
        """A packet's payload: a sequence of buffers of bytes, 1 to MAX_PAYLOAD in all.  Raises CompressorError."""
        pages = tuple(pages)  # which nobody can change
        payload: Sequence[Buffer] = self.call("multifd_send_prepare", channel=channel, pages=pages)
        try:
            fault = contract.payload_fault(payload, pages) or self._channel_fault(channel)
        except BaseException as error:  # what it returned is the plugin's, too
            check_own(error)
            raise self.failed("multifd_send_prepare", error) from error
        if fault:
            raise CompressorError(f"{self}: {fault}")
        return payload

    def decode(self, channel: Channel, pages: memoryview, doing: str) -> None:
        """Fill a packet's pages; `doing` says which in messages.  Raises CompressorError, and what `read_into` does."""
        self.call("multifd_recv", doing=doing, channel=channel, pages=pages)
        if fault := self._channel_fault(channel):
            raise CompressorError(f"{doing}: {self}: {fault}")

    def _channel_fault(self, channel: Channel) -> str:
        """What a hook left there that core goes on with."""
        counts: object = channel.counts
        if not isinstance(counts, dict) or len(counts) > contract.MAX_WAYS:
            return contract.counts_fault(counts)
        if channel.live and channel.level not in (self.facts.ladder or (None, self.facts.default_level)):
            sentence = "the compressor leaves the level there that it used"
            return contract.breaks(f"it left the level {contract.shown(channel.level)}", sentence)
        return ""

    def cleanup(self, direction: str, channel: Channel) -> None:
        """Call a cleanup hook; one that raises all the same is told on standard error."""
        try:
            self.call(f"multifd_{direction}_cleanup", channel=channel)
        except MultifdError as error:
            raised = (error.__cause__ if isinstance(error, CompressorError) else None) or error
            log.warning(f"{self}: multifd_{direction}_cleanup raised {describe(raised)}")

    def probe(self, settings: Settings) -> Probe:
        """Ask whether it works here, in this process.  Raises CompressorError where it breaks."""
        probe = self.call("multifd_probe", options=settings.options)
        if fault := contract.probe_fault(probe):
            raise CompressorError(f"{self}: {fault}")
        provider, version, reason, install, *devices = (
            " ".join(text.split())
            for text in (probe.provider, probe.version, probe.reason, probe.install, *probe.devices)
        )
        return Probe(probe.available, provider, version, probe.hardware, reason, install, tuple(devices))

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
