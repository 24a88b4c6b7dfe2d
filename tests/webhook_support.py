"""A program that a webhook tells of results."""

from __future__ import annotations

import http.server
import ssl
import threading


class HookReceiver:
    """Answers with the statuses, then 204; `requests` are the headers and bodies."""

    def __init__(self, *statuses: int, tls: ssl.SSLContext | None = None) -> None:
        self.requests: list[tuple[dict, bytes]] = []
        statuses_left, requests = list(statuses), self.requests

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:  # the base class's name
                body = self.rfile.read(int(self.headers["Content-Length"]))
                requests.append((dict(self.headers), body))
                status = statuses_left.pop(0) if statuses_left else 204
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "http://127.0.0.1:1/elsewhere")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_words) -> None:
                pass

        class Server(http.server.ThreadingHTTPServer):
            def handle_error(self, *_what) -> None:
                """A client that goes away is what some tests are about."""

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
