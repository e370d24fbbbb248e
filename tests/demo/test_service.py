"""The reference service as its users meet it: started from the command line, asked over HTTP, read in its log."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from html import unescape
from pathlib import Path
from typing import Any

import httpx2
import psycopg
import pytest
from redis import Redis
from sqlalchemy import create_engine

from overdrive.demo.data import seed

# What the page's commands need of curl, for a machine that has none.
_CURL = """#!{python}
import argparse, httpx2
parser = argparse.ArgumentParser()
for flag in ("-s", "-i"):
    parser.add_argument(flag, action="store_true")
parser.add_argument("-X", default="GET")
parser.add_argument("-H", action="append", default=[])
parser.add_argument("-d")
parser.add_argument("-w")
parser.add_argument("url")
given = parser.parse_args()
headers = dict(line.split(": ", 1) for line in given.H)
response = httpx2.request(given.X, given.url, headers=headers, content=given.d)
if given.i:
    print("HTTP/1.1", response.status_code)
    print(*(f"{{name}}: {{value}}" for name, value in response.headers.items()), sep="\\n", end="\\n\\n")
print(response.text)
"""


def until(condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Return what `condition` returns as soon as that is true; fail where it never is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"not within {seconds} s")


class Service:
    def __init__(self, http: httpx2.Client, log: Path, redis: Redis | None) -> None:
        self.http = http
        self.redis = redis
        self._log = log

    def get(self, path: str) -> Any:
        return self.http.get(path).raise_for_status().json()

    def x_cache(self, path: str) -> str:
        """What the cache did for a GET, once that is over: a response is sent first and stored then."""
        response = self.http.get(path).raise_for_status()
        assert response.headers["cache-status"].startswith("overdrive; ")
        self.logged(response.headers["x-request-id"])
        return str(response.headers["x-cache"])

    def logged(self, request_id: str) -> list[dict[str, Any]]:
        """The log lines of a request up to its event; what the server says of it comes after."""
        return until(lambda: self._lines_of(request_id))  # type: ignore[no-any-return]

    def _lines_of(self, request_id: str) -> list[dict[str, Any]] | None:
        written = self._log.read_text().rpartition("\n")[0]
        lines = [line for line in map(json.loads, written.splitlines()) if line.get("request_id") == request_id]
        events = [number for number, line in enumerate(lines, 1) if line["logger"] == "overdrive.request"]
        return lines[: events[0]] if events else None


@pytest.fixture(scope="module", params=["SQLite and memory", "PostgreSQL and Redis"])
def service(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    directory = tmp_path_factory.mktemp("service")
    if request.param == "SQLite and memory":
        url = f"sqlite:///{directory / 'demo.sqlite'}"
        fill(url)
        with serving(directory, "--database-url", url) as address, httpx2.Client(base_url=address, timeout=30) as http:
            yield Service(http, directory / "log", None)
    else:
        server = request.getfixturevalue("postgres_server")
        redis_url = request.getfixturevalue("redis_server").removesuffix("/0") + "/1"
        with database(server) as url, closing(Redis.from_url(redis_url)) as redis:
            redis.flushdb()
            fill(url.replace("postgresql:", "postgresql+psycopg:"))
            options = ["--database-url", url, "--redis-url", redis_url]
            with serving(directory, *options) as address, httpx2.Client(base_url=address, timeout=30) as http:
                yield Service(http, directory / "log", redis)
            redis.flushdb()


@contextmanager
def database(server: str) -> Iterator[str]:
    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("CREATE DATABASE service TEMPLATE template0")
        yield server.removesuffix("/postgres") + "/service"
        connection.execute("DROP DATABASE service WITH (FORCE)")


def fill(url: str) -> None:
    engine = create_engine(url)
    with engine.begin() as connection:
        seed(connection, users=500, orders=1_500, products=50)
    engine.dispose()


@contextmanager
def serving(directory: Path, *options: str) -> Iterator[str]:
    output = directory / "output"
    with output.open("w") as stdout, (directory / "log").open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "overdrive.cli", "demo", "--port", "0", *options],
            cwd=directory,
            # Under pytest the cache is off, and the variable that says so is inherited.
            env={**os.environ, "OVERDRIVE_CACHE__ENABLED": "true"},
            stdout=stdout,
            stderr=stderr,
        )
    try:
        address = until(lambda: process.poll() is not None or re.search(r"http://[0-9.:]+", output.read_text()))
        assert process.poll() is None, (directory / "log").read_text()
        until(lambda: answers(address[0]))
        yield address[0]
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        return httpx2.get(f"{address}/ready").status_code == 200
    except httpx2.TransportError:
        return False


def seen(service: Service, user_id: int) -> str | None:
    return service.get(f"/users/{user_id}")["last_seen_at"]  # type: ignore[no-any-return]


def place_order(service: Service, **order: int) -> httpx2.Response:
    """Place an order, and wait for the background task that comes after it."""
    before = seen(service, order["user_id"])
    response = service.http.post("/orders", json=order)
    until(lambda: seen(service, order["user_id"]) != before)
    return response


# Pages


def test_users_by_page(service: Service) -> None:
    page = service.get("/users?page=2&size=20")
    assert [user["id"] for user in page.pop("items")] == list(range(21, 41))
    assert page == {"total": 500, "page": 2, "size": 20, "pages": 25}


@pytest.mark.parametrize(
    ("query", "holds"),
    [
        ("country=DE", lambda user: user["country"] == "DE"),
        ("active=false", lambda user: not user["active"]),
        ("q=aDa", lambda user: user["name"].startswith("Ada")),
        ("country=US&active=true&q=b", lambda user: user["name"][0] == "B" and user["country"] == "US"),
    ],
)
def test_filtered_users(service: Service, query: str, holds: Callable[[Any], bool]) -> None:
    page = service.get(f"/users?size=100&{query}")
    assert 0 < page["total"] < 500
    assert all(map(holds, page["items"]))


def test_filters_are_texts_and_no_patterns(service: Service) -> None:
    assert service.get("/users?q=%25")["total"] == 0
    assert service.http.get("/users?q=%00").status_code == 422


def test_walking_the_feed_meets_every_user_once_newest_first(service: Service) -> None:
    items: list[Any] = []
    page = service.get("/feed?size=90")
    assert page["prev_cursor"] is None
    items += page["items"]
    while page["next_cursor"]:
        page = service.get(f"/feed?size=90&cursor={page['next_cursor']}")
        items += page["items"]
    assert sorted(user["id"] for user in items) == list(range(1, 501))
    times = [user["created_at"] for user in items]
    assert times == sorted(times, reverse=True)


def test_a_forged_cursor_is_the_client_s_mistake(service: Service) -> None:
    response = service.http.get("/feed?cursor=forged")
    assert (response.status_code, response.json()["code"]) == (400, "invalid_cursor")


def test_orders_of_a_user(service: Service) -> None:
    page = service.get("/users/1/orders?size=3")
    assert {order["user_id"] for order in page["items"]} == {1}
    assert len(page["items"]) == 3 < page["total"]
    times = [order["created_at"] for order in page["items"]]
    assert times == sorted(times, reverse=True)
    assert service.http.get("/users/501/orders").status_code == 404


# Cache and writes


def test_a_user_is_cached_until_changed(service: Service) -> None:
    assert [service.x_cache("/users/10") for _ in range(3)] == ["miss", "hit", "hit"]
    before = service.get("/users/10")
    if service.redis is not None:
        assert service.redis.keys("overdrive:entry:*")

    changed = service.http.patch("/users/10", json={"name": "Zoe Zimmer", "active": False, "country": None})
    assert changed.json() == {**before, "name": "Zoe Zimmer", "active": False}
    response = service.http.get("/users/10")
    assert "invalidated" in response.headers["cache-status"]
    service.logged(response.headers["x-request-id"])
    assert service.x_cache("/users/10") == "hit"
    assert changed.json() == response.json() == service.get("/users/10")


def test_a_user_is_cached_while_others_change(service: Service) -> None:
    assert service.x_cache("/users/12") == "miss"
    service.http.patch("/users/13", json={"name": "Somebody Else"}).raise_for_status()
    assert service.x_cache("/users/12") == "hit"


@pytest.mark.parametrize("changes", [{"name": ""}, {"name": "\0"}, {"country": "Germany"}, {"active": "perhaps"}])
def test_bad_changes_are_refused(service: Service, changes: Any) -> None:
    assert service.http.patch("/users/2", json=changes).status_code == 422


def test_users_that_are_not_there(service: Service) -> None:
    for response in (service.http.get("/users/501"), service.http.patch("/users/501", json={"name": "Nobody"})):
        assert (response.status_code, response.json()) == (404, {"detail": "There is no user 501."})
    assert service.http.get("/users/99999999999999999999").status_code == 422


def test_bulk_prices_drop_the_top_products(service: Service) -> None:
    service.http.post("/products/prices", json={"category": "books", "percent": 0}).raise_for_status()
    assert [service.x_cache("/products/top") for _ in range(2)] == ["miss", "hit"]
    products = service.get("/products/top")
    sold = [product["sold"] for product in products]
    assert len(sold) == 10
    assert sold == sorted(sold, reverse=True)

    best = products[0]
    change = service.http.post("/products/prices", json={"category": best["category"], "percent": -20})
    assert change.json()["changed"] > 0
    assert service.logged(change.headers["x-request-id"])[-1]["statements"] == 1
    assert service.x_cache("/products/top") == "miss"
    assert service.get("/products/top")[0] == {**best, "price_cents": best["price_cents"] * 80 // 100}


def test_placing_an_order(service: Service) -> None:
    before = service.get("/users/20/orders")["total"]
    top = service.get("/products/top")[0]
    response = place_order(service, user_id=20, product_id=top["id"], quantity=3)
    assert response.status_code == 201
    order = response.json()
    assert (order["user_id"], order["product_id"], order["quantity"], order["status"]) == (20, top["id"], 3, "pending")
    page = service.get("/users/20/orders")
    assert page["total"] == before + 1
    assert page["items"][0] == order
    assert service.get("/products/top")[0] == {**top, "sold": top["sold"] + 3}


@pytest.mark.parametrize(
    ("wrong", "status", "message"),
    [
        ({"user_id": 501}, 404, "There is no user 501."),
        ({"product_id": 51}, 404, "There is no product 51."),
        ({"quantity": 0}, 422, "greater than or equal to 1"),
    ],
)
def test_impossible_orders_are_refused(service: Service, wrong: dict[str, int], status: int, message: str) -> None:
    response = service.http.post("/orders", json={"user_id": 1, "product_id": 1, "quantity": 1, **wrong})
    assert response.status_code == status
    assert message in response.text


def test_a_failure_keeps_nothing(service: Service) -> None:
    before = service.get("/users/1")
    # uvicorn cuts the connection of a request that raised; the next one should not meet it half closed.
    response = service.http.get("/fail", headers={"connection": "close"})
    assert response.status_code == 500
    event = service.logged(response.headers["x-request-id"])[-1]
    assert (event["status"], event["outcome"], event["route"]) == (500, "error", "/fail")
    assert event["statements"] == 2
    assert service.get("/users?size=1")["items"] == [before]


# Everything else


def test_countries(service: Service) -> None:
    countries = service.get("/reports/countries")
    assert sum(country["users"] for country in countries) == 500
    assert sum(country["active"] for country in countries) == service.get("/users?active=true")["total"]


def test_log_lines_carry_the_id_of_the_response(service: Service) -> None:
    response = service.http.get("/log?till=south")
    *lines, event = service.logged(response.headers["x-request-id"])
    assert [line["message"] for line in lines] == response.json()["lines"]
    assert [line["severity"] for line in lines] == ["INFO", "WARNING", "ERROR"]
    assert {line["till"] for line in (*lines, event)} == {"south"}
    assert (event["method"], event["path"], event["status"]) == ("GET", "/log", 200)


def test_health(service: Service) -> None:
    assert service.http.get("/ready").status_code == 200


def test_documentation(service: Service) -> None:
    assert service.http.get("/docs").status_code == 200
    parameters = service.get("/openapi.json")["paths"]["/feed"]["get"]["parameters"]
    assert {parameter["name"] for parameter in parameters} == {"cursor", "size"}


def test_the_page_is_for_the_address_it_was_asked_at(service: Service) -> None:
    page = service.http.get("/", headers={"host": "shop.example:81"})
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "'http://shop.example:81/users/42'" in unescape(page.text)
    assert "{{" not in page.text
    assert "<script>" not in service.http.get("/", headers={"host": "<script>"}).text


def test_every_command_of_the_page_works(service: Service, tmp_path: Path) -> None:
    # The page tells a story that begins with nothing cached.
    service.http.post("/products/prices", json={"category": "books", "percent": 0}).raise_for_status()
    service.http.patch("/users/42", json={"name": "Unknown"}).raise_for_status()
    service.get("/users/1")
    before = seen(service, 42)
    service.http.patch("/users/42", json={"name": "Known"}).raise_for_status()

    commands = re.findall(r'<pre(?: data-status="(\d+)")?><code>(.*?)</code>', service.http.get("/").text, re.DOTALL)
    assert len(commands) > 15
    marks: list[tuple[str, str]] = []
    for status, command in commands:
        answer = run(unescape(command), tmp_path)
        found = re.match(r"HTTP/1.1 (\d+)", answer)
        assert found, (command, answer)
        assert re.fullmatch(status or r"2\d\d", found[1]), (command, answer)
        headers = dict(re.findall(r"^([\w-]+): (.*)$", answer, re.MULTILINE))
        event = service.logged(headers["x-request-id"])[-1]
        if "x-cache" in headers:
            marks.append((event["path"], headers["x-cache"]))
    until(lambda: seen(service, 42) != before)
    assert marks == [
        ("/products/top", "miss"),
        ("/products/top", "hit"),
        ("/products/top", "miss"),
        ("/users/42", "miss"),
        ("/users/42", "miss"),
        # The other one has changed.
        ("/users/1", "hit"),
    ]


def run(command: str, directory: Path) -> str:
    path = os.environ["PATH"]
    if shutil.which("curl") is None:
        curl = directory / "curl"
        curl.write_text(_CURL.format(python=sys.executable))
        curl.chmod(0o755)
        path = f"{directory}:{path}"
    done = subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=30, env={**os.environ, "PATH": path}
    )
    assert done.returncode == 0, (command, done.stderr)
    return done.stdout
