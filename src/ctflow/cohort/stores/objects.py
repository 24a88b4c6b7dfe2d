"""Objects below a prefix of an object store, through fsspec."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from ctflow.cohort.stores.patience import Patience, StoreFault, TooMuchFault
from ctflow.core.errors import RequirementUnmet
from ctflow.core.requirements import check_requirements

Result = TypeVar("Result")

OBJECT_URL = re.compile(r"(?P<scheme>s3|gs)://(?P<bucket>[A-Za-z0-9][A-Za-z0-9._-]{1,221})(?:/(?P<prefix>.*))?")
_AT_A_TIME = 16  # requests: each waits for the store, hardly for this machine
_CONNECT_S, _READ_S = 10, 30
_SMALL_S, _SLOWEST = 60.0, 200_000  # an object may take a minute, and what its bytes take at this rate a second
_PAGES_S = 300.0
_MOST_NAMES = 10_000_000  # a page's are 1000

log = logging.getLogger(__name__)


class ObjectStore:
    """Objects whose names begin with a prefix. Methods are called from several threads.

    Credentials come from the environment that the store's own tools read; without any, requests are anonymous, as
    public archives take them. Listings are never cached: other machines write to the same prefix.

    Args:
        url: `s3://BUCKET/PREFIX` or `gs://BUCKET/PREFIX`.
        patience_s: How long a request is repeated while the store fails.

    Raises:
        RequirementUnmet: A package for this kind of store is not installed.
    """

    def __init__(self, url: str, patience_s: float) -> None:
        match = OBJECT_URL.fullmatch(url)
        if match is None:
            raise ValueError("no object store's URL")
        self._scheme = match["scheme"]
        self._root = f"{match['bucket']}/{(match['prefix'] or '').strip('/')}".rstrip("/")
        self._patience = Patience(patience_s)
        self._files = file_system(self._scheme)

    def hurry(self) -> None:
        """Give up within seconds: the run ends."""
        self._patience.hurry()

    def sizes(self, folder: str = "", start: str = "", most: int = _MOST_NAMES) -> Mapping[str, int]:
        """The objects below a folder, by their names from there, and their sizes; from the store's pages of names.

        Args:
            folder: Below the prefix.
            start: Of the names.
            most: How many there may be.

        Raises:
            StoreFault: They cannot be listed.
            TooMuchFault: They are more; the listing ends there.
        """
        root = f"{self._path(folder)}/"
        if self._scheme == "s3":
            return self._run(self._sizes_by_pages(root, start, most))

        async def listed() -> Any:
            return await self._files._find(root, detail=True)

        found = self._run(self._repeat(listed, _PAGES_S))
        if len(found) > most:  # gcsfs gives all of its pages at once
            raise TooMuchFault(f"more than {most} objects")
        files = {
            path: facts for path, facts in found.items() if facts["type"] == "file" and path.startswith(root + start)
        }
        return {path[len(root) :]: int(facts["size"] or 0) for path, facts in files.items() if not path.endswith("/")}

    async def _sizes_by_pages(self, root: str, start: str, most: int) -> Mapping[str, int]:
        """Each page is repeated by itself: of hundreds, one fails often; and only names and sizes stay in memory."""
        bucket, _, prefix = root.partition("/")
        sizes: dict[str, int] = {}
        query: dict[str, Any] = {"Bucket": bucket, "Prefix": prefix + start}

        def request() -> Awaitable[Any]:
            answer: Awaitable[Any] = self._files._call_s3("list_objects_v2", **query)
            return answer

        while True:
            page = await self._repeat(request, _SMALL_S)
            for each in page.get("Contents", ()):
                if not each["Key"].endswith("/"):  # a "folder" that some tools make
                    sizes[each["Key"][len(prefix) :]] = int(each["Size"])
            if len(sizes) > most:
                raise TooMuchFault(f"more than {most} objects")
            if not page.get("IsTruncated"):
                return sizes
            query["ContinuationToken"] = page["NextContinuationToken"]

    def read(self, name: str) -> bytes:
        """A small object.

        Raises:
            StoreFault: It cannot be read.
        """
        return bytes(self._run(self._repeat(lambda: self._files._cat_file(self._path(name)), _SMALL_S)))

    def write(self, name: str, content: bytes) -> None:
        """Write a small object.

        Raises:
            StoreFault: It cannot be written.
        """
        self._run(self._repeat(lambda: self._files._pipe_file(self._path(name), content), _SMALL_S))

    def create(self, name: str, content: bytes) -> None:
        """Write a small object unless it is there, which the store decides (If-None-Match): of two writers one wins.

        Raises:
            StoreFault: It can neither be written nor be there.
        """

        async def created() -> None:
            try:
                await self._files._pipe_file(self._path(name), content, mode="create")
            except Exception:
                # Stores and clients say it in several ways; a repeated request may also meet what itself has written.
                if not await self._files._exists(self._path(name)):
                    raise

        try:
            self._run(self._repeat(created, _SMALL_S))
        except StoreFault as fault:
            if fault.kind != "refused":
                raise
            log.warning("the store has no conditional writes: start the first process of a cohort before the others")
            self.write(name, content)

    def upload(self, files: Mapping[str, Path]) -> None:
        """Write objects from files, several at a time; some may be there if it fails.

        Raises:
            StoreFault: One cannot be written.
        """

        def one(name: str, path: Path) -> Awaitable[Any]:
            return self._repeat(
                lambda: self._files._put_file(str(path), self._path(name)),
                _SMALL_S + path.stat().st_size / _SLOWEST,
            )

        self._run(_all(one(name, path) for name, path in files.items()))

    def download(self, files: Mapping[str, tuple[Path, int]]) -> None:
        """Read objects into files, several at a time.

        Args:
            files: By object: its file, and its size as listed.

        Raises:
            StoreFault: One cannot be read.
            OSError: A file cannot be written.
        """

        def one(name: str, path: Path, size: int) -> Awaitable[Any]:
            async def got() -> None:
                await self._files._get_file(self._path(name), str(path))
                if path.stat().st_size != size:
                    raise StoreFault("no-answer", "an object was cut short")

            return self._repeat(got, _SMALL_S + size / _SLOWEST)

        self._run(_all(one(name, *rest) for name, rest in files.items()))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects, whether or not they are there.

        Raises:
            StoreFault: One cannot be removed.
        """

        def one(name: str) -> Awaitable[Any]:
            async def removed() -> None:
                with suppress(FileNotFoundError):
                    await self._files._rm_file(self._path(name))

            return self._repeat(removed, _SMALL_S)

        self._run(_all(one(name) for name in names))

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    async def _repeat(self, request: Callable[[], Awaitable[Result]], timeout_s: float) -> Result:
        try:
            return await self._patience.repeat(request, timeout_s)
        except StoreFault as fault:
            if fault.kind != "no-credentials" or self._scheme != "s3":
                raise
            log.info("no credentials for object stores: requests are anonymous")
            self._files = file_system(self._scheme, is_anonymous=True)
            return await self._patience.repeat(request, timeout_s)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Result:
        from fsspec.asyn import sync  # noqa: PLC0415  # of the extra `cohort`

        result: Result = sync(self._files.loop, lambda: work)
        return result


