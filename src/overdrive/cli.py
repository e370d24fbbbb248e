"""The command line: `overdrive demo`, `inspect`, `explain`, `off`, `on`, `doctor` and `triggers`.

What an extra brings is imported where it is needed, so that a missing one is named instead of a module.
"""

import asyncio
import contextlib
import gc
import json
import logging
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, cast, get_args

from fastapi import FastAPI
from sqlalchemy import Connection, MetaData
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from .app import Overdrive
from .cache.store import StoreUnavailable
from .cache.trust import EVERYTHING, is_known, requests, template_of
from .config import Settings
from .diagnosis import set_up
from .doctor import Report, examine
from .endpoint import CACHED
from .errors import ConfigurationError
from .inspection import Inspection, explain, inspected, overdrive_of
from .log.handler import LogHandler
from .pool.engine import create_engine, ping
from .pool.outside import Database, explained, installation, keys_of, removal, run
from .pool.triggers import Announced, Via, via_of
from .routes import sites

if TYPE_CHECKING:
    import typer

T = TypeVar("T")

_DEMO_DATABASE = "sqlite:///overdrive-demo.sqlite"

#: How many users the demo's database is filled with, and how many where the servers are its own.
_USERS = 200_000
_USERS_ON_SERVERS = 2_000_000

#: What a shell reports for a command that Ctrl-C has ended: 128 + SIGINT.
_INTERRUPTED = 130

#: What `doctor` reports where it could not look: 1 is for advice.
_UNEXAMINED = 2


def main() -> None:
    """Run the command line; what cannot work is told in one line on stderr, with exit status 1."""
    try:
        _need("cli", "typer", "rich")
        _commands()(prog_name="overdrive")
    except ConfigurationError as error:
        sys.exit(f"overdrive: {error}")


def _need(extra: str, *modules: str) -> None:
    for module in modules:
        try:
            import_module(module)
        except ImportError:
            raise ConfigurationError(
                f"this needs {module}, which is missing: pip install 'overdrive[{extra}]'"
            ) from None


#: Of every group of commands: help where none is named, and tracebacks and texts as they are.
_PLAIN: dict[str, Any] = {"no_args_is_help": True, "pretty_exceptions_enable": False, "rich_markup_mode": None}


