"""The command line as a shell meets it: exit status, one line on stderr, and no traceback."""

from __future__ import annotations

import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

import psycopg
import pytest
from redis import Redis
from shell import Command
from sqlalchemy import create_engine

from overdrive.demo import servers
from overdrive.demo.data import is_seeded, seed

_APP = """
from fastapi import BackgroundTasks, Depends, FastAPI, Request
from pydantic import BaseModel
from overdrive import Overdrive, Page, SessionDep, SessionFactoryDep, SyncSessionDep, cached

class Item(BaseModel):
    id: int

app = FastAPI()
overdrive = Overdrive(app)
bare = FastAPI()
refused = FastAPI()
Overdrive(refused)
number = 7

@app.get("/items", response_model=Page[Item])
@cached(ttl=30)
async def items(db: SessionDep) -> None: ...

@app.get("/whole")
@cached
async def whole(request: Request) -> None: ...

@app.get("/plain")
def plain(db: SyncSessionDep) -> None: ...

@app.post("/items")
async def add(db: SessionDep, sessions: SessionFactoryDep) -> None: ...

@app.websocket("/live")
async def live(sessions: SessionFactoryDep) -> None: ...

@refused.get("/wrong")
def wrong(db: SessionDep) -> None: ...
"""


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory to run in, and no settings but a test's own."""
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("OVERDRIVE_")]:
        monkeypatch.delenv(name)
    return tmp_path


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port that is taken, so that nobody else opens it, and does not listen."""
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line a command that could not work has left."""
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("overdrive: ")
    return line


@contextmanager
def running(*arguments: str, before: str = "pass") -> Iterator[subprocess.Popen[str]]:
    """Run `overdrive demo`, to be ended by the test; its output goes to the files `out` and `err`.

    before: a statement that prepares its interpreter.
    """
    command = [
        sys.executable,
        "-c",
        f"{before}; from overdrive.cli import main; main()",
        "demo",
        "--port",
        "0",
        *arguments,
    ]
    with Path("out").open("w") as out, Path("err").open("w") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """Return what `condition` returns as soon as that is true; fail where the process ends before."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if found := condition():
            return found
        assert process.poll() is None, Path("err").read_text()
        time.sleep(0.02)
    raise AssertionError("not within 30 s")


def printed(process: subprocess.Popen[str]) -> list[str]:
    """Return the addresses `overdrive demo --servers` has printed once both servers run, and its own if it serves."""
    until(lambda: "Redis is at" in Path("out").read_text(), process)
    return [line.split()[-1] for line in Path("out").read_text().splitlines()]


def assert_gone(*addresses: str) -> None:
    for address in addresses:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", urlsplit(address).port))


@pytest.fixture
def own_servers(redis_server: str, server_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `--servers` needs besides the wheel: Redis on the PATH, and a temporary directory open to all."""
    with Redis.from_url(redis_server, decode_responses=True) as client:
        program = Path(client.info("server")["executable"])
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    server_directory.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(server_directory))
    monkeypatch.setattr(tempfile, "tempdir", str(server_directory))


# demo


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("typer", "demo", "cli"),
        ("rich", "inspect", "cli"),
        ("uvicorn", "demo", "demo"),
        ("aiosqlite", "demo", "sqlite"),
    ],
)
def test_a_missing_extra_is_named(module: str, command: str, extra: str) -> None:
    arguments = {"demo": ["demo"], "inspect": ["inspect", "app:app"]}[command]
    code = f"import sys; sys.modules[{module!r}] = None; from overdrive.cli import main; main()"
    line = complaint(subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True))
    assert module in line
    assert f"pip install 'overdrive[{extra}]'" in line


