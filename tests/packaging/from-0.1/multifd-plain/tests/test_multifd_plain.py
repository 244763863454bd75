"""The compressor plain.  `pytest --multifd-compressor plain` asks it everything of the contract too."""

from __future__ import annotations

from multifd.plugins import Spec, select


def test_it_is_installed_and_works_here() -> None:
    compressor, settings = select(Spec("plain", {"level": "1"}), sending=True)
    assert (compressor.facts.method, settings.level) == ("plain", 1)


def test_a_packet_gets_smaller() -> None:
    compressor, settings = select(Spec("plain"), sending=True)
    channel = compressor.channel(0, 4096, settings)
    compressor.hook.multifd_send_setup(channel=channel)
    pages = memoryview(b"guest memory".ljust(4096, b"\0") * 128).toreadonly()
    payload = compressor.hook.multifd_send_prepare(channel=channel, pages=[pages])
    compressor.hook.multifd_send_cleanup(channel=channel)
    assert sum(map(len, payload)) < len(pages) // 10
