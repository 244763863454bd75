"""Ten thousand mutations of each method's whole packets: none is taken with other memory than its migration's.

Some come as recordings, some live, some live through a relay that compresses them anew.  What each may come to another
implementation says (`mutations`), and of a few it says other memory: packets of zlib or zstd that another guest could
have sent just so.  The same mutants catch the receiver of version 0.1, and ours with a check taken out.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

import multifd
import mutations
import peers
import prove
import streams
from multifd.errors import MultifdError
from multifd.jobs.relay.outcome import Relayed
from mutations import KINDS, Memory, Mutant
from relaying import Relaying, closing

TOP = Path(__file__).parents[2]
COUNT = len(prove.sample(range(10_000), 200))
#: Seconds that a mutant's receiver waits for what never comes.
SHORT = 0.3
#: And for a source that may be silent as long as it likes, between two sections or once it has sent everything.
IDLE = 2.0
TARGETS = ("none", "zlib", "zstd", "qatzip-sw", "qpl-sw", "uadk-sw")

pytestmark = [
    pytest.mark.timeout(1800),
    # A connection that is cut at its first bytes is nobody's.
    pytest.mark.may_warn(".* ignored"),
]


def recorded(work: Path, mutant: Mutant, mix: random.Random, timeout: float) -> Memory:
    """What a receiver makes of it; raises MultifdError."""
    return mutations.recorded(work, mutant, multifd.receive)


def receiving(work: Path, mutant: Mutant, timeout: float) -> peers.Receiving:
    times = {"timeout": timeout, "first_timeout": timeout, "idle_timeout": max(timeout, IDLE)}
    channels = len(mutant.channels)
    return peers.Receiving(work / "snap", f"unix:{work}/there", channels=channels, digests=False, **times)  # type: ignore[arg-type]


def play(uri: str, mutant: Mutant, mix: random.Random) -> None:
    """Be its source: all is out on the channels before the main channel's last byte, and then it waits, or ends.

    One without return path has nothing to wait for; one with it may die as well.
    """
    dies = not mutant.made.return_path or (mutant.kind != "nothing" and mix.random() < 0.8)
    piece = mix.choice((1000, 65536))

    def write(sock: socket.socket, data: bytes) -> None:
        with suppress(OSError):  # the other side has refused it
            for at in range(0, len(data), piece):
                sock.sendall(data[at : at + piece])

    with ExitStack() as stack, suppress(OSError):
        main, *others = [stack.enter_context(peers.dial(uri)) for _ in (mutant.main, *mutant.channels)]
        threads = [threading.Thread(target=write, args=each) for each in zip(others, mutant.channels, strict=True)]
        for thread in threads:
            thread.start()
        write(main, mutant.main[:-1])
        for thread in threads:
            thread.join()
        write(main, mutant.main[-1:])
        for sock in (main, *others) if dies else ():
            sock.shutdown(socket.SHUT_WR)
        while main.recv(4096):
            pass


def live(work: Path, mutant: Mutant, mix: random.Random, timeout: float) -> Memory:
    there = receiving(work, mutant, timeout)
    play(there.uri, mutant, mix)
    there.join()
    return mutations.taken(work)


def relayed(work: Path, mutant: Mutant, mix: random.Random, timeout: float) -> Memory:
    """The relay may not say that it went through either, unless what is wrong is in the pages."""
    there = receiving(work, mutant, timeout)
    relaying = Relaying(there.uri, listen=f"unix:{work}/relay", to=mix.choice(TARGETS), timeout=timeout)
    with closing(relaying):
        play(relaying.uri, mutant, mix)
        try:
            there.join()
        except MultifdError:
            peers.eventually(lambda: relaying.outcomes != [], SHORT)  # nobody began one where main was cut at once
            whole = any(isinstance(outcome, Relayed) for outcome in relaying.outcomes)
            assert not (whole and mutant.memory is None), "the relay saw nothing"
            raise
    return mutations.taken(work)


Way = Callable[[Path, Mutant, random.Random, float], Memory]
WAYS: dict[Way, int] = {recorded: 75, live: 15, relayed: 10}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("old", [True, False], ids=["7.2", "10.0"])
@pytest.mark.parametrize("method", streams.METHODS)
def test_what_nobody_mutated_is_taken(work: Path, method: str, old: bool, way: Way) -> None:
    mix = random.Random(f"{prove.SEED} {method}")
    for _ in range(3):
        made = mutations.make(mix, method, old=old)
        assert mutations.read(made, made.channels) == made.memory
        whole = mutations.judged("nothing", made, made.channels)
        assert whole.memory == made.memory
        assert way(work, whole, mix, peers.TIMEOUT) == made.memory


@pytest.mark.parametrize("method", streams.METHODS)
def test_no_mutant_makes_other_memory(work: Path, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    mix = random.Random(f"{prove.SEED} {method}")
    found = {kind: Counter[str]() for kind in KINDS}
    began = time.monotonic()
    for number, mutant in enumerate(mutations.mutants(mix, method, COUNT)):
        (way,) = mix.choices(list(WAYS), list(WAYS.values()))
        which = f"mutant {number} of {method}, {way.__name__}: {mutant.kind}"
        try:
            memory = way(work, mutant, mix, SHORT)
        except MultifdError as error:
            assert "\n" not in str(error), which
            found[mutant.kind]["refused"] += 1
        else:
            assert mutant.memory is not None, f"{which}: taken"
            assert memory == mutant.memory, f"{which}: other memory"
            found[mutant.kind]["equal" if memory == mutant.made.memory else "other"] += 1
        assert [path.name for path in work.iterdir() if path.name != "recording"] == [], which
    with capsys.disabled():
        print(f"\n{method}: {COUNT} mutants in {time.monotonic() - began:.0f} s")
        print(f"{'':24}{'refused':>10}{'equal':>10}{'other':>10}")
        for kind, counts in found.items():
            print(f"{kind:24}{counts['refused']:10}{counts['equal']:10}{counts['other']:10}")


DRIVER = """
import sys
from pathlib import Path
import multifd
import mutations
from multifd.errors import MultifdError
try:
    from multifd import receive