def _commands() -> "typer.Typer":
    import typer

    app = typer.Typer(
        help="The performance layer for FastAPI.",
        add_completion=False,
        **_PLAIN,
    )

    @app.command()
    def demo(
        host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
        port: Annotated[int, typer.Option(help="The port; 0 for any free one.", min=0, max=65535)] = 8000,
        database_url: Annotated[
            str | None,
            typer.Option(help=f"PostgreSQL or SQLite; else OVERDRIVE_DATABASE_URL, else {_DEMO_DATABASE}."),
        ] = None,
        redis_url: Annotated[
            str | None, typer.Option(help="Redis; else OVERDRIVE_REDIS_URL, else the cache is in memory.")
        ] = None,
        servers: Annotated[
            bool,
            typer.Option("--servers", help=f"Bring PostgreSQL, with {_USERS_ON_SERVERS:,} users, and Redis along."),
        ] = False,
    ) -> None:
        """Serve the reference API; the first start fills its database."""
        _need("demo", "uvicorn")
        if servers and (database_url or redis_url):
            raise ConfigurationError("--servers brings its own: leave out --database-url and --redis-url")
        # Taken before the database is filled: that would be a long wait for the news that somebody else has it.
        with _bound(host, port) as listener:
            try:
                if servers:
                    with _own_servers() as urls:
                        _serve_demo(listener, _USERS_ON_SERVERS, **urls)
                else:
                    _serve_demo(listener, _USERS, database_url=database_url, redis_url=redis_url)
            except KeyboardInterrupt:
                print("overdrive: interrupted; nothing was kept of a database half filled", file=sys.stderr)
                sys.exit(_INTERRUPTED)

    @app.command()
    def inspect(
        target: Annotated[str, typer.Argument(metavar="MODULE:APP", show_default=False)],
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document.")] = False,
    ) -> None:
        """Show the layers a request passes, how each route is treated, and how its cache has done."""
        inspection = asyncio.run(inspected(overdrive_of(_app(target))))
        if as_json:
            print(json.dumps(asdict(inspection), indent=2))
        else:
            _show(inspection)

    @app.command(name="explain")
    def explain_(
        target: Annotated[str, typer.Argument(metavar="MODULE:APP", show_default=False)],
        method: Annotated[str, typer.Argument(metavar="METHOD", show_default=False)],
        address: Annotated[str, typer.Argument(metavar="PATH", show_default=False)],
        header: Annotated[
            list[str], typer.Option(metavar="'NAME: VALUE'", help="A header to send.", default_factory=list)
        ],
        as_json: Annotated[bool, typer.Option("--json", help="Print a JSON document.")] = False,
    ) -> None:
        """Say what becomes of one request in the cache, and why; its endpoint is not run, and nothing written."""
        # What the app prints and logs is not what was asked for.
        with contextlib.redirect_stdout(sys.stderr):
            findings = asyncio.run(explain(_app(target), method, address, _pairs(":", header)))
        print(json.dumps(findings, indent=2) if as_json else "\n".join(_lines(findings)))

    @app.command()
    def off(
        part: Annotated[str, typer.Argument(metavar="cache", show_default=False)],
        target: Annotated[str | None, typer.Argument(metavar="[MODULE:APP]", show_default=False)] = None,
        route: Annotated[
            list[str] | None, typer.Option(metavar="TEMPLATE", help="/users/{user_id}; may be repeated. Else all.")
        ] = None,
        redis_url: Annotated[str | None, typer.Option(help="Redis; else OVERDRIVE_REDIS_URL.")] = None,
    ) -> None:
        """Switch the cache off in all workers at once, for all routes or for some."""
        _switch(part, target, route or [], redis_url, off=True)

    @app.command()
    def on(
        part: Annotated[str, typer.Argument(metavar="cache", show_default=False)],
        target: Annotated[str | None, typer.Argument(metavar="[MODULE:APP]", show_default=False)] = None,
        route: Annotated[
            list[str] | None, typer.Option(metavar="TEMPLATE", help="/users/{user_id}; may be repeated.")
        ] = None,
        redis_url: Annotated[str | None, typer.Option(help="Redis; else OVERDRIVE_REDIS_URL.")] = None,
    ) -> None:
        """Undo `off`, for what was switched off with the same options."""
        _switch(part, target, route or [], redis_url, off=False)

    @app.command()
    def doctor(
        target: Annotated[str, typer.Argument(metavar="MODULE:APP", show_default=False)],
        param: Annotated[
            list[str], typer.Option(help="NAME=VALUE for a parameter that pages have; may be repeated.")
        ] = [],  # noqa: B006 - typer's way
        header: Annotated[list[str], typer.Option(help="'NAME: VALUE' to send; may be repeated.")] = [],  # noqa: B006
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON document.")] = False,
    ) -> None:
        """Say how an app is set up and what of it is wrong, and name the index that a page lacks, with proof.

        GET routes that declare a page are really called, on databases that refuse writes. The exit status is 1 where
        there is something to be done, else 2 where something could not be examined.
        """
        setup, report = None, Report()
        try:
            # What the app prints is not what was asked for.
            with contextlib.redirect_stdout(sys.stderr):
                examined = _app(target)
                setup = asyncio.run(set_up(examined))
                report = asyncio.run(examine(examined, _pairs("=", param), _pairs(":", header)))
            status = report.status
        except ConfigurationError as error:
            print(f"overdrive: {error}", file=sys.stderr)
            status = _UNEXAMINED
        except Exception:
            traceback.print_exc()
            status = _UNEXAMINED
        if setup is None:
            sys.exit(status)
        if as_json:
            print(json.dumps({"setup": asdict(setup), **asdict(report)}, indent=2))
        else:
            print("\n\n".join(filter(None, [setup.as_text(), report.as_text()])))
        sys.exit(1 if setup.findings else status)

    app.add_typer(_trigger_commands(), name="triggers")
    return app


# demo


@contextlib.contextmanager
def _own_servers() -> Iterator[dict[str, str]]:
    from .demo.servers import KEPT, postgres, redis

    # What ends a process at once would leave the servers behind, and a shell's background jobs ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup has it ignored.
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT))
    with postgres(KEPT) as database_url, redis(KEPT.parent) as redis_url:
        print(f"PostgreSQL is at {database_url}\nRedis is at {redis_url}", flush=True)
        yield {"database_url": database_url, "redis_url": redis_url}


