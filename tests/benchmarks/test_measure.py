"""A run from end to end, as short as can be."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import msgspec
import psutil
import pytest

from benchmarks import disk, measure
from benchmarks.comparisons import PLANS, STORMS, Plan, Rival
from benchmarks.load import Answer
from benchmarks.measure import FEWEST_ROUNDS, compare
from benchmarks.process import RivalError
from benchmarks.results import Claim, Results

FASTAPI = Rival("FastAPI", "plain_fastapi:constant", "/constant")
STALLED = {"disk_log:file_handler", "disk_log:direct"}
ROOT = Path(__file__).parents[2]
#: A run with rivals that are started twice, and warm at once.
RUN = "from benchmarks import __main__ as run, measure; measure.CASTS = 2; measure._WARM_UP = 0.01; run.main()"


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rivals are started once, and warm at once."""
    monkeypatch.setattr(measure, "CASTS", 1)
    monkeypatch.setattr(measure, "_WARM_UP", 0.01)


def test_run_prints_a_table_and_writes_its_results(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RUN, "--only", "constant", "--seconds", "0", "--out"]
    done = subprocess.run([*command, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = msgspec.json.decode((tmp_path / "results.json").read_bytes(), type=Results)
    [comparison] = results.comparisons
    assert [entry.failure for entry in comparison.entries] == [None] * 4
    assert all(len(entry.rounds) == 2 * FEWEST_ROUNDS for entry in comparison.entries)
    assert all(name in done.stdout for name in ("bare ASGI", "FastAPI", "Overdrive", results.versions["fastapi"]))
    assert "FastAPI" in (tmp_path / "results.svg").read_text()
    # No path of the machine, no name of it.
    assert str(ROOT) not in (tmp_path / "results.json").read_text()


def test_rival_that_fails_is_told_so_and_the_others_go_on() -> None:
    plan = Plan(
        "some",
        "Some that fail",
        [
            FASTAPI,
            Rival("not installed", "nobody:app", "/constant"),
            Rival("not there", "plain_fastapi:constant", "/nowhere"),
            Rival("different", "with_overdrive:log", "/log"),
            FASTAPI._replace(name="the same"),
        ],
        [Claim("the same", "FastAPI", 1.0)],
        database=False,
    )
    comparison = compare(plan, 0, Random(1), {})
    failures = {entry.name: entry.failure for entry in comparison.entries}
    assert list(failures) == ["FastAPI", "FastAPI (A/A)", "not installed", "not there", "different", "the same"]
    assert "No module named 'benchmarks.rivals.nobody'" in str(failures["not installed"])
    assert "404" in str(failures["not there"])
    assert "answers something else" in str(failures["different"])
    assert [name for name, failure in failures.items() if failure is None] == ["FastAPI", "FastAPI (A/A)", "the same"]
    assert not [child for child in psutil.Process().children() if "benchmarks.server" in child.cmdline()]


def test_run_without_a_baseline_fails() -> None:
    plan = Plan("none", "No baseline", [FASTAPI._replace(factory="nobody:app")], [], database=False)
    with pytest.raises(RivalError, match=r"FastAPI: .*nobody"):
        compare(plan, 0, Random(1), {})


@pytest.mark.parametrize(
    ("lost", "normal"),
    [((), 0), ((10.5, 12), 0.5), ((10, 10.9, 11.8), 1.8), ([10 + 0.9 * number for number in range(9)], None)],
)
def test_all_is_normal_once_a_whole_second_was_answered(lost: Sequence[float], normal: float | None) -> None:
    due = [10 + number / 10 for number in range(80)]
    answers = [Answer(503 if any(abs(each - at) < 0.01 for at in lost) else 200, 0.05, 0.0) for each in due]
    found = measure._normal(due, answers, 10.0, 1.0)
    assert found == (None if normal is None else pytest.approx(normal))


def test_names_are_unique_and_claims_are_about_rivals_there_are() -> None:
    assert len({each.name for each in (*PLANS, *STORMS)}) == len(PLANS) + len(STORMS)
    for plan in PLANS:
        names = [rival.name for rival in plan.rivals]
        assert len(set(names)) == len(names)
        assert {name for claim in plan.claims for name in (claim.entry, claim.against)} <= set(names)


def test_a_log_whose_reader_stops_is_told_by_who_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "RIVALS", [each for each in disk.RIVALS if each.factory in STALLED])
    monkeypatch.setattr(disk, "_STATES", [("stopped", 0, 2)])
    [state] = disk.measure(Random(1))
    assert max(state.entries, key=lambda entry: entry.longest_call).name == "logging FileHandler"
    assert all(0 < entry.answered <= 1 for entry in state.entries)
