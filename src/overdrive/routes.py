"""The routes of an app as FastAPI serves them, and the one place that touches its less documented names.

Used are: `iter_route_contexts` (every route as it is served, included and mounted ones too), the `dependant` of a
route (its parameters and dependencies) with `get_parameterless_sub_dependant` (to add one), and `dependant.call` (to
answer instead of the endpoint). Each use has a check that is run before it is relied on: where FastAPI has changed,
that part is switched off with one ERROR, and the app serves on without it. So those names are not imported: a missing
one is found by its check.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter, Depends, FastAPI, routing
from fastapi import __version__ as fastapi_version
from fastapi.dependencies import utils
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute, APIWebSocketRoute
from starlette.routing import Mount

from .config import PaginationSettings
from .pages import page_dependency
from .pagination.page import BasePage, CursorParams, LimitOffsetParams, Page, PageParams, Style

logger = logging.getLogger("overdrive")


@dataclass(frozen=True, slots=True)
class Site:
    """One route as it is served.

    app: the FastAPI app it belongs to, which a mount may have put inside another.
    route: FastAPI's context of the route, with the prefixes and dependencies of its inclusion.
    template: its whole path, mounts included.
    by_address: whether nothing but its address brings a request here, and nothing of the team's stands before the
        route but what stands before the outermost app's router.
    """

    app: FastAPI
    route: Any
    template: str
    by_address: bool

    @property
    def name(self) -> str:
        """Name the route for a message."""
        return f"{'/'.join(sorted(self.route.methods or ('WEBSOCKET',)))} {self.template}"

    @property
    def endpoint(self) -> Callable[..., Any]:
        """Return the function as the team wrote it."""
        endpoint: Callable[..., Any] = inspect.unwrap(self.route.endpoint)
        return endpoint

    def graph(self) -> Iterator[Any]:
        """Walk the endpoint's dependant and those of all its dependencies."""
        yield self.route.dependant
        yield from self.dependencies()

    def dependencies(self) -> Iterator[Any]:
        """Walk the dependants of all the endpoint's dependencies."""
        pending = [*self.route.dependant.dependencies]
        while pending:
            dependant = pending.pop()
            yield dependant
            pending += dependant.dependencies

    def resolved(self, call: Any) -> Any:
        """Return what the app runs for a dependency, which may be overridden."""
        return self.app.dependency_overrides.get(call, call)


def sites(app: FastAPI, prefix: str = "", by_address: bool = True) -> Iterator[Site]:
    """Walk every route of an app: direct, included, of any `route_class`, and those of mounted FastAPI apps, but for
    apps with an Overdrive of their own.

    prefix, by_address: what a mount says of all of them.
    """
    by_address = by_address and all(map(_is_frameworks, _routers(app.router)))
    for route in routing.iter_route_contexts(app.routes):
        served = route.original_route
        # Whatever comes behind a route is asked only where that one has declined.
        by_address = by_address and _is_frameworks(type(served).matches)
        plain = by_address and _is_frameworks(served)
        if isinstance(served, Mount):
            if isinstance(served.app, FastAPI) and not _is_served(served.app):
                yield from sites(served.app, prefix + (route.path or ""), plain and _is_bare(served.app))
        elif isinstance(served, APIRoute | APIWebSocketRoute):
            yield Site(app, route, prefix + (route.path_format or route.path or ""), plain)


def _is_served(app: FastAPI) -> bool:
    """Say whether a mounted app has an Overdrive of its own, which prepares its routes."""
    installation = getattr(app.state, "overdrive_installation", None)
    return installation is not None and installation.runtime is not None


def _routers(router: Any) -> Iterator[Any]:
    yield router
    for route in router.routes:
        if (included := getattr(route, "original_router", None)) is not None:
            yield from _routers(included)


def _is_frameworks(thing: Any) -> bool:
    """Say whether an object is of a class, or a method one, that the team has not changed."""
    module = thing.__module__ if inspect.isfunction(thing) else type(thing).__module__
    return module.partition(".")[0] in ("fastapi", "starlette")


def _is_bare(app: FastAPI) -> bool:
    """Say whether nothing stands between a mounted app and its router."""
    built = getattr(app.build_middleware_stack, "__func__", None)
    return _is_frameworks(app) and built is FastAPI.build_middleware_stack and not app.user_middleware


