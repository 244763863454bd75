"""Migrate the guests of every QEMU that we know to every other, as each machine, by each method.

make qemu-matrix
.venv/bin/python tools/qemu_matrix.py [--machine NAME] [--jobs N] [--write docs/qemu.md]

Each guest is paused; its memory is compared byte for byte when it has been received into a snapshot, sent from one, and
relayed.  `--write` puts the tables between the two marks of that page.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "tests" / "support"))

from boards import BOARDS, METHODS, Board, exact_version
from matrix import Group, Pair, explained, groups, try_group
from qemus import RELEASES

BEGIN, END = "<!-- qemu-matrix -->", "<!-- /qemu-matrix -->"
ABSENT = "-"


class Notes:
    """What failures say, each once."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def number(self, text: str) -> int:
        if text not in self.texts:
            self.texts.append(text)
        return self.texts.index(text) + 1


def cell(pair: Pair | None, notes: Notes) -> str:
    if pair is None:
        return ABSENT
    if pair.works:
        return "yes"
    word = "snapshot" if pair.worked("receive") and pair.worked("send") else "no"
    return f"{word} [{notes.number(explained(pair))}]"


def tables(found: dict[Group, dict[str, Pair]]) -> str:
    """Markdown: a line per type of a machine, a column per pair of releases."""
    pairs = [(source, target) for source in RELEASES for target in RELEASES]
    notes = Notes()
    lines = [
        "| machine | type | " + " | ".join(f"{source} to {target}" for source, target in pairs) + " |",
        "| --- | --- |" + " --- |" * len(pairs),
    ]
    by_kind: dict[tuple[Board, str], dict[str, dict[str, Pair]]] = {}
    for group, outcome in found.items():
        by_kind.setdefault((group.board, group.kind), {})[group.source] = outcome
    for (board, kind), outcomes in by_kind.items():
        cells = [cell(outcomes.get(source, {}).get(target), notes) for source, target in pairs]
        lines.append(f"| {board.system} {board.name} | `{kind}` | " + " | ".join(cells) + " |")
    lines += ["", *(f"{number}. {text}" for number, text in enumerate(notes.texts, 1))]
    return "\n".join(lines).rstrip() + "\n"


def report(found: dict[Group, dict[str, Pair]], seconds: float) -> str:
    tried = sum(len(METHODS) + sum(pair.tried for pair in outcome.values()) for outcome in found.values())
    versions = ", ".join(exact_version(release) for release in RELEASES)
    head = f"{date.today().isoformat()}, QEMU {versions} as Debian has them: {tried} migrations in {seconds:.0f} s."
    return f"{head}\n\n{tables(found)}"


def write(page: Path, text: str) -> None:
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", action="append", metavar="NAME", help="this alone: q35, aarch64-virt, pseries ...")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="how many at a time; default: 2")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables there")
    arguments = parser.parse_args()
    boards = [board for board in BOARDS if not arguments.machine or {board.name, str(board)} & set(arguments.machine)]
    if not boards:
        sys.exit(f"qemu_matrix: there are {', '.join(map(str, BOARDS))}")
    logging.getLogger("multifd").addHandler(logging.NullHandler())
    began = time.monotonic()
    all_groups = list(groups(boards))
    found: dict[Group, dict[str, Pair]] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for group, outcome in zip(all_groups, pool.map(try_group, all_groups), strict=True):
            found[group] = outcome
            for target, pair in outcome.items():
                words = "works" if pair.works else explained(pair)
                which = f"{group.board.system} {group.kind}, {group.source} to {target}"
                print(f"{time.monotonic() - began:5.0f} s  {which}: {words}", file=sys.stderr, flush=True)
    text = report(found, time.monotonic() - began)
    if arguments.write:
        write(arguments.write, text)
    print(text)
    sys.exit(any(pair.ours for outcome in found.values() for pair in outcome.values()))


if __name__ == "__main__":
    main()
