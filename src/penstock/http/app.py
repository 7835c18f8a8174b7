"""The HTTP API: runs are started, listed, followed and cancelled over these routes.

    POST /v1/runs                    start a run; its record, or with "stream": true its stream
    GET  /v1/runs                    the newest records
    GET  /v1/runs/{id}               one record
    GET|POST|HEAD /v1/runs/{id}/stream   the stream, from a cursor on
    POST /v1/runs/{id}/cancel        ask it to stop
    GET  /healthz, /readyz           alive; able to serve
    GET  /                           a page for browsers

Everything that comes in is checked in `http/requests.py`; from there on a cursor is an int and a run id is a run id.
Errors outside a stream are `application/problem+json` with a `code` (or what the dialect makes of it).

The supervisor lives in a task of its own beside the application's lifespan: if one of its services dies, that must not
end the lifespan (the server would be torn down without a word to anybody) but mark the service failed, so that readers
are released, `/readyz` says so and `serve()` shuts down.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final

import trio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from penstock.answers import Answer, answer_to, is_refusal
from penstock.dialects import dialect_named
from penstock.errors import ConfigurationError, PenstockError, RunEnded, StreamRejected, SupervisorFailed
from penstock.http import requests
from penstock.http.bodies import WholeRequests
from penstock.http.page import page
from penstock.log import CancelStatus
from penstock.log.urls import open_log
from penstock.observer import LoggingObserver, new_error_id, tell
from penstock.response import EventStreamResponse
from penstock.settings import Settings, check_duration
from penstock.sources import command
from penstock.supervisor import Supervisor, open_supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from starlette.types import ASGIApp, Receive, Scope, Send

    from penstock.follower import Follower
    from penstock.log import EventLog
    from penstock.observer import Observer
    from penstock.runs import Run

MAX_BODY_BYTES: Final = 1024 * 1024
"""The default of the limit on a request's body."""


class Service:
    """What an application has beside its routes: the log, the supervisor, and how they are. `app.state.penstock`."""

    def __init__(
        self,
        producers: Mapping[str, Any],
        log: str | EventLog,
        observer: Observer | None,
        knobs: Mapping[str, Any],
        *,
        ping_interval: float | None,
        max_body_bytes: int,
    ) -> None:
        self.producers = dict(producers)
        self.settings = Settings.of(knobs)
        self.dialect = dialect_named(self.settings.dialect)
        self.ping_interval = ping_interval
        self.max_body_bytes = max_body_bytes
        self.failed = trio.Event()
        """Set when a service of the supervisor has died."""
        self.startup_error: Exception | None = None
        """What kept log or supervisor from opening; a server tells no more of it than its words."""
        self._log = log
        self.observer: Observer = LoggingObserver() if observer is None else observer
        self._knobs = dict(knobs)
        self._supervisor: Supervisor | None = None
        self._stopping = trio.Event()
        self._drained = trio.Event()
        self._drained.set()

    @property
    def patience(self) -> float:
        """Seconds that a drain takes at the most, and one more."""
        settings = self.settings
        return settings.drain_timeout + settings.cancel_grace + settings.finalize_timeout + 1.0

    @property
    def running(self) -> bool:
        """Whether there is a supervisor, or was."""
        return self._supervisor is not None

    @property
    def supervisor(self) -> Supervisor:
        """The supervisor.

        Raises:
            SupervisorFailed: the application's lifespan has not started it, or is over.
        """
        if self._supervisor is None:
            raise SupervisorFailed("the application is not running: its server must support the ASGI lifespan protocol")
        return self._supervisor

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold log and supervisor open until `stop`. What goes wrong is raised before they are open, recorded later."""
        started = False
        self._stopping = trio.Event()  # it may have been run before
        try:
            async with AsyncExitStack() as stack:
                log = await stack.enter_async_context(open_log(self._log)) if isinstance(self._log, str) else self._log
                self._supervisor = await stack.enter_async_context(
                    open_supervisor(log, observer=self.observer, **self._knobs)
                )
                started = True
                task_status.started()
                await self._stopping.wait()
        except Exception as error:  # the supervisor has told its observer what it died of
            if not started:
                self.startup_error = error
                raise
            self.failed.set()

    async def drain(self) -> None:
        """Start no more runs and let those that are there end, as `Supervisor.drain` does; not if the service fails."""

        async def give_up() -> None:
            await self.failed.wait()
            nursery.cancel_scope.cancel(reason="a service of the supervisor died")

        self._drained = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_up)
                await self.supervisor.drain()
                nursery.cancel_scope.cancel(reason="the drain is over")
        finally:
            self._drained.set()

    async def drained(self) -> None:
        """Wait for a drain that is under way: its runs may have no readers, whom a server would wait for."""
        await self._drained.wait()

    def stop(self) -> None:
        """Let `run` return, when the supervisor's runs are over."""
        self._stopping.set()