def _serve_demo(listener: socket.socket, users: int, **urls: str | None) -> None:
    import uvicorn

    from .demo.service import create_app

    settings = _demo_settings(**urls)
    app = create_app(settings)
    asyncio.run(_prepare(settings, users))
    print(f"The reference service is at {_address(listener)}", flush=True)
    logging.basicConfig(handlers=[LogHandler()], level=logging.INFO)
    # Overdrive logs one event a request, which has all that uvicorn's access log tells.
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False))
    # uvicorn shuts down on Ctrl-C, and then passes it on.
    with contextlib.suppress(KeyboardInterrupt):
        server.run(sockets=[listener])


def _demo_settings(**urls: str | None) -> Settings:
    given = {name: url for name, url in urls.items() if url is not None}
    # Nobody else writes to it.
    settings = Settings.load(**given, pagination={"cache_totals": True})
    if "database_url" in settings.model_fields_set:
        return settings
    return settings.model_copy(update={"database_url": _DEMO_DATABASE})


def _bound(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # As every server does: else a port is not free for a minute after the last one.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


async def _prepare(settings: Settings, users: int) -> None:
    engine = create_engine(settings.database_url)
    try:
        await ping(engine)
        if settings.redis_url is not None:
            await _begin_cache(settings.redis_url, settings.cache.prefix)
        await _to_its_end(asyncio.create_task(_seed(engine, users)))
    finally:
        await engine.dispose()


async def _begin_cache(url: str, prefix: str) -> None:
    from .cache.cluster import store_at

    store = store_at(url, prefix)
    try:
        await store.ping()
        # What it still holds may have been read from another database.
        await store.clear()
    except StoreUnavailable as error:
        raise ConfigurationError(f"Redis answers, but cannot serve the cache: {error}") from None
    finally:
        await store.aclose()


async def _to_its_end(task: asyncio.Task[None]) -> None:
    """Wait for a task, and have it end when this one is cancelled."""
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        # asyncpg's executemany swallows a cancellation between two of its chunks, and then waits forever.
        while not task.done():
            task.cancel()
            await asyncio.wait([task], timeout=1)
        raise


async def _seed(engine: AsyncEngine, users: int) -> None:
    from rich.progress import Progress

    from .demo.data import is_seeded, seed

    try:
        async with engine.begin() as connection:
            if await connection.run_sync(is_seeded):
                return
            with Progress(transient=True, disable=not sys.stdout.isatty()) as progress:
                bar = progress.add_task("Filling the database, once")
                await connection.run_sync(
                    seed, users, progress=lambda done, total: progress.update(bar, completed=done, total=total)
                )
    except SQLAlchemyError as error:
        reason = str(getattr(error, "orig", None) or error).splitlines()[0]
        where = engine.url.render_as_string(hide_password=True)
        raise ConfigurationError(f"the database {where} cannot be filled: {reason}") from None


# inspect and explain


def _show(inspection: Inspection) -> None:
    print("Layers, outermost first:")
    for layer in inspection.layers:
        print(f"  {layer}")
    print("\nRoutes:")
    for name, treatment in inspection.routes.items():
        print(f"  {name:<40} {'; '.join(treatment) or '-'}")
    if not inspection.cached:
        return
    print("\nCache:")
    head = ("route", "mode", "ttl", "hits", "of", "bytes", "mismatches", "verdict", "key of")
    rows = []
    for name, route in inspection.cached.items():
        counts = route.counts or {}
        ratio = "-" if route.hit_ratio is None else f"{route.hit_ratio:.1%}"
        known = [str(counts.get(each, 0)) if route.counts is not None else "-" for each in ("bytes", "mismatches")]
        of = "-" if route.counts is None else str(requests(counts))
        rows.append((name, route.mode, f"{route.ttl:g} s", ratio, of, *known, route.verdict, ", ".join(route.key)))
    _table(head, rows)
    if inspection.off:
        print(f"\n{_told_off(inspection.off)}")
    if inspection.note:
        print(f"\n{inspection.note}")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        table = Table(*head)
        for row in rows:
            table.add_row(*row)
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, *rows):
        print(f"  {'  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))}".rstrip())


def _lines(findings: dict[str, Any]) -> Iterator[str]:
    width = max(map(len, findings))
    for name, finding in findings.items():
        if name == "tags":
            for tag, versions in finding.items():
                why = f"; {versions['why']}" if "why" in versions else ""
                yield f"{'tag':<{width}}  {tag}: version {versions['then']} then, {versions['now']} now{why}"
        else:
            yield f"{name:<{width}}  {', '.join(finding) if isinstance(finding, list) else finding}"


# off and on


