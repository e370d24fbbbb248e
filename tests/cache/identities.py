"""Apps and requests, made up: who is asking is found out in any way FastAPI has, by clients that try anything.

What is right is what the same app answers that caches nothing. A body says for whom it was made.
"""

from __future__ import annotations

import asyncio
import base64
import gzip
import inspect
from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from itertools import count
from typing import Any
from urllib.parse import quote, unquote, urlencode

from fastapi import APIRouter, Cookie, Depends, FastAPI, Header, HTTPException, Query, Request, Security
from fastapi.security import (
    APIKeyCookie,
    APIKeyHeader,
    APIKeyQuery,
    HTTPBasic,
    HTTPBearer,
    OAuth2PasswordBearer,
    OpenIdConnect,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from sqlalchemy import insert, select
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.responses import PlainTextResponse
from support import Item, tables

from overdrive import CursorPage, Overdrive, SessionDep, cached, declare, paginate
from overdrive.cache.conditional import names_tag, strong_tag
from overdrive.config import CacheSettings, Settings
from overdrive.context import current

PEOPLE = ("alice", "bob", "None", "1")
TENANTS = ("a", "b", "")
HOSTS = ("a.test", "b.test", "A.test", "a.test:80")

#: Each comes twice, under two tokens.
TOKENS = {f"{person}{suffix}": person for person in PEOPLE for suffix in ("", "-2")}


def person_of(token: str | None) -> str | None:
    if token is None:
        return None
    if token not in TOKENS:
        raise HTTPException(401)
    return TOKENS[token]


# What is made up


@dataclass(frozen=True)
class Route:
    source: str
    placed: str
    kind: str
    at: str
    inputs: str
    strict: bool
    public: bool
    plain: bool
    by_token: bool


@dataclass(frozen=True)
class World:
    routes: tuple[Route, ...]
    tenant: str | None
    middlewares: tuple[str, ...]
    mounted_guard: bool


@dataclass(frozen=True)
class Ask:
    """A request; `known` is the number of an earlier answer whose entity tag it has, or "*"."""

    route: int
    method: str
    item: str
    tokens: tuple[tuple[str, str], ...]
    query: tuple[tuple[str, str], ...]
    headers: tuple[tuple[str, str], ...]
    host: str | None
    known: int | str | None
    overridden: bool
    app: int


SOURCES = (
    "none", "bearer", "basic", "key-header", "key-query", "key-cookie", "oauth2", "oidc",
    "header", "cookie", "model", "request", "undeclared", "state", "ignored",
)  # fmt: skip
CARRIERS = ("bearer", "basic", "raw", "x-key", "key", "session", "x-user", "x_user", "user")

tokens = st.sampled_from([*TOKENS, *TOKENS, "mallory", "", "ALICE", "alice ", "älice"])
words = st.sampled_from(["", "x", "X", "a,b", "a&b=1", "é", "1", "null"])

MIDDLEWARES = ("gzip", "cors", "state", "base", "path", "host")

routes = st.builds(
    Route,
    source=st.sampled_from(["none"] * 3 + [*SOURCES]),
    placed=st.sampled_from(["parameter", "nested", "class", "yield", "afresh", "router"]),
    kind=st.sampled_from(["value", "value", "value", "page", "memoized"]),
    at=st.sampled_from(["app", "router", "mount"]),
    inputs=st.sampled_from(["none", "query", "all", "all"]),
    strict=st.booleans(),
    public=st.sampled_from([False, False, True]),
    plain=st.sampled_from([False, False, True]),
    by_token=st.booleans(),
)
worlds = st.builds(
    World,
    routes=st.lists(routes, min_size=1, max_size=2).map(tuple),
    tenant=st.sampled_from([None, None, "header", "host", "state"]),
    middlewares=st.one_of(
        st.just(()),
        st.lists(st.sampled_from(["gzip", "cors", "state", "base", "path", "host"]), unique=True, max_size=3).map(
            tuple
        ),
    ),
    mounted_guard=st.booleans(),
)


def _everywhere(token: str) -> tuple[tuple[str, str], ...]:
    """In the address too."""
    return tuple((carrier, token) for carrier in CARRIERS)


def _beside(token: str) -> tuple[tuple[str, str], ...]:
    """So that two people ask for the same address."""
    return tuple((carrier, token) for carrier in CARRIERS if carrier != "key")


def _only(carrier: str, token: str) -> tuple[tuple[str, str], ...]:
    return ((carrier, token),)


def _later(token: str) -> tuple[tuple[str, str], ...]:
    """Basic credentials first, and no bearer's."""
    return tuple((carrier, token) for carrier in CARRIERS[1:] if carrier != "key")


carried = st.one_of(
    st.builds(_everywhere, tokens),
    st.builds(_beside, tokens),
    st.builds(_beside, tokens),
    st.builds(_beside, tokens),
    st.builds(_later, tokens),
    st.builds(_only, st.sampled_from(CARRIERS), tokens),
    st.lists(st.tuples(st.sampled_from(CARRIERS), tokens), max_size=4).map(tuple),
)
items = st.sampled_from(["1", "1", "me", "me", "a%2Fb", "a/b", "1/", "%C3%A9", "é"])
hosts = st.sampled_from(["a.test", *HOSTS, None])
queries = st.lists(st.tuples(st.sampled_from(["q", "q", "tags", "other", "key"]), words), max_size=2).map(tuple)
sent = st.one_of(
    st.tuples(st.just("x-lang"), words),
    st.tuples(st.just("x_lang"), words),
    st.tuples(st.just("cookie"), words.map(lambda word: f"theme={word}")),
    st.tuples(st.just("x-tenant"), st.sampled_from(TENANTS)),
    st.tuples(st.just("x-forwarded-host"), st.sampled_from(HOSTS)),
    st.tuples(st.sampled_from(["x-forwarded-for", "forwarded", "x-refused", "x-other"]), words),
)
known_tags = st.one_of(st.none(), st.none(), st.integers(0, 20), st.just("*"))


@st.composite
def _others(draw: st.DrawFn, ask: Ask) -> Ask:
    """Ask for the same with one thing else: only so is it seen that this thing makes the difference."""
    changed = draw(st.sampled_from(["tokens", "tokens", "headers", "headers", "host", "query", "item", "method"]))
    if changed == "headers":
        name, value = draw(sent)
        kept = [each for each in ask.headers if each[0] != name or draw(st.booleans())]
        return replace(ask, headers=tuple(draw(st.permutations([(name, value), *kept]))))
    values: dict[str, st.SearchStrategy[Any]] = {
        "tokens": carried,
        "host": hosts,
        "query": queries,
        "item": items,
        "method": st.just("HEAD"),
    }
    return replace(ask, **{changed: draw(values[changed])})


@st.composite
def stories(draw: st.DrawFn) -> tuple[World, list[list[Ask]]]:
    """A world, and what is asked in it: those of one step ask at the same time.

    Several ask for almost the same, and once more, as nothing else is a hit.
    """
    world = draw(worlds)
    steps: list[list[Ask]] = []
    for route in range(len(world.routes)):
        known = st.lists(st.sampled_from([*TOKENS]), min_size=2, max_size=2, unique_by=TOKENS.__getitem__)
        two = [_beside(token) for token in draw(known)] if draw(st.booleans()) else [draw(carried), draw(carried)]
        tenants, values = draw(st.permutations(TENANTS)), draw(st.permutations(["x", "X", "é"]))
        headers = draw(st.lists(sent, max_size=2))
        said = [
            (("x-tenant", tenant), ("x-lang", value), ("cookie", f"theme={value}"), *headers)
            for tenant, value in zip(tenants, values, strict=True)
        ]
        item = "me" if "path" in world.middlewares and draw(st.booleans()) else draw(items)
        query, host = draw(queries), draw(hosts)
        ask = Ask(route, "GET", item, two[0], query, said[0], host, known=None, overridden=False, app=0)
        others = [
            replace(ask, tokens=two[1]),
            replace(ask, headers=said[1]),
            replace(ask, headers=(said[0][0], *said[1][1:])),
            *draw(st.lists(_others(ask), min_size=1, max_size=2)),
        ]
        steps += [[ask, replace(ask, app=1)], [*others, others[0]]]
        if draw(st.integers(0, 5)) == 0:
            steps.append([replace(each, overridden=True) for each in (ask, *others)])
        steps.append([replace(each, known=draw(known_tags), app=draw(st.integers(0, 1))) for each in (*others, ask)])
    return world, steps


# The app of a world


class Headers(BaseModel):
    x_user: str | None = None


def _source(route: Route) -> Any:
    """Return a dependency that gives the token of whoever is asking."""
    schemes: dict[str, Callable[[], Any]] = {
        "bearer": lambda: HTTPBearer(auto_error=route.strict),
        "basic": lambda: HTTPBasic(auto_error=route.strict),
        "key-header": lambda: APIKeyHeader(name="X-Key", auto_error=route.strict),
        "key-query": lambda: APIKeyQuery(name="key", auto_error=route.strict),
        "key-cookie": lambda: APIKeyCookie(name="session", auto_error=route.strict),
        "oauth2": lambda: OAuth2PasswordBearer("token", auto_error=route.strict),
        "oidc": lambda: OpenIdConnect(openIdConnectUrl="/oidc", auto_error=route.strict),
    }
    if route.source in schemes:
        given = Security(schemes[route.source]())

        async def by_scheme(credential: Any = given) -> str | None:
            found = getattr(credential, "credentials", None) or getattr(credential, "username", None) or credential
            return found.removeprefix("Bearer ") if isinstance(found, str) else None

        return by_scheme

    async def by_header(x_user: str | None = Header(None)) -> str | None:
        return x_user

    async def by_cookie(user: str | None = Cookie(None)) -> str | None:
        return user

    sent = Header()

    async def by_model(headers: Headers = sent) -> str | None:
        return headers.x_user

    async def by_request(request: Request) -> str | None:
        return request.headers.get("x-user")

    async def by_state(request: Request) -> str | None:
        return getattr(request.state, "user", None)

    async def by_nothing() -> str | None:
        return None

    return {
        "header": by_header,
        "cookie": by_cookie,
        "model": by_model,
        "request": by_request,
        "undeclared": by_request,
        "state": by_state,
    }.get(route.source, by_nothing)


#: Of a dependency whose value no parameter takes.
_who: ContextVar[str | None] = ContextVar("who", default=None)


def _asking(route: Route) -> Any:
    """Return a dependency that gives who is asking, in the way the route has it."""
    token_of = Depends(_source(route), use_cache=route.placed != "afresh")

    async def who(token: Any = token_of) -> Any:
        if token is None and route.strict and route.source not in ("none", "ignored"):
            raise HTTPException(401)
        found = person_of(token)
        _who.set(found)
        return found

    if route.placed == "yield":

        async def yielded(found: Any = Depends(who)) -> AsyncIterator[Any]:  # noqa: B008
            yield found

        result: Any = yielded
    elif route.placed == "nested":

        async def nested(found: Any = Depends(who)) -> Any:  # noqa: B008
            return found

        result = nested
    else:
        result = who
    if route.source in ("request", "state"):
        # By token or by person: each is who is asking.
        said = {"1": 1, "None": "None"}
        declared = token_of.dependency if route.by_token else result
        declare(declared, principal=lambda found: said.get(found, found))
    return result


class Person:
    def __init__(self, name: Any) -> None:
        self.name = name


def _of_class(dependency: Any) -> Any:
    given = Depends(dependency)

    class Asking(Person):
        def __init__(self, name: Any = given) -> None:
            super().__init__(name)

    return Asking


async def _overriding(x_other: str | None = Header(None), q: str = "") -> str:
    return f"overridden {x_other} {q}"


async def _guard(request: Request) -> None:
    if "x-refused" in request.headers:
        raise HTTPException(403)


declare(_guard, ignore=True)


def _endpoint(number: int, route: Route, asking: Any, overdrive: Overdrive) -> Any:
    given = Depends(_of_class(asking) if route.placed == "class" else asking)

    def name_of(asked: Any) -> Any:
        if route.public or route.source == "none":
            return None
        if route.placed == "router":
            return _who.get()
        return asked.name if isinstance(asked, Person) else asked

    def body(asked: Any, *inputs: Any) -> list[Any]:
        context = current()
        assert context is not None
        return [number, name_of(asked), context.tenant, *inputs]

    @overdrive.cache.memoize()
    async def remembered(route_number: int, name: Any, item: str) -> list[Any]:
        context = current()
        assert context is not None
        await asyncio.sleep(0)
        return [route_number, name, context.tenant, item]

    if route.kind == "memoized":

        async def memoized(item: str, who: Any = given) -> list[Any]:
            return await remembered(number, name_of(who), item)

        return memoized
    if route.kind == "page":

        async def page(item: str, db: SessionDep, who: Any = given) -> Any:
            _number, name, tenant = body(who)
            return await paginate(
                db, select(Item.name).where(Item.name.startswith(f"{name}@{tenant}")).order_by(Item.id)
            )

        return page
    if route.inputs == "none":

        async def alone(item: str, who: Any = given) -> list[Any]:
            await asyncio.sleep(0)
            return body(who, item)

        return alone
    if route.plain:

        def plain(item: str, who: Any = given, q: str = "") -> list[Any]:
            # What a thread knows of its request's context variables is a copy.
            return body(who, item, q)

        return plain
    if route.inputs == "query":

        async def queried(item: str, who: Any = given, q: str = "", tags: list[str] = Query([])) -> list[Any]:  # noqa: B008
            await asyncio.sleep(0)
            return body(who, item, q, tags)

        return queried

    async def everything(
        item: str,
        who: Any = given,
        q: str = Query("", alias="q"),
        x_lang: str = Header(""),
        theme: str = Cookie(""),
    ) -> list[Any]:
        await asyncio.sleep(0)
        return body(who, item, q, x_lang, theme)

    return everything


def _header(scope: Any, name: bytes) -> str | None:
    return next((value.decode("latin-1") for each, value in scope["headers"] if each == name), None)


class StateUser:
    """Authenticates as pure ASGI middlewares do."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope.setdefault("state", {})["user"] = _header(scope, b"x-user")
            scope["state"]["tenant"] = _header(scope, b"x-tenant")
        await self.app(scope, receive, send)


class PathUser:
    """Makes of `me` whoever is asking."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/me"):
            user = _header(scope, b"x-user") or "nobody"
            scope = {**scope, "path": f"{scope['path'].removesuffix('me')}{user}"}
        await self.app(scope, receive, send)