class _Application(Starlette):
    """Starlette, with `WholeRequests` around all of it, its own error page included."""

    def build_middleware_stack(self) -> ASGIApp:
        """The middleware around the routes."""
        return WholeRequests(super().build_middleware_stack())


def create_app(
    producers: Mapping[str, Any],
    log: str | EventLog = "memory://",
    *,
    observer: Observer | None = None,
    ping_interval: float | None = 15.0,
    max_body_bytes: int = MAX_BODY_BYTES,
    **knobs: Any,
) -> Starlette:
    """The ASGI application with the routes of penstock's HTTP API. For Hypercorn's trio worker; see `serve`.

    Args:
        producers: what runs can be started of: name → producer, which is called with the request's `input` (any JSON
            value).
        log: the event log, or its URL for `open_log`.
        observer: told of what happens; by default it goes to the logger `penstock`.
        ping_interval: seconds without a send after which a stream is pinged; None = never.
        max_body_bytes: the limit on a request's body, in bytes; beyond it the answer is 413.
        knobs: the supervisor's; see `Settings`.

    Returns:
        The application; mount it, add middleware to it, or serve it as it is.

    Raises:
        ConfigurationError: a knob is unknown, or has a value that it cannot have; or a producer cannot be called.
    """
    check_duration("ping_interval", ping_interval)
    for name, producer in producers.items():
        if producer is command:
            raise ConfigurationError(
                f"the producer {name!r} would run whatever program a client names; give it a fixed argv: "
                "lambda _input: penstock.command([...])"
            )
        if not callable(producer):
            raise ConfigurationError(f"the producer {name!r} is called once for each run, and {producer!r} cannot be")
    service = Service(producers, log, observer, knobs, ping_interval=ping_interval, max_body_bytes=max_body_bytes)

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
            Route("/v1/runs", start_or_list_runs, methods=["GET", "POST"]),  # one route, or Allow would name one method
            Route("/v1/runs/{run_id}", get_run, methods=["GET"]),
            Route("/v1/runs/{run_id}/stream", _StreamRun(), methods=["GET", "POST"], name="stream_run"),
            Route("/v1/runs/{run_id}/cancel", cancel_run, methods=["POST"]),
            Route("/healthz", healthz, methods=["GET"]),
            Route("/readyz", readyz, methods=["GET"]),
        ],
        lifespan=lifespan,
        exception_handlers={
            StreamRejected: on_error,
            PenstockError: on_error,
            HTTPException: on_error,
            ClientDisconnect: on_disconnect,
            Exception: on_error,
        },
    )
    app.state.penstock = service
    return app


def service_of(request: Request) -> Service:
    """The service of the application that a request came to."""
    service: Service = request.app.state.penstock
    return service


async def start_or_list_runs(request: Request) -> Response:
    """GET, HEAD or POST /v1/runs."""
    return await (start_run if request.method == "POST" else list_runs)(request)


