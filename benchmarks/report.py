"""From results to what people read: a table for the terminal, a picture for the README. No I/O, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import isinf
from statistics import median
from textwrap import wrap
from typing import NamedTuple
from xml.sax.saxutils import escape

from benchmarks.estimate import Estimate, speed, verdict
from benchmarks.results import Comparison, DiskState, Entry, Overload, OverloadEntry, Phase, Results

COLUMNS = 110
#: Of a table's columns, those a name may take: what the numbers leave.
NAME_COLUMNS = 36

READING = (
    "speed: CPU time of the server per request, the baseline's divided by the entry's own, so that higher is better; "
    "the median of all rounds and its 95 % interval. A/A: that interval for the baseline's twin, the same app in "
    "another process: a difference no larger than that is none. The database's CPU time is not part of the speed."
)

WIDTH = 860
MARGIN = 28
GUTTER = 36
PANEL_WIDTH = (WIDTH - 2 * MARGIN - GUTTER) // 2
#: From one panel to the next, from its title to its first bar, a line of the title, and from one bar to the next.
PANEL_GAP, PANEL_HEAD, TITLE_LINE, ROW = 22, 22, 17, 19
#: From an overload's top to its first bar.
OVERLOAD_HEAD = 54
BAR = 11
#: What the value beside the longest bar needs.
VALUE_WIDTH = 56
MIN_NAME_WIDTH, MAX_NAME_WIDTH = 90, 180
#: What a character takes of its font's size, on the wide side, for whatever font the reader has.
CHARACTER, NARROW, NARROW_CHARACTER, WIDE, WIDE_CHARACTER = 0.56, " .,:;|!'()[]-/fijlrtI", 0.34, "mwMW@%+", 0.88

STYLE = """
text { font-family: -apple-system, BlinkMacSystemFont, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif;
  font-size: 11.5px; fill: #424a53; font-variant-numeric: tabular-nums }
.card { fill: #ffffff; stroke: #d8dee4 }
.headline { font-size: 18px; font-weight: 600; fill: #1f2328 }
.title { font-size: 13px; font-weight: 600; fill: #1f2328 }
.note { font-size: 11px; fill: #59636e }
.own { font-weight: 600; fill: #4338ca }
.value { paint-order: stroke; stroke: #ffffff; stroke-width: 3px; stroke-linejoin: round }
.bar { fill: #c4ccd6 }
.bar.own { fill: #6366f1 }
.track { fill: #f0f2f5 }
.band { fill: #f59e0b; fill-opacity: 0.45 }
.one { stroke: #6e7781 }
.whisker { stroke: #1f2328; stroke-opacity: 0.7; fill: none }
.rule { stroke: #e4e8ec }
@media (prefers-color-scheme: dark) {
  text { fill: #c4ccd4 }
  .card { fill: #0d1117; stroke: #30363d }
  .headline, .title { fill: #f0f6fc }
  .note { fill: #9198a1 }
  .own { fill: #a5b4fc }
  .value { stroke: #0d1117 }
  .bar { fill: #454e59 }
  .bar.own { fill: #6d70f3 }
  .track { fill: #1a2028 }
  .band { fill: #fbbf24; fill-opacity: 0.5 }
  .one { stroke: #9198a1 }
  .whisker { stroke: #f0f6fc; stroke-opacity: 0.75 }
  .rule { stroke: #262c34 }
}
"""


def table(results: Results) -> str:
    """Return everything measured as plain text, at most `COLUMNS` wide."""
    return "\n".join(
        line.rstrip()
        for block in (
            _head(results),
            *map(_comparison_table, results.comparisons),
            *map(_overload_table, results.overloads),
            *map(_disk_table, results.disks),
        )
        for line in (*block, "")
    )


def picture(results: Results) -> str:
    """Return one SVG that stands alone: a panel for each comparison and each overload, for light and dark pages."""
    name_width = _name_width(results)
    left, right = _balanced(results.comparisons)
    drawn: list[str] = []
    bottom = top = 84
    for column, comparisons in enumerate((left, right)):
        y = top
        for comparison in comparisons:
            x = MARGIN + column * (PANEL_WIDTH + GUTTER)
            drawn += [f'<g transform="translate({x} {y})">', *_comparison_panel(comparison, name_width), "</g>"]
            y += _height(comparison) + PANEL_GAP
        bottom = max(bottom, y)
    for overload in results.overloads:
        drawn += [f'<g transform="translate({MARGIN} {bottom})">', *_overload_panel(overload, name_width), "</g>"]
        bottom += OVERLOAD_HEAD + ROW * len(overload.entries) + PANEL_GAP
    footer, height = _footer(results, bottom)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
            f'viewBox="0 0 {WIDTH} {height}" role="img" aria-labelledby="title desc">',
            '<title id="title">Overdrive beside its alternatives</title>',
            f'<desc id="desc">{escape(_description(results))}</desc>',
            f"<style>{STYLE}</style>",
            f'<rect class="card" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1}" rx="10"/>',
            *_legend(),
            *drawn,
            *footer,
            "</svg>\n",
        ]
    )


# What both show.


def _speed(entry: Entry, against: Entry) -> Estimate | None:
    """The speed, or None where one of the two has failed."""
    return None if entry.failure is not None or against.failure is not None else speed(entry, against)


def _number(value: float) -> str:
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"


def _interval(measured: Estimate | None, dash: str) -> str:
    if measured is None or isinf(measured.high):
        return "unknown"
    return f"{_number(measured.low)}{dash}{_number(measured.high)}"


def _share(phase: Phase, capacity: float) -> float:
    """Good answers as a share of those that could be given: all that were asked for, up to the capacity."""
    return phase.good / min(phase.offered, capacity * phase.seconds)


def _machine(results: Results) -> str:
    """The machine in one line: a text speaks for itself, a number needs to be told of what."""
    described = (
        value if isinstance(value, str) else f"{value} {name.replace('_', ' ')}"
        for name, value in results.machine.items()
    )
    return ", ".join(described)


def _rounds(results: Results) -> str:
    counts = sorted(len(comparison.entries[0].rounds) for comparison in results.comparisons)
    return "-".join(map(str, dict.fromkeys([*counts[:1], *counts[-1:]]))) + " rounds"


# The table.


def _head(results: Results) -> Iterator[str]:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    run = f"{_rounds(results)}, seed {results.seed}"
    for label, content in (("machine", _machine(results)), ("versions", versions), ("run", run), ("reading", READING)):
        yield from _wrapped(f"{label:<10}{content}", " " * 10)


def _comparison_table(comparison: Comparison) -> Iterator[str]:
    baseline, twin = comparison.entries[:2]
    noise = _interval(_speed(twin, baseline), "-")
    with_database = any(entry.database_cpu for entry in comparison.entries)
    yield from _wrapped(f"{comparison.title} ({comparison.connections} connections)", "  ")
    header = ["", "CPU µs", "speed", "95 %", "A/A", *(["DB µs"] if with_database else []), "req/s", "p50 ms", "p99 ms"]
    rows = []
    for entry in comparison.entries:
        if entry.failure is not None:
            rows.append([entry.name, _failed(entry.failure)])
            continue
        measured, turns = _speed(entry, baseline), entry.rounds
        rows.append(
            [
                entry.name,
                f"{1e6 * median(turn.cpu_per_request for turn in turns):.1f}",
                "-" if measured is None else _number(measured.value),
                "baseline" if entry is baseline else _interval(measured, "-"),
                noise,
                *([f"{1e6 * entry.database_cpu:.0f}"] if with_database else []),
                f"{median(turn.requests / turn.seconds for turn in turns):.0f}",
                _milliseconds(median(turn.p50 for turn in turns)),
                _milliseconds(median(turn.p99 for turn in turns)),
            ]
        )
    yield from _aligned(header, rows)
    entries = {entry.name: entry for entry in comparison.entries}
    for claim in comparison.claims:
        measured = _speed(entries[claim.entry], entries[claim.against])
        outcome = (
            "not measured"
            if measured is None
            else f"{_number(measured.value)} ({_interval(measured, '-')}, A/A {noise}) {verdict(claim, measured)}"
        )
        yield from _wrapped(f"  {claim.entry} >= {claim.factor:g} x {claim.against}: {outcome}", "    ")


def _overload_table(overload: Overload) -> Iterator[str]:
    yield from _wrapped(
        f"{overload.title} (capacity {overload.capacity:.0f}/s, deadline {overload.deadline:g} s; "
        "good: share of min(offered, capacity) answered in time)",
        "  ",
    )
    rows = []
    for entry in overload.entries:
        if entry.failure is not None:
            rows.append([entry.name, _failed(entry.failure)])
            continue
        rows += [
            [
                entry.name,
                f"{phase.load:g} x",
                f"{phase.offered / phase.seconds:.0f}",
                f"{_share(phase, overload.capacity):.1%}",
                f"{phase.refused}",
                f"{phase.late}",
                _milliseconds(phase.p50),
                _milliseconds(phase.p99),
                _milliseconds(phase.lag_p99),
            ]
            for phase in entry.phases
        ]
    yield from _aligned(
        ["", "load", "offered/s", "good", "refused", "late", "p50 ms", "p99 ms", "lag p99 ms"],
        rows,
    )
    yield from _storm_table(overload)


def _storm_table(overload: Overload) -> Iterator[str]:
    """What can be said of the storm only beside the calm before it."""
    yield ""
    yield from _wrapped(
        "The storm (ceiling: what its connections could do just then, or the CPU, as refusals take time of it, too; "
        "p99: against the calm; refused p99: ms; normal: from when on a whole second was answered; good, else: CPU ms)",
        "  ",
    )
    rows = []
    for entry in overload.entries:
        if entry.failure is not None:
            continue
        calm, storm, _ = entry.phases
        rows.append(
            [
                entry.name,
                f"{entry.ceiling:.1f}",
                "-" if not entry.ceiling else f"{storm.good / storm.seconds / entry.ceiling:.1%}",
                f"{storm.good / storm.offered:.1%}",
                "-" if storm.p99 is None or calm.p99 is None else f"{storm.p99 / calm.p99:.1f} x",
                _milliseconds(storm.refused_p99),
                "never" if entry.normal_after is None else f"{entry.normal_after:.2f} s",
                f"{1e3 * entry.cpu_good:.2f}",
                f"{1e3 * entry.cpu_other:.2f}",
            ]
        )
    yield from _aligned(
        ["", "ceiling/s", "of it", "of all", "p99", "refused p99", "normal", "good", "else"],
        rows,
    )


def _disk_table(state: DiskState) -> Iterator[str]:
    yield from _wrapped(
        f"Five log lines a request into a pipe, reader: {state.name}, {state.seconds:g} s (answered: share of requests "
        "answered within a second; vs: the same, and their 99th percentile, as a multiple of the first's)",
        "  ",
    )
    baseline = state.entries[0]
    rows = [
        [
            entry.name,
            f"{entry.answered:.1%}",
            f"{entry.answered / baseline.answered:.2f}",
            _milliseconds(entry.p99),
            "-" if entry.p99 is None or baseline.p99 is None else _number(entry.p99 / baseline.p99),
            f"{1e6 * entry.call:.1f}",
            f"{1e6 * entry.call_p999:.0f}",
            f"{1e3 * entry.longest_call:.1f}",
        ]
        for entry in state.entries
    ]
    yield from _aligned(["", "answered", "vs", "p99 ms", "vs", "call µs", "99.9 % µs", "longest ms"], rows)


def _failed(reason: str) -> str:
    return f"failed: {reason.strip().partition(chr(10))[0]}"


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1e3 * seconds:.2f}"


def _aligned(header: list[str], rows: list[list[str]]) -> Iterator[str]:
    """Names to the left and numbers to the right; what a row says instead of numbers takes all of their room."""
    measured = [header, *(row for row in rows if len(row) == len(header))]
    widths = [max(map(len, cells)) for cells in zip(*measured, strict=True)]
    name_width = min(NAME_COLUMNS, max(len(row[0]) for row in (header, *rows)))
    for name, *cells in (header, *rows):
        if len(cells) > 1:
            cells = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        yield _cut("  ".join(["", _cut(name, name_width).ljust(name_width), *cells]), COLUMNS)


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"


def _wrapped(text: str, indent: str) -> list[str]:
    first = text[: len(text) - len(text.lstrip())]
    return wrap(text.lstrip(), COLUMNS, initial_indent=first, subsequent_indent=indent, break_on_hyphens=False)


# The picture.


def _name_width(results: Results) -> float:
    """What the names take of every panel, so that all bars of a column start on one line."""
    names = [entry.name for comparison in results.comparisons for entry in comparison.entries]
    names += [entry.name for overload in results.overloads for entry in overload.entries]
    return min(MAX_NAME_WIDTH, max([MIN_NAME_WIDTH, *(_text_width(name, 11.5) for name in names)]))


def _text_width(text: str, size: float) -> float:
    return size * sum(
        NARROW_CHARACTER if character in NARROW else WIDE_CHARACTER if character in WIDE else CHARACTER
        for character in text
    )


def _text(x: float, y: float, content: str, css: str, room: float = WIDTH, size: float = 11.5) -> str:
    """One line of text, of the `size` that its class has, or smaller where it may not fit its room."""
    width = _text_width(content, size)
    smaller = f' style="font-size: {size * room / width:.1f}px"' if width > room else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}"{smaller}>{escape(content)}</text>'


def _title_lines(comparison: Comparison) -> list[str]:
    return wrap(comparison.title, int(PANEL_WIDTH / (CHARACTER * 13)))


def _height(comparison: Comparison) -> int:
    # The twin has no bar: it is the band.
    return TITLE_LINE * len(_title_lines(comparison)) + PANEL_HEAD + ROW * (len(comparison.entries) - 1)


def _balanced(comparisons: Sequence[Comparison]) -> tuple[list[Comparison], list[Comparison]]:
    """Two columns as even as can be, each in the order given: there are few enough to try every way."""
    if not comparisons:
        return [], []
    heights = [_height(comparison) + PANEL_GAP for comparison in comparisons]

    def taller(columns: tuple[int, ...]) -> int:
        on_the_right = sum(height for height, column in zip(heights, columns, strict=True) if column)
        return max(on_the_right, sum(heights) - on_the_right)

    best = min(((0, *others) for others in product((0, 1), repeat=len(heights) - 1)), key=taller)
    left, right = (
        [comparison for comparison, column in zip(comparisons, best, strict=True) if column == wanted]
        for wanted in (0, 1)
    )
    return left, right


class _Bar(NamedTuple):
    entry: Entry
    measured: Estimate | None


def _comparison_panel(comparison: Comparison, name_width: float) -> Iterator[str]:
    baseline, twin, *_ = comparison.entries
    noise = _speed(twin, baseline)
    bars = [_Bar(entry, _speed(entry, baseline)) for entry in comparison.entries if entry is not twin]
    # The fastest first, those without a speed last; ties stay in the order given.
    bars.sort(key=lambda bar: -bar.measured.value if bar.measured else 0.0)

    y = 0
    for line in _title_lines(comparison):
        y += TITLE_LINE
        yield _text(0, y - 5, line, "title")
    yield _text(0, y + 11, f"A/A {_interval(noise, '–')}: {twin.name}", "note", PANEL_WIDTH, 11)
    top = y + PANEL_HEAD

    ends = [1.0, *(end for bar in bars if bar.measured for end in bar.measured if not isinf(end))]
    if noise and not isinf(noise.high):
        ends.append(noise.high)
    start = name_width + 10
    scale = (PANEL_WIDTH - start - VALUE_WIDTH) / max(ends)
    bottom = top + ROW * len(bars)
    middles = [top + ROW * (row + 0.5) for row in range(len(bars))]
    for bar, middle in zip(bars, middles, strict=True):
        yield _text(0, middle + 4, bar.entry.name, f"name{_own(bar.entry)}", name_width)
        if bar.measured:
            yield _rectangle(f"bar{_own(bar.entry)}", start, middle - BAR / 2, scale * bar.measured.value, BAR)
    if noise and not isinf(noise.high):
        # A band too thin to be seen is shown all the same.
        width = max(1.5, scale * (noise.high - noise.low))
        yield _rectangle("band", start + scale * (noise.low + noise.high) / 2 - width / 2, top, width, bottom - top)
    yield f'<path class="one" d="M{start + scale:.1f} {top}V{bottom}"/>'
    # On top, so that no line runs through a number.
    for bar, middle in zip(bars, middles, strict=True):
        yield from _value(bar, middle, start, scale)


def _value(bar: _Bar, middle: float, start: float, scale: float) -> Iterator[str]:
    entry, measured = bar
    if measured is None:
        yield _text(start, middle + 4, "failed" if entry.failure is not None else "no baseline", "note value")
        return
    end, value = start + scale * measured.value, f"{_number(measured.value)}×"
    if isinf(measured.high):
        value += " ± ?"
    elif measured.high > measured.low:
        low, end = start + scale * measured.low, start + scale * measured.high
        yield f'<path class="whisker" d="M{low:.1f} {middle - 3:.1f}v6m0-3H{end:.1f}m0-3v6"/>'
    yield _text(end + 7, middle + 4, value, f"value{_own(entry)}")


def _own(entry: Entry | OverloadEntry) -> str:
    return " own" if entry.ours else ""


def _rectangle(css: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


def _overload_panel(overload: Overload, name_width: float) -> Iterator[str]:
    room = WIDTH - 2 * MARGIN
    yield f'<path class="rule" d="M0 -8H{room}"/>'
    yield _text(0, 12, overload.title, "title", room, 13)
    yield _text(
        0,
        28,
        f"Good answers, within {overload.deadline:g} s, as a share of what {overload.capacity:.0f} a second allow",
        "note",
    )
    measured = [entry for entry in overload.entries if entry.failure is None]
    loads = [phase.load for phase in measured[0].phases] if measured else []
    start = name_width + 10
    column = (room - start) / max(1, len(loads))
    for number, load in enumerate(loads):
        yield _text(start + column * number, 48, f"{'then ' if number else ''}{load:g}× capacity", "note")
    for row, entry in enumerate(overload.entries):
        middle = OVERLOAD_HEAD + ROW * (row + 0.5)
        yield from _shares(entry, overload.capacity, middle, name_width, column)


def _shares(entry: OverloadEntry, capacity: float, middle: float, name_width: float, column: float) -> Iterator[str]:
    start, full = name_width + 10, column - VALUE_WIDTH
    yield _text(0, middle + 4, entry.name, f"name{_own(entry)}", name_width)
    if entry.failure is not None:
        yield _text(start, middle + 4, "failed", "note")
        return
    for number, phase in enumerate(entry.phases):
        x, share = start + column * number, _share(phase, capacity)
        yield _rectangle("track", x, middle - BAR / 2, full, BAR)
        # A little more than could be asked of it, by the luck of a short phase, is no more than all.
        yield _rectangle(f"bar{_own(entry)}", x, middle - BAR / 2, full * min(1.0, share), BAR)
        yield _text(x + full + 7, middle + 4, f"{share:.0%}", f"value{_own(entry)}")


def _legend() -> Iterator[str]:
    yield _text(MARGIN, 38, "How fast, as a multiple of the baseline", "headline")
    yield _text(MARGIN, 58, "Longer is better. Every panel has its own scale, from 0.", "note")
    x, y = WIDTH - MARGIN - 306, 49
    yield _rectangle("bar own", x, y, 14, BAR)
    yield _text(x + 20, y + 9, "Overdrive", "note")
    yield _rectangle("bar", x + 88, y, 14, BAR)
    yield _text(x + 108, y + 9, "others", "note")
    yield f'<path class="one" d="M{x + 162} {y - 3}v17"/>'
    yield _text(x + 169, y + 9, "baseline", "note")
    yield _rectangle("band", x + 230, y - 3, 6, 17)
    yield _text(x + 242, y + 9, "its twin (A/A)", "note")


def _footer(results: Results, top: int) -> tuple[list[str], int]:
    """The footer and the height that the picture has with it."""
    lines = [
        f"CPU time of the server per request, median of {_rounds(results)}; "
        "whiskers: 95 % interval of the median (± ?: unknown).",
        "A/A: the same interval for the baseline against itself in another process.",
        _machine(results),
    ]
    drawn = [f'<path class="rule" d="M{MARGIN} {top}H{WIDTH - MARGIN}"/>']
    drawn += [
        _text(MARGIN, top + 22 + 16 * number, line, "note", WIDTH - 2 * MARGIN, 11) for number, line in enumerate(lines)
    ]
    return drawn, top + 22 + 16 * len(lines) + 6


def _description(results: Results) -> str:
    """What the bars show, in words."""
    sentences = []
    for comparison in results.comparisons:
        baseline = comparison.entries[0]
        speeds = [
            f"{entry.name} {'failed' if measured is None else _number(measured.value)}"
            for entry in comparison.entries
            for measured in [_speed(entry, baseline)]
        ]
        sentences.append(f"{comparison.title}: {', '.join(speeds)}.")
    for overload in results.overloads:
        shares = [f"{entry.name} {_spoken(entry, overload.capacity)}" for entry in overload.entries]
        sentences.append(f"{overload.title}, good answers: {'; '.join(shares)}.")
    return " ".join(sentences)


def _spoken(entry: OverloadEntry, capacity: float) -> str:
    if entry.failure is not None:
        return "failed"
    return ", ".join(f"{_share(phase, capacity):.0%} at {phase.load:g} times the capacity" for phase in entry.phases)
