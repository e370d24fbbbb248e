"""Everything measured is in the table and in the picture, and nothing else is."""

from __future__ import annotations

from random import Random
from xml.etree import ElementTree

import msgspec
import pytest

from benchmarks.estimate import speed, verdict
from benchmarks.report import COLUMNS, picture, table
from benchmarks.results import (
    Claim,
    Comparison,
    DiskEntry,
    DiskState,
    Entry,
    Overload,
    OverloadEntry,
    Phase,
    Results,
    Round,
)

SVG = "{http://www.w3.org/2000/svg}"

#: Name and title of a comparison, and its rivals: what each costs in microseconds, and in the database.
COMPARISONS: list[tuple[str, str, dict[str, tuple[float, float]]]] = [
    (
        "constant",
        "A constant: what a framework costs",
        {
            "bare ASGI": (31, 0),
            "bare ASGI, again": (31, 0),
            "FastAPI": (118, 0),
            "FastAPI + Overdrive, unused": (121, 0),
        },
    ),
    (
        "user",
        "A user by id, from PostgreSQL",
        {
            "hand-written get_db": (905, 210),
            "hand-written get_db, again": (905, 210),
            "Overdrive's SessionDep": (902, 208),
            "SQLModel": (980, 211),
        },
    ),
    (
        "hit",
        "The same user from a cache",
        {
            "FastAPI, not cached": (905, 210),
            "FastAPI, not cached, again": (905, 210),
            "bare ASGI, a constant": (31, 0),
            "fastapi-cache2, memory": (240, 0),
            "cashews, memory": (310, 0),
            "Litestar, memory": (190, 0),
            "Overdrive, memory": (61, 0),
            "cashews, Redis": (520, 0),
            "Litestar, Redis": (350, 0),
            "Overdrive, Redis": (205, 0),
        },
    ),
    (
        "miss",
        "A user nobody has asked for, through the cache",
        {
            "FastAPI, not cached": (905, 210),
            "FastAPI, not cached, again": (905, 210),
            "fastapi-cache2, memory": (1290, 212),
            "cashews, memory": (1405, 211),
            "Overdrive, memory": (960, 209),
        },
    ),
    (
        "page",
        "50 of 2,000,000 users, newest first",
        {
            "hand-written keyset": (2100, 340),
            "hand-written keyset, again": (2100, 340),
            "fastapi-pagination Page": (5200, 98000),
            "fastapi-pagination CursorPage": (5900, 97000),
            "the same without total": (4700, 360),
            "Overdrive Page": (2900, 610),
            "Overdrive CursorPage": (1430, 335),
            "FastAPI on asyncpg": (1700, 330),
            "bare asyncpg + orjson": (760, 330),
            "SQLModel": (4100, 350),
        },
    ),
    (
        "log",
        "Five log lines a request",
        {
            "logging off": (130, 0),
            "logging off, again": (130, 0),
            "logging FileHandler": (240, 0),
            "logging QueueHandler": (395, 0),
            "loguru": (560, 0),
            "loguru enqueue": (810, 0),
            "structlog + orjson": (265, 0),
            "Overdrive LogHandler": (178, 0),
            "Overdrive LogHandler + event": (196, 0),
        },
    ),
]


def _round(random: Random, weather: float, cpu: float) -> Round:
    cpu *= weather * random.gauss(1, 0.015) / 1e6
    requests = int(0.4 / (cpu + 12e-6))
    p50 = 8 * cpu * 1.02
    return Round(requests, 0.4, cpu * requests, p50, p50 * random.uniform(1.5, 2))


def _comparison(
    random: Random, name: str, title: str, costs: dict[str, tuple[float, float]], rounds: int
) -> Comparison:
    weather = [random.uniform(0.9, 1.3) for _ in range(rounds)]
    entries = [
        Entry(rival, "Overdrive" in rival, [_round(random, each, cpu) for each in weather], database / 1e6)
        for rival, (cpu, database) in costs.items()
    ]
    return Comparison(name, title, 8, entries, [])


def _phase(load: float, good: float, p50: float | None = 0.021, p99: float | None = 0.24) -> Phase:
    offered = int(1000 * load)
    return Phase(
        load, 10.0, offered, int(good * offered), offered // 3, offered // 7, p50, p99, 0.0021, 0.004, 0.001 * offered
    )


