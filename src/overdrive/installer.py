"""What Overdrive adds to an app, and the one place that touches FastAPI's less documented names.

Used are: `app.build_middleware_stack` and `app.user_middleware` (where Overdrive stands), `iter_route_contexts`
(every route as it is served, included and mounted ones too), the `dependant` of a route (its parameters and
dependencies) with `get_parameterless_sub_dependant` (to add one), and `dependant.call` (to answer instead of the
endpoint). Each use but the first has a check that is run before it is relied on: where FastAPI has changed, that
part is switched off with one ERROR, and the app serves on without it. So those names are not imported: a missing
one is found by its check.

Annotations of dependencies made here are read by FastAPI at run time, so this module does not postpone them.
"""

import functools
import inspect
import logging
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from hashlib import blake2b
from multiprocessing import parent_process
from typing import TYPE_CHECKING, Any, TypeAlias, cast, get_args

from fastapi import APIRouter, Depends, FastAPI, Request, Response, routing
from fastapi import __version__ as fastapi_version
from fastapi.dependencies import utils
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute, APIWebSocketRoute
from fastapi.security.base import SecurityBase
from pydantic import AliasChoices, AliasPath, BaseModel, TypeAdapter
from starlette.middleware import Middleware
from starlette.routing import Mount, compile_path

from .cache.cache import Cache, Exchange
from .cache.conditional import if_none_match
from .cache.key import KeyPlan, Shortcuts, key_of
from .cache.policy import Policy
from .cache.values import key_of_call, tag_of_call
from .config import PaginationSettings
from .context import RequestContext, current
from .endpoint import (
    CACHED,
    DECLARED,
    Declaration,
    Mark,
    RequestSession,
    SessionFactory,
    SyncRequestSession,
    SyncSessionFactory,
)
from .errors import ConfigurationError, RequestError
from .middleware import Observer, RequestPath
from .pages import PROCESS_KEY, page_dependency
from .pagination.page import BasePage, CursorParams, LimitOffsetParams, Page, PageParams, Style

if TYPE_CHECKING:
    from .app import Overdrive

logger = logging.getLogger("overdrive")

#: How the routes of requests are cached that were seen before, under which keys, and the apps they are of.
KnownRequests: TypeAlias = Shortcuts[tuple[Policy, str, FastAPI]]

_OURS = (RequestSession, SyncRequestSession, SessionFactory, SyncSessionFactory)


@dataclass(frozen=True, slots=True)
class Site:
    """One route as it is served.

    app: the FastAPI app it belongs to, which a mount may have put inside another.
    route: FastAPI's context of the route, with the prefixes and dependencies of its inclusion.
    template: its whole path, mounts included.
    """

    app: FastAPI
    route: Any
    template: str

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