class ForwardedHost:
    """Believes what a proxy says of the host."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (host := _header(scope, b"x-forwarded-host")) is not None:
            kept = [header for header in scope["headers"] if header[0] != b"host"]
            scope = {**scope, "headers": [(b"host", host.encode("latin-1")), *kept]}
        await self.app(scope, receive, send)


class Authenticating(BaseHTTPMiddleware):
    """Refuses whom it does not know, before anything else does."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        token = request.headers.get("x-user")
        if token is not None and token not in TOKENS:
            return PlainTextResponse("no", 401)
        request.state.user = token
        return await call_next(request)


def _tenant(how: str) -> Callable[[Request], str | None]:
    def tenant(request: Request) -> str | None:
        if how == "header":
            return request.headers.get("x-tenant")
        if how == "host":
            return request.headers.get("host")
        return getattr(request.state, "tenant", None)

    return tenant


@dataclass
class Built:
    app: FastAPI
    overdrive: Overdrive
    #: What an override is of.
    asking: list[Any] = field(default_factory=list)


def build(world: World, chosen: Settings, *, caches: bool) -> Built:
    app, inner, router = FastAPI(), FastAPI(), APIRouter()
    kinds: dict[str, tuple[Any, dict[str, Any]]] = {
        "gzip": (GZipMiddleware, {"minimum_size": 1}),
        "cors": (CORSMiddleware, {"allow_origins": ["*"]}),
        "state": (StateUser, {}),
        "base": (Authenticating, {}),
        "path": (PathUser, {}),
        "host": (ForwardedHost, {}),
    }
    for name in world.middlewares:
        kind, options = kinds[name]
        app.add_middleware(kind, **options)
    if world.mounted_guard:
        inner.add_middleware(Authenticating)
    tenant = _tenant(world.tenant) if world.tenant is not None else None
    overdrive = Overdrive(app, settings=chosen, cache=caches, tenant=tenant)
    built = Built(app, overdrive)
    for number, route in enumerate(world.routes):
        asking = _asking(route)
        built.asking.append(asking)
        endpoint = _endpoint(number, route, asking, overdrive)
        if route.placed == "router" or route.public or route.source == "none":
            # Nobody is asked, so that nothing but the address may count.
            taken = inspect.signature(endpoint)
            endpoint.__signature__ = taken.replace(
                parameters=[each for name, each in taken.parameters.items() if name != "who"]
            )
        if route.kind != "memoized":
            cached(scope="public" if route.public else None)(endpoint)
        first: list[Any] = [Depends(_guard)] if route.source == "ignored" else []
        # What is everybody's is so whoever has asked first; the app that caches nothing asks nobody.
        if (route.placed == "router" and not route.public) or (route.public and caches):
            first.append(Depends(asking))
        model = CursorPage[str] if route.kind == "page" else list[Any]
        target: Any = {"app": app, "router": APIRouter(), "mount": inner}[route.at]
        path = f"/r{number}/{{item:path}}"
        if route.at == "router":
            target.get(path, response_model=model)(endpoint)
            router.include_router(target, dependencies=first)
        else:
            target.api_route(path, methods=["GET", "HEAD"], response_model=model, dependencies=first)(endpoint)
    app.include_router(router, prefix="/router")
    app.mount("/mount", inner)
    return built


