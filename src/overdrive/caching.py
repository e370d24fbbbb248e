"""Routes whose responses are cached: what their key is made of, and how they are answered.

Annotations of dependencies made here are read by FastAPI at run time, so this module does not postpone them.
"""

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias, get_args

import msgspec
from fastapi import FastAPI, Request, Response, params
from fastapi.security.base import SecurityBase
from pydantic import AliasChoices, AliasPath, BaseModel, TypeAdapter

from .cache.exchange import Exchange, form_of, wishes_of
from .cache.key import KeyPlan, Shortcuts, canonical_json, key_of
from .cache.policy import Policy
from .cache.tags import everything_beside, tag_of_tenant
from .cache.trust import Trust
from .cache.values import key_of_call, tag_of_call
from .config import CacheSettings
from .context import RequestContext, current
from .endpoint import (
    DECLARED,
    Declaration,
    Mark,
    RequestSession,
    ServedBy,
    SessionFactory,
    SyncRequestSession,
    SyncSessionFactory,
)
from .errors import ConfigurationError
from .pages import page_dependency
from .routes import Site, add_dependency, is_awaited, sites, specimen

logger = logging.getLogger("overdrive")


class Known(NamedTuple):
    """A request that was seen before.

    policy, key: how its route is cached, and where its response is.
    app: the app its route is of.
    routed: what the router left in its scope, which others read after it: those who measure, say.
    """

    policy: Policy
    key: str
    app: FastAPI
    routed: dict[str, Any]


KnownRequests: TypeAlias = Shortcuts[Known]

_ROUTED = ("route", "endpoint", "path_params", "root_path")

#: Bytes above which a body is not made a key of.
_MOST_BODY = 65_536

_OURS = (RequestSession, SyncRequestSession, SessionFactory, SyncSessionFactory, ServedBy)


def cache_route(
    site: Site, mark: Mark, ttl: float, database: str, shortcuts: KnownRequests, settings: CacheSettings, trust: Trust
) -> KeyPlan | str:
    """Have a route answered from the cache, behind its dependencies; or say why its responses cannot be kept."""
    plan = key_plan(site, mark, ttl, database)
    if isinstance(plan, str):
        logger.warning("%s is marked @cached but is not cached: %s", site.name, plan)
        return plan
    calls = [dependant.call for dependant in site.dependencies()]
    alone = all(_is_ours(call) or _is_of_pages(call) for call in calls)
    # A route that is found by more than its address is found by the router alone.
    # What is not to be answered need not be found early.
    early = trust.mode == "on" and site.by_address and (mark.public or (alone and not plan.private)) and not plan.body
    asking = [] if mark.public else [dependant for dependant in _graph(site, mark) if _principal_of(dependant.call)]
    policy = Policy(
        ttl,
        plan,
        site.template,
        early=early,
        stale_while_revalidate=mark.stale_while_revalidate,
        stale_if_error=mark.stale_if_error,
        outdated=mark.outdated,
        cache_control=_cache_control(mark, plan),
        vary=_vary(plan, gzip=settings.gzip, principal=bool(asking)),
        # A browser would take it off its own time.
        tells_age=not mark.browser_ttl,
        gzip=settings.gzip,
        hide_status=settings.hide_status,
        tags=(*mark.tags, *mark.depends, *sorted(map(everything_beside, mark.depends))),
        knows_reads=bool(mark.depends),
        trust=trust,
    )
    add_dependency(site, _look_up(site, policy, calls, shortcuts, [dependant.call for dependant in asking]))
    # The same dependants, so that each is resolved once.
    last = site.route.dependant.dependencies[-1]
    last.dependencies += [replace(dependant, name=f"principal_{number}") for number, dependant in enumerate(asking)]
    site.route.dependant.call = _answered_from_cache(site.route.dependant.call)
    return plan


def _cache_control(mark: Mark, plan: KeyPlan) -> bytes:
    if mark.browser_ttl:
        # A middleware may tell people apart, of which nothing is known here.
        return (b"" if mark.public else b"private, ") + b"max-age=%d" % mark.browser_ttl
    return b"private, no-cache" if plan.private else b"no-cache"


def _vary(plan: KeyPlan, *, gzip: bool, principal: bool) -> tuple[bytes, ...]:
    """Return the headers that tell a route's responses apart.

    An underscore stands for a hyphen in what endpoints declare; few servers would let it pass.
    """
    names = {name for name in plan.headers if "_" not in name}
    if plan.cookies or principal:
        names.add("cookie")
    if principal:
        names.add("authorization")
    if gzip:
        names.add("accept-encoding")
    return tuple(name.title().encode("latin-1") for name in sorted(names))