def test_a_port_in_use(overdrive: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = complaint(overdrive("demo", "--port", str(port)))
    assert f"127.0.0.1:{port}" in line
    assert "in use" in line
    assert not Path("overdrive-demo.sqlite").exists()


def test_an_address_of_another_machine(overdrive: Command) -> None:
    assert "192.0.2.1" in complaint(overdrive("demo", "--port", "0", "--host", "192.0.2.1"))


def test_a_database_that_does_not_answer(closed_port: int, overdrive: Command) -> None:
    url = f"postgresql://shop:secret@127.0.0.1:{closed_port}/shop"
    line = complaint(overdrive("demo", "--port", "0", "--database-url", url))
    assert f"127.0.0.1:{closed_port}" in line
    assert "secret" not in line


def test_a_database_in_a_folder_that_is_not_there(overdrive: Command) -> None:
    line = complaint(overdrive("demo", "--port", "0", "--database-url", "sqlite:///nowhere/demo.sqlite"))
    assert "nowhere/demo.sqlite" in line


def test_a_database_whose_tables_are_others(overdrive: Command) -> None:
    with closing(sqlite3.connect("other.sqlite")) as connection:
        connection.execute("CREATE TABLE users (login TEXT)")
    line = complaint(overdrive("demo", "--port", "0", "--database-url", "sqlite:///other.sqlite"))
    assert "other.sqlite cannot be filled: no such column" in line


def test_a_redis_that_does_not_answer(closed_port: int, overdrive: Command) -> None:
    url = f"redis://:secret@127.0.0.1:{closed_port}/0"
    line = complaint(overdrive("demo", "--port", "0", "--redis-url", url))
    assert f"127.0.0.1:{closed_port}" in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("OVERDRIVE_POOL__SIZE", "abc"),
        ("OVERDRIVE_PAGINATION__MAX_SIZE", "0"),
        ("OVERDRIVE_DATABASE_URL", "shop"),
        ("OVERDRIVE_DATABASE_URL", "nosuch://localhost/shop"),
        ("OVERDRIVE_REDIS_URL", "http://localhost"),
    ],
)
def test_a_malformed_setting(name: str, value: str, overdrive: Command) -> None:
    line = complaint(overdrive("demo", "--port", "0", **{name: value}))
    assert any(word in line for word in (name, "database URL", "'nosuch'", "Redis URL"))


def test_options_win_over_variables(closed_port: int, overdrive: Command) -> None:
    url = f"postgresql://127.0.0.1:{closed_port}/shop"
    line = complaint(overdrive("demo", "--port", "0", "--database-url", url, OVERDRIVE_DATABASE_URL="shop"))
    assert f"127.0.0.1:{closed_port}" in line


def test_the_second_start_serves_at_once_and_ctrl_c_ends_it() -> None:
    engine = create_engine("sqlite:///overdrive-demo.sqlite")
    with engine.begin() as connection:
        seed(connection, users=10, orders=10, products=10)
    engine.dispose()
    with running() as process:
        until(lambda: "Application startup complete" in Path("err").read_text(), process)
        address = Path("out").read_text().split()[-1]
        with urlopen(f"{address}users?size=1") as response:
            assert b'"total":10' in response.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    assert "Traceback" not in Path("err").read_text()


