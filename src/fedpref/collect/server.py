"""The page on loopback: who has its address may choose, and nobody else's page can ask for it."""

from __future__ import annotations

import json
import secrets
import socket
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from fedpref.collect.sitting import RefusedError, Sitting
from fedpref.errors import UserError

LOOPBACK = "127.0.0.1"
SHORTCUT = ".page.html"  # in the folder of choices
LARGEST = 200_000  # bytes of a request
HEADERS = {
    # nothing from elsewhere, nothing inline, in nobody's frame, and the address is told nobody
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}
FILES = {
    "": ("page.html", "text/html; charset=utf-8"),
    "page.js": ("page.js", "text/javascript; charset=utf-8"),
    "page.css": ("page.css", "text/css; charset=utf-8"),
}


def application(sitting: Sitting, token: str, port: int) -> Any:
    """Return the page as an application of Starlette.

    Args:
        sitting: What people do.
        token: Begins every path.
        port: Of the address, which requests must name.
    """
    from starlette.applications import Starlette
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import ClientDisconnect, Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route

    hosts = {f"{LOOPBACK}:{port}", f"localhost:{port}"}
    origins = {f"http://{host}" for host in hosts}
    texts = sitting.texts
    answers: Mapping[str, Callable[[Any], dict[str, Any]]] = {
        "begin": lambda asked: {
            "title": texts.title,
            "edits": texts.edits,
            "questions": len(texts.names),
        },
        "next": lambda asked: sitting.next(asked.get("rater")),
        "choose": sitting.choose,
        "undo": sitting.undo,
    }

    def refusal(request: Request) -> str:
        """Return why a request is not answered; empty for one that is."""
        if request.headers.get("host") not in hosts:
            return "this page is at another address"
        if not secrets.compare_digest(request.path_params["token"].encode(), token.encode()):
            return "this is not the whole address"
        if request.headers.get("origin", "") not in {"", *origins}:
            return "another page asks"
        # a link may be followed to the page, which has no data; a frame of it is nobody's
        is_link = request.method == "GET" and request.headers.get("sec-fetch-dest") == "document"
        site = request.headers.get("sec-fetch-site", "none")
        if site not in ("none", "same-origin") and not is_link:
            return "another page asks"
        return ""

    def guarded(
        answer: Callable[[Request], Awaitable[Response]],
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guard(request: Request) -> Response:
            why = refusal(request)
            response = JSONResponse({"refused": why}, 403) if why else await answer(request)
            response.headers.update(HEADERS)
            return response

        return guard

    async def file(request: Request) -> Response:
        name, kind = FILES.get(request.path_params["name"], ("", ""))
        if not name:
            return Response("there is nothing here", 404)
        content = (files("fedpref.collect") / "page" / name).read_bytes()
        return Response(content, media_type=kind)

    def asked_for(name: str) -> Callable[[Request], Awaitable[Response]]:
        async def ask(request: Request) -> Response:
            return await answered(request, answers[name])

        return ask

    async def answered(request: Request, answer: Callable[[Any], dict[str, Any]]) -> Response:
        # another page's form can send text, and no JSON without asking first
        if request.headers.get("content-type", "").partition(";")[0] != "application/json":
            return JSONResponse({"refused": "expected application/json"}, 415)
        content = b""
        try:
            async for piece in request.stream():
                content += piece
                if len(content) > LARGEST:
                    return JSONResponse({"refused": "the request is too large"}, 413)
        except ClientDisconnect:  # nobody is there to read an answer
            return Response(status_code=400)
        try:
            asked = json.loads(content)
            if not isinstance(asked, dict):
                raise RefusedError("expected an object")
            return JSONResponse(await run_in_threadpool(answer, asked))
        except (RefusedError, ValueError, RecursionError) as error:
            return JSONResponse({"refused": str(error)}, 400)
        except sqlite3.Error as error:  # as of a full disk: nothing was written
            return JSONResponse({"again": f"the choice cannot be written: {error}"}, 503)

    return Starlette(
        routes=[
            *(
                Route(f"/{{token}}/api/{name}", guarded(asked_for(name)), methods=["POST"])
                for name in answers
            ),
            Route("/{token}/{name:path}", guarded(file), methods=["GET"]),
        ]
    )


class Page:
    """The server of a page, on a port of loopback, in a thread of its own.

    Args:
        sitting: What people do. Its folder keeps the address, so that a page which stayed open goes
            on when the command does.
        port: The port; None takes the folder's last one, or one that is free.

    Raises:
        UserError: The port is taken.
    """

    def __init__(self, sitting: Sitting, port: int | None = None) -> None:
        import uvicorn

        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        store = sitting.store
        try:
            self._socket.bind((LOOPBACK, store.kept("port", 0) if port is None else port))
        except OSError as error:
            if port is not None:
                raise UserError(
                    f"--port {port}: {error.strerror}. Leave it out to take a free one."
                ) from error
            self._socket.bind((LOOPBACK, 0))
        self._socket.listen()  # who asks before the server runs waits
        self.port = int(self._socket.getsockname()[1])
        self.sitting = sitting
        self.token = str(store.kept("token") or secrets.token_urlsafe(16))
        store.keep("port", self.port)
        store.keep("token", self.token)
        settings = uvicorn.Config(
            application(sitting, self.token, self.port),
            log_level="warning",
            access_log=False,  # whose lines have the token
            server_header=False,
            lifespan="off",
        )
        self._server = uvicorn.Server(settings)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True
        )
        self._thread.start()

    @property
    def address(self) -> str:
        """The whole address."""
        return f"http://{LOOPBACK}:{self.port}/{self.token}/"

    def shortcut(self) -> Path:
        """Write a file that leads to the page, and return it.

        A browser is begun with it, and not with the address, which other accounts of the machine
        could read off the command.
        """
        file = self.sitting.store.folder / SHORTCUT
        file.touch(mode=0o600)
        file.chmod(0o600)
        file.write_text(f'<meta http-equiv="refresh" content="0; url={self.address}">\n')
        return file

    def end(self) -> None:
        """Answer what is being asked, and stop."""
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        (self.sitting.store.folder / SHORTCUT).unlink(missing_ok=True)