def sites(app: FastAPI, prefix: str = "") -> Iterator[Site]:
    """Walk every route of an app: direct, included, of any `route_class`, and those of mounted FastAPI apps."""
    for route in routing.iter_route_contexts(app.routes):
        served = route.original_route
        if isinstance(served, Mount):
            if isinstance(served.app, FastAPI):
                yield from sites(served.app, prefix + (route.path or ""))
        elif isinstance(served, APIRoute | APIWebSocketRoute):
            yield Site(app, route, prefix + (route.path_format or route.path or ""))


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
        self.logs_events = False
        self._installed = False
        #: Of requests that were seen before: how their route is cached, and under which key.
        self._shortcuts: KnownRequests = Shortcuts()
        #: By the id of a route's dependant, which is kept here so that no other gets its id.
        self._prepared: dict[int, Any] = {}
        #: By the id of an endpoint: it need not be hashable.
        self._templates: dict[int, list[tuple[re.Pattern[str], str]]] = {}
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
        self.request_id_header = settings.log.request_id_header.encode()
        self.logs_events = settings.log.events

    # Where Overdrive stands

    def _stack(self) -> Any:
        if not any(cast(Any, middleware.cls) is RequestPath for middleware in self.app.user_middleware):
            # The last of the app's middlewares is the innermost.
            self.app.user_middleware.append(Middleware(RequestPath, installation=self))
        _answer_request_errors(self.app)
        return Observer(self._build_stack(), self)

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
        if self.runtime is not None:
            self.runtime.enter_loop()
            context.instant = self.runtime.cache.seen()

    def route_of(self, scope: Any, path: str) -> str | None:
        """Return the template of the route that served `scope`, if one did.

        path: what was asked for, without the scope's root path.
        """
        templates = self._templates.get(id(scope.get("endpoint")), ())
        for pattern, template in templates:
            if len(templates) == 1 or pattern.fullmatch(path):
                return template
        return getattr(scope.get("route"), "path", None)

    def tenant_of(self, scope: Any) -> str | None:
        """Return whose data a request is about, where the app has tenants."""
        if self.runtime is None or self.runtime.tenant is None or scope["type"] != "http":
            return None
        return self.runtime.tenant(Request(scope))

    def known(self, scope: Any, tenant: str | None) -> tuple[Policy, str] | None:
        """Return how a request's route is cached, and its key, where it may be answered without asking the route.

        Such a request was seen before, and its response is nobody's own.
        """
        if self.runtime is None or scope["type"] != "http" or scope["method"] != "GET":
            return None
        if tenant is None and self.runtime.tenant is not None:
            return None
        known = self._shortcuts.find(scope, tenant)
        # An override, of a test say, is asked where dependencies are resolved.
        return (known[0], known[1]) if known is not None and not known[2].dependency_overrides else None

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

    async def shut_down(self) -> None:
        """Give back what the runtime holds."""
        if self.runtime is not None:
            await self.runtime.aclose()

    # Putting it in place

    def install(self) -> None:
        """Prepare every route; raises `ConfigurationError` for one that could not keep its promises."""
        if not self._installed:
            self._prepare_all()
            self._installed = True

    def _prepare_all(self) -> None:
        found = list(sites(self.app)) if works(check_walk) else []
        found = [site for site in found if id(site.route.dependant) not in self._prepared]
        for site in found:
            refuse_misuse(site)
            if PROCESS_KEY in self.cursor_keys:
                refuse_lone_key(site)
        for site in found:
            self._prepared[id(site.route.dependant)] = site.route.dependant
            self._prepare(site)
        for mounted in {site.app for site in found if site.app is not self.app}:
            _answer_request_errors(mounted)

    def _prepare(self, site: Site) -> None:
        served = self._templates.setdefault(id(site.route.endpoint), [])
        served.append((compile_path(site.template)[0], site.template))
        if isinstance(site.route.original_route, APIWebSocketRoute):
            return
        if (envelope := page_model(site)) is not None and works(check_added_dependency):
            taken = page_style(site) is None
            add_dependency(site, page_dependency(envelope, self.pagination, taken=taken, endpoint=site.route.endpoint))
            document_refusal(site, envelope.style)
        mark = getattr(site.route.endpoint, CACHED, None)
        if mark is None or self.runtime is None:
            return
        if works(check_added_dependency) and works(check_replaced_call):
            # The address without its password, which may be renewed and is nobody's to see.
            database = self.runtime.engine.url.render_as_string(hide_password=True)
            try:
                cache_route(site, mark, mark.ttl or self.runtime.cache.ttl, database, self._shortcuts)
            except Exception:
                logger.exception("%s is marked @cached but is not cached: its declaration could not be read", site.name)


def _refuse_late(app: FastAPI) -> None:
    if app.middleware_stack is not None:
        raise ConfigurationError("Overdrive(app) must come before the app serves its first request")


def _answer_request_errors(app: FastAPI) -> None:
    """Have `app` answer a `RequestError`, unless it does so its own way; its middlewares are not built yet."""

    async def answer(_request: Request, error: RequestError) -> Response:
        return JSONResponse({"detail": str(error), "code": error.code}, error.status)

    app.exception_handlers.setdefault(RequestError, answer)


