"""What Overdrive adds to an app: its place among the middlewares, page parameters, cached routes; and what it refuses.

Of the app, `build_middleware_stack`, `user_middleware` and `openapi` are touched here; of its routes, see `routes`.
"""

import asyncio
import inspect
import logging
import re
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import parent_process
from types import FunctionType
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIWebSocketRoute
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.errors import ServerErrorMiddleware
from starlette.routing import compile_path

from .admission.gate import Admission
from .cache.cache import Cache
from .cache.key import KeyPlan, Shortcuts
from .cache.trust import Trust, is_known, template_of
from .caching import Known, KnownRequests, cache_route, check_replaced_call, declared_names
from .config import AdmissionSettings, CacheSettings, LogSettings, PaginationSettings
from .context import RequestContext
from .endpoint import CACHED, Mark, RequestSession, SyncRequestSession
from .errors import ConfigurationError, OverloadedError, RequestError
from .middleware import Observer, RequestPath, putting_off
from .pages import PROCESS_KEY, page_dependency
from .pool.attempt import Attempts
from .routes import (
    Site,
    add_dependency,
    answers_as_usual,
    check_added_dependency,
    check_walk,
    document_refusal,
    is_awaited,
    page_model,
    page_style,
    sites,
    works,
)
from .workers import workers

if TYPE_CHECKING:
    from .app import Overdrive
    from .log.logger import BindingLogger

logger = logging.getLogger("overdrive")

#: Seconds between two looks whether anybody has come to stand before FastAPI: what patches it, or its telemetry.
_LOOK_INTERVAL = 1.0


class Served(NamedTuple):
    """A route, as it is found by a request's address and method."""

    template: str
    addresses: re.Pattern[str]
    methods: frozenset[str]
    is_cached: bool
    endpoint: Any


#: Where an expression names what it has found.
_NAMED = re.compile(r"\(\?P<\w+>")


def _finder(served: Sequence[Served]) -> Callable[[str], Served | None]:
    """Return what finds the first of the routes that has an address: one expression for all, as there may be many."""
    every = [f"(?P<_{number}>{_NAMED.sub('(?:', route.addresses.pattern)})" for number, route in enumerate(served)]
    match_of = re.compile("|".join(every)).fullmatch

    def find(path: str) -> Served | None:
        match = match_of(path)
        # The group that was closed last stands around all others.
        return served[int(match.lastgroup[1:])] if match is not None and match.lastgroup is not None else None

    return find