async def _all(requests: Iterable[Awaitable[Any]]) -> None:
    """Wait for all of them, so many at a time; the first failure ends the others."""
    gate = asyncio.Semaphore(_AT_A_TIME)

    async def gated(request: Awaitable[Any]) -> None:
        async with gate:
            await request

    tasks = [asyncio.ensure_future(gated(request)) for request in requests]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@cache
def file_system(scheme: str, *, is_anonymous: bool = False) -> Any:
    """This process's client of a kind of store: a new one reads megabytes of descriptions, which takes 0.1 s.

    Raises:
        RequirementUnmet: A package for it is not installed.
    """
    check_requirements("cohort")
    import fsspec  # noqa: PLC0415  # of the extra `cohort`

    options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
    if scheme == "s3":
        # Repetitions are ours: three layers of them would multiply.
        once = {"mode": "standard", "total_max_attempts": 1}
        limits = {"connect_timeout": _CONNECT_S, "read_timeout": _READ_S, "max_pool_connections": 4 * _AT_A_TIME}
        options |= {"config_kwargs": {**limits, "retries": once}, "anon": is_anonymous}
    try:
        files = fsspec.filesystem(scheme, **options)
    except ImportError as error:
        raise RequirementUnmet("gs:// needs the package gcsfs: python -m pip install gcsfs") from error
    files.retries = 1
    return files
