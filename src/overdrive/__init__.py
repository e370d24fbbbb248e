"""Overdrive, the performance layer for FastAPI.

Every public name is here and is loaded when it is first used, so that a part costs the import of that part alone.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .app import Overdrive as Overdrive
    from .app import add_pagination as add_pagination
    from .cache.asgi import CacheMiddleware as CacheMiddleware
    from .cache.cache import Cache as Cache
    from .config import Settings as Settings
    from .context import bind as bind
    from .endpoint import RequestSession as RequestSession
    from .endpoint import SessionDep as SessionDep
    from .endpoint import SessionFactoryDep as SessionFactoryDep
    from .endpoint import SyncRequestSession as SyncRequestSession
    from .endpoint import SyncSessionDep as SyncSessionDep
    from .endpoint import SyncSessionFactoryDep as SyncSessionFactoryDep
    from .endpoint import cached as cached
    from .endpoint import declare as declare
    from .endpoint import get_session as get_session
    from .endpoint import get_session_factory as get_session_factory
    from .endpoint import get_sync_session as get_sync_session
    from .endpoint import get_sync_session_factory as get_sync_session_factory
    from .endpoint import priority as priority
    from .errors import ConfigurationError as ConfigurationError
    from .errors import DeadlineExceededError as DeadlineExceededError
    from .errors import InvalidCursorError as InvalidCursorError
    from .errors import NotInstalledError as NotInstalledError
    from .errors import OutcomeUnknownError as OutcomeUnknownError
    from .errors import OverdriveError as OverdriveError
    from .errors import OverloadedError as OverloadedError
    from .errors import PageError as PageError
    from .errors import PageTooDeepError as PageTooDeepError
    from .errors import RequestError as RequestError
    from .errors import SessionEndedError as SessionEndedError
    from .export import stream as stream
    from .health import health_router as health_router
    from .listing import Listing as Listing
    from .log.handler import LogHandler as LogHandler
    from .log.logger import log_directly as log_directly
    from .pages import paginate as paginate
    from .pagination.page import BasePage as BasePage
    from .pagination.page import CountedCursorPage as CountedCursorPage
    from .pagination.page import CountedPage as CountedPage
    from .pagination.page import CursorPage as CursorPage
    from .pagination.page import CursorParams as CursorParams
    from .pagination.page import Found as Found
    from .pagination.page import LimitOffsetPage as LimitOffsetPage
    from .pagination.page import LimitOffsetParams as LimitOffsetParams
    from .pagination.page import Page as Page
    from .pagination.page import PageParams as PageParams
    from .pool.engine import create_engine as create_engine
    from .pool.pool import FairPool as FairPool
    from .pool.pool import PoolStatistics as PoolStatistics
    from .pool.pool import PoolTimeoutError as PoolTimeoutError

_MODULES = {
    "app": ("Overdrive", "add_pagination"),
    "cache.asgi": ("CacheMiddleware",),
    "cache.cache": ("Cache",),
    "config": ("Settings",),
    "context": ("bind",),
    "endpoint": (
        "RequestSession",
        "SessionDep",
        "SessionFactoryDep",
        "SyncRequestSession",
        "SyncSessionDep",
        "SyncSessionFactoryDep",
        "cached",
        "declare",
        "get_session",
        "get_session_factory",
        "get_sync_session",
        "get_sync_session_factory",
        "priority",
    ),
    "errors": (
        "ConfigurationError",
        "DeadlineExceededError",
        "InvalidCursorError",
        "NotInstalledError",
        "OverdriveError",
        "OutcomeUnknownError",
        "OverloadedError",
        "PageError",
        "PageTooDeepError",
        "RequestError",
        "SessionEndedError",
    ),
    "export": ("stream",),
    "health": ("health_router",),
    "listing": ("Listing",),
    "log.handler": ("LogHandler",),
    "log.logger": ("log_directly",),
    "pages": ("paginate",),
    "pagination.page": (
        "BasePage",
        "CountedCursorPage",
        "CountedPage",
        "CursorPage",
        "CursorParams",
        "Found",
        "LimitOffsetPage",
        "LimitOffsetParams",
        "Page",
        "PageParams",
    ),
    "pool.engine": ("create_engine",),
    "pool.pool": ("FairPool", "PoolStatistics", "PoolTimeoutError"),
}
_HOMES = {name: module for module, names in _MODULES.items() for name in names}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