def _results(rounds: int = 21) -> Results:
    random = Random(1)
    comparisons = [_comparison(random, *each, rounds) for each in COMPARISONS]
    hit = comparisons[2]
    hit.entries[4] = Entry("cashews, memory", False, [], failure="answered 500\nTraceback (most recent call last):")
    hit.claims.extend(
        [
            Claim("Overdrive, memory", "Litestar, memory", 2),
            Claim("Overdrive, memory", "Litestar, memory", 9),
            Claim("Overdrive, memory", "cashews, memory", 2),
        ]
    )
    services = [
        OverloadEntry(
            "stock FastAPI + SQLAlchemy", False, [_phase(0.6, 1), _phase(10, 0, None, None), _phase(0.9, 0.2)]
        ),
        OverloadEntry(
            "Overdrive", True, [_phase(0.6, 1), _phase(10, 0.094), _phase(0.9, 0.99)], None, 96.0, normal_after=0.25
        ),
    ]
    return Results(
        {
            "processor": "AMD EPYC 7763 64-Core Processor",
            "cores": 2,
            "system": "Linux 6.8.0",
            "python": "CPython 3.12.3",
        },
        {"overdrive": "0.1.0", "fastapi": "0.165.1", "fastapi-cache2": "0.2.2"},
        7,
        comparisons,
        [Overload("overload", "Offered 0.6, 10 and 0.9 times what it can do", 100, 1.0, services)],
    )


def _renamed(results: Results, name: str) -> Results:
    """The same results with that name for the last rival of each comparison and overload."""
    return msgspec.structs.replace(
        results,
        comparisons=[
            msgspec.structs.replace(
                each, title=name, entries=[*each.entries[:-1], msgspec.structs.replace(each.entries[-1], name=name)]
            )
            for each in results.comparisons
        ],
        overloads=[
            msgspec.structs.replace(
                each, title=name, entries=[*each.entries[:-1], msgspec.structs.replace(each.entries[-1], name=name)]
            )
            for each in results.overloads
        ],
    )


def _with_entries(results: Results, entries: list[Entry]) -> Results:
    comparison = msgspec.structs.replace(results.comparisons[0], entries=entries)
    return msgspec.structs.replace(results, comparisons=[comparison], overloads=[])


def _block(printed: str, title: str) -> list[str]:
    """The lines of the table from that title to the next empty one."""
    lines = [*printed.splitlines(), ""]
    start = next(number for number, line in enumerate(lines) if line.startswith(title))
    return lines[start : lines.index("", start)]


def _row(block: list[str], name: str) -> list[str]:
    (row,) = (line for line in block if line.startswith(f"  {name}  "))
    return row.removeprefix(f"  {name}").split()


def _panels(drawn: str) -> list[list[str]]:
    """Every panel's texts."""
    return [
        [text.text or "" for text in panel.iter(f"{SVG}text")]
        for panel in ElementTree.fromstring(drawn).iter(f"{SVG}g")
    ]


def _panel(drawn: str, title: str) -> list[str]:
    (panel,) = (texts for texts in _panels(drawn) if texts[0] == title)
    return panel


