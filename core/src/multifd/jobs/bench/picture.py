"""Migration time over bandwidth, drawn."""

from __future__ import annotations

import html
import math
from collections.abc import Iterator, Sequence
from itertools import cycle, groupby, pairwise
from statistics import fmean

from multifd.errors import counted
from multifd.jobs.bench.model import MODEL, Bench, Row, bandwidth

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 1040, 78, 172, 104, 64
LINE_HEIGHT = 16
#: Bits per second at the ends of its axis; a link beyond them widens it.
NARROW, WIDE = 1e7, 4e11
#: Red, green, blue per compressor; the lower a level, the more white is in it.
COLOURS = (
    (31, 96, 160),
    (196, 64, 20),
    (20, 120, 60),
    (130, 55, 165),
    (150, 90, 5),
    (15, 110, 130),
    (180, 25, 90),
    (80, 90, 20),
)


def picture(bench: Bench, links: Sequence[float]) -> str:
    """An SVG of migration time over bandwidth, both logarithmic: a curve per setting, a dot for the best on a link."""
    rows = bench.measured
    colours = _colours(rows)
    narrow, wide = min(NARROW, *links), max(WIDE, *links)
    slowest = max(bench.seconds(row, narrow) for row in rows) * 1.2
    fastest = min(bench.seconds(row, wide) for row in rows) / 1.2
    right, bottom = WIDTH - RIGHT, TOP + max(500, LINE_HEIGHT * len(rows))

    def x(link: float) -> float:
        return LEFT + (right - LEFT) * math.log(link / narrow) / math.log(wide / narrow)

    def y(seconds: float) -> float:
        return TOP + (bottom - TOP) * math.log(slowest / seconds) / math.log(slowest / fastest)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + BOTTOM}" font-family="sans-serif">',
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, 28, f"Migration time of {bench.path.name} over the link's bandwidth", size=18),
        _text(LEFT, 48, f"{counted(bench.cores, 'core')} on each side; {MODEL}", fill="#555"),
        _text(LEFT - 8, TOP - 15, "best", anchor="end"),
    ]
    for value, name in _ticks(narrow, wide):
        parts.append(_line(x(value), TOP, x(value), bottom, "#ccc" if name else "#eee"))
        if name:
            parts.append(_text(x(value), bottom + 20, bandwidth(value), anchor="middle"))
    for value, name in _ticks(fastest, slowest):
        parts.append(_line(LEFT, y(value), right, y(value), "#ccc" if name else "#eee"))
        parts.append(_text(LEFT - 8, y(value) + 4, name, anchor="end"))
    middle = (TOP + bottom) / 2
    parts += [
        _text((LEFT + right) / 2, bottom + 46, "bandwidth of the link", anchor="middle"),
        f'<g transform="rotate(-90 22 {middle})">{_text(22, middle, "migration time, seconds", anchor="middle")}</g>',
    ]
    for first, end, row in _best(bench, narrow, wide):
        width = x(end) - x(first)
        parts.append(
            f'<rect x="{x(first):.1f}" y="{TOP - 28}" width="{width:.1f}" height="20" fill="{colours[row]}" '
            f'stroke="white"><title>{_escape(row.text)}</title></rect>'
        )
        if width > 7 * len(_short(row)):
            parts.append(_text((x(first) + x(end)) / 2, TOP - 14, _short(row), fill="white", anchor="middle", size=12))
    rows = sorted(rows, key=lambda row: bench.seconds(row, wide), reverse=True)
    heights = _apart([y(bench.seconds(row, wide)) for row in rows], bottom)
    for row, height in zip(rows, heights, strict=True):
        knee = bench.wire_bytes(row) * 8 / bench.busy_seconds(row)
        corners = [link for link in (narrow, knee, wide) if narrow <= link <= wide]
        points = [(x(link), y(bench.seconds(row, link))) for link in corners]
        leader = [(right + 4, points[-1][1]), (right + 18, height), (right + 22, height)]
        curve, lead = (" ".join(f"{a:.1f},{b:.1f}" for a, b in line) for line in (points, leader))
        width = 3 if row is bench.none else 1.8
        parts.append(
            f'<g class="setting" fill="none" stroke="{colours[row]}"><title>{_escape(row.text)}, ratio {row.ratio:.2f}'
            f'</title><polyline points="{curve}" stroke-width="{width}" stroke-linejoin="round"/>'
            f'<polyline points="{lead}" stroke-opacity="0.5"/></g>'
        )
        parts.append(_text(right + 26, height + 4, _short(row), fill=colours[row]))
    for link in links:
        best = bench.recommend(link)
        seconds = bench.seconds(best, link)
        parts.append(
            f'<circle cx="{x(link):.1f}" cy="{y(seconds):.1f}" r="5" fill="{colours[best]}" stroke="white" '
            f'stroke-width="1.5"><title>{_escape(best.text)}, {seconds:.3g} s</title></circle>'
        )
    return "\n".join([*parts, "</svg>\n"])


def _short(row: Row) -> str:
    return row.compressor if row.level is None else f"{row.compressor} {row.level}"


def _colours(rows: Sequence[Row]) -> dict[Row, str]:
    found = dict.fromkeys(rows, "#111")
    names = dict.fromkeys(row.compressor for row in rows if row.compressor != "none")
    for name, colour in zip(names, cycle(COLOURS), strict=False):
        mine = [row for row in rows if row.compressor == name]
        for place, row in enumerate(reversed(mine)):
            white = 0.3 * place / len(mine)
            found[row] = "#" + "".join(f"{round(part + (255 - part) * white):02x}" for part in colour)
    return found


def _ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """1, 2, 5, 10 ... between two values; only powers of ten have a name."""
    for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1):
        for digit in (1, 2, 5):
            value = float(f"{digit}e{power}")
            if low <= value <= high:
                yield value, f"{value:g}" if digit == 1 else ""


def _best(bench: Bench, narrow: float, wide: float) -> Iterator[tuple[float, float, Row]]:
    """The best setting from one bandwidth to the next."""
    steps = 400
    edges = [narrow * (wide / narrow) ** (step / steps) for step in range(steps + 1)]
    for row, group in groupby(pairwise(edges), key=lambda edge: bench.recommend(math.sqrt(edge[0] * edge[1]))):
        spans = list(group)
        yield spans[0][0], spans[-1][1], row


def _apart(heights: Sequence[float], bottom: float) -> list[float]:
    """Rising heights, moved as little as makes them a line of text apart, and none below the bottom."""
    groups: list[list[float]] = []  # of heights less their lines: what overlaps shares its mean
    for place, height in enumerate(heights):
        groups.append([height - place * LINE_HEIGHT])
        while len(groups) > 1 and fmean(groups[-2]) >= fmean(groups[-1]):
            last = groups.pop()
            groups[-1] += last
    means = [fmean(group) for group in groups for _ in group]
    highest = bottom - (len(heights) - 1) * LINE_HEIGHT
    return [min(mean, highest) + place * LINE_HEIGHT for place, mean in enumerate(means)]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, text: str, *, fill: str = "#111", anchor: str = "start", size: int = 13) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f'<text {place} fill="{fill}">{_escape(text)}</text>'


def _escape(text: str) -> str:
    """A file's name may hold what XML cannot."""
    return html.escape("".join(letter if letter.isprintable() else "?" for letter in text))