def _switch(part: str, target: str | None, routes: list[str], redis_url: str | None, *, off: bool) -> None:
    if part != "cache":
        raise ConfigurationError(f"{part!r} cannot be switched: it is the cache that can")
    given = {} if redis_url is None else {"redis_url": redis_url}
    settings = overdrive_of(_app(target)).settings.model_copy(update=given) if target else Settings.load(**given)
    if settings.redis_url is None:
        raise ConfigurationError(
            "without a Redis a worker's cache cannot be reached from here: name the workers' one by --redis-url or "
            "OVERDRIVE_REDIS_URL, or restart them with OVERDRIVE_CACHE__ENABLED=false"
        )
    known = None if target is None else [s.name for s in sites(_app(target)) if hasattr(s.route.endpoint, CACHED)]
    names = asyncio.run(_switched(settings.redis_url, settings.cache.prefix, routes, known, off=off))
    print(_told_off(sorted(names)))


async def _switched(url: str, prefix: str, routes: list[str], known: list[str] | None, *, off: bool) -> frozenset[str]:
    from .cache.redis import RedisStore

    store = RedisStore(url, prefix)
    try:
        await store.ping()
        counted = await store.sums()
        for route in routes:
            if not template_of(route).startswith("/"):
                raise ConfigurationError(f"{route!r} is no route's template: it looks like /users/{{user_id}}")
            if known is not None and not is_known(route, known):
                raise ConfigurationError(f"no cached route is called {route!r}; there are {', '.join(known) or 'none'}")
            if known is None and not is_known(route, counted):
                print(
                    f"overdrive: no worker has told of a route {route!r}; MODULE:APP would say which there are",
                    file=sys.stderr,
                )
        for route in routes or [EVERYTHING]:
            await store.switch(template_of(route), off=off)
        return await store.switched_off()
    except StoreUnavailable as error:
        raise ConfigurationError(f"Redis answers, but cannot be told: {error}") from None
    finally:
        await store.aclose()


def _told_off(names: list[str]) -> str:
    if EVERYTHING in names:
        others = [name for name in names if name != EVERYTHING]
        return "off now: the whole cache" + (f", and by themselves {', '.join(others)}" if others else "")
    return f"off now: {', '.join(names) or 'nothing'}"


# triggers


def _trigger_commands() -> "typer.Typer":
    import typer

    triggers = typer.Typer(
        help="Have PostgreSQL tell of what others write: psql, other services, foreign keys.",
        **_PLAIN,
    )
    target_ = Annotated[str | None, typer.Argument(metavar="[MODULE:APP]", show_default=False)]
    url_ = Annotated[str | None, typer.Option("--database-url", help="PostgreSQL; else the app's.")]
    table_ = Annotated[
        list[str] | None, typer.Option("--table", metavar="NAME", help="users, or shop.users; may be repeated.")
    ]
    dry_ = Annotated[bool, typer.Option("--dry-run", help="Print the SQL, and execute none of it.")]
    engine_ = Annotated[str, typer.Option(help="Which of the app's engines.")]

    @triggers.command()
    def install(
        target: target_ = None,
        database_url: url_ = None,
        table: table_ = None,
        via: Annotated[str, typer.Option(help="notify, or outbox for many commits a second.")] = "notify",
        dry_run: dry_ = False,
        engine: engine_ = "default",
    ) -> None:
        """Add triggers to the tables that the app's models know, or without an app to those on the search path."""
        if via not in get_args(Via):
            raise ConfigurationError(f"--via is {' or '.join(get_args(Via))}, and not {via!r}")
        reach = _Reach(target, database_url, engine)

        def statements(database: Database) -> list[str]:
            return list(installation(database, reach.announced(database, table or []), cast(Via, via)))

        reach.carry_out(statements, dry_run=dry_run)

    @triggers.command()
    def uninstall(
        target: target_ = None,
        database_url: url_ = None,
        table: table_ = None,
        dry_run: dry_ = False,
        engine: engine_ = "default",
    ) -> None:
        """Take the triggers off all tables, and whatever belongs to them; or off some."""
        reach = _Reach(target, database_url, engine)
        reach.carry_out(lambda database: list(removal(database, table or [])), dry_run=dry_run)

    @triggers.command()
    def status(
        target: target_ = None, database_url: url_ = None, table: table_ = None, engine: engine_ = "default"
    ) -> None:
        """Say of each table whether it has its triggers; the exit status is 1 where not all would tell."""
        reach = _Reach(target, database_url, engine)

        def look(connection: Connection) -> tuple[list[tuple[str, ...]], dict[str, str | None], str]:
            database = Database(connection)
            found = reach.announced(database, table or [])
            rows: list[tuple[str, ...]] = [
                (f"{each.schema}.{each.name}", database.state(each), ", ".join(each.key)) for each in found
            ]
            return rows, database.functions, database.setting("session_replication_role")

        rows, functions, role = asyncio.run(reach.run(look))
        _table(("table", "triggers", "rows by"), rows)
        ways = sorted({via_of(said) or "an unknown way" for said in functions.values()})
        print(f"\nvia: {', '.join(ways) or 'nothing'}\nsession_replication_role: {role}")
        if role == "replica":
            print("With this role no trigger fires: whoever sets it has to say NOTIFY overdrive when all is written.")
        sys.exit(role == "replica" or any(state != "installed" for _, state, _ in rows))

    return triggers