# Asking


@dataclass
class Answer:
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


def scope_of(ask: Ask, world: World, known: str | None = None) -> dict[str, Any]:
    number = ask.route
    prefix = {"app": "", "router": "/router", "mount": "/mount"}[world.routes[number].at]
    headers: list[tuple[str, str]] = [("host", ask.host)] if ask.host is not None else []
    query = list(ask.query)
    for carrier, token in ask.tokens:
        basic = base64.b64encode(f"{token}:".encode()).decode()
        headers += {
            "bearer": [("authorization", f"Bearer {token}")],
            "basic": [("authorization", f"Basic {basic}")],
            "raw": [("authorization", token)],
            "session": [("cookie", f"session={token}")],
            "user": [("cookie", f"user={token}")],
        }.get(carrier, [(carrier, token)] if carrier != "key" else [])
        query += [("key", token)] if carrier == "key" else []
    headers += ask.headers
    if known is not None:
        headers.append(("if-none-match", known))
    raw_path = quote(f"{prefix}/r{number}/{ask.item}", safe="/%")
    return {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "scheme": "http",
        "method": ask.method, "path": unquote(raw_path), "raw_path": raw_path.encode(),
        "query_string": urlencode(query).encode(), "root_path": "",
        "headers": [(name.encode(), value.encode("utf-8")) for name, value in headers],
        "client": ("127.0.0.1", 1), "server": ("test", 80),
    }  # fmt: skip


