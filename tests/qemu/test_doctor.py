"""Two real QEMUs that do not fit, told before anything moves."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import peers
from commands import run
from examples import examples
from multifd.jobs.doctor.compare import advise, compare
from multifd.jobs.doctor.side import Side, examine
from multifd.qemu.monitor import Monitor
from qemus import RELEASES, Qemu, Start, common


def differences(start: Start, source: dict[str, Any], destination: dict[str, Any]) -> list[str]:
    """What is found between two, each given by `release`, what it starts with and what is set (`set`)."""
    sides = []
    for name, options in (("source", source), ("destination", destination)):
        settings = options.pop("set", {})
        qemu = start(options.pop("release", "10.0"), name, incoming=name == "destination", **options)
        if settings is not None:
            qemu.prepare(**settings)
        sides.append(examine(qemu.monitor))
    return [f"{trouble.what}: {trouble.remedy}" for trouble in compare(*sides)]


MISTAKES = [
    ({}, {}, []),
    ({"set": {"method": "zlib"}}, {"release": "7.2", "machine": "pc-q35-7.2", "set": {"method": "zlib"}}, None),
    ({"set": None}, {}, ["multifd is off on the source: on the source's monitor: migrate_set_capability multifd on"]),
    (
        {},
        {"set": None},
        ["multifd is off on the destination: on the destination's monitor: migrate_set_capability multifd on"],
    ),
    (
        {"set": {"channels": 4}},
        {"set": {"channels": 2}},
        ["multifd-channels differ: 4 and 2: on the destination's monitor: migrate_set_parameter multifd-channels 4"],
    ),
    (
        {"set": {"method": "zlib"}},
        {"set": {"method": "zstd"}},
        [
            (
                "multifd-compression differs: zlib and zstd: set multifd-compression to zlib on the destination, or "
                "set multifd-compression to zstd on the source, or put a relay between them, with --from zlib "
                "--to zstd"
            )
        ],
    ),
    (
        {"mib": 32},
        {},
        ["memory sizes differ: 32M and 24M: start the destination with -m 32M"],
    ),
    (
        {"machine": "pc-q35-9.0"},
        {"machine": "pc-q35-9.1"},
        ["machine types differ: pc-q35-9.0 and pc-q35-9.1: start the destination with -machine pc-q35-9.0"],
    ),
    (
        {"set": {"multifd": False, "postcopy_ram": True}},
        {},
        [
            "multifd is off on the source: on the source's monitor: migrate_set_capability multifd on",
            (
                "postcopy-ram is on on the source only: a destination without it refuses the stream: on the source's "
                "monitor: "
                "migrate_set_capability postcopy-ram off"
            ),
        ],
    ),
    (
        {"set": {"tls_creds": "tls0"}},
        {},
        [
            (
                "TLS is on on the source (tls0), not on the destination: set tls-creds on the destination, or put a "
                "relay beside it, with --listen-tls-creds"
            )
        ],
    ),
]


@pytest.mark.parametrize(("source", "destination", "expected"), MISTAKES, ids=lambda value: str(value)[:40])
def test_what_would_fail(
    start: Start, source: dict[str, Any], destination: dict[str, Any], expected: list[str] | None
) -> None:
    found = differences(start, dict(source), dict(destination))
    if expected is None:
        assert [line.partition(":")[0] for line in found] == [
            "machine types differ",
            "the source may send switchover-start, which a destination before 10.0 refuses",
            "the source puts zero pages into packets, which a destination before 9.0 does not read",
        ]
    else:
        assert found == expected


#: Capabilities that are on besides multifd and return-path, and the parameter `mode`, of a source whose guest runs, and
#: of a destination: what would fail, and what else is said.
SETTINGS: list[tuple[str, str, list[str], list[str]]] = [
    ("", "return-path", [], []),
    ("validate-uuid late-block-activate auto-converge", "validate-uuid", [], []),
    (
        "x-ignore-shared",
        "",
        [
            (
                "x-ignore-shared is on on the source only: the destination refuses that: on the source's monitor: "
                "migrate_set_capability x-ignore-shared off, or on the destination's monitor: migrate_set_capability "
                "x-ignore-shared on"
            )
        ],
        [],
    ),
    (
        "",
        "x-ignore-shared",
        [
            (
                "x-ignore-shared is on on the destination only: the destination refuses that: on the destination's "
                "monitor: migrate_set_capability x-ignore-shared off, or on the source's monitor: "
                "migrate_set_capability x-ignore-shared on"
            )
        ],
        [],
    ),
    (
        "x-ignore-shared",
        "x-ignore-shared",
        [],
        [
            (
                "x-ignore-shared is on on both: shared memory is not sent; a relay passes such a migration unread, "
                "receive refuses it"
            )
        ],
    ),
    (
        "mapped-ram",
        "",
        ["mapped-ram is on on the source: on the source's monitor: migrate_set_capability mapped-ram off"],
        [],
    ),
    (
        "postcopy-ram",
        "",
        [
            (
                "postcopy-ram is on on the source only: a destination without it refuses the stream: on the source's "
                "monitor: migrate_set_capability postcopy-ram off"
            )
        ],
        [],
    ),
    ("postcopy-ram", "postcopy-ram", [], []),
    ("", "postcopy-ram", [], []),
    (
        "postcopy-ram postcopy-preempt",
        "postcopy-ram postcopy-preempt",
        [
            (
                "postcopy-preempt is on on the source: a relay cannot pass the connection that it opens: on the "
                "source's monitor: migrate_set_capability postcopy-preempt off"
            )
        ],
        [],
    ),
    ("dirty-bitmaps", "", [], []),
    ("", "dirty-bitmaps", [], []),
    (
        "dirty-bitmaps",
        "postcopy-ram",
        [
            (
                "dirty-bitmaps is on on the source, and postcopy-ram on the destination only: it refuses the stream: "
                "on the "
                "destination's monitor: migrate_set_capability postcopy-ram off"
            )
        ],
        [],
    ),
    (
        "switchover-ack",
        "",
        [
            (
                "switchover-ack is on on the source only: while its guest runs it waits for the destination's word "
                "for ever: "
                "on the source's monitor: migrate_set_capability switchover-ack off, or on the destination's monitor: "
                "migrate_set_capability switchover-ack on"
            )
        ],
        [],
    ),
    ("switchover-ack", "return-path switchover-ack", [], []),
    ("", "return-path switchover-ack", [], []),
    (
        "pause-before-switchover",
        "pause-before-switchover",
        [],
        ["pause-before-switchover is on on the source: it will wait in pre-switchover, its guest stopped"],
    ),
    (
        "mode=cpr-transfer",
        "",
        [
            (
                "the source has mode cpr-transfer, which hands the guest's memory to another QEMU of its host, over no "
                "connection: on its monitor: migrate_set_parameter mode normal"
            )
        ],
        [],
    ),
    ("mode=cpr-reboot", "", [], ["the source has mode cpr-reboot: its guest stands still from the beginning"]),
]


def put(qemu: Qemu, words: str, *, on: bool) -> None:
    """Capabilities on or off, and `mode=`."""
    names = [word for word in words.split() if "=" not in word]
    qemu.monitor.command("migrate-set-capabilities", capabilities=[{"capability": name, "state": on} for name in names])
    if "mode=" in words:
        qemu.monitor.command("migrate-set-parameters", mode=words.partition("mode=")[2] if on else "normal")


def told(source: Side, destination: Side) -> tuple[list[str], list[str]]:
    """The troubles in whole lines, and what the advice is about."""
    troubles = [f"{trouble.what}: {trouble.remedy}" for trouble in compare(source, destination)]
    return troubles, [one.what for one in advise(source, destination)]


def test_settings_that_do_not_go_together(start: Start) -> None:
    source = start("11.1", "source", machine="pc-q35-10.0")
    destination = start("11.1", "destination", machine="pc-q35-10.0", incoming=True)
    source.prepare(return_path=True)
    destination.prepare()
    source.monitor.command("cont")
    for ours, theirs, troubles, advice in SETTINGS:
        put(source, ours, on=True)
        put(destination, theirs, on=True)
        found = told(examine(source.monitor), examine(destination.monitor))
        assert found == (troubles, advice), (
            f"{ours or 'nothing'} on the source, {theirs or 'nothing'} on the destination"
        )
        put(source, ours, on=False)
        put(destination, theirs, on=False)


def test_switchover_ack_where_nobody_waits_for_it(start: Start) -> None:
    """A guest that stands still, a machine type whose devices ask for it themselves, a source too old to know it."""
    sides = []
    for release, name, machine in (
        ("10.0", "paused", "pc-q35-7.2"),
        ("11.1", "new", "pc-q35-11.1"),
        ("11.1", "there", "pc-q35-11.1"),
        ("7.2", "old", "pc-q35-7.2"),
        ("10.0", "destination", "pc-q35-7.2"),
    ):
        incoming = name in ("there", "destination")
        qemu = start(release, name, machine=machine, incoming=incoming)
        qemu.prepare(return_path=True)
        if name not in ("old", "there"):
            put(qemu, "switchover-ack", on=True)
        if name == "new":
            qemu.monitor.command("cont")
        sides.append(examine(qemu.monitor))
    paused, new, there, old, destination = sides
    assert told(new, there) == ([], [])
    assert told(paused, destination) == ([], [])
    without = replace(destination, capabilities=destination.capabilities | {"switchover-ack": False})
    assert told(paused, without) == (
        [],
        ["switchover-ack is on on the source only: if its guest ran, it would wait for the destination for ever"],
    )
    assert told(old, destination)[0] == [
        (
            "switchover-ack is on on the destination: a source before 8.1 does not know its word, and fails: on the "
            "destination's monitor: migrate_set_capability switchover-ack off"
        )
    ]


def test_block_migration(start: Start) -> None:
    old = {"release": "7.2", "machine": "pc-q35-7.2"}
    assert differences(start, old | {"set": {"block": True}}, {"machine": "pc-q35-7.2"}) == [
        (
            "block is on on the source: the destination has no such capability any more, and refuses it: on the "
            "source's monitor: migrate_set_capability block off"
        )
    ]


def disk(size: int) -> list[str]:
    return ["-blockdev", f"null-co,node-name=d0,size={size},read-zeroes=on", "-device", "virtio-blk-pci,drive=d0,id=b0"]


#: Much of what a guest can have: behind a bridge, on another bus than PCI, memory beside the main one.
DEVICES = [
    *("-m", "24M,slots=4,maxmem=1G", "-object", "memory-backend-ram,id=mem1,size=128M"),
    *("-object", "memory-backend-ram,id=unused,size=16M", "-device", "pc-dimm,id=dimm1,memdev=mem1"),
    *("-netdev", "hubport,hubid=0,id=n0", "-device", "virtio-net-pci,romfile=,netdev=n0,id=net0"),
    *("-device", "pcie-root-port,id=port1,chassis=1", "-device", "virtio-rng-pci,bus=port1"),
    *("-device", "qemu-xhci", "-device", "usb-tablet", *disk(1 << 20), "-smp", "2", "-cpu", "Nehalem"),
]
#: The same with a mistake each.
MISTAKEN = [
    *("-m", "24M,slots=5,maxmem=1G", "-object", "memory-backend-ram,id=mem2,size=128M"),
    *("-device", "pc-dimm,id=dimm1,memdev=mem2,addr=0x110000000"),
    *("-device", "e1000,romfile=,addr=1"),
    *("-device", "pcie-root-port,id=port1,chassis=1,addr=2", "-device", "qemu-xhci,addr=3", *disk(1 << 19)),
]


def test_devices_that_differ(start: Start) -> None:
    source = start("10.0", "source", more=DEVICES)
    destination = start("11.1", "destination", machine="pc-q35-10.0", more=MISTAKEN, incoming=True)
    for qemu in (source, destination):
        qemu.prepare(return_path=True)
    troubles, advice = told(examine(source.monitor), examine(destination.monitor))
    same = "start the destination with the source's -device options"
    assert troubles == [
        "memory slots differ: 4 and 5: start the destination with -m ...,slots=4,maxmem=...",
        (
            "RAM block mem1 (128 MiB) is not on the destination (it has mem2 of that size): start the destination "
            "with the "
            "same memory and devices; the id of a -object memory-backend-... is its block's name"
        ),
        (
            "the destination has no dimm of 128 MiB at 0x100000000: start the destination with the same -device, "
            "slot= and "
            "addr= included"
        ),
        f"the PCI devices at 00:01.0 differ: virtio-net-pci and e1000: {same}, addr= included",
        (
            f"the destination has no PCI device at 00:02.0/00.0, where the source has virtio-rng-pci: {same}, addr= "
            f"included"
        ),
        f"the source has 1 of device usb-tablet, the destination 0: {same}",
        (
            "disk b0 has 1048576 bytes on the source, 524288 on the destination: give the destination the same disk, "
            "or one "
            "of that size"
        ),
        "the source has 2 processors, the destination 1: start the destination with the source's -smp",
        (
            "processors differ: Nehalem-x86_64-cpu and qemu64-x86_64-cpu: the guest may miss there what it has seen "
            "here: "
            "start the destination with the source's -cpu"
        ),
        (
            "a destination of 11.1 refuses what QEMU 10.0 sends of a virtio queue that its guest has not set up: it "
            "has not "
            "run yet: let it boot first, or take QEMU 10.0 or 10.2 there"
        ),
    ]
    assert advice == ["the destination has more than the source: dimm at 0x110000000: its guest does not know of it"]


PLAIN: tuple[str, tuple[str, ...]] = ("q35", ())
XHCI = ("-device", "qemu-xhci", "-device")
SCSI = ("-blockdev", "null-co,node-name=d,size=1048576,read-zeroes=on", "-device", "virtio-scsi-pci", "-device")
SERIAL = ("-chardev", "null,id=c", "-device", "virtio-serial-pci", "-device")
PLUGGED = " ".join(["-device qemu64-x86_64-cpu,socket-id=0,core-id={},thread-id=0"] * 2)
#: Machine and options of both sides; the trouble and the advice that are told, and nothing else.
SIDES = [
    (PLAIN, ("q35,hpet=off", ()), "the destination's machine lacks what the source's has: hpet", ""),
    (PLAIN, ("q35,pit=off", ()), "the destination's machine lacks what the source's has: isa-pcspk, isa-pit", ""),
    (
        PLAIN,
        ("q35,i8042=off", ()),
        "the destination's machine lacks what the source's has: i8042, port92, vmmouse",
        "the destination lacks what the source sends nothing of: vmport: its guest misses it",
    ),
    (
        ("q35,vmport=on", ()),
        ("q35,vmport=off", ()),
        "the destination's machine lacks what the source's has: vmmouse",
        "the destination lacks what the source sends nothing of: vmport: its guest misses it",
    ),
    (("q35", ("-serial", "null")), PLAIN, "the destination's machine lacks what the source's has: isa-serial", ""),
    (("q35", ("-device", "ib700")), PLAIN, "the source has 1 of device ib700, the destination 0", ""),
    (("q35", ("-parallel", "null")), PLAIN, "the destination's machine lacks what the source's has: isa-parallel", ""),
    (
        ("q35", ("-smp", "6,sockets=2,cores=3")),
        ("q35", ("-smp", "6,sockets=1,cores=6")),
        "processors are arranged differently: sockets=2,cores=3 and cores=6",
        "",
    ),
    (
        ("q35", (*XHCI, "usb-tablet,port=1")),
        ("q35", (*XHCI, "usb-tablet,port=2")),
        "usb-tablet is at port=1 on the source, at port=2 on the destination",
        "",
    ),
    (
        ("q35", (*SCSI, "scsi-hd,drive=d,lun=1")),
        ("q35", (*SCSI, "scsi-hd,drive=d,lun=2")),
        "scsi-hd is at channel=0,scsi-id=0,lun=1 on the source, at channel=0,scsi-id=0,lun=2 on the destination",
        "",
    ),
    (
        ("q35", (*SERIAL, "virtserialport,chardev=c,nr=1")),
        ("q35", (*SERIAL, "virtserialport,chardev=c,nr=2")),
        "virtserialport is at nr=1 on the source, at nr=2 on the destination",
        "",
    ),
    (
        ("q35", SERIAL[:-1]),
        ("q35", (*SERIAL, "virtserialport,chardev=c,nr=1")),
        "the source has no virtserialport at nr=1 of 00:01.0, the destination has one",
        "",
    ),
    (
        ("q35", ("-device", "virtio-rng-pci")),
        ("q35", ("-device", "virtio-rng-pci,disable-legacy=on")),
        "the PCI devices at 00:01.0 differ: virtio-rng-pci (1af4:1005) and virtio-rng-pci (1af4:1044)",
        "",
    ),
    (
        ("q35", ("-smp", "1,cores=4,maxcpus=4", *PLUGGED.format(2, 3).split())),
        ("q35", ("-smp", "1,cores=4,maxcpus=4", *PLUGGED.format(1, 3).split())),
        "processors are plugged in at other places",
        "",
    ),
    (
        ("q35", (*XHCI[:-1], *XHCI, "usb-tablet,port=1,bus=usb-bus.0")),
        ("q35", (*XHCI[:-1], *XHCI, "usb-tablet,port=1,bus=usb-bus.1")),
        "usb-tablet is at port=1 of 00:01.0 on the source, at port=1 of 00:02.0 on the destination",
        "",
    ),
    # What QEMU takes.
    (
        ("q35,hpet=off,i8042=off,pit=off", ()),
        ("q35", ("-serial", "null", "-serial", "null")),
        "",
        (
            "the destination has more than the source: hpet, i8042, isa-pcspk, isa-pit, 2 isa-serial, port92, vmmouse, "
            "vmport: its guest does not know of it"
        ),
    ),
    (("q35", ("-serial", "null")), ("q35", ("-chardev", "null,id=s", "-device", "isa-serial,chardev=s")), "", ""),
    (("q35", (*XHCI, "usb-tablet")), ("q35", (*XHCI, "usb-tablet,port=1")), "", ""),
    (("q35", ("-cpu", "Haswell")), ("q35", ("-cpu", "Haswell-v1")), "", ""),
    (
        ("q35", ("-device", "pvpanic", "-device", "isa-debug-exit", "-device", "edu")),
        PLAIN,
        "",
        (
            "the destination lacks what the source sends nothing of: edu at 00:01.0, isa-debug-exit, pvpanic: its "
            "guest misses it"
        ),
    ),
    (
        ("q35", ("-smp", "4,sockets=4")),
        ("q35", ("-smp", "4,cores=4")),
        "",
        "processors are arranged differently: sockets=4 and cores=4",
    ),
]


@pytest.mark.parametrize(("ours", "theirs", "trouble", "advice"), SIDES, ids=lambda value: str(value)[:60])
def test_what_qemu_refuses_is_told_and_what_it_takes_is_not(
    start: Start,
    work: Path,
    ours: tuple[str, Sequence[str]],
    theirs: tuple[str, Sequence[str]],
    trouble: str,
    advice: str,
) -> None:
    source = start("10.0", "source", machine=ours[0], more=ours[1])
    destination = start("10.0", "destination", machine=theirs[0], more=theirs[1], incoming=True)
    for qemu in (source, destination):
        qemu.prepare(return_path=True)
    sides = examine(source.monitor), examine(destination.monitor)
    assert [one.what for one in compare(*sides)] == ([trouble] if trouble else [])
    assert [one.what for one in advise(*sides)] == ([advice] if advice else [])
    for qemu in (source, destination):
        qemu.prepare(multifd=False)
    destination.monitor.command("migrate-incoming", uri=f"unix:{work}/migration", exit_on_error=False)
    source.monitor.command("migrate", uri=f"unix:{work}/migration")
    fails = destination.wait("completed", "failed") == "failed"
    assert fails == bool(trouble), destination.log.read_text()


def test_a_machine_s_own_devices_are_compared_within_a_release_only(start: Start) -> None:
    """Another release may name them in another way; processors and seats are compared all the same."""
    machine = "pc-q35-10.0"
    source = start("11.1", "source", machine=machine, more=[*XHCI, "usb-tablet,port=1", "-smp", "6,sockets=2,cores=3"])
    destination = start(
        "10.0",
        "destination",
        machine=f"{machine},hpet=off",
        more=[*XHCI, "usb-tablet,port=2", "-smp", "6,sockets=1,cores=6"],
        incoming=True,
    )
    for qemu in (source, destination):
        qemu.prepare(return_path=True)
    assert [one.what for one in compare(examine(source.monitor), examine(destination.monitor))] == [
        "usb-tablet is at port=1 on the source, at port=2 on the destination",
        "processors are arranged differently: sockets=2,cores=3 and cores=6",
    ]


def test_a_memory_of_another_size(start: Start) -> None:
    more = "-object", "memory-backend-ram,id=mem1,size={}M", "-device", "pc-dimm,memdev=mem1"
    options = [{"more": ["-m", "24M,slots=1,maxmem=1G", *(word.format(size) for word in more)]} for size in (128, 256)]
    assert differences(start, *options)[:1] == [
        (
            "RAM block mem1 differs: 128 MiB and 256 MiB: start the destination with the same sizes of memory, and "
            "with the "
            "same firmware"
        )
    ]


def test_more_devices_than_the_source_has(start: Start) -> None:
    """QEMU takes that."""
    more = ["-device", "e1000,romfile=,addr=1", "-device", "qemu-xhci", "-device", "usb-tablet", "-smp", "2"]
    source, destination = start("10.0", "source"), start("10.0", "destination", more=more, incoming=True)
    for qemu in (source, destination):
        qemu.prepare(return_path=True)
    assert told(examine(source.monitor), examine(destination.monitor)) == (
        [],
        [
            (
                "the destination has more than the source: e1000 at 00:01.0, qemu-xhci at 00:02.0, usb-tablet, 2 "
                "processors "
                "for 1: its guest does not know of it"
            )
        ],
    )


@pytest.mark.parametrize(
    ("machine", "releases"),
    [("pc-q35-7.2", ["7.2", "10.0", "11.1"]), ("pc-q35-10.0", ["10.0", "11.1"]), ("pc-i440fx-7.2", ["7.2", "11.1"])],
)
def test_nothing_is_found_where_both_are_started_alike(start: Start, machine: str, releases: list[str]) -> None:
    """Whatever they have, on each release, once the guest's firmware has run, and numbered the buses."""
    devices = DEVICES if "q35" in machine else [word.replace("pcie-root-port", "pci-bridge") for word in DEVICES]
    devices = [
        word.replace("id=port1,chassis=1", "id=port1,chassis_nr=1") if "bridge" in word else word for word in devices
    ]
    sources, destinations = [], []
    for release in releases:
        source = start(release, f"source{release}", machine=machine, more=devices)
        destination = start(release, f"destination{release}", machine=machine, more=devices, incoming=True)
        for qemu in (source, destination):
            qemu.prepare(return_path=True)
        sources.append(source)
        destinations.append(examine(destination.monitor))
    for running in (False, True):
        for source in sources:
            if running:
                source.monitor.command("cont")
                assert peers.eventually(lambda: numbered(source.monitor.command("query-pci")))  # noqa: B023
            ours = examine(source.monitor)
            assert ours.untold == ()
            for theirs in destinations:
                troubles, advice = told(ours, theirs)
                if ours.version[:2] == (10, 0) and theirs.version >= (11, 1):
                    (queues,) = advice if running else troubles
                    assert "refuses what QEMU 10.0 sends of a virtio queue that its guest has not set up" in queues
                    assert not (troubles if running else advice)
                else:
                    assert (troubles, advice) == ([], []), f"{ours.version} to {theirs.version}"