class Installation:
    """Overdrive on one app. Everything is in place before the app's first request is served.

    That is late enough for routes added in a lifespan, and for fastapi-pagination, which changes routes there.
    Whoever asks for the OpenAPI document earlier has the routes prepared that there are by then.
    """

    def __init__(self, app: FastAPI) -> None:
        self.app = app
        self.runtime: Overdrive | None = None
        self.pagination = PaginationSettings()
        self.cursor_keys: tuple[bytes, ...] = (PROCESS_KEY,)
        self.request_id_header = b"x-request-id"
        self.log = LogSettings(events=False)
        #: Seconds that a request has, and the headers that say something to Overdrive itself.
        self.deadline: float | None = None
        self.heeded = frozenset((b"traceparent",))
        self.attempts = Attempts(stop_abandoned=False)
        self.admission = Admission(AdmissionSettings().max_wait)
        #: Says whose data a request is about, where the app has tenants.
        self.tenant: Callable[[Request], str | None] | None = None
        #: What takes the events instead of the logger `overdrive.request`.
        self.events_to: BindingLogger | None = None
        self.is_installed = False
        #: Of requests that were seen before: how their route is cached, and under which key.
        self._shortcuts: KnownRequests = Shortcuts()
        #: By the id of a route's dependant, which is kept here so that no other gets its id.
        self._prepared: dict[int, Any] = {}
        #: By the same: what the responses of a route that is marked are kept by, or why they are not.
        self.plans: dict[int, KeyPlan | str] = {}
        #: The ids of the dependants of cached routes.
        self.cached: set[int] = set()
        #: All routes in their order, and by the id of their endpoint: it need not be hashable.
        self._served: list[Served] = []
        #: By method, what finds the route of a path.
        self._finders: dict[str, Callable[[str], Served | None]] = {}
        self._by_endpoint: dict[int, list[Served]] = {}
        self._build_stack = app.build_middleware_stack
        self._openapi = app.openapi
        app.build_middleware_stack = self._stack  # type: ignore[method-assign]
        app.openapi = self._documented  # type: ignore[method-assign]

    @classmethod
    def of(cls, app: FastAPI) -> "Installation":
        """Return the installation of `app`, made when it is first asked for.

        Raises `ConfigurationError` for an app that already serves.
        """
        if not isinstance(app, FastAPI):
            raise ConfigurationError(
                f"this takes the FastAPI app, not {type(app).__name__}: it finds the app's routers"
            )
        installation = getattr(app.state, "overdrive_installation", None)
        if installation is None:
            _refuse_late(app)
            installation = app.state.overdrive_installation = cls(app)
        return installation

    def serve(self, runtime: "Overdrive") -> None:
        """Make `runtime` the one that serves this app; raises `ConfigurationError` if there is another."""
        if self.runtime is not None:
            raise ConfigurationError("this app has an Overdrive already: keep one, and use it everywhere")
        _refuse_late(self.app)
        self.runtime = runtime
        settings = runtime.settings
        self.pagination = settings.pagination
        if settings.pagination.secrets:
            self.cursor_keys = tuple(each.get_secret_value().encode() for each in settings.pagination.secrets)
        self.request_id_header = settings.log.request_id_header.lower().encode()
        self.log = settings.log
        self.deadline = settings.pool.deadline
        if settings.log.trust_request_id:
            self.heeded |= {self.request_id_header}
        if settings.pool.deadline_header is not None:
            self.heeded |= {settings.pool.deadline_header.lower().encode()}
        self.attempts = Attempts(stop_abandoned=settings.pool.stop_abandoned)
        self.admission, self.tenant = runtime.admission, runtime.tenant
        self.events_to = runtime.events_to

    # Where Overdrive stands

    def _stack(self) -> Any:
        if not any(cast(Any, middleware.cls) is RequestPath for middleware in self.app.user_middleware):
            # The last of the app's middlewares is the innermost.
            self.app.user_middleware.append(Middleware(RequestPath, installation=self))
        _answer_errors(self.app)
        stack = Observer(self._build_stack(), self)
        if self.app.build_middleware_stack == self._stack:
            stand_first(self.app)
            return stack
        # What wraps it from outside, as OpenTelemetry's instrumentation does, looks for Starlette's outermost.
        return ServerErrorMiddleware(stack)

    def layers(self) -> list[str]:
        """Name what a request passes, from the outermost to the router."""
        if self.app.middleware_stack is None:
            self.app.middleware_stack = self.app.build_middleware_stack()
        names: list[str] = []
        layer: Any = self.app.middleware_stack
        while layer is not None:
            names.append(type(layer).__name__)
            layer = getattr(layer, "app", None) if layer is not self.app.router else None
        return names

    def _documented(self) -> dict[str, Any]:
        self._prepare_all()
        return self._openapi()

    # What the middlewares ask

    def begin(self, context: RequestContext) -> None:
        """Note the cache's write clock before anything of the request is read."""
        if (runtime := self.runtime) is not None:
            if asyncio.get_running_loop() is not runtime.loop:
                runtime.enter_loop()
            context.instant = runtime.cache.seen()

    def route_of(self, scope: Any, asked: Any) -> str | None:
        """Return the template of the route that served `scope`, if one did.

        asked: the scope as it came: a mount changes its root path.
        """
        routes = self._by_endpoint.get(id(scope.get("endpoint")), ())
        for route in routes:
            if len(routes) == 1 or route.addresses.fullmatch(_path_of(asked)):
                return route.template
        return getattr(scope.get("route"), "path", None)

    def known(self, scope: Any, tenant: str | None) -> Known | None:
        """Return what is known of a request that may be answered without asking the route.

        Such a request was seen before, and its response is nobody's own.
        """
        if self.runtime is None or scope["type"] != "http" or scope["method"] != "GET":
            return None
        if tenant is None and self.tenant is not None:
            return None
        known = self._shortcuts.find(scope, tenant)
        # An override, of a test say, is asked where dependencies are resolved.
        return known if known is not None and not known.app.dependency_overrides else None

    def has_head_of_get(self, scope: Any) -> bool:
        """Say whether a HEAD is answered as its GET: if the route of that is cached, and none declares the HEAD."""
        if not self.cached:
            return False
        path = _path_of(scope)
        served = [route for route in self._served if route.addresses.fullmatch(path)]
        by_get = [route.is_cached for route in served if "GET" in route.methods]
        return by_get[:1] == [True] and not any("HEAD" in route.methods for route in served)

    def refused(self, scope: Any, context: RequestContext | None) -> tuple[OverloadedError, str] | None:
        """Refuse a request before its route is asked, where it is sure to be refused by its database.

        scope: as it came to the router.
        context: where there is one by now.

        Returns also the template of the route that would have served it.
        """
        find = self._finders.get(scope["method"])
        route = find(_path_of(scope)) if find is not None else None
        # What is cached behind its dependencies may be a hit.
        if route is None or (route.is_cached and (context is None or context.exchange is None)):
            return None
        error = self.admission.refuse(route.endpoint, context)
        return None if error is None else (error, route.template)

    @property
    def puts_off(self) -> bool:
        """Say whether a request that is refused is answered as everywhere, and may be so by whom nobody stands before.

        What tells tenants apart may have something to say to it.
        """
        return self.app.exception_handlers.get(OverloadedError) is _put_off and self.tenant is None

    @property
    def cache(self) -> Cache:
        """Return the runtime's cache."""
        assert self.runtime is not None
        return self.runtime.cache

    @property
    def is_innermost(self) -> bool:
        """Say whether nothing of the team's, or of what instruments the app, stands around the router."""
        own = self.app.user_middleware
        built = getattr(self._build_stack, "__func__", None)
        return built is FastAPI.build_middleware_stack and all(cast(Any, each.cls) is RequestPath for each in own)

    def heard(self, message: str) -> None:
        """Note that the server starts up or shuts down, by the type of its message."""
        if self.runtime is not None:
            self.runtime.readiness.state = "starting" if message == "lifespan.startup" else "draining"

    def started(self) -> None:
        """Prepare what there is by now, before the first request: the app has started up."""
        self.install()
        if self.runtime is not None:
            self.runtime.enter_loop()
            self.runtime.readiness.begin()

    async def shut_down(self) -> None:
        """Give back what the runtime holds."""
        if self.runtime is not None:
            await self.runtime.aclose()

    # Putting it in place

    def install(self) -> None:
        """Prepare every route; raises `ConfigurationError` for one that could not keep its promises."""
        if not self.is_installed:
            self._prepare_all()
            self.is_installed = True

    def _prepare_all(self) -> None:
        every = list(sites(self.app)) if works(check_walk) else []
        found = [site for site in every if id(site.route.dependant) not in self._prepared]
        for site in found:
            refuse_misuse(site)
            if PROCESS_KEY in self.cursor_keys:
                refuse_lone_key(site)
        for site in found:
            self._prepared[id(site.route.dependant)] = site.route.dependant
            self._prepare(site)
        self._served = [
            Served(
                site.template,
                compile_path(site.template)[0],
                frozenset(site.route.methods or ()),
                id(site.route.dependant) in self.cached,
                site.route.endpoint,
            )
            for site in every
        ]
        self._finders = {
            method: _finder([route for route in self._served if method in route.methods])
            for method in {method for route in self._served for method in route.methods}
        }
        self._by_endpoint = {}
        for route in self._served:
            self._by_endpoint.setdefault(id(route.endpoint), []).append(route)
        for mounted in {site.app for site in found if site.app is not self.app}:
            _answer_errors(mounted)
        self._complain_of_unknown_names()

    def _complain_of_unknown_names(self) -> None:
        """Say which names in `cache.off` are no route's: whoever has set them means one that is not off."""
        if self.runtime is None:
            return
        known = self.runtime.cache.ledger.routes
        for name in self.runtime.settings.cache.off:
            if not is_known(name, known):
                logger.warning("OVERDRIVE_CACHE__OFF: no cached route is called %s", name)

    def _prepare(self, site: Site) -> None:
        if isinstance(site.route.original_route, APIWebSocketRoute):
            return
        if (envelope := page_model(site)) is not None and works(check_added_dependency):
            taken = page_style(site) is None
            ask = page_dependency(
                envelope,
                self.pagination,
                taken=taken,
                endpoint=site.route.endpoint,
                as_usual=answers_as_usual(site),
            )
            add_dependency(site, ask)
            document_refusal(site, envelope.style)
        mark = getattr(site.route.endpoint, CACHED, None)
        if mark is None or self.runtime is None:
            return
        if works(check_added_dependency) and works(check_replaced_call):
            # The address without its password, which may be renewed and is nobody's to see.
            database = self.runtime.engine.url.render_as_string(hide_password=True)
            cache, settings = self.runtime.cache, self.runtime.settings.cache
            if mark.browser_ttl and self.runtime.tenant is not None:
                logger.warning(
                    "%s has a browser_ttl, and the app has tenants, of whom a browser may show one what another has "
                    "been answered: it asks each time",
                    site.name,
                )
                mark = replace(mark, browser_ttl=0)
            trust = trust_of(site, mark, settings)
            try:
                plan = cache_route(site, mark, mark.ttl or cache.ttl, database, self._shortcuts, settings, trust)
                self.plans[id(site.route.dependant)] = plan
                if not isinstance(plan, str):
                    self.cached.add(id(site.route.dependant))
                    cache.ledger.routes[site.name] = trust
            except Exception:
                logger.exception("%s is marked @cached but is not cached: its declaration could not be read", site.name)