async def answer_to(app: FastAPI, scope: dict[str, Any]) -> Answer:
    answer = Answer()

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status = message["status"]
            answer.headers = {name.decode(): value.decode("latin-1") for name, value in message["headers"]}
        elif message["type"] == "http.response.body":
            answer.body += message.get("body", b"")

    await app(scope, receive, send)
    if answer.headers.get("content-encoding") == "gzip" and answer.body:
        answer.body = gzip.decompress(answer.body)
    return answer


def _is_right(answer: Answer, right: Answer, known: str | None) -> bool:
    if answer.status == 304:
        return right.status == 200 and known is not None and names_tag(known.encode(), strong_tag(right.body))
    return (answer.status, answer.body) == (right.status, right.body)


def _override(built: Built, overridden: bool) -> None:
    built.app.dependency_overrides = dict.fromkeys(built.asking, _overriding) if overridden else {}


@dataclass
class Tally:
    """How often what was tried: a search that finds no hits proves nothing."""

    answers: int = 0
    hits: int = 0
    collapsed: int = 0
    not_modified: int = 0
    refused: int = 0
    people: int = 0

    def add(self, answer: Answer) -> None:
        self.answers += 1
        self.hits += answer.headers.get("x-cache") == "hit"
        self.collapsed += "collapsed" in answer.headers.get("cache-status", "")
        self.not_modified += answer.status == 304
        self.refused += answer.status in (401, 403)
        self.people += any(f'"{person}"'.encode() in answer.body for person in PEOPLE)