class _Reach:
    """The database that triggers are for, and the tables that its models know.

    Raises `ConfigurationError` where neither an app nor a URL says which it is.
    """

    def __init__(self, target: str | None, database_url: str | None, engine: str) -> None:
        if target is None and database_url is None:
            raise ConfigurationError("which database? Give MODULE:APP, or --database-url postgresql://...")
        self._keys: dict[str, tuple[str, ...]] | None = None
        self._overdrive: Overdrive | None = None
        if target is not None:
            self._overdrive = overdrive_of(_app(target))
            self._overdrive.sessions(engine)  # refuses an unknown name
            # Models belong to no app: those count that it has imported.
            self._keys = keys_of([each for each in gc.get_objects() if issubclass(type(each), MetaData)])
            if not self._keys:
                raise ConfigurationError(f"{target} imports no models: name the database alone, --database-url")
        if database_url is not None:
            self._engine = create_engine(database_url)
        elif self._overdrive is not None:
            self._engine = self._overdrive.engines[engine]

    def announced(self, database: Database, only: list[str]) -> list[Announced]:
        """Return the tables; models' tables that this database has not are told on stderr."""
        there = {name for relation in database.relations.values() for name in relation.names}
        if not only and (away := sorted((self._keys or {}).keys() - there)):
            print(f"overdrive: not in this database: {', '.join(away)}", file=sys.stderr)
        return database.announced(self._keys, only)

    def carry_out(self, statements: Callable[[Database], list[str]], *, dry_run: bool) -> None:
        """Execute statements in one transaction, or print them as psql takes them."""

        def work(connection: Connection) -> list[str]:
            planned = statements(Database(connection))
            if not dry_run:
                for sql in planned:
                    run(connection, sql)
                connection.commit()
            return planned

        planned = asyncio.run(self.run(work))
        if not planned:
            print("nothing is to be done", file=sys.stderr if dry_run else sys.stdout)
        elif dry_run:
            print("".join(f"{sql};\n" for sql in ("BEGIN", *planned, "COMMIT")), end="")
        else:
            print(f"done, in one transaction of {len(planned)} statements")

    async def run(self, work: Callable[[Connection], T]) -> T:
        """Return what is done with a connection."""
        try:
            await ping(self._engine)
            async with self._engine.connect() as connection:
                with explained():
                    return await connection.run_sync(work)
        finally:
            await self._engine.dispose()
            if self._overdrive is not None:
                await self._overdrive.aclose()


# inspect, explain and doctor


def _app(target: str) -> FastAPI:
    app = _imported(target)
    if not isinstance(app, FastAPI):
        raise ConfigurationError(f"{target} is no FastAPI app but of type {type(app).__name__}")
    return app


def _pairs(separator: str, given: list[str]) -> dict[str, str]:
    pairs = [each.partition(separator) for each in given]
    for name, found, _ in pairs:
        if not name or not found:
            raise ConfigurationError(f"{name!r} has no value: it looks like name{separator}value")
    return {name.strip(): value.strip() for name, _, value in pairs}


def _imported(target: str) -> object:
    module_name, _, attribute = target.partition(":")
    if not module_name or not attribute:
        raise ConfigurationError(f"{target!r} names no app: it looks like module:app")
    # As for a server, the app's module is found from where the command is run.
    sys.path.insert(0, "")
    try:
        module = import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, and what it imports is not
        raise ConfigurationError(f"there is no module {error.name!r} here") from None
    if not hasattr(module, attribute):
        raise ConfigurationError(f"the module {module_name!r} has no {attribute!r}")
    return getattr(module, attribute)


if __name__ == "__main__":
    main()
