"""A small EC2 instance metadata service, version 2: gives a role's credentials to who asks with a token."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

ROLE = "database-server"
TOKEN = "metadata-session-token"


class Imds:
    """Serves one role's credentials on a free loopback port; `asked` counts the hand-outs."""

    def __init__(self, access_key: str, secret: str, session_token: str):
        self.asked = 0
        document = json.dumps({
            "Code": "Success", "Type": "AWS-HMAC", "LastUpdated": "2026-01-01T00:00:00Z", "AccessKeyId": access_key,
            "SecretAccessKey": secret, "Token": session_token, "Expiration": "2099-01-01T00:00:00Z",
        })
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, document))
        self._server.daemon_threads = True

    @property
    def endpoint(self) -> str:
        """What AWS_EC2_METADATA_SERVICE_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> "Imds":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc) -> None:
        self._server.shutdown()
        self._server.server_close()


def _handler(imds: Imds, document: str):
    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self):
            self._answer(TOKEN if self.path == "/latest/api/token" else None)

        def do_GET(self):
            if self.headers.get("x-aws-ec2-metadata-token") != TOKEN:
                return self._answer(None, 401)
            listing = "/latest/meta-data/iam/security-credentials"
            if self.path.rstrip("/") == listing:
                return self._answer(ROLE)
            if self.path == f"{listing}/{ROLE}":
                imds.asked += 1
                return self._answer(document)
            return self._answer(None)

        def _answer(self, body, status=404):
            data = (body or "").encode()
            self.send_response(200 if body is not None else status)
            self.send_header("x-aws-ec2-metadata-token-ttl-seconds", "21600")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            """Quiet: the tests' output is for the tests."""

    return Handler