def installed_on(app: FastAPI) -> Installation:
    """Return what is installed on an app; raises `ConfigurationError` where nothing is."""
    installation: Installation | None = getattr(app.state, "overdrive_installation", None)
    if installation is None:
        raise ConfigurationError("the app has no Overdrive: call Overdrive(app) or add_pagination(app)")
    return installation


def _path_of(scope: Any) -> str:
    """Return what was asked for, without the scope's root path."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def stand_first(app: FastAPI) -> None:
    """Have requests go straight to the app's middlewares, where FastAPI's own `__call__` has nothing to do for them.

    For each request it looks whether there is telemetry to send somewhere, which takes as long as a hit. Not where
    anybody else stands there: a class of the team's, what has patched FastAPI's or Starlette's, or FastAPI's own
    telemetry, as long as it has somewhere to send to.
    """
    if type(app) is not FastAPI or app.root_path:
        return
    telemetry = getattr(app, "_native_telemetry", None)
    first, looked_at = False, float("-inf")

    async def call(self: Any, scope: Any, receive: Any, send: Any) -> None:
        nonlocal first, looked_at
        # To look takes as long as half of what this saves.
        if (now := time.monotonic()) - looked_at >= _LOOK_INTERVAL:
            traced = telemetry is not None and telemetry.enabled()
            first, looked_at = not traced and _is_as_written(FastAPI) and _is_as_written(Starlette), now
        if first and scope["type"] == "http" and self.middleware_stack is not None:
            scope["app"] = self
            await self.middleware_stack(scope, receive, send)
        else:
            await FastAPI.__call__(self, scope, receive, send)

    # It looks like the one it was.
    members = {"__call__": call, "__module__": FastAPI.__module__, "__qualname__": FastAPI.__qualname__}
    app.__class__ = type(FastAPI.__name__, (FastAPI,), members)


def _is_as_written(kind: type) -> bool:
    """Say whether a class's `__call__` is the one in its own module."""
    call: Any = vars(kind).get("__call__")
    return isinstance(call, FunctionType) and call.__code__.co_filename == sys.modules[kind.__module__].__file__


