"""Run the comparisons: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import distributions
from pathlib import Path
from random import Random

import anyio
import msgspec

from benchmarks.comparisons import PLANS, STORMS
from benchmarks.measure import compare, overload
from benchmarks.process import RivalError, keep_off_the_first_core
from benchmarks.report import picture, table
from benchmarks.results import Results
from overdrive import create_engine
from overdrive.demo import servers
from overdrive.demo.data import seed

_USERS = 2_000_000
_LIBRARIES = [
    "overdrive", "fastapi", "starlette", "pydantic", "sqlalchemy", "asyncpg", "redis", "uvicorn", "uvloop", "httptools",
    "psycopg-pool", "litestar", "cashews", "fastapi-cache2", "fastapi-pagination", "loguru", "structlog", "orjson",
]  # fmt: skip


def main() -> None:
    """Measure what the command line asks for, print the table, write `results.json` and `results.svg`."""
    arguments = _arguments()
    keep_off_the_first_core()
    try:
        results = _measure(arguments)
    except RivalError as error:
        sys.exit(f"benchmarks: {error}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(results)) + b"\n")
    (arguments.out / "results.svg").write_text(picture(results), encoding="utf-8")
    print(table(results))


def _arguments() -> argparse.Namespace:
    names = [each.name for each in (*PLANS, *STORMS)]
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    parser.add_argument("--only", choices=names, help="run one comparison")
    parser.add_argument("--seconds", type=float, default=45, help="of measuring in a comparison (%(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the order of turns (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path(".bench"), help="directory of the results (%(default)s)")
    return parser.parse_args()


def _measure(arguments: argparse.Namespace) -> Results:
    plans = [plan for plan in PLANS if arguments.only in (None, plan.name)]
    storms = [storm for storm in STORMS if arguments.only in (None, storm.name)]
    random = Random(arguments.seed)
    with _databases() if storms or any(plan.database for plan in plans) else nullcontext({}) as environment:
        comparisons = []
        for plan in plans:
            _say(plan.title)
            comparisons.append(compare(plan, arguments.seconds, random, environment))
        overloads = []
        for storm in storms:
            _say(storm.title)
            overloads.append(overload(storm, random, environment))
    return Results(_machine(), _versions(), arguments.seed, comparisons, overloads)


@contextmanager
def _databases() -> Iterator[dict[str, str]]:
    """Run both, PostgreSQL with its users, which are kept for the next run; yield what tells a rival about them."""
    with (
        servers.postgres(servers.KEPT) as database_url,
        tempfile.TemporaryDirectory() as scratch,
        servers.redis(Path(scratch)) as redis_url,
    ):
        _say(f"{_USERS:,} users")
        anyio.run(_fill, database_url)
        yield {"DATABASE_URL": database_url, "REDIS_URL": redis_url}


async def _fill(url: str) -> None:
    engine = create_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(seed, users=_USERS)
    await engine.dispose()


def _say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


def _machine() -> dict[str, str | int]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count() or 1,
        "system": f"{platform.system()} {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def _versions() -> dict[str, str]:
    installed = {distribution.name.lower(): distribution.version for distribution in distributions()}
    return {name: installed[name] for name in _LIBRARIES if name in installed}


if __name__ == "__main__":
    main()