def _shown(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def test_the_table_has_every_ratio_with_its_interval_and_the_spread_of_the_pair() -> None:
    results = _results()
    printed = table(results)
    for comparison in results.comparisons:
        block, baseline = _block(printed, comparison.title), comparison.entries[0]
        twin = speed(comparison.entries[1], baseline)
        spread = f"{_shown(twin.low)}-{_shown(twin.high)}"
        for entry in comparison.entries[1:]:
            if entry.failure is None:
                measured = speed(entry, baseline)
                interval = f"{_shown(measured.low)}-{_shown(measured.high)}"
                assert _row(block, entry.name)[1:4] == [_shown(measured.value), interval, spread]
        assert _row(block, baseline.name)[1:4] == ["1.00", "baseline", spread]


def test_the_table_has_what_the_rounds_had_in_the_middle() -> None:
    turns = [Round(1000, 0.5, 0.25 * each, 0.001 * each, 0.002 * each) for each in (3, 1, 2)]
    results = _with_entries(_results(), [Entry(name, False, turns, 0.0002) for name in ("one", "twin")])
    assert _row(_block(table(results), "A constant"), "one")[0] == "500.0"
    assert _row(_block(table(results), "A constant"), "one")[4:] == ["200", "2000", "2.00", "4.00"]


def test_the_database_has_a_column_only_where_it_was_asked() -> None:
    printed = table(_results())
    assert "DB µs" in _block(printed, "A user by id")[1]
    assert "DB µs" not in _block(printed, "Five log lines")[1]


def test_a_claim_is_printed_with_its_verdict() -> None:
    results = _results()
    block = _block(table(results), results.comparisons[2].title)
    entries = {entry.name: entry for entry in results.comparisons[2].entries}
    twin = speed(results.comparisons[2].entries[1], results.comparisons[2].entries[0])
    for claim in results.comparisons[2].claims[:2]:
        measured = speed(entries[claim.entry], entries[claim.against])
        assert (
            f"  {claim.entry} >= {claim.factor:g} x {claim.against}: {measured.value:.2f} ({measured.low:.2f}-"
            f"{measured.high:.2f}, A/A {twin.low:.2f}-{twin.high:.2f}) {verdict(claim, measured)}"
        ) in block
    assert "  Overdrive, memory >= 2 x cashews, memory: not measured" in block


def test_a_failed_rival_is_said_to_have_failed() -> None:
    results = _results()
    title = results.comparisons[2].title
    assert _row(_block(table(results), title), "cashews, memory") == ["failed:", "answered", "500"]
    assert "Traceback" not in table(results)
    panel = _panel(picture(results), title)
    assert "cashews, memory" in panel
    assert panel.count("failed") == 1


@pytest.mark.parametrize("failed", [0, 1])
def test_without_one_of_the_pair_the_rest_is_reported(failed: int) -> None:
    results = _results()
    entries = [*results.comparisons[0].entries]
    entries[failed] = Entry(entries[failed].name, False, [], failure="did not start")
    results = _with_entries(results, entries)
    block = _block(table(results), "A constant")
    speeds = ["-", "unknown"] if failed == 0 else [_shown(speed(entries[2], entries[0]).value)]
    assert _row(block, "FastAPI")[1 : 1 + len(speeds)] == speeds
    assert _row(block, "FastAPI")[3] == "unknown"
    panel = _panel(picture(results), "A constant: what a framework costs")
    assert any(text.startswith("A/A unknown") for text in panel)
    assert ("no baseline" in panel) is (failed == 0)


def test_a_phase_is_a_row_and_its_share_is_of_what_could_be_answered() -> None:
    block = _block(table(_results()), "Offered 0.6")
    rows = [line.split() for line in block if line.startswith("  Overdrive ")]
    assert [row[3:] for row in rows] == [
        ["60", "100.0%", "200", "85", "21.00", "240.00", "2.10"],
        ["1000", "94.0%", "3333", "1428", "21.00", "240.00", "2.10"],
        ["90", "99.0%", "300", "128", "21.00", "240.00", "2.10"],
    ]
    unanswered = next(line for line in block if "stock FastAPI" in line and "10 x" in line)
    assert unanswered.split()[-3:] == ["-", "-", "2.10"]
    panel = _panel(picture(_results()), "Offered 0.6, 10 and 0.9 times what it can do")
    assert [text for text in panel if text.endswith("%")] == ["100%", "0%", "20%", "100%", "94%", "99%"]


def test_the_storm_is_told_beside_what_could_be_attained_and_the_calm_before_it() -> None:
    block = _block(table(_results()), "The storm (ceiling")
    assert _row(block, "Overdrive") == ["96.0", "97.9%", "9.4%", "1.0", "x", "4.00", "0.25", "s", "1.00", "1.00"]
    assert _row(block, "stock FastAPI + SQLAlchemy")[3:7] == ["-", "4.00", "never", "1.00"]


@pytest.mark.parametrize(("refusal", "ceiling"), [(0.0001, 96), (0.0006, 400 / 4.4), (0.0011, 0)])
def test_nothing_is_expected_of_a_cpu_that_refusals_have_taken(refusal: float, ceiling: float) -> None:
    calm, storm = _phase(0.6, 1), _phase(10, 0.05)
    calm = msgspec.structs.replace(calm, server_cpu=0.005 * calm.good)
    cpu = 0.005 * storm.good + refusal * (storm.offered - storm.good)
    storm = msgspec.structs.replace(storm, server_cpu=cpu)
    entry = OverloadEntry("some", False, [calm, storm, calm], attainable=96)
    assert entry.ceiling == pytest.approx(ceiling)


def test_a_service_that_failed_under_load_is_said_to_have_failed() -> None:
    results = _results()
    results.overloads[0].entries[0] = OverloadEntry("stock", False, [], "did not start")
    assert _row(_block(table(results), "Offered"), "stock") == ["failed:", "did", "not", "start"]
    assert "failed" in _panel(picture(results), results.overloads[0].title)


def test_the_picture_has_each_name_once_in_its_panel_with_its_ratio() -> None:
    results = _results()
    drawn = picture(results)
    for comparison in results.comparisons:
        texts = _panel(drawn, comparison.title)
        baseline, twin, *_ = comparison.entries
        spread = speed(twin, baseline)
        assert texts[1] == f"A/A {_shown(spread.low)}–{_shown(spread.high)}: {twin.name}"
        assert not [text for text in texts[2:] if twin.name in text]
        for entry in comparison.entries:
            if entry is not twin:
                assert texts.count(entry.name) == 1
                assert entry.failure is not None or f"{_shown(speed(entry, baseline).value)}×" in texts
    for overload in results.overloads:
        texts = _panel(drawn, overload.title)
        assert all(texts.count(entry.name) == 1 for entry in overload.entries)


def test_the_fastest_is_drawn_first() -> None:
    speeds = [float(text[:-1]) for text in _panel(picture(_results()), "The same user from a cache") if text[-1] == "×"]
    assert speeds == sorted(speeds, reverse=True)


def test_what_is_ours_is_marked_and_nothing_else() -> None:
    results = _results()
    texts = ElementTree.fromstring(picture(results)).iter(f"{SVG}text")
    marked = {text.text for text in texts if text.get("class") == "name own"}
    ours = {entry.name for each in results.comparisons for entry in each.entries if entry.ours}
    assert marked == ours | {"Overdrive"}


def test_the_picture_says_in_words_what_it_shows() -> None:
    results = _results()
    root = ElementTree.fromstring(picture(results))
    assert root.get("role") == "img"
    assert root.findtext(f"{SVG}title")
    description = root.findtext(f"{SVG}desc") or ""
    assert all(entry.name in description for each in results.comparisons for entry in each.entries)


@pytest.mark.parametrize("rounds", [1, 5, 6, 21])
def test_nothing_is_drawn_that_is_not_known(rounds: int) -> None:
    results = _results(rounds)
    drawn, printed = picture(results), table(results)
    root = ElementTree.fromstring(drawn)
    numbers = [
        value for element in root.iter() for key, value in element.items() if key in {"x", "y", "width", "height", "d"}
    ]
    assert not [value for value in numbers if "nan" in value or "inf" in value]
    assert not {"nan", "inf"} & set(printed.replace("-", " ").replace("(", " ").split())
    classes = [element.get("class") for element in root.iter()]
    assert ("whisker" in classes) is (rounds >= 6)
    # The legend's own is there either way.
    assert classes.count("band") == 1 + (len(results.comparisons) if rounds >= 6 else 0)
    assert ("± ?" in " ".join(_panel(drawn, "The same user from a cache"))) is (rounds < 6)
    assert ("unknown" in printed) is (rounds < 6)


def test_names_are_text() -> None:
    name = '<b>&"quoted"'
    results = _renamed(_results(), name)
    drawn = picture(results)
    assert [panel.count(name) for panel in _panels(drawn)] == [2] * 7
    assert "<b>" not in drawn
    assert name in table(results)


def test_whatever_is_long_keeps_to_its_room() -> None:
    name = "a rival with a name " * 6
    results = _renamed(_results(), name.strip())
    results.machine["processor"] = "a processor with a name " * 8
    results.comparisons[2].entries[4] = Entry("cashews, memory", False, [], failure="a reason to fail " * 20)
    assert max(map(len, table(results).splitlines())) <= COLUMNS
    assert ElementTree.fromstring(picture(results)).get("width") == "860"


def test_a_run_of_one_kind_is_reported() -> None:
    results = _results()
    for part in (msgspec.structs.replace(results, comparisons=[]), msgspec.structs.replace(results, overloads=[])):
        ElementTree.fromstring(picture(part))
        assert len(_panels(picture(part))) == len(part.comparisons) + len(part.overloads)
        assert table(part)


def test_the_head_has_what_the_numbers_depend_on() -> None:
    head = table(_results()).split("\n\n")[0]
    for part in ("AMD EPYC 7763", "2 cores", "CPython 3.12.3", "fastapi-cache2 0.2.2", "seed 7", "21 rounds"):
        assert part in head


def test_the_same_results_make_the_same_report() -> None:
    assert picture(_results()) == picture(_results())
    assert table(_results()) == table(_results())


def test_a_disk_is_a_table_of_ratios() -> None:
    entries = [
        DiskEntry("logging off", False, 1.0, 0.002, 1e-6, 2e-6, 1e-3),
        DiskEntry("logging FileHandler", False, 0.02, None, 2e-5, 9e-3, 59.5),
        DiskEntry("Overdrive log_directly", True, 0.99, 0.003, 5e-6, 1e-4, 2e-3),
    ]
    results = msgspec.structs.replace(_results(), disks=[DiskState("stopped", 60, entries)])
    block = _block(table(results), "Five log lines a request into a pipe, reader: stopped, 60 s")
    assert _row(block, "logging off") == ["100.0%", "1.00", "2.00", "1.00", "1.0", "2", "1.0"]
    assert _row(block, "logging FileHandler") == ["2.0%", "0.02", "-", "-", "20.0", "9000", "59500.0"]
    assert _row(block, "Overdrive log_directly") == ["99.0%", "0.99", "3.00", "1.50", "5.0", "100", "2.0"]
