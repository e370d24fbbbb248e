"""`overdrive doctor`: what an app's pages lack in its database; `diagnosis` is the rest of it.

Every route that declares a page is called as a client would call it, in this process, while databases refuse writes
and the cache is off. What it sent for its page is explained, and where no index gives the page's order, the index
that does is named. Statements are explained, never run again.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from typing import Any
from urllib.parse import quote, urlencode

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError

from .errors import ConfigurationError
from .installer import Installation, installed_on
from .pagination.index import Index, index_for
from .pool.explain import (
    Sent,
    empty_copy,
    is_served,
    kind_of,
    on_connection,
    read_only,
    sent_pages,
    sort_line,
    waste_line,
)
from .routes import Site, page_model, sites

#: A total from which counting it for every page is worth a note.
_MANY_ROWS = 100_000


# What is found


@dataclass(frozen=True, slots=True)
class Advice:
    """An index that a route lacks.

    order: the ORDER BY of its page.
    plan: the line of EXPLAIN that shows the lack.
    sql: what makes the index.
    proof: what was proven of it, and what was not.
    """

    route: str
    order: str
    plan: str
    sql: str
    proof: str


@dataclass(frozen=True, slots=True)
class Remark:
    """A sentence about a route."""

    route: str
    text: str


@dataclass(slots=True)
class Report:
    """What was found.

    examined: how many routes' pages were explained.
    notes: what no index changes.
    unexamined: routes that could not be examined, and why.
    """

    examined: int = 0
    advice: list[Advice] = field(default_factory=list)
    notes: list[Remark] = field(default_factory=list)
    unexamined: list[Remark] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The exit status: 1 where there is advice, else 2 where a route could not be examined, else 0."""
        return 1 if self.advice else 2 if self.unexamined else 0

    def as_text(self) -> str:
        """Return a block for each finding; nothing where all is well."""
        blocks = [
            f"{each.route}\n  order  {each.order}\n  plan   {each.plan}\n  run    {each.sql};\n  proof  {each.proof}"
            for each in self.advice
        ]
        blocks += [f"{each.route}\n  note   {each.text}" for each in self.notes]
        blocks += [f"{each.route}\n  not examined: {each.text}" for each in self.unexamined]
        return "\n\n".join(blocks)


class _UnexaminedError(Exception):
    """Why a route could not be examined."""


# An app


async def examine(
    app: FastAPI, parameters: Mapping[str, str] | None = None, headers: Mapping[str, str] | None = None
) -> Report:
    """Examine every GET route of `app` that declares a page.

    The app's lifespan runs. Endpoints and dependencies do what they do, but that databases refuse writes.

    parameters: values for parameters of paths, queries, headers and cookies, by their names, on every route that
        has them. Required ones that are not named get their declared example.
    headers: sent with every request.

    Raises `ConfigurationError` where the app does not start, has neither `Overdrive(app)` nor `add_pagination(app)`,
    or no route has one of the parameters.
    """
    installation = installed_on(app)
    report = Report()
    async with read_only(), started(app, installation) as state:
        found = [site for site in sites(app) if "GET" in (site.route.methods or ()) and page_model(site)]
        _refuse_unknown(parameters or {}, found)
        for site in found:
            client = _Client(app, state, headers or {})
            try:
                await _examine_site(site, client, parameters or {}, report)
            except _UnexaminedError as reason:
                report.unexamined.append(Remark(site.name, str(reason)))
            else:
                report.examined += 1
    return report


@asynccontextmanager
async def started(app: FastAPI, installation: Installation) -> AsyncIterator[dict[str, Any]]:
    """Run the app's lifespan, with the cache switched off; the value is the state it has made."""
    stack = AsyncExitStack()
    stack.push_async_callback(installation.shut_down)
    if (runtime := installation.runtime) is not None:
        stack.callback(setattr, runtime.cache, "enabled", runtime.cache.enabled)
        runtime.cache.enabled = False
    try:
        try:
            state = await stack.enter_async_context(app.router.lifespan_context(app))
        except Exception as error:
            raise ConfigurationError(f"the app does not start where databases refuse writes: {told(error)}") from error
        installation.install()
        yield dict(state or {})
    finally:
        # What has been found is of more worth than a farewell that could not be written.
        with suppress(Exception):
            await stack.aclose()