def is_awaited(endpoint: Callable[..., Any]) -> bool:
    """Say whether FastAPI awaits an endpoint: a function, what a decorator has wrapped, or an object one can call."""
    called = (endpoint, inspect.unwrap(endpoint), getattr(endpoint, "__call__", None))  # noqa: B004
    return any(inspect.iscoroutinefunction(each) for each in called)


def page_model(site: Site) -> type[BasePage[Any]] | None:
    """Return the page a route declares; None where it declares none."""
    # A websocket has none.
    model = getattr(site.route, "response_model", None)
    return model if isinstance(model, type) and issubclass(model, BasePage) else None


def page_style(site: Site) -> Style | None:
    """Return the style of the page a route declares; None where it declares none, or takes the parameters itself."""
    model = page_model(site)
    asks = [d.call for d in site.dependencies()]
    asks += [field.field_info.annotation for d in site.graph() for field in d.query_params]
    taken = any(isinstance(each, type) and issubclass(each, _PARAMS) for each in asks)
    return None if taken or model is None else model.style


def answers_as_usual(site: Site) -> bool:
    """Say whether a route sends what its response model makes of a result, all of it, as JSON, with the status 200."""
    route = site.route
    # A class that was chosen stands there itself.
    return getattr(route.response_class, "value", None) is JSONResponse and (
        route.status_code,
        route.response_model_include,
        route.response_model_exclude,
        route.response_model_by_alias,
        route.response_model_exclude_unset,
        route.response_model_exclude_defaults,
        route.response_model_exclude_none,
    ) == (None, None, None, True, False, False, False)


_PARAMS = (PageParams, LimitOffsetParams, CursorParams)


def document_refusal(site: Site, style: Style) -> None:
    """Document the 400 that a page answers with, unless the route documents its own."""
    code = "invalid_cursor" if style == "cursor" else "page_too_deep"
    schema = {
        "title": "RequestError",
        "type": "object",
        "required": ["detail", "code"],
        "properties": {
            "detail": {"type": "string", "description": "What is wrong, for people."},
            "code": {"type": "string", "description": "What is wrong, for programs.", "examples": [code]},
        },
    }
    description = "The cursor is not one of this list's." if style == "cursor" else "The page lies too deep."
    content = {"application/json": {"schema": schema}}
    site.route.responses.setdefault(400, {"description": description, "content": content})


def add_dependency(site: Site, dependency: Callable[..., Any]) -> None:
    """Have a route resolve `dependency`, after all of its own."""
    site.route.dependant.dependencies.append(
        utils.get_parameterless_sub_dependant(depends=Depends(dependency), path=site.route.path_format)
    )


# Checks: each builds a small app and tries on it what the parts above rely on


@functools.cache
def works(check: Callable[[], None]) -> bool:
    """Try a mechanism once; where FastAPI has changed under it, say so in one ERROR."""
    try:
        check()
    except Exception as error:
        part = (check.__doc__ or "").rstrip(".")
        logger.error(
            "Overdrive is not made for FastAPI %s, and goes without one part: %s. (%r)",
            fastapi_version,
            part,
            error,
        )
        return False
    return True


def specimen() -> tuple[FastAPI, Site]:
    """Return a small app, and one of its routes, to try on it what is relied on."""
    app, router, mounted = FastAPI(), APIRouter(), FastAPI()

    async def endpoint(q: int = 0) -> int:
        return q

    router.add_api_route("/direct/{item}", endpoint)
    app.include_router(router, prefix="/included")
    mounted.add_api_route("/inner", endpoint)
    app.mount("/mounted", mounted)
    found = list(sites(app))
    assert [site.template for site in found] == ["/included/direct/{item}", "/mounted/inner"]
    return app, found[0]


def check_walk() -> None:
    """Page parameters, cached routes and the refusal of misuse: the routes of an app cannot be listed."""
    _app, site = specimen()
    assert [call.name for call in site.route.dependant.query_params] == ["q"]
    assert site.route.endpoint is site.route.dependant.call


def check_added_dependency() -> None:
    """Page parameters and cached routes: a dependency cannot be added to a route."""
    app, site = specimen()
    add_dependency(site, page_dependency(Page, PaginationSettings()))
    document_refusal(site, "page")
    operation = app.openapi()["paths"]["/included/direct/{item}"]["get"]
    assert {"page", "size"} <= {parameter["name"] for parameter in operation["parameters"]}
    assert "400" in operation["responses"]
