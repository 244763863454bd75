"""Compare migrations of a real QEMU 10 with and without multifd between or instead.

make bench-qemu

A paused guest of 512 MiB, 40 % of it zero, 2 channels, over loopback, all processes on two cores.
A migration's time is QEMU's own `total-time`, or that of `multifd send`.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from bench import Alone, Report, plan, run
from measure import MULTIFD, Process, cpu_seconds, sampled, transfer
from qemus import Qemu, qemus
from standin import Missing

CHANNELS = 2
RELAY = (*MULTIFD, "relay", "--listen", "tcp:127.0.0.1:0", "--migrations", "1", "--json")
#: What a relay in Python costs at the least.
BARE = (sys.executable, str(Path(__file__).with_name("bare_relay.py")))


@dataclass(frozen=True)
class Run:
    """One migration: seconds, bytes on the wire behind the relay, CPU seconds of both QEMUs and of the relay."""

    seconds: float
    wire_bytes: int
    qemus_cpu: float = 0.0
    relay_cpu: float = 0.0
    relay_memory: int = 0


class Bench:
    def __init__(self, image: Path) -> None:
        self.image = image

    def migrate(
        self, source_method: str, target_method: str, relay: Sequence[str] | None = None, *, sample: float = 0
    ) -> Run:
        """QEMU to QEMU, directly or through a relay: this command, with `--connect URI` added.

        Every `sample` seconds the relay's memory is looked at, which takes time from it.
        """
        folder, mib = self.image.parent, self.image.stat().st_size >> 20
        with qemus() as running:
            running += [
                Qemu("10.0", folder, "source", mib=mib),
                Qemu("10.0", folder, "target", mib=mib, incoming=True),
            ]
            source, target = running
            shutil.copyfile(self.image, source.ram)
            source.prepare(channels=CHANNELS, method=source_method, return_path=True, max_bandwidth=100 << 30)
            target.prepare(channels=CHANNELS, method=target_method)
            uri = target.listen("tcp:127.0.0.1:0")
            between = []
            if relay is not None:
                child = subprocess.Popen(
                    [*relay, "--connect", uri], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
                )
                assert child.stderr is not None
                uri = child.stderr.readline().split()[-1]
                between = [Process(child, cpu_seconds(child.pid))]
            before = sum(cpu_seconds(qemu.process.pid) for qemu in running)
            with sampled(between, sample):
                source.monitor.command("migrate", uri=uri)
                source.wait("completed")
                target.wait("completed")
            spent = sum(cpu_seconds(qemu.process.pid) for qemu in running) - before
            found = source.monitor.command("query-migrate")
            if target.ram.read_bytes() != source.ram.read_bytes():
                sys.exit("what arrived is not what was sent")
            done = Run(found["total-time"] / 1000, found["ram"]["transferred"], spent)
            for process in between:
                process.finish()
                done = replace(
                    done,
                    wire_bytes=process.result["bytes_out"],
                    relay_cpu=process.cpu_seconds,
                    relay_memory=process.peak_anonymous,
                )
            return done

    def ours(self, method: str) -> Run:
        """`multifd send` to `multifd receive`."""
        source, _ = transfer(self.image, self.image.with_name("snapshot"), method)
        return Run(source.result["seconds"], source.result["wire_bytes"])


def alternate(runs: int, *actions: Callable[[], Run]) -> list[list[Run]]:
    """Each action in turn, so many times."""
    found: list[list[Run]] = [[] for _ in actions]
    for _ in range(runs):
        for action, results in zip(actions, found, strict=True):
            results.append(action())
    return found


def ratio(of: list[Run], to: list[Run], what: Callable[[Run], float]) -> float:
    return statistics.median(what(one) / what(other) for one, other in zip(of, to, strict=True))


def seconds(run: Run) -> float:
    return run.seconds


def size(run: Run) -> float:
    return run.wire_bytes


def measure(report: Report, image: Path, runs: int) -> None:
    bench = Bench(image)
    try:
        for method, most, bytes_most, ours_most in (("zlib", 0.40, 1.0, 0.30), ("zstd", 1.15, 0.97, 1.1)):
            command = [*RELAY, "--from", "none", "--to", method]
            qemu, relay, bare, ours = alternate(
                runs,
                partial(bench.migrate, method, method),
                partial(bench.migrate, "none", method, command),
                partial(bench.migrate, "none", method, [*BARE, "--to", method]),
                partial(bench.ours, method),
            )
            codec = Alone(method, image, plan(image))
            alone = statistics.median(codec.encode().cpu for _ in range(runs))
            detail = f"{statistics.median(map(seconds, relay)):.2f} and {statistics.median(map(seconds, qemu)):.2f} s"
            value = ratio(relay, qemu, seconds)
            report.line(f"none -> relay -> {method}: time / QEMU's", value, f"<= {most}", value <= most, detail)
            # With the codec and no more than the kernel's calls, and where those cost nothing and every core is busy.
            least = statistics.median((one.qemus_cpu + alone) / CHANNELS for one in relay)
            least /= statistics.median(map(seconds, qemu))
            detail = f"CPU time of both QEMUs and of the codec alone: {least:.2f}"
            value = ratio(bare, qemu, seconds)
            report.line(f"none -> bare loop -> {method}: time / QEMU's", value, "none", True, detail)
            value = ratio(relay, qemu, size)
            report.line(f"none -> relay -> {method}: bytes / QEMU's", value, f"<= {bytes_most}", value <= bytes_most)
            value = ratio(ours, qemu, seconds)
            report.line(f"send to receive, {method}: time / QEMU's", value, f"<= {ours_most}", value <= ours_most)
            value = statistics.median(run.relay_cpu for run in relay) / alone
            report.line(f"relay to {method}: CPU / codec alone", value, "<= 1.3", value <= 1.3, f"codec {alone:.2f} s")
            mib = bench.migrate("none", method, command, sample=0.01).relay_memory / (1 << 20)
            report.line(f"relay to {method}: anonymous MiB", mib, "<= 64", 0 < mib <= 64)
        qemu, relay, ours = alternate(
            runs,
            partial(bench.migrate, "none", "none"),
            partial(bench.migrate, "none", "none", RELAY),
            partial(bench.ours, "none"),
        )
        value = ratio(qemu, relay, seconds)
        detail = f"{statistics.median(map(seconds, relay)):.2f} and {statistics.median(map(seconds, qemu)):.2f} s"
        report.line("none -> relay -> none: rate / QEMU's", value, ">= 0.6", value >= 0.6, detail)
        value = ratio(ours, qemu, seconds)
        report.line("send to receive, none: time / QEMU's", value, "<= 1.3", value <= 1.3)
    except Missing as missing:
        print(f"left out: {missing}")


if __name__ == "__main__":
    run(__doc__, measure)