def numbered(buses: list[dict[str, Any]]) -> bool:
    """Whether the bus behind the bridge has its number, and tells what is there."""
    return any("devices" in device.get("pci_bridge", {}) for bus in buses for device in bus["devices"])


@pytest.mark.parametrize(("source", "destination"), list(itertools.product(RELEASES, RELEASES)))
def test_a_good_pair(start: Start, source: str, destination: str) -> None:
    """A new QEMU with an old machine type sends what the old one reads."""
    machine = common(source, destination)
    assert (
        differences(start, {"release": source, "machine": machine}, {"release": destination, "machine": machine}) == []
    )


def test_a_destination_that_does_not_wait(start: Start) -> None:
    source, destination = start("10.0", "source"), start("10.0", "destination")
    found = compare(examine(source.monitor), examine(destination.monitor))
    assert "the destination is prelaunch, it does not wait" in [trouble.what for trouble in found]


def test_another_uuid_and_a_release_too_old(start: Start) -> None:
    side = examine(start("7.2", "source").monitor)
    other = replace(side, version=(6, 0, 0), uuid="11111111-2222-3333-4444-555555555555")
    told = {trouble.what for trouble in compare(side, other)}
    assert f"uuids differ: {side.uuid} and {other.uuid}" in told
    assert "the destination is QEMU 6.0.0: older than 7.2, the oldest tried" in told
    assert set(side.methods) >= {"none", "zlib", "zstd"}


