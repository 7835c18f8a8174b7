"""The HTTP API: runs are started, listed, followed and cancelled over these routes.

    POST /v1/runs                    start a run; its record, or with "stream": true its stream
    GET  /v1/runs                    the newest records
    GET  /v1/runs/{id}               one record
    GET|POST|HEAD /v1/runs/{id}/stream   the stream, from a cursor on
    POST /v1/runs/{id}/link          an address of the stream that needs no token, for a limited time
    POST /v1/runs/{id}/cancel        cancel it
    GET  /v1/producers               the producers that runs can be started with
    GET  /healthz, /readyz           alive; able to serve
    GET  /metrics                    for Prometheus
    GET  /                           a page from which all of this can be used in a browser

Every route except the two for health asks `auth.py` first for the caller and their rights. Everything that comes in is
then checked in `requests.py`; from there on a cursor is an int and a run id is a run id. Errors outside a stream are
`application/problem+json` with a `code`, or the dialect's equivalent.

The page is one file, `index.html`, which loads nothing from elsewhere. Its Content-Security-Policy allows only its own
script and style, by a nonce that is new for every response, and requests to this server.
"""

from __future__ import annotations

import secrets
from contextlib import asynccontextmanager
from functools import partial
from http import HTTPStatus
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from penstock.asgi import requests
from penstock.asgi.auth import AccessControl, Right, check_origins
from penstock.asgi.errors import ErrorResponse, error_response_for, is_expected, retry_instead_of
from penstock.asgi.lifespan import BODY_TIMEOUT, MAX_BODY_BYTES, AppLifespan, RequestLimits
from penstock.asgi.request_body import DrainRequestBody
from penstock.asgi.response import EventStreamResponse
from penstock.errors import ConfigurationError, NotAuthenticated, PenstockError, RunEnded, RunExists, StreamRejected
from penstock.log import CancelStatus
from penstock.observer import new_error_id, notify
from penstock.sources.command import command
from penstock.supervisor.settings import check_duration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterable, Mapping, Sequence

    from starlette.types import ASGIApp, Receive, Scope, Send

    from penstock.asgi.auth import Authorizer
    from penstock.log import EventLog
    from penstock.observer import Observer
    from penstock.observer.prometheus import Metrics
    from penstock.supervisor.follower import Follower

_PAGE: Final = (files("penstock.asgi") / "index.html").read_text(encoding="utf-8")


def page(status: int = 200, headers: Mapping[str, str] | None = None) -> HTMLResponse:
    """The page. It is the same for every caller: it asks for a token when a request of its own gets a 401."""
    nonce = secrets.token_urlsafe(16)
    policy = (
        f"default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return HTMLResponse(
        _PAGE.replace("{{nonce}}", nonce),
        status,
        headers={
            **(headers or {}),
            "Content-Security-Policy": policy,
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        },
    )