async def _tell(world: World, steps: list[list[Ask]], chosen: list[Settings], tally: Tally) -> None:
    apps = [build(world, each, caches=True) for each in chosen]
    sample = build(world, chosen[0], caches=False)
    tags: list[str] = []
    try:
        for step in steps:
            for each in (*apps, sample):
                _override(each, step[0].overridden)
            known = [tags[ask.known % len(tags)] if isinstance(ask.known, int) and tags else ask.known for ask in step]
            given = [each if isinstance(each, str) else None for each in known]
            answers = await asyncio.gather(
                *(
                    answer_to(apps[ask.app % len(apps)].app, scope_of(ask, world, tag))
                    for ask, tag in zip(step, given, strict=True)
                )
            )
            for ask, tag, answer in zip(step, given, answers, strict=True):
                right = await answer_to(sample.app, scope_of(ask, world))
                if world.routes[ask.route].public and answer.status in (401, 403):
                    # Asked before there was anything to answer with.
                    pass
                elif ask.method == "HEAD" and answer.status == 405:
                    # What asks somebody it has not declared is not cached; the sample asks nobody, and is.
                    assert "x-cache" not in answer.headers
                elif ask.method == "HEAD" and answer.status != 304:
                    assert answer.status == right.status, f"{world}\n{ask}\n{answer}\n{right}"
                elif ask.method == "HEAD":
                    right = await answer_to(sample.app, scope_of(replace(ask, method="GET"), world))
                    assert _is_right(answer, right, tag), f"{world}\n{ask}\n{answer}\n{right}"
                else:
                    assert _is_right(answer, right, tag), f"{world}\n{ask}\n{tag}\n{answer}\n{right}"
                tags += [answer.headers["etag"]] if "etag" in answer.headers else []
                tally.add(answer)
    finally:
        for each in (*apps, sample):
            await each.overdrive.aclose()


_numbers = count()


def search(url: str, redis_url: str | None, examples: int) -> Tally:
    """Tell that many stories to an app with a store of its own, or to two that share one, and say what was tried.

    url: a database. Raises `AssertionError` where somebody gets another's answer.
    """
    tally = Tally()

    # A story's error says all of it, and one that is not true every time is not made shorter in any time.
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(stories())
    def check(story: tuple[World, list[list[Ask]]]) -> None:
        # Apps of different stories have routes of the same names.
        own = CacheSettings(prefix=f"story{next(_numbers)}", enabled=True)
        shared = Settings(database_url=url, redis_url=redis_url, cache=own)
        asyncio.run(_tell(*story, [shared] if redis_url is None else [shared, shared], tally))

    with tables(url) as database:
        with database.begin() as connection:
            names = [f"{name}@{tenant}" for name in PEOPLE for tenant in (*TENANTS, "None", *HOSTS)]
            connection.execute(insert(Item), [{"name": name} for name in names])
        check()
    return tally