def test_ctrl_c_while_the_database_is_filled() -> None:
    file, log = Path("overdrive-demo.sqlite"), Path("overdrive-demo.sqlite-wal")
    with running() as process:
        # Rows are in the file or in its log long before all of them are.
        until(lambda: any(each.exists() and each.stat().st_size > 1_000_000 for each in (file, log)), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
    assert Path("err").read_text().splitlines()[-1].startswith("overdrive: interrupted")
    assert "Traceback" not in Path("err").read_text()

    engine = create_engine("sqlite:///overdrive-demo.sqlite")
    with engine.begin() as connection:
        assert not is_seeded(connection)
        seed(connection, users=10, orders=10, products=10)
        assert is_seeded(connection)
    engine.dispose()


@pytest.mark.parametrize("option", ["--database-url", "--redis-url"])
def test_own_servers_beside_others(option: str, overdrive: Command) -> None:
    line = complaint(overdrive("demo", "--port", "0", "--servers", option, "sqlite:///demo.sqlite"))
    assert "leave out --database-url and --redis-url" in line


def test_own_servers_are_filled_once_and_end_with_the_demo(own_servers: None) -> None:
    few = "from functools import partial; from overdrive import cli; from overdrive.demo import data; "
    few += "cli._USERS_ON_SERVERS = 10; data.seed = partial(data.seed, orders=10, products=10)"
    name = b'"name":"Kept"'
    for end in (signal.SIGHUP, signal.SIGINT):
        with running("--servers", before=few) as process:
            until(lambda: "Application startup complete" in Path("err").read_text(), process)
            postgres, redis, service = printed(process)
            with urlopen(f"{service}users?size=1") as response:
                page = response.read()
            assert b'"total":10' in page
            assert (name in page) == (end != signal.SIGHUP)
            change = Request(
                f"{service}users/1", b'{"name": "Kept"}', {"content-type": "application/json"}, method="PATCH"
            )
            urlopen(change).close()
            urlopen(f"{service}users/1").close()
            with Redis.from_url(redis) as client:
                assert client.dbsize() > 0
            process.send_signal(end)
            assert process.wait(30) in (0, 130)
        assert_gone(postgres, redis, service)
        assert "Traceback" not in Path("err").read_text()


def test_own_servers_end_when_filling_them_is_interrupted(own_servers: None) -> None:
    writes = "SELECT FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND query LIKE 'INSERT%'"
    with running("--servers") as process:
        postgres, redis = printed(process)
        with psycopg.connect(postgres, autocommit=True) as connection:
            until(lambda: connection.execute(writes).fetchone() is not None, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    assert_gone(postgres, redis)
    assert Path("err").read_text().splitlines() == [
        "overdrive: interrupted; nothing was kept of a database half filled"
    ]
    with servers.postgres(servers.KEPT) as url, psycopg.connect(url) as connection:
        assert connection.execute("SELECT to_regclass('users')").fetchone() == (None,)


# inspect


def test_inspecting_an_app(overdrive: Command) -> None:
    Path("shop.py").write_text(_APP)
    done = overdrive("inspect", "shop:app")
    assert (done.returncode, done.stderr) == (0, "")
    layers, routes, cache, _ = done.stdout.split("\n\n")
    names = [line.strip() for line in layers.splitlines()[1:]]
    assert names[0] == "Observer"
    assert names.index("ServerErrorMiddleware") < names.index("RequestPath") < names.index("APIRouter")
    treatments = dict(line.strip().split("  ", 1) for line in routes.splitlines()[1:])
    assert {route: treatment.strip() for route, treatment in treatments.items()} == {
        "GET /items": "page by number; async session",
        "GET /whole": "-",
        "GET /plain": "sync session",
        "POST /items": "async session; async session factory",
        "WEBSOCKET /live": "async session factory",
    }
    assert [" ".join(line.split()) for line in cache.splitlines()[2:]] == [
        "GET /items off: the cache is (cache.enabled) 30 s - - - - cached host, path, every query parameter",
        "GET /whole off: the cache is (cache.enabled) 60 s - - - - not cached: whole() takes the whole request, and "
        "nobody can tell what it reads of it: say so by declare(whole, principal=...) or declare(whole, ignore=True)",
    ]


def test_inspecting_an_app_that_could_not_serve(overdrive: Command) -> None:
    Path("shop.py").write_text(_APP)
    done = overdrive("inspect", "shop:refused")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "SyncSessionDep" in line


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("shop", "module:app"),
        (":app", "module:app"),
        ("nowhere:app", "no module 'nowhere'"),
        ("shop.deeper:app", "no module 'shop.deeper'"),
        ("shop:nothing", "has no 'nothing'"),
        ("shop:number", "of type int"),
        ("shop:bare", "Overdrive(app)"),
    ],
)
def test_inspecting_what_is_no_app(target: str, message: str, overdrive: Command) -> None:
    Path("shop.py").write_text(_APP)
    assert message in complaint(overdrive("inspect", target))