def _refuse_late(app: FastAPI) -> None:
    if app.middleware_stack is not None:
        raise ConfigurationError("Overdrive(app) must come before the app serves its first request")


def _answer_errors(app: FastAPI) -> None:
    """Have `app` answer what is no fault of its own, unless it does so itself; its middlewares are not built yet."""

    async def answer(_request: Request, error: RequestError) -> Response:
        return JSONResponse({"detail": str(error), "code": error.code}, error.status)

    app.exception_handlers.setdefault(RequestError, answer)
    app.exception_handlers.setdefault(OverloadedError, _put_off)


async def _put_off(_request: Request, error: OverloadedError) -> Response:
    return putting_off(error)


# What is asked of a route


def trust_of(site: Site, mark: Mark, settings: CacheSettings) -> Trust:
    """Return how the hits of a route that is marked are treated."""
    mode = "off" if site.template in map(template_of, settings.off) else mark.mode or settings.mode
    verify = settings.verify if mark.verify is None else mark.verify
    # Only what compares responses tells names.
    names = declared_names(site) if mode == "shadow" or (mode == "on" and verify) else ()
    return Trust(mode, verify if mode == "on" else 0.0, names)


def refuse_misuse(site: Site) -> None:
    """Raise `ConfigurationError` for a route whose session could not be what it promises to be."""
    websocket = isinstance(site.route.original_route, APIWebSocketRoute)
    generator = inspect.isgeneratorfunction(site.endpoint) or inspect.isasyncgenfunction(site.endpoint)
    for dependant in site.dependencies():
        call = site.resolved(dependant.call)
        if isinstance(call, RequestSession | SyncRequestSession) and (websocket or generator):
            kind = "a websocket" if websocket else "a generator"
            raise ConfigurationError(
                f"{site.name} is {kind}, and the request's session ends before the first byte: take "
                "`sessions: SessionFactoryDep` there and open a session for each unit of work, "
                "`async with sessions() as db: ...`"
            )
    if is_awaited(site.route.endpoint) or websocket or generator:
        return
    for dependency in site.route.dependant.dependencies:
        if isinstance(site.resolved(dependency.call), RequestSession) and dependency.name is not None:
            raise ConfigurationError(
                f"{site.name} is a plain function and cannot await an AsyncSession: take "
                f"`{dependency.name}: SyncSessionDep` (or Depends(get_sync_session)), or make it `async def`"
            )


def refuse_lone_key(site: Site) -> None:
    """Raise `ConfigurationError` for cursors that another worker of the same server could not read.

    What `multiprocessing` starts, as uvicorn does its workers, has its key from its parent; what gunicorn forks, not.
    """
    model = page_model(site)
    walked = model is not None and model.style == "cursor"
    several = "gunicorn.arbiter" in sys.modules or workers() > 1
    if walked and several and parent_process() is None:
        raise ConfigurationError(
            f"{site.name} has cursors, and each worker here would sign them with a key of its own, which the others "
            "refuse: give all of them the same, OVERDRIVE_PAGINATION__SECRETS=<32 random bytes, as text>"
        )
