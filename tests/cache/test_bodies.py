"""POST routes that only ask for something, cached by their bodies."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from cache.service import Service, serve
from fastapi import Body, Cookie, FastAPI, Form, UploadFile
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import insert, select
from support import Item, client, eventually

from overdrive import ConfigurationError, Overdrive, SessionDep, cached
from overdrive.cache.key import canonical_json
from overdrive.testing import Clock

pytestmark = pytest.mark.anyio

JSON = "application/json"


class Query(BaseModel):
    text: str = ""
    size: int = 10
    others: dict[str, Any] = {}


def add_search(service: Service, **options: Any) -> list[Query]:
    asked: list[Query] = []

    @service.app.post("/search")
    @cached(**{"body": True, **options})
    async def search(query: Query, db: SessionDep, page: int = 1) -> list[Any]:
        asked.append(query)
        return [query.text, page, *await db.scalars(select(Item.name).where(Item.name != "x"))]

    return asked


async def post(service: Service, content: str | bytes, path: str = "/search", **headers: str) -> Any:
    return await service.http.post(path, content=content, headers={"content-type": JSON, **headers})


async def mark(service: Service, content: str | bytes, path: str = "/search", **headers: str) -> str | None:
    return (await post(service, content, path, **headers)).headers.get("x-cache")  # type: ignore[no-any-return]


async def test_a_body_is_part_of_the_key(service: Service) -> None:
    asked = add_search(service)
    assert (await post(service, '{"text": "a", "size": 1}')).json() == ["a", 1, "first"]
    # Neither white space nor the order of members says anything else.
    same = await post(service, '{"size":1,\n"text":"\\u0061"}')
    assert (same.headers["x-cache"], same.json()) == ("hit", ["a", 1, "first"])
    for other in ('{"text": "b", "size": 1}', '{"text": "a"}', '{"text": "a", "size": 1, "x": null}', "{}"):
        assert await mark(service, other) == "miss"
    assert await mark(service, '{"text": "a", "size": 1}', "/search?page=2") == "miss"
    assert len(asked) == 6


async def test_a_write_drops_it(service: Service) -> None:
    add_search(service)

    async def add(db: Any) -> None:
        await db.execute(insert(Item).values(name="new"))

    assert [await mark(service, "{}") for _ in range(2)] == ["miss", "hit"]
    assert await service.write(add) == 200
    assert (await post(service, "{}")).json() == ["", 1, "first", "new"]


async def test_one_that_writes_is_not_stored(service: Service) -> None:
    @service.app.post("/add")
    @cached(body=True)
    async def add(query: Query, db: SessionDep) -> int:
        await db.execute(insert(Item).values(name=query.text))
        return len(list(await db.scalars(select(Item.id))))

    answers = [await post(service, '{"text": "a"}', "/add") for _ in range(2)]
    assert [each.json() for each in answers] == [2, 3]
    assert all("detail=wrote" in each.headers["cache-status"] for each in answers)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        ("{", 422),
        ("", 422),
        ("[]", 422),
        (b"\xff", 400),
        ('{"text": "a", "text": "b"}', 200),
        ('{"others": {"a": {"b": 1, "b": 2}}}', 200),
        ('{"others": {"a": NaN}}', 200),
        ('{"others": {"a": 1e999999999999999999999}}', 200),
    ],
)
async def test_what_cannot_be_told_apart_is_not_cached(service: Service, content: str, status: int) -> None:
    add_search(service)
    for _ in range(2):
        answer = await post(service, content)
        assert answer.status_code == status
        assert answer.headers.get("x-cache") in {None, "bypass"} or content == "[]"


@pytest.mark.parametrize("content", ["[" * 30_000 + "]" * 30_000, '{"size": %s}' % ("9" * 5_000)], ids=["deep", "long"])
async def test_what_python_cannot_read_is_fastapis(service: Service, content: str) -> None:
    add_search(service)
    answer = await post(service, content)
    assert answer.status_code in (400, 422)


async def test_bodies_are_bounded(service: Service) -> None:
    add_search(service)
    long = json.dumps({"text": "x" * 70_000})
    for _ in range(2):
        answer = await post(service, long)
        assert (answer.status_code, answer.headers["cache-status"]) == (200, "overdrive; fwd=bypass; detail=body")


async def test_the_content_type_counts(service: Service) -> None:
    add_search(service)
    assert await mark(service, "{}") == "miss"
    assert await mark(service, "{}", **{"content-type": "application/vnd.x+json"}) == "miss"
    assert await mark(service, "{}", **{"content-type": "application/vnd.x+json"}) == "hit"
    answer = await post(service, "{}", **{"content-type": "text/plain"})
    assert answer.status_code == 422


async def test_a_post_has_no_304(service: Service) -> None:
    add_search(service)
    etag = (await post(service, "{}")).headers["etag"]
    for content in ("{}", '{"text": "c"}'):
        answer = await post(service, content, **{"If-None-Match": f"*, {etag}"})
        assert answer.status_code == 200


async def test_an_expired_one_is_made_anew_with_its_body(service: Service) -> None:
    asked = add_search(service, ttl=10, stale_while_revalidate=30)
    clock = service.overdrive.cache.clock = Clock()
    await post(service, '{"text": "a"}')
    clock.tick(11)
    assert (await post(service, '{"text": "a"}')).headers["cache-status"] == "overdrive; hit; ttl=-1; detail=stale"
    await eventually(lambda: not service.overdrive.cache.refreshes._tasks)
    assert [each.text for each in asked] == ["a", "a"]
    assert (await post(service, '{"text": "a"}')).headers["cache-status"] == "overdrive; hit; ttl=10"


async def test_a_get_of_the_same_address_is_another(service: Service) -> None:
    add_search(service)

    @service.app.get("/search")
    @cached
    async def by_get() -> list[Any]:
        return ["get"]

    assert (await service.get("/search")).json() == ["get"]
    assert (await post(service, "{}")).json() == ["", 1, "first"]
    again = await service.get("/search")
    assert (again.headers["x-cache"], again.json()) == ("hit", ["get"])


async def test_a_search_without_a_session_is_not_found_by_its_address(service: Service) -> None:
    @service.app.post("/echo")
    @cached(body=True)
    async def echo(query: Query) -> str:
        return query.text

    for text in ("a", "b", "a"):
        assert (await post(service, json.dumps({"text": text}), "/echo")).json() == text
    assert (await service.get("/echo")).status_code == 405
    assert (await service.http.head("/echo")).status_code == 405


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("undeclared", "say so by @cached(body=True)"),
        ("form", "reads a form or files"),
        ("file", "reads a form or files"),
        ("get", "leave it out"),
        ("put", "only GET is, and POST by @cached(body=True)"),
        ("get with a body", "only a POST is cached by it"),
    ],
)
async def test_start_up_says_why_a_route_is_not_cached(
    sqlite_url: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, kind: str, said: str
) -> None:
    # Nothing is parsed here.
    monkeypatch.setattr("fastapi.dependencies.utils.ensure_multipart_is_installed", lambda: None)
    app = FastAPI()
    overdrive = Overdrive(app, database_url=sqlite_url, cache=True)

    async def by_model(query: dict[str, str] = Body()) -> int:  # noqa: B008
        return 1

    async def by_form(text: str = Form()) -> int:
        return 1

    async def by_file(text: UploadFile) -> int:
        return 1

    async def plain() -> int:
        return 1

    match kind:
        case "undeclared":
            app.post("/a")(cached(by_model))
        case "form":
            app.post("/a")(cached(body=True)(by_form))
        case "file":
            app.post("/a")(cached(body=True)(by_file))
        case "get":
            app.get("/a")(cached(body=True)(plain))
        case "put":
            app.put("/a")(cached(plain))
        case _:
            app.get("/a")(cached(by_model))
    async with client(app) as http:
        await http.get("/")
    [record] = [each for each in caplog.records if each.levelno == logging.WARNING]
    assert "/a is marked @cached but is not cached: " in record.getMessage()
    assert said in record.getMessage()
    await overdrive.aclose()


def test_body_is_yes_or_no() -> None:
    with pytest.raises(ConfigurationError, match=r"body=\.\.\."):
        cached(body="json")  # type: ignore[call-overload]


# The canonical form

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


def reordered(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: reordered(each) for name, each in reversed(value.items())}
    return [reordered(each) for each in value] if isinstance(value, list) else value


@given(values)
def test_order_and_form_do_not_matter(value: Any) -> None:
    text = canonical_json(JSON, json.dumps(value).encode())
    assert text is not None
    assert canonical_json(f"{JSON}; charset=utf-8", json.dumps(reordered(value), indent=1).encode()) == text


@given(values, values)
def test_other_values_have_other_texts(one: Any, other: Any) -> None:
    texts = [json.dumps(each, sort_keys=True) for each in (one, other)]
    assert (texts[0] == texts[1]) == (len({canonical_json(JSON, each.encode()) for each in texts}) == 1)


@pytest.mark.parametrize(("one", "other"), [("1", "true"), ("1", "1.0"), ('"1"', "1"), ("0.1", '"0.1"'), ("[]", "{}")])
def test_what_is_alike_in_python_is_not_the_same(one: str, other: str) -> None:
    assert canonical_json(JSON, one.encode()) != canonical_json(JSON, other.encode())


@given(st.binary(max_size=40))
def test_no_body_raises(body: bytes) -> None:
    canonical_json(JSON, body)


def test_too_deep_a_body_is_none() -> None:
    assert canonical_json(JSON, b"[" * 100_000 + b"]" * 100_000) is None


@pytest.mark.parametrize("content_type", ["", "text/json", "application/jsonx", "json", "multipart/form-data"])
def test_other_content_is_none(content_type: str) -> None:
    assert canonical_json(content_type, b"{}") is None


async def test_private_searches_are_kept_apart(sqlite_url: str) -> None:
    async with serve(sqlite_url) as service:

        @service.app.post("/mine")
        @cached(body=True)
        async def mine(query: Query, session: str = Cookie()) -> str:
            return session

        for who in ("alice", "bob", "alice"):
            answer = await post(service, "{}", "/mine", cookie=f"session={who}")
            assert answer.json() == who
        assert answer.headers["x-cache"] == "hit"
        assert answer.headers["cache-control"] == "private, no-cache"