def _is_ours(call: Any) -> bool:
    # A class that a team has made of one of ours may read whatever it likes.
    return type(call) in _OURS


def _is_of_pages(call: Any) -> bool:
    return getattr(call, "__module__", "") == page_dependency.__module__


def _principal_of(call: Any) -> Callable[[Any], Any] | None:
    declaration: Declaration | None = getattr(call, DECLARED, None)
    return declaration.principal if declaration is not None else None


def _look_up(
    site: Site, policy: Policy, calls: list[Any], shortcuts: KnownRequests, asked: list[Any]
) -> Callable[..., Any]:
    """Return the dependency that looks the response up: resolved last, so that authentication has run.

    asked: the dependencies that say who is asking; what they return is what `look_up` gets besides.
    """
    plan = policy.plan
    # Shortcuts know whole headers.
    told_by = (*plan.headers, "cookie") if plan.cookies else plan.headers

    async def look_up(request: Request, response: Response, **asking: Any) -> None:
        context = _context()
        if request.method != ("POST" if plan.body else "GET"):
            return
        context.route, context.response = policy.route, response
        if context.exchange is None:
            await look_up_late(context, request, asking.values())
        # Otherwise it was looked up before the route was.
        if context.exchange.entry is None:
            context.reads.tags.update((tag_of_call(key_of_call(site.endpoint, request.path_params)), *policy.tags))
            if context.tenant is not None:
                context.reads.tags.add(tag_of_tenant(context.tenant))

    async def look_up_late(context: RequestContext, request: Request, asking: Iterable[Any]) -> None:
        overridden = any(site.resolved(call) is not call and not _is_ours(site.resolved(call)) for call in calls)
        content = await request.body() if plan.body else b""
        content_type = request.headers.get("content-type", "")
        text = canonical_json(content_type, content) if len(content) <= _MOST_BODY else None
        key = key_of(
            plan,
            host=request.headers.get("host", ""),
            # As the team's middlewares have left them: the route is found by these.
            root_path=request.scope.get("root_path", ""),
            path=request.scope["path"],
            query=request.scope["query_string"].decode("latin-1"),
            headers=[request.headers.getlist(name) for name in plan.headers],
            cookies=[request.cookies.get(name) for name in plan.cookies],
            principals=[] if overridden else list(map(_who, asked, asking)),
            tenant=context.tenant,
            body=(content_type, text or "") if plan.body else None,
        )
        if policy.early:
            routed = {name: request.scope[name] for name in _ROUTED if name in request.scope}
            shortcuts.add(request.scope, context.tenant, told_by, Known(policy, key, site.app, routed))
        wishes = wishes_of(request.scope["headers"])
        if plan.body:
            # It has no preconditions of this kind (RFC 9110, section 13.1.2).
            wishes = wishes._replace(if_none_match=b"")
        exchange = context.exchange = Exchange(context.runtime.cache, policy, key, context, wishes)
        exchange.body = content
        if overridden:
            exchange.bypass("overridden-dependency")
        elif context.lacks_tenant:
            exchange.bypass("no-tenant")
        elif plan.body and text is None:
            exchange.bypass("body")
        else:
            await exchange.look_up()

    # FastAPI would make a parameter of the principals.
    own = list(inspect.signature(look_up).parameters.values())[:2]
    look_up.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    return look_up


def _who(dependency: Any, value: Any) -> Any:
    """Return who is asking, by what a dependency has returned."""
    principal = _principal_of(dependency)
    assert principal is not None
    who = principal(value)
    try:
        msgspec.msgpack.encode(who)
    except (TypeError, OverflowError) as error:
        name = getattr(dependency, "__name__", type(dependency).__name__)
        raise ConfigurationError(
            f"the principal= of {name} gives text, or a number of 64 bits, that says who is asking, not a "
            f"{type(who).__name__}: declare({name}, principal=lambda value: str(...))"
        ) from error
    return who


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
    form = form_of(entry, context.exchange.wishes)
    # Headers that this request's dependencies have set are newer than those that were stored with the body. What
    # was not sent with the body is not sent now: an endpoint that returns a `Response` sends none of them.
    stored = {name for name, _ in form.headers}
    fresh = [header for header in context.response.headers.raw if header[0] in stored]
    replaced = {name for name, _ in fresh}
    response = Response(form.body, entry.status)
    response.raw_headers = [header for header in form.headers if header[0] not in replaced] + fresh
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
    if unfit := _unfit(site, mark):
        return unfit
    headers: set[str] = set()
    cookies: set[str] = set()
    parameters: set[str] | None = set()
    private = False
    for dependant in _graph(site, mark):
        if _is_of_pages(dependant.call):
            # It puts the whole address into links and cursors.
            parameters = None
            continue
        if _is_ours(dependant.call):
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
        elif unknowable := _unknowable(dependant, mark):
            return unknowable
        if parameters is not None:
            open_ended = any(map(_takes_others, dependant.query_params))
            parameters = None if open_ended else parameters | set(_names(dependant.query_params))
        headers |= {form for name in _names(dependant.header_params) for form in _header_names(name)}
        cookies |= set(_names(dependant.cookie_params))
    private = private or bool(cookies) or "authorization" in headers
    names = frozenset(parameters) if parameters is not None else None
    fingerprint = _fingerprint(site, (ttl, mark.browser_ttl, mark.tags, mark.depends, mark.outdated), database)
    return KeyPlan(fingerprint, tuple(sorted(headers)), tuple(sorted(cookies)), private, names, mark.body)