# What is asked of a route


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
    several = "gunicorn.arbiter" in sys.modules or os.environ.get("WEB_CONCURRENCY", "1") != "1"
    if walked and several and parent_process() is None:
        raise ConfigurationError(
            f"{site.name} has cursors, and each worker here would sign them with a key of its own, which the others "
            "refuse: give all of them the same, OVERDRIVE_PAGINATION__SECRETS=<32 random bytes, as text>"
        )


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


# Cached routes


def cache_route(site: Site, mark: Mark, ttl: float, database: str, shortcuts: KnownRequests) -> None:
    """Have a route answered from the cache, behind its dependencies; or say why its responses cannot be kept."""
    plan = key_plan(site, mark, ttl, database)
    if isinstance(plan, str):
        logger.warning("%s is marked @cached but is not cached: %s", site.name, plan)
        return
    calls = [dependant.call for dependant in site.dependencies()]
    # A route that is found by more than its address is found by the router alone.
    by_address = type(site.route.original_route).matches is APIRoute.matches
    alone = all(isinstance(call, _OURS) or _is_of_pages(call) for call in calls)
    policy = Policy(ttl, plan, site.template, early=by_address and (mark.public or (alone and not plan.private)))
    asking = [] if mark.public else [dependant for dependant in _graph(site, mark) if _principal_of(dependant.call)]
    add_dependency(
        site, _look_up(site, policy, calls, shortcuts, [_principal_of(dependant.call) for dependant in asking])
    )
    # The same dependants, so that each is resolved once.
    last = site.route.dependant.dependencies[-1]
    last.dependencies += [replace(dependant, name=f"principal_{number}") for number, dependant in enumerate(asking)]
    site.route.dependant.call = _answered_from_cache(site.route.dependant.call)


def _is_of_pages(call: Any) -> bool:
    return getattr(call, "__module__", "") == page_dependency.__module__


def _principal_of(call: Any) -> Callable[[Any], Any] | None:
    declaration: Declaration | None = getattr(call, DECLARED, None)
    return declaration.principal if declaration is not None else None


def _look_up(
    site: Site, policy: Policy, calls: list[Any], shortcuts: KnownRequests, principals: list[Any]
) -> Callable[..., Any]:
    """Return the dependency that looks the response up: resolved last, so that authentication has run."""
    plan = policy.plan

    async def look_up(request: Request, response: Response, **asking: Any) -> None:
        context = _context()
        if request.method != "GET":
            return
        context.route, context.response = policy.route, response
        if context.exchange is None:
            await look_up_late(context, request, asking.values())
        # Otherwise it was looked up before the route was.
        if context.exchange.entry is None:
            context.reads.tags.add(tag_of_call(key_of_call(site.endpoint, request.path_params)))

    async def look_up_late(context: RequestContext, request: Request, asking: Iterable[Any]) -> None:
        key = key_of(
            plan,
            host=request.headers.get("host", ""),
            path=context.path,
            query=context.query,
            headers=[request.headers.getlist(name) for name in plan.headers],
            cookies=[request.cookies.get(name) for name in plan.cookies],
            principals=[principal(value) for principal, value in zip(principals, asking, strict=True)],
            tenant=context.tenant,
        )
        if policy.early:
            shortcuts.add(request.scope, context.tenant, plan.headers, (policy, key, site.app))
        exchange = context.exchange = Exchange(
            context.runtime.cache, policy, key, context, if_none_match(request.scope["headers"])
        )
        if any(site.resolved(call) is not call and not isinstance(site.resolved(call), _OURS) for call in calls):
            exchange.bypass("overridden-dependency")
        elif context.tenant is None and context.runtime.tenant is not None:
            exchange.bypass("no-tenant")
        else:
            await exchange.look_up()

    # FastAPI would make a parameter of the principals.
    own = list(inspect.signature(look_up).parameters.values())[:2]
    look_up.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return look_up