except ImportError:
    from multifd.migrate import receive  # 0.1
assert multifd.__file__.startswith(sys.argv[1]), multifd.__file__
print(mutations.caught(Path(sys.argv[2]), receive, MultifdError, int(sys.argv[3]), 3000))
"""


def caught(site: Path, work: Path) -> str:
    """How the multifd in `site` is caught."""
    result = subprocess.run(
        [sys.executable, "-c", DRIVER, site, work, str(prove.SEED)],
        env=os.environ | {"PYTHONPATH": f"{site}:{TOP / 'tests' / 'support'}"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


#: Each with what is taken out of it, and what is there instead.
NUMBERS, RECEIVED = "wire/numbers.py", "jobs/destination/migration.py"
AT_THE_END = "if syncs != points or self.since_sync:"
CHECKS: dict[str, list[tuple[str, str, str]]] = {
    "a channel's numbers rise": [(NUMBERS, "if number <= self._last and not this.odd:", "if False:")],
    "an empty packet is owed": [(NUMBERS, " and self._owed and number == self._last:", ":")],
    "no packet comes twice, or after its round": [(NUMBERS, "if number < expected:", "if False:")],
    "every packet comes": [(NUMBERS, "if not wrong:", "if True:")],
    "no SYNC is too many": [(NUMBERS, AT_THE_END, "if self.since_sync:")],
    "no packet follows the last SYNC": [(NUMBERS, AT_THE_END, "if syncs != points:")],
    "the main channel comes to its end": [
        (
            RECEIVED,
            "self._parser.end(description_required=self._description_required)",
            "if not self._parser._last: self._parser.end()",
        )
    ],
}


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_check_it_is_caught(work: Path, check: str) -> None:
    site = work / "site"
    shutil.copytree(TOP / "core" / "src", site)
    for file, text, instead in CHECKS[check]:
        path = site / "multifd" / file
        code = path.read_text()
        assert code.count(text) == 1, f"{file}: {text}"
        path.write_text(code.replace(text, instead))
    assert caught(site, work)


if prove.SIZE == "full":

    def test_version_0_1_is_caught(work: Path) -> None:
        archive = subprocess.run(["git", "archive", "863d354", "core"], cwd=TOP, capture_output=True, check=True)
        subprocess.run(["tar", "-x"], cwd=work, input=archive.stdout, check=True)
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", "--no-deps")
        subprocess.run([*pip, "--target", work / "site", work / "core"], check=True, timeout=110)
        assert caught(work / "site", work)
