"""An S3 server on loopback: moto's, behind a handler that can fail, close connections and answer slowly."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

from ctflow.cohort.stores.objects import file_system

BUCKET = "bucket"
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "testing",
    "AWS_SECRET_ACCESS_KEY": "testing",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}
Fault = Callable[[str, str], int | float | None]


@dataclass
class Store:
    """A running server.

    Attributes:
        url: Its address.
        fault: Of a request's method and path: a status to answer with, the seconds to wait for in the middle of the
            answer's body, or None.
        requests: Method and path of each request.
    """

    url: str = ""
    fault: Fault = lambda _method, _path: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    @property
    def client(self):
        return boto3.client("s3", endpoint_url=self.url, region_name="us-east-1", aws_access_key_id="testing",
                            aws_secret_access_key="testing")  # fmt: skip

    def keys(self, prefix: str = "") -> list[str]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [each["Key"] for page in pages for each in page.get("Contents", ())]

    def content(self, key: str) -> bytes:
        return self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read()

    def empty(self) -> None:
        self.fault = lambda _method, _path: None
        for key in self.keys():
            self.client.delete_object(Bucket=BUCKET, Key=key)
        self.requests.clear()


@contextmanager
def object_store() -> Iterator[Store]:
    """The server, with an empty bucket."""
    file_system.cache_clear()  # the last one is of another address
    store = Store()
    inner = DomainDispatcherApplication(create_backend_app)

    def application(environ, start_response) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        store.requests.append((method, path))
        fault = store.fault(method, path)
        if isinstance(fault, int):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start_response(f"{fault} Fault", [("Content-Type", "application/xml")])
            return [b"<Error><Code>InternalError</Code><Message>injected</Message></Error>"]
        answer = inner(environ, start_response)
        return answer if fault is None else _slowly(answer, fault)

    server = make_server("127.0.0.1", 0, application, threaded=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    store.url = f"http://127.0.0.1:{server.port}"
    try:
        store.client.create_bucket(Bucket=BUCKET)
        store.requests.clear()
        yield store
    finally:
        file_system.cache_clear()
        server.shutdown()
        thread.join()


def _slowly(answer: Iterable[bytes], seconds: float) -> Iterator[bytes]:
    content = b"".join(answer)
    yield content[: len(content) // 2]
    time.sleep(seconds)
    yield content[len(content) // 2 :]