def _answered_from_cache(endpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap an endpoint so that it is not called where the look-up has found its response."""
    if is_awaited(endpoint):

        @functools.wraps(endpoint)
        async def call(**values: Any) -> Any:
            return _stored_response() or _kept(await endpoint(**values))

    else:

        @functools.wraps(endpoint)
        def call(**values: Any) -> Any:
            return _stored_response() or _kept(endpoint(**values))

    return call


def _stored_response() -> Response | None:
    context = _context()
    entry = context.exchange.entry if context.exchange is not None else None
    if entry is None:
        return None
    # Headers that this request's dependencies have set are newer than those that were stored with the body. What
    # was not sent with the body is not sent now: an endpoint that returns a `Response` sends none of them.
    stored = {name for name, _ in entry.headers}
    fresh = [header for header in context.response.headers.raw if header[0] in stored]
    replaced = {name for name, _ in fresh}
    response = Response(entry.body, entry.status)
    response.raw_headers = [header for header in entry.headers if header[0] not in replaced] + fresh
    return response


def _kept(result: Any) -> Any:
    """Keep a response with a task in it out of the cache: from there the task would not be started."""
    if isinstance(result, Response) and result.background is not None and (exchange := _context().exchange):
        exchange.bypass("background-task")
    return result


def _context() -> RequestContext:
    context = current()
    assert context is not None, "the observer is outside every route"
    return context


def key_plan(site: Site, mark: Mark, ttl: float, database: str = "") -> KeyPlan | str:
    """Read from the dependency graph what tells one response of a route from another, or why that is unknowable.

    database: the address of the default engine's, so that services that share a store do not share entries.
    """
    headers: set[str] = set()
    cookies: set[str] = set()
    parameters: set[str] | None = set()
    private = False
    for dependant in _graph(site, mark):
        if _is_of_pages(dependant.call):
            # It puts the whole address into links and cursors.
            parameters = None
            continue
        if isinstance(dependant.call, _OURS):
            continue
        if _principal_of(dependant.call):
            private = True
            continue
        if isinstance(dependant.call, SecurityBase):
            read = _credential(dependant.call)
            if read is None:
                return f"nothing is known of what the security scheme {type(dependant.call).__name__} reads"
            private = True
            (cookies if read[0] == "cookie" else headers).add(read[1])
            if read[0] == "query":
                parameters = None
        elif unknowable := _unknowable(dependant):
            return unknowable
        if parameters is not None:
            open_ended = any(map(_takes_others, dependant.query_params))
            parameters = None if open_ended else parameters | set(_names(dependant.query_params))
        headers |= {form for name in _names(dependant.header_params) for form in _header_names(name)}
        cookies |= set(_names(dependant.cookie_params))
    private = private or bool(cookies) or "authorization" in headers
    names = frozenset(parameters) if parameters is not None else None
    fingerprint = _fingerprint(site.route, ttl, database)
    return KeyPlan(fingerprint, tuple(sorted(headers)), tuple(sorted(cookies)), private, names)


def _graph(site: Site, mark: Mark) -> Iterator[Any]:
    """Walk what has a say in a route's responses.

    Where a dependency says who is asking, what it reads of the request to find out has none; where everybody gets
    the same, neither it nor a security scheme has.
    """
    pending = [site.route.dependant]
    while pending:
        dependant = pending.pop()
        names_principal = _principal_of(dependant.call) is not None
        if mark.public and (names_principal or isinstance(dependant.call, SecurityBase)):
            continue
        yield dependant
        if not names_principal:
            pending += dependant.dependencies


def _takes_others(parameter: Any) -> bool:
    """Say whether parameters that are not declared make a difference: kept, or refused."""
    models = _models(parameter.field_info.annotation)
    return any(model.model_config.get("extra", "ignore") != "ignore" for model in models)


def _names(parameters: list[Any]) -> Iterator[str]:
    """Return every name under which parameters, or the fields of a model of parameters, may be sent."""
    for parameter in parameters:
        own = {parameter.name: parameter.field_info}
        models = _models(parameter.field_info.annotation)
        for fields in [model.model_fields for model in models] or [own]:
            for name, info in fields.items():
                alias = info.validation_alias
                choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
                paths = [choice.path[0] if isinstance(choice, AliasPath) else choice for choice in choices]
                yield from (each for each in (name, info.alias, *paths) if isinstance(each, str))


def _models(annotation: Any) -> list[type[BaseModel]]:
    kinds = get_args(annotation) or (annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]


def _header_names(name: str) -> tuple[str, str]:
    return name.lower(), name.lower().replace("_", "-")


def _credential(scheme: SecurityBase) -> tuple[str, str] | None:
    """Return where a security scheme of FastAPI's reads its credential, and under which name."""
    if not type(scheme).__module__.startswith("fastapi."):
        return None
    model: Any = scheme.model
    if model.type_.value == "apiKey":
        return model.in_.value, model.name.lower() if model.in_.value == "header" else model.name
    return "header", "authorization"


def _unknowable(dependant: Any) -> str | None:
    """Say why what a dependency takes cannot be put into a key."""
    name = getattr(dependant.call, "__name__", type(dependant.call).__name__)
    takes_all = dependant.request_param_name or dependant.http_connection_param_name
    if takes_all and getattr(dependant.call, DECLARED, None) is None:
        return (
            f"{name}() takes the whole request, and nobody can tell what it reads of it: say so by "
            f"declare({name}, principal=...) or declare({name}, ignore=True)"
        )
    if dependant.background_tasks_param_name:
        return f"{name}() takes BackgroundTasks, which a stored response would not start"
    if dependant.body_params:
        return f"{name}() reads the body"
    for parameter in (*dependant.header_params, *dependant.cookie_params):
        if any(model.model_config.get("extra") == "allow" for model in _models(parameter.field_info.annotation)):
            return f"{name}() takes every header or cookie there is"
    return None


def _fingerprint(route: Any, ttl: float, database: str) -> str:
    """Digest whatever makes a route answer differently: which rows it reads, and what a release makes of them."""
    model = route.response_model
    schema = TypeAdapter(model).json_schema(mode="serialization") if model is not None else None
    shape = (
        route.response_model_include,
        route.response_model_exclude,
        route.response_model_by_alias,
        route.response_model_exclude_unset,
        route.response_model_exclude_defaults,
        route.response_model_exclude_none,
        route.status_code,
    )
    return blake2b(repr((database, route.path_format, schema, shape, ttl)).encode(), digest_size=8).hexdigest()


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


def _specimen() -> tuple[FastAPI, Site]:
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
    _app, site = _specimen()
    assert [call.name for call in site.route.dependant.query_params] == ["q"]
    assert site.route.endpoint is site.route.dependant.call


def check_added_dependency() -> None:
    """Page parameters and cached routes: a dependency cannot be added to a route."""
    app, site = _specimen()
    add_dependency(site, page_dependency(Page, PaginationSettings()))
    document_refusal(site, "page")
    operation = app.openapi()["paths"]["/included/direct/{item}"]["get"]
    assert {"page", "size"} <= {parameter["name"] for parameter in operation["parameters"]}
    assert "400" in operation["responses"]


def check_replaced_call() -> None:
    """Cached routes: an endpoint cannot be replaced."""
    _app, site = _specimen()
    dependant = site.route.dependant
    assert list(_names(dependant.query_params)) == ["q", "q"]
    assert _unknowable(dependant) is None
    call = _answered_from_cache(site.route.dependant.call)
    site.route.dependant.call = call
    assert next(sites(_app)).route.dependant.call is call