def test_what_an_app_s_module_misses_is_shown_whole(overdrive: Command) -> None:
    Path("shop.py").write_text("import nothing_of_that_name")
    done = overdrive("inspect", "shop:app")
    assert done.returncode == 1
    assert "shop.py" in done.stderr
    assert "ModuleNotFoundError: No module named 'nothing_of_that_name'" in done.stderr


def test_what_workers_have_counted_and_what_is_off(redis_url: str, overdrive: Command) -> None:
    Path("shop.py").write_text(_APP)
    counts = {"late": 3, "misses": 1, "bytes": 70, "mismatches": 2, "bypassed.off": 2}
    with Redis.from_url(redis_url) as server:
        for name, number in counts.items():
            server.hincrby("overdrive:counts", f"GET /items\n{name}", number)
        server.set("overdrive:off", "/whole")
    variables = {"OVERDRIVE_REDIS_URL": redis_url, "OVERDRIVE_CACHE__ENABLED": "true"}
    done = overdrive("inspect", "shop:app", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    cache, off = done.stdout.partition("Cache:\n")[2].split("\n\n")
    head, items, whole = [" ".join(line.split()) for line in cache.splitlines()]
    assert head == "route mode ttl hits of bytes mismatches verdict key of"
    assert items == "GET /items on 30 s 50.0% 6 70 2 cached host, path, every query parameter"
    assert whole.startswith("GET /whole off: switched 60 s - 0 0 0 not cached: whole() takes")
    assert off == "off now: /whole\n"
    document = json.loads(overdrive("inspect", "shop:app", "--json", **variables).stdout)
    assert document["cached"]["GET /items"]["counts"] == counts
    assert document["off"] == ["/whole"]


# explain


def test_explaining_a_request(overdrive: Command) -> None:
    Path("shop.py").write_text(
        _APP.replace("async def whole(request: Request) -> None", 'def whole(key: str = "") -> None')
    )
    arguments = "explain", "shop:app", "get", "/whole?key=hush", "--header", "Authorization: Bearer hush"
    done = overdrive(*arguments)
    assert (done.returncode, done.stderr) == (0, "")
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[:5] == [
        "request GET /whole",
        "route GET /whole",
        "mode off: the cache is (cache.enabled)",
        "verdict cached",
        "key of host, path, query key",
    ]
    assert "another process" in lines[-1]
    assert "hush" not in done.stdout
    assert "its endpoint is not marked @cached" in overdrive("explain", "shop:app", "GET", "/plain", "--json").stdout
    assert "looks like name:value" in complaint(overdrive(*arguments[:4], "--header", "nothing"))


# off and on


@pytest.mark.parametrize(
    ("arguments", "message"), [(("cache",), "OVERDRIVE_REDIS_URL"), (("pool",), "'pool' cannot be switched")]
)
def test_switching_what_cannot_be_switched(arguments: tuple[str, ...], message: str, overdrive: Command) -> None:
    assert message in complaint(overdrive("off", *arguments))


def test_switching_routes_of_an_app(redis_url: str, closed_port: int, overdrive: Command) -> None:
    Path("shop.py").write_text(_APP)
    done = overdrive("off", "cache", "shop:app", "--route", "GET /items", "--route", "/whole", "--redis-url", redis_url)
    assert (done.stdout, done.stderr) == ("off now: /items, /whole\n", "")
    line = complaint(overdrive("off", "cache", "shop:app", "--route", "/plain", OVERDRIVE_REDIS_URL=redis_url))
    assert "no cached route is called '/plain'; there are GET /items, GET /whole" in line
    assert "is no route's template" in complaint(
        overdrive("off", "cache", "--route", "items", "--redis-url", redis_url)
    )
    done = overdrive("on", "cache", "--route", "/items", OVERDRIVE_REDIS_URL=redis_url)
    assert done.stdout == "off now: /whole\n"
    assert "no worker has told of a route '/items'" in done.stderr
    away = f"redis://127.0.0.1:{closed_port}/0"
    assert "cannot be reached" in complaint(overdrive("off", "cache", "--redis-url", away))
