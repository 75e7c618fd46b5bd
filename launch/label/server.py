"""The page on which people judge pairs, and what it asks: starlette on uvicorn.

Who has no token sees the page's own text and nothing of the data. A token is a part of the link behind `#`, which
browsers send to nobody; the page keeps it for its tab and sends it in a header, so that no other site can use it.
"""

import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from importlib.resources import files
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from launch.label.board import Board
from recipes.errors import CapacityError, RequestError

LOCAL = ("127.0.0.1", "localhost", "::1")
MAX_BODY = 64 * 1024
START_S = 20.0
_HEADERS = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
_PAGE = {
    "/": ("page.html", "text/html"),
    "/page.js": ("page.js", "text/javascript"),
    "/page.css": ("page.css", "text/css"),
}

Answer = Callable[[Board, str, dict[str, Any]], dict[str, Any]]


def build_app(board: Board, title: str, host: str) -> Starlette:
    """The page and its calls; only requests to the host's own name are answered where that is this machine."""
    routes = [Route(path, _static(*named)) for path, named in _PAGE.items()]
    calls: dict[str, Answer] = {"/api/next": _next, "/api/judge": _judge, "/api/undo": _undo}
    routes += [Route(path, _call(board, title, answer), methods=["POST"]) for path, answer in calls.items()]
    # A page of another site could otherwise reach this one under a name that it makes mean 127.0.0.1.
    hosts = [*LOCAL, "[::1]"] if host in LOCAL else ["*"]
    return Starlette(routes=routes, middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)])


@contextlib.contextmanager
def serving(board: Board, title: str, host: str, port: int) -> Iterator[str]:
    """Serve while the block runs, in a thread; gives the address. Raises CapacityError for a port that is taken."""
    config = uvicorn.Config(
        build_app(board, title, host), host=host, port=port, log_config=None, lifespan="off", access_log=False
    )
    try:
        listener = config.bind_socket()
        listener.listen(config.backlog)  # requests wait from here on until the thread takes them
    except (OSError, SystemExit) as error:
        raise CapacityError(f"the page cannot be served at {host}:{port}: {error}; give another port, or 0") from None
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="label", daemon=True)
    thread.start()
    shown = f"[{host}]" if ":" in host else host
    try:
        yield f"http://{shown}:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(START_S)
        listener.close()


def _static(name: str, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    content = files("launch.label").joinpath(name).read_bytes()

    async def page(request: Request) -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)

    return page


def _call(board: Board, title: str, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
    """A call of the page: by an annotator's token, JSON in and out."""

    async def call(request: Request) -> Response:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        annotator = board.annotator_of(token) if scheme.lower() == "bearer" else None
        if annotator is None:
            return _refused(401, "this link is not valid; ask for your own")
        body = await _body(request)
        if body is None:
            return _refused(400, f"not a JSON object of at most {MAX_BODY} bytes")
        try:
            said = await run_in_threadpool(answer, board, annotator, body)
        except RequestError as error:
            return _refused(400, str(error))
        progress = {"labels": board.count(), "wanted": board.wanted, "own": board.count(annotator)}
        return JSONResponse({"title": title, "annotator": annotator, **progress, **said}, headers=_HEADERS)

    return call


async def _body(request: Request) -> dict[str, Any] | None:
    data = b""
    async for chunk in request.stream():
        data += chunk
        if len(data) > MAX_BODY:
            return None
    try:
        found = json.loads(data)
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status_code=status, headers=_HEADERS)


def _next(board: Board, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
    board.refresh()
    shown = board.next(annotator)
    return {"pair": None if shown is None else shown.to_json(), "done": board.is_done()}


def _judge(board: Board, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
    board.judge(annotator, str(body.get("pair")), body.get("choice"), str(body.get("comment", "")))  # type: ignore[arg-type]
    return _next(board, annotator, body)


def _undo(board: Board, annotator: str, body: dict[str, Any]) -> dict[str, Any]:
    undone = board.undo(annotator)
    return {**_next(board, annotator, body), "undone": undone}