def told(error: BaseException) -> str:
    """Return an exception as one line."""
    lines = str(getattr(error, "orig", None) or error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


# A route


async def _examine_site(site: Site, client: _Client, parameters: Mapping[str, str], report: Report) -> None:
    if any(dependant.background_tasks_param_name for dependant in site.graph()):
        raise _UnexaminedError("it takes BackgroundTasks, which would really run")
    path, query, headers = _address(site, parameters)
    with sent_pages() as pages:
        first = await client.get(path, query, headers)
        if not pages:
            raise _UnexaminedError("its page is not read from a database by paginate()")
        # The statements of a page further on are others.
        if cursor := first.get("next_cursor"):
            await client.get(path, [*query, ("cursor", cursor)], headers)
    try:
        judged = await on_connection(pages[0].engine, lambda connection: _judged(connection, site.name, pages))
    except DBAPIError as error:
        raise _UnexaminedError(f"its statement cannot be explained: {told(error)}") from error
    if isinstance(judged, Advice):
        report.advice.append(judged)
    elif judged is not None:
        report.notes.append(judged)
    total, kind = first.get("total"), first.get("total_kind", "exact")
    if isinstance(total, int) and total > _MANY_ROWS and kind == "exact":
        text = f'every page counts its {total:,} rows; CountedPage with total="capped" and CursorPage do not'
        report.notes.append(Remark(site.name, text))


def _judged(connection: Connection, route: str, pages: Sequence[Sent]) -> Advice | Remark | None:
    """Find the index a page lacks, and prove that it does and what the index changes."""
    dialect = connection.dialect
    index = index_for(pages[0].statement, dialect)
    if index is None:
        return None
    plan = next(filter(None, (sort_line(connection, page) for page in pages)), None)
    if isinstance(index, str):
        return None if plan is None else Remark(route, f"no index serves its order: {index} ({plan})")
    if plan is None and (plan := waste_line(connection, pages[0], index.filters)) is None:
        return None
    kind = kind_of(connection, index.table)
    if kind == "view":
        return Remark(route, f"no index serves its order: {index.table} is a view ({plan})")
    try:
        without, with_index = _tried(connection, pages, index)
    except DBAPIError as error:
        proof = f"derived from the statement; not proven, as that takes an empty copy of its tables: {told(error)}"
    else:
        if with_index <= without:
            # A page further on may be sorted for reasons of its own.
            return None if 0 in without else Remark(route, f"no index serves its order, nor would {index} ({plan})")
        proof = f"on an empty copy of {index.table}, EXPLAIN sorts or filters row by row, but not with this index"
    concurrently = dialect.name == "postgresql" and kind == "table"
    return Advice(route, index.order, plan, index.ddl(dialect, concurrently=concurrently), proof)


def _tried(connection: Connection, pages: Sequence[Sent], index: Index) -> tuple[set[int], set[int]]:
    """Return the numbers of the pages that are read from an index on an empty copy, without `index` and with it."""

    def served() -> set[int]:
        return {number for number, page in enumerate(copied) if is_served(copy, page, index.filters)}

    with empty_copy(connection, pages) as (copy, copied):
        without = served()
        # Not every expression may be in an index.
        with suppress(DBAPIError), copy.begin_nested():
            copy.exec_driver_sql(index.ddl(connection.dialect, use_schema=False))
        return without, served()


# A request


def scope_of(
    method: str, path: str, raw_path: str, query: str, headers: Mapping[str, str], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the scope of a request that is sent into an app in this process."""
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": method,
        # An app that redirects to https would answer nothing else.
        "scheme": "https",
        "path": path,
        "raw_path": raw_path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 1),
        "server": ("localhost", 443),
        "state": dict(state),
    }


class _Client:
    """Sends GET requests to an app in this process.

    state: what its lifespan has made.
    headers: sent with each.
    """

    def __init__(self, app: FastAPI, state: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        self._app = app
        self._state = state
        self._headers = {"host": "localhost", "accept": "application/json", **headers}

    async def get(self, path: str, query: Sequence[tuple[str, str]], headers: Mapping[str, str]) -> Mapping[str, Any]:
        """Return the JSON object of the answer; raises `_UnexaminedError` for every other answer."""
        sent = {**self._headers, **headers}
        scope = scope_of("GET", path, quote(path), urlencode(query), sent, self._state)
        status, body = 0, b""

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            nonlocal status, body
            status = message.get("status", status)
            body += message.get("body", b"")

        try:
            await self._app(scope, receive, send)
        except Exception as error:
            raise _UnexaminedError(told(error)) from error
        if status != 200:
            raise _UnexaminedError(f"HTTP {status}{_HINTS.get(status, '')}")
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise _UnexaminedError("it answers with something else than a page")
        return answer


_HINTS = {
    401: ": say --header 'authorization: ...'",
    403: ": say --header 'authorization: ...'",
    404: ": say --param name=value for something that is there",
    422: ": say --param name=value for what it requires",
}


# What a route requires


@dataclass(frozen=True, slots=True)
class _Input:
    """A parameter of a route; `place` is path, query, header or cookie."""

    place: str
    name: str
    info: FieldInfo


def _inputs(site: Site) -> Iterator[_Input]:
    for dependant in site.graph():
        for place in ("path", "query", "header", "cookie"):
            for parameter in getattr(dependant, f"{place}_params"):
                yield from _fields(place, parameter)


def _fields(place: str, parameter: Any) -> Iterator[_Input]:
    model = parameter.field_info.annotation
    if isinstance(model, type) and issubclass(model, BaseModel):
        for name, info in model.model_fields.items():
            yield _Input(place, _spelled(place, info.alias or name), info)
    else:
        yield _Input(place, _spelled(place, parameter.alias), parameter.field_info)


def _spelled(place: str, name: str) -> str:
    return name.replace("_", "-") if place == "header" else name


def _refuse_unknown(parameters: Mapping[str, str], found: Sequence[Site]) -> None:
    known = {each.name for site in found for each in _inputs(site)}
    if unknown := parameters.keys() - known:
        raise ConfigurationError(
            f"no page has a parameter {' or '.join(sorted(unknown))}; there are {', '.join(sorted(known))}"
        )


def _address(site: Site, parameters: Mapping[str, str]) -> tuple[str, list[tuple[str, str]], dict[str, str]]:
    """Return the path, the query and the headers of the request for a route's first page."""
    path, query, headers, cookies = site.template, [], {}, []
    missing = []
    for each in _inputs(site):
        if each.name in parameters:
            values = [parameters[each.name]]
        elif not each.info.is_required():
            continue
        elif not (values := _example(each.info)):
            missing.append(each.name)
            continue
        match each.place:
            case "path":
                path = path.replace(f"{{{each.name}}}", values[0])
            case "query":
                query += [(each.name, value) for value in values]
            case "header":
                headers[each.name] = values[0]
            case _:
                cookies.append(f"{each.name}={values[0]}")
    if missing:
        raise _UnexaminedError(f"it requires {' and '.join(missing)}: say --param {missing[0]}=...")
    if cookies:
        headers["cookie"] = "; ".join(cookies)
    return path, query, headers


def _example(info: FieldInfo) -> list[str]:
    """Return the first value that is declared as an example, as a client would send it: one each where it is a list."""
    declared = [each["value"] for each in (getattr(info, "openapi_examples", None) or {}).values() if "value" in each]
    for example in [*(info.examples or ()), *declared][:1]:
        values = example if isinstance(example, list | tuple | set) else [example]
        return [str(value.value if isinstance(value, Enum) else value) for value in values]
    return []