def test_on_the_command_line(start: Start, work: Path) -> None:
    source, destination = start("10.0", "source"), start("10.0", "destination", incoming=True)
    source.prepare(method="zstd", channels=3)
    destination.prepare(method="zstd", channels=3)
    for qemu in (source, destination):
        qemu.monitor.close()
    where = ("--source-qmp", f"{work}/source.qmp", "--destination-qmp", f"{work}/destination.qmp")
    good = run("doctor", *where)
    assert (good.returncode, good.stderr) == (0, "")
    assert "multifd zstd, 3 channels" in good.stdout
    assert "return-path is off on the source" in good.stdout
    assert "migrate_set_capability return-path on\n" in good.stdout
    assert good.stdout.endswith("nothing is seen that would fail\n")
    source.reconnect()
    source.prepare(method="zstd", channels=3, return_path=True)
    source.monitor.close()
    assert "return-path" not in run("doctor", *where).stdout
    destination.reconnect()
    destination.prepare(method="none", channels=3)
    destination.monitor.close()
    bad = run("doctor", *where, "--json")
    assert bad.returncode == 1
    (trouble,) = json.loads(bad.stdout)["troubles"]
    assert trouble["what"] == "multifd-compression differs: zstd and none"
    nobody = run("doctor", "--source-qmp", f"{work}/nobody", "--destination-qmp", f"{work}/destination.qmp")
    assert (nobody.returncode, len(nobody.stderr.splitlines())) == (1, 1)
    assert "is QEMU's monitor listening there?" in nobody.stderr


@pytest.mark.parametrize("where", ["multifd.jobs.doctor.compare", "multifd.qemu.monitor"])
def test_the_examples_run(
    start: Start, work: Path, where: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("here", "there"):
        start("10.0", name, incoming=name == "there").monitor.close()
    monkeypatch.chdir(work)
    exec(examples()[where], {"Monitor": Monitor})
    assert capsys.readouterr().out
