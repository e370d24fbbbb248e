"""Every exception Overdrive raises, each with the HTTP status a client sees when nobody handles it.

* `OverdriveError` (500)
    * `ConfigurationError` (500): a setting, a route or a missing extra; raised at start-up where it can be
    * `NotInstalledError` (500): a part was used on a request that no `Overdrive(app)` observes
    * `SessionEndedError` (500): the request's session was used after its response had begun
    * `OutcomeUnknownError` (500): a commit that was sent and never answered: it may have been kept
    * `PageError` (500): the endpoint's query or page style cannot be paginated as written
    * `OverloadedError` (503): there is more to do than can be done now; answered with `Retry-After`
        * `DeadlineExceededError` (503): the request's time has run out
    * `RequestError` (400): the request itself asks for something impossible; answered as JSON with its code
        * `InvalidCursorError` (400): a cursor that was damaged, or made for another route, order or filter
        * `PageTooDeepError` (400): a page by number behind more rows than may be skipped
"""

from __future__ import annotations


class OverdriveError(Exception):
    """The root of the tree: catch it to catch everything Overdrive raises."""

    status = 500
    code = "overdrive_error"


class ConfigurationError(OverdriveError):
    """A setting, a route or an installation that cannot work; the message names the fix."""

    code = "configuration"


class NotInstalledError(OverdriveError):
    """A part that needs `Overdrive(app)` was used on a request it does not observe."""

    code = "not_installed"


class SessionEndedError(OverdriveError):
    """The request's session was used after its response had begun; the message names the fix."""

    code = "session_ended"


class OutcomeUnknownError(OverdriveError):
    """A COMMIT was sent, and its answer has not come within the request's time: what was written may have been kept."""

    code = "outcome_unknown"


class PageError(OverdriveError):
    """A statement, a page style or a combination of both that cannot be paginated as written."""

    code = "page"


class OverloadedError(OverdriveError):
    """What was asked for cannot be done now, and is worth asking for again: `PoolTimeoutError` is one.

    retry_after: in how many seconds.
    reason: why admission has refused it, as its statistics count it; None where something else did.
    detail: what its client is told.
    """

    status = 503
    code = "overloaded"
    # How many connections there are is nobody's business outside.
    detail = "the service has too much to do; try again later"
    retry_after: float = 1
    reason: str | None = None


class DeadlineExceededError(OverloadedError):
    """The time a request has, by `pool.deadline` or its proxy's header, has run out before its response began."""

    code = "deadline_exceeded"
    detail = "the time for this request has run out; try again later"


class RequestError(OverdriveError):
    """A request that cannot be served as the client has put it."""

    status = 400
    code = "request"


class InvalidCursorError(RequestError):
    """A cursor that is damaged, or that was made for another route, order or filter."""

    code = "invalid_cursor"


class PageTooDeepError(RequestError):
    """A page by number that begins after more rows than `pagination.max_offset` allows."""

    code = "page_too_deep"