async def start_run(request: Request) -> Response:
    """POST /v1/runs."""
    service = service_of(request)
    wanted = requests.start_request(await requests.json_body(request, service.max_body_bytes), request.headers)
    if wanted.producer not in service.producers:
        known = ", ".join(sorted(service.producers)) or "none"
        words = f"there is no producer {wanted.producer!r:.200}; there are: {known}"
        raise StreamRejected(400, "UNKNOWN_PRODUCER", words)
    started = await service.supervisor.start_once(
        service.producers[wanted.producer],
        wanted.input,
        run_id=wanted.run_id,
        name=wanted.producer,
        timeout=wanted.timeout,
        max_silence=wanted.max_silence,
        idempotency_key=wanted.idempotency_key,
        metadata=wanted.metadata,
    )
    status = 201 if started.created else 200
    headers = {
        "Location": request.scope.get("root_path", "") + request.app.url_path_for("stream_run", run_id=started.run.id),
        "Penstock-Run-Id": started.run.id,
    }
    if wanted.stream:
        follower = service.supervisor.follow(started.run.id)
        return _stream(service, started.run.id, follower, status_code=status, headers=headers)
    return _record(started.run, status, headers)


async def list_runs(request: Request) -> Response:
    """GET /v1/runs."""
    limit, status = requests.list_query(request.query_params)
    runs = await service_of(request).supervisor.list(limit=limit, status=status)
    return JSONResponse({"runs": [run.to_json() for run in runs]})


async def get_run(request: Request) -> Response:
    """GET /v1/runs/{id}."""
    return _record(await service_of(request).supervisor.get(requests.run_id(request.path_params)))


async def stream_run(request: Request) -> Response:
    """GET, POST or HEAD /v1/runs/{id}/stream."""
    service = service_of(request)
    body = await requests.json_body(request, service.max_body_bytes) if request.method == "POST" else {}
    wanted = requests.stream_request(body, request.query_params, request.headers)
    run_id = requests.run_id(request.path_params)
    follower = service.supervisor.follow(run_id, wanted.after, last=wanted.last)
    return _stream(service, run_id, follower, pings=wanted.include_pings)


class _StreamRun:
    """`stream_run` as an application of its own: around a function Starlette handles errors, and each send, twice."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await stream_run(Request(scope, receive, send))
        await response(scope, receive, send)


async def cancel_run(request: Request) -> Response:
    """POST /v1/runs/{id}/cancel."""
    service = service_of(request)
    reason = requests.cancel_reason(await requests.json_body(request, service.max_body_bytes))
    reply = await service.supervisor.cancel(requests.run_id(request.path_params), reason)
    if reply.status is CancelStatus.ENDED:
        raise RunEnded(reply.run.id, reply.run)
    return _record(reply.run, 202 if reply.status is CancelStatus.REQUESTED else 200)


async def index(request: Request) -> Response:
    """GET /: a page to use all of this from a browser."""
    return page(service_of(request).producers)


async def healthz(_request: Request) -> Response:
    """GET /healthz: the process answers."""
    return JSONResponse({"status": "alive"})


async def readyz(request: Request) -> Response:
    """GET /readyz: runs can be started here."""
    await service_of(request).supervisor.check()
    return JSONResponse({"status": "ready"})


async def on_error(request: Request, error: Exception) -> Response:
    """What an error becomes that was raised before there was a response."""
    service = service_of(request)
    headers: list[tuple[bytes, bytes]] = []
    if isinstance(error, HTTPException):  # no such route, or no such method
        code = HTTPStatus(error.status_code).name
        answer = Answer(error.status_code, code, HTTPStatus(error.status_code).description or code, {})
        headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    else:
        answer = answer_to(error, expose_errors=service.settings.expose_errors)
    if not isinstance(error, HTTPException) and not is_refusal(error):
        answer.members["error_id"] = error_id = new_error_id()
        where = f"{request.method} {request.url.path}"
        tell(service.observer.on_error, error, error_id=error_id, where=where)
    rendered, body = answer.render(service.dialect)
    response = Response(body, answer.status)
    response.raw_headers = rendered + headers
    return response


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """The client went away while it was sending its request: there is nobody to answer."""
    return Response(status_code=400)


def _record(run: Run, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return JSONResponse(run.to_json(), status, headers)


def _stream(
    service: Service,
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