CORS: Final[Mapping[str, Any]] = {
    "allow_methods": ["GET", "POST"],
    "allow_headers": ["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
    "expose_headers": ["Location", "Penstock-Run-Id", "Retry-After"],
}
"""What pages of the allowed origins may send and read."""


class _Application(Starlette):
    """Starlette, with `DrainRequestBody` around everything, even around Starlette's own error page."""

    def build_middleware_stack(self) -> ASGIApp:
        service: AppLifespan = self.state.penstock
        return DrainRequestBody(super().build_middleware_stack(), service.limits)


def create_app(
    producers: Mapping[str, Any],
    log: str | EventLog = "memory://",
    *,
    authorizer: Authorizer | None = None,
    allowed_hosts: Iterable[str] | None = None,
    allowed_origins: Sequence[str] = (),
    observer: Observer | None = None,
    metrics: Metrics | bool = True,
    ping_interval: float | None = 15.0,
    max_body_bytes: int = MAX_BODY_BYTES,
    body_timeout: float = BODY_TIMEOUT,
    **settings: Any,
) -> Starlette:
    """The ASGI application with the routes of penstock's HTTP API, for Hypercorn's trio worker; see `serve`.

    Args:
        producers: the producers that runs can be started with, by name. A producer is called with the request's
            `input` (any JSON value).
        log: the event log, or its URL for `open_log`.
        authorizer: decides what each caller may do, such as a `TokenAuthorizer`; None: every caller may do everything.
        allowed_hosts: the host names, without ports, that requests may be addressed to; None: any. Set them on a server
            that has no authorizer, even if it can be reached only from its own machine: otherwise a page of another
            site may use it through a browser (DNS rebinding).
        allowed_origins: the origins (`https://example.org`) whose pages may use the API from a browser; `*`: all of
            them, which needs an authorizer. The default is none but the server's own.
        observer: is notified of what happens; the default writes to the logger `penstock`.
        metrics: the metrics that `/metrics` shows; True: new ones; False: there is no such route.
        ping_interval: seconds without a send after which a ping is sent on a stream; None: no pings.
        max_body_bytes: the limit on a request's body, in bytes. The response to a larger one is 413.
        body_timeout: seconds from a request's headers to the end of its body. After that the response is 408.
        settings: those of the supervisor; see `Settings`.

    Returns:
        The application. It can be mounted in another one, extended with middleware, or served as it is. The supervisor
        is opened and closed by its lifespan.

    Raises:
        ConfigurationError: a setting is unknown or has a value that it cannot have, or a producer is not callable.
    """
    check_duration("ping_interval", ping_interval)
    if body_timeout is None:
        raise ConfigurationError("body_timeout is a number of seconds above 0, not None")
    check_duration("body_timeout", body_timeout)
    _check_producers(producers)
    check_origins(allowed_origins, anybody=authorizer is None)
    if metrics is True:
        from penstock.observer.prometheus import Metrics  # noqa: PLC0415  (its library decides at import how it counts)

        metrics = Metrics()
    service = AppLifespan(
        producers,
        log,
        settings,
        access=AccessControl(authorizer, allowed_hosts),
        limits=RequestLimits(max_body_bytes, body_timeout),
        observer=observer,
        metrics=metrics or None,
        ping_interval=ping_interval,
    )

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        async with trio.open_nursery() as nursery:
            await nursery.start(service.run)
            try:
                yield
                await service.drained()
            finally:
                service.stop()

    app = _Application(
        routes=[
            Route("/", index, methods=["GET"]),
            Route("/v1/runs", start_or_list_runs, methods=["GET", "POST"]),  # one, so that Allow names all
            Route("/v1/runs/{run_id}", get_run, methods=["GET"]),
            Route("/v1/runs/{run_id}/stream", _StreamRun(), methods=["GET", "POST"], name="stream_run"),
            Route("/v1/runs/{run_id}/link", share_run, methods=["POST"]),
            Route("/v1/runs/{run_id}/cancel", cancel_run, methods=["POST"]),
            Route("/v1/producers", list_producers, methods=["GET"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
            *([Route("/metrics", show_metrics, methods=["GET"])] if service.metrics is not None else []),
        ],
        middleware=[Middleware(CORSMiddleware, allow_origins=allowed_origins, **CORS)] if allowed_origins else [],
        lifespan=lifespan,
        exception_handlers={
            StreamRejected: on_error,
            PenstockError: on_error,
            HTTPException: on_error,
            ClientDisconnect: on_disconnect,
            Exception: on_error,
        },
    )
    app.router.redirect_slashes = False  # a redirect would name the Host of the request, before that is checked
    app.state.penstock = service
    return app


def _check_producers(producers: Mapping[str, Any]) -> None:
    for name, producer in producers.items():
        if producer is command:
            raise ConfigurationError(
                f"the producer {name!r} would run any program that a client names; give it a fixed argv: "
                "lambda _input: penstock.command([...])"
            )
        if not callable(producer):
            raise ConfigurationError(
                f"the producer {name!r} is called once for each run, but {producer!r} is not callable"
            )


def service_of(request: Request) -> AppLifespan:
    service: AppLifespan = request.app.state.penstock
    return service


async def start_or_list_runs(request: Request) -> Response:
    return await (start_run if request.method == "POST" else list_runs)(request)


async def start_run(request: Request) -> Response:
    service = service_of(request)
    access = service.access
    caller = await access.authenticate(request)
    wanted = requests.start_request(await requests.json_body(request, service.limits.max_body_bytes), request.headers)
    await access.check(caller, Right.START, wanted.run_id)
    if wanted.stream:
        await access.check(caller, Right.READ, wanted.run_id)
    if wanted.producer not in service.producers:
        known = ", ".join(sorted(service.producers)) or "none"
        message = f"there is no producer {wanted.producer!r:.200}; there are: {known}"
        raise StreamRejected(400, "UNKNOWN_PRODUCER", message)
    start = partial(
        service.supervisor.start_once,
        service.producers[wanted.producer],
        wanted.input,
        run_id=wanted.run_id,
        name=wanted.producer,
        timeout=wanted.timeout,
        max_silence=wanted.max_silence,
        idempotency_key=wanted.idempotency_key,
        metadata=wanted.metadata,
    )
    try:
        started = await start()
    except RunExists as error:
        raise StreamRejected(409, error.code, str(error), run=await access.visible_record(caller, error.run)) from None
    status = 201 if started.created else 200
    headers = {
        "Location": _stream_path(request, started.run.id),
        "Penstock-Run-Id": started.run.id,
    }
    if wanted.stream:
        if not started.created:  # another caller may have started it
            await access.check(caller, Right.READ, started.run.id)
        follower = service.supervisor.follow(started.run.id)
        return _stream(service, started.run.id, follower, status_code=status, headers=headers)
    record = started.run.to_json() if started.created else await access.visible_record(caller, started.run)
    return JSONResponse(record, status, headers)


async def list_runs(request: Request) -> Response:
    service = service_of(request)
    caller = await service.access.authenticate(request)
    await service.access.check(caller, Right.LIST)
    limit, status = requests.list_query(request.query_params)
    runs = await service.supervisor.list(limit=limit, status=status)
    visible = await service.access.visible_runs(caller, runs)
    if len(visible) < len(runs) == limit:  # older runs may be visible to the caller
        runs = await service.supervisor.list(limit=requests.MAX_LIST, status=status)
        visible = await service.access.visible_runs(caller, runs)
    return JSONResponse({"runs": [run.to_json() for run in visible[:limit]]})


async def get_run(request: Request) -> Response:
    run_id, _ = await _run_id(request, Right.READ)
    return JSONResponse((await service_of(request).supervisor.get(run_id)).to_json())


class _StreamRun:
    """The route of a stream."""

    # An ASGI application, not a function: Starlette wraps the send of a function's response in a second error handler.

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        service = service_of(request)
        run_id, _ = await _run_id(request, Right.READ)
        body = await requests.json_body(request, service.limits.max_body_bytes) if request.method == "POST" else {}
        wanted = requests.stream_request(body, request.query_params, request.headers)
        follower = service.supervisor.follow(run_id, wanted.after, last=wanted.last)
        response = _stream(service, run_id, follower, pings=wanted.include_pings)
        await response(scope, receive, send)


async def cancel_run(request: Request) -> Response:
    service = service_of(request)
    run_id, caller = await _run_id(request, Right.CANCEL)
    reason = requests.cancel_reason(await requests.json_body(request, service.limits.max_body_bytes))
    reply = await service.supervisor.cancel(run_id, reason)
    record = await service.access.visible_record(caller, reply.run)
    if reply.status is CancelStatus.ENDED:
        raise StreamRejected(409, RunEnded.code, str(RunEnded(run_id, reply.run)), run=record)
    return JSONResponse(record, 202 if reply.status is CancelStatus.REQUESTED else 200)


async def share_run(request: Request) -> Response:
    service = service_of(request)
    run_id, _ = await _run_id(request, Right.SHARE)
    if (links := service.access.links) is None:
        raise StreamRejected(
            404, "NO_LINKS", "this server makes no links, because it requires no tokens or has no secret for links"
        )
    lifetime = requests.link_lifetime(await requests.json_body(request, service.limits.max_body_bytes))
    run = await service.supervisor.get(run_id)
    token, ends_at = links.make(run.id, lifetime)
    return JSONResponse({"url": f"{_stream_path(request, run.id)}?link={token}", "expires_at": ends_at}, 201)


async def list_producers(request: Request) -> Response:
    service = service_of(request)
    await service.access.require(request, Right.START)
    return JSONResponse({"producers": sorted(service.producers)})


async def show_metrics(request: Request) -> Response:
    service = service_of(request)
    await service.access.require(request, Right.METRICS)
    if service.running:
        service.supervisor.tell_figures()
    assert service.metrics is not None  # noqa: S101  (or there would be no such route)
    text, media_type = service.metrics.render()
    return Response(text, headers={"content-type": media_type})


async def index(request: Request) -> Response:
    service = service_of(request)
    try:
        await service.access.authenticate(request)
    except NotAuthenticated as error:
        notify(service.observer.refused, error.status, error.code)
        rendered, _ = error_response_for(error).render(service.dialect)
        return page(status=error.status, headers={k.decode(): v.decode() for k, v in rendered if b"content" not in k})
    return page()


async def healthz(_request: Request) -> Response:
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    await service_of(request).supervisor.check()
    return JSONResponse({"status": "ready"})


async def on_error(request: Request, error: Exception) -> Response:
    """The response to a request that failed before there was another response."""
    service = service_of(request)
    headers: list[tuple[bytes, bytes]] = []
    if isinstance(error, HTTPException):  # no such route, or no such method
        code = HTTPStatus(error.status_code).name
        error_response = ErrorResponse(error.status_code, code, HTTPStatus(error.status_code).description or code, {})
        headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    else:
        error_response = error_response_for(error, expose_errors=service.settings.expose_errors)
        if not is_expected(error):
            error_response.members["error_id"] = error_id = new_error_id()
            where = f"{request.method} {request.url.path}"
            notify(service.observer.on_error, error, error_id=error_id, where=where)
    notify(service.observer.refused, error_response.status, error_response.code)
    if isinstance(request.scope.get("endpoint"), _StreamRun) and request.method == "GET":
        retry = retry_instead_of(error_response, request.scope)
        if retry is not None:
            return Response(retry, media_type="text/event-stream", headers={"cache-control": "no-store"})
    rendered, body = error_response.render(service.dialect)
    response = Response(body, error_response.status)
    response.raw_headers = rendered + headers
    return response


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """The client disconnected while it was sending its request. Nothing receives this response."""
    return Response(status_code=400)


async def _run_id(request: Request, right: Right) -> tuple[str, Any]:
    """The run id of the path, and the caller, who has that right to it."""
    caller = await service_of(request).access.require(request, right, request.path_params["run_id"])
    return requests.run_id(request.path_params), caller


def _stream_path(request: Request, run_id: str) -> str:
    return f"{request.scope.get('root_path', '')}{request.app.url_path_for('stream_run', run_id=run_id)}"


def _stream(
    service: AppLifespan,
    run_id: str,
    follower: Follower,
    *,
    pings: bool = True,
    status_code: int = 200,
    headers: Mapping[str, str] | None = None,
) -> Response:
    return EventStreamResponse(
        follower,
        status_code,
        headers,
        ping_interval=service.ping_interval if pings else None,
        dialect=service.settings.dialect,
        observer=service.observer,
        run_id=run_id,
    )
