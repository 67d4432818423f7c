"""Small web servers that tests start on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def local_server(answer_post: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Serve POST requests by a function of their handler while the context lasts; gives the address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answer_post(self)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def send(handler: BaseHTTPRequestHandler, status: int, content: bytes) -> None:
    handler.send_response(status)
    handler.end_headers()
    handler.wfile.write(content)