def _unfit(site: Site, mark: Mark) -> str | None:
    """Say why a route's methods are none that are cached."""
    methods = site.route.methods
    if mark.body:
        return None if methods == {"POST"} else "body=True is for routes that take POST alone: leave it out"
    if "GET" in methods:
        return None
    if "POST" in methods:
        return "a POST that only asks for something is cached by its body: say so by @cached(body=True)"
    return "only GET is, and POST by @cached(body=True)"


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
    return any(model.model_config.get("extra", "ignore") != "ignore" or _peeks(model) for model in models)


def _peeks(model: type[BaseModel]) -> bool:
    """Say whether a model sees what it does not declare, as its validators see it before it is one."""
    return any(each.info.mode != "after" for each in model.__pydantic_decorators__.model_validators.values())


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


def _unknowable(dependant: Any, mark: Mark) -> str | None:
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
    if any(isinstance(parameter.field_info, params.Form) for parameter in dependant.body_params):
        return f"{name}() reads a form or files, and a key is made of JSON alone: take a model as its body"
    if dependant.body_params and not mark.body:
        return f"{name}() reads the body, and only a POST is cached by it: @app.post and @cached(body=True)"
    for parameter in (*dependant.header_params, *dependant.cookie_params):
        models = _models(parameter.field_info.annotation)
        if any(model.model_config.get("extra") == "allow" or _peeks(model) for model in models):
            return f"{name}() takes every header or cookie there is"
    return None


def _fingerprint(site: Site, told: tuple[Any, ...], database: str) -> str:
    """Digest whatever makes a route answer differently: which rows it reads, and what a release makes of them.

    The endpoint's name is there for services that a proxy has put behind one host, with paths that look alike.
    """
    route, endpoint = site.route, site.endpoint
    name = endpoint.__module__, getattr(endpoint, "__qualname__", type(endpoint).__qualname__)
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
    return blake2b(repr((database, name, route.path_format, schema, shape, told)).encode(), digest_size=8).hexdigest()


def identities(site: Site, mark: Mark) -> list[str]:
    """Name what says who is asking a route: dependencies, as `get_user()`, and where credentials are read from."""
    names: set[str] = set()
    for dependant in _graph(site, mark):
        if _principal_of(dependant.call):
            names.add(f"{getattr(dependant.call, '__name__', type(dependant.call).__name__)}()")
        elif isinstance(dependant.call, SecurityBase) and (read := _credential(dependant.call)):
            names.add(" ".join(read))
        names |= {f"cookie {name}" for name in _names(dependant.cookie_params)}
        names |= {f"header {name}" for name in _names(dependant.header_params) if name.lower() == "authorization"}
    return sorted(names)


def declared_names(site: Site) -> frozenset[str]:
    """Return the names that the objects in a route's responses may have, by its response model."""
    if site.route.response_model is None:
        return frozenset()
    pending: list[Any] = [TypeAdapter(site.route.response_model).json_schema(mode="serialization")]
    names: set[str] = set()
    while pending:
        schema = pending.pop()
        if isinstance(schema, dict):
            names |= set(schema.get("properties", ()))
            pending += schema.values()
        elif isinstance(schema, list):
            pending += schema
    return frozenset(names)


def check_replaced_call() -> None:
    """Cached routes: an endpoint cannot be replaced."""
    _app, site = specimen()
    dependant = site.route.dependant
    assert list(_names(dependant.query_params)) == ["q", "q"]
    assert _unknowable(dependant, Mark(None, public=False)) is None
    call = _answered_from_cache(site.route.dependant.call)
    site.route.dependant.call = call
    assert next(sites(_app)).route.dependant.call is call
