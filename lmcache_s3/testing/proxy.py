"""A TCP proxy that makes the network bad: latency, a bandwidth limit, resets, answers cut short, refusals.

Knows no protocol, so it serves for any S3 client over plain HTTP. Runs an event loop in a thread of its own; settings
may be changed at any time from any thread, and count from the next bytes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from types import TracebackType

_BLOCK_BYTES = 1 << 16
_QUEUE_BLOCKS = 256


class Proxy:
    """`with Proxy("127.0.0.1", 9000) as proxy:` then talk to `proxy.endpoint_url`.

    latency_s: added to each direction's bytes, without limiting the rate. bytes_per_s: of all answers of a connection,
    None for no limit. cut_answer_after_bytes: close each connection once it has carried so many bytes of answers (0:
    the request passes, no answer comes back). reset: close with RST rather than FIN. refuse: new connections are closed
    at once, open ones go on. counts: connections, refused, cut.
    """

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self.port = 0
        self.latency_s = 0.0
        self.bytes_per_s: float | None = None
        self.cut_answer_after_bytes: int | None = None
        self.reset = False
        self.refuse = False
        self.counts: Counter[str] = Counter()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def endpoint_url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Proxy:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut_all(self) -> None:
        """End every open connection now."""
        asyncio.run_coroutine_threadsafe(self._cancel(), self._loop).result()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._cancel()
        await self._server.wait_closed()

    async def _cancel(self) -> None:
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # A task of ours, not asyncio's: its cancellation at the end is no error to be logged.
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.counts["connections"] += 1
        writers = [writer]
        try:
            if self.refuse:
                self.counts["refused"] += 1
                return
            with contextlib.suppress(OSError):
                server_reader, server_writer = await asyncio.open_connection(*self._target)
                writers.append(server_writer)
                ways = [
                    asyncio.ensure_future(self._carry(reader, server_writer, answers=False)),
                    asyncio.ensure_future(self._carry(server_reader, writer, answers=True)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
        finally:
            for w in writers:
                await self._close(w)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool) -> None:
        """One direction: read ahead, deliver each block when it is due. Returns at the end or when cut."""
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_QUEUE_BLOCKS)
        ahead = asyncio.ensure_future(self._read_ahead(reader, queue))
        carried = 0
        free_at_s = 0.0
        try:
            while True:
                due_s, block = await queue.get()
                if not block:
                    return
                if answers and self.cut_answer_after_bytes is not None:
                    block = block[: max(self.cut_answer_after_bytes - carried, 0)]
                carried += len(block)
                if answers and self.bytes_per_s is not None:
                    free_at_s = max(free_at_s, due_s) + len(block) / self.bytes_per_s
                    due_s = free_at_s
                await asyncio.sleep(max(due_s - self._loop.time(), 0))
                writer.write(block)
                await writer.drain()
                if answers and self.cut_answer_after_bytes is not None and carried >= self.cut_answer_after_bytes:
                    self.counts["cut"] += 1
                    return
        except OSError:
            return
        finally:
            ahead.cancel()
            await asyncio.gather(ahead, return_exceptions=True)

    async def _read_ahead(self, reader: asyncio.StreamReader, queue: asyncio.Queue[tuple[float, bytes]]) -> None:
        block = b"-"
        while block:
            try:
                block = await reader.read(_BLOCK_BYTES)
            except OSError:
                block = b""
            await queue.put((self._loop.time() + self.latency_s, block))

    async def _close(self, writer: asyncio.StreamWriter) -> None:
        if self.reset:
            sock = writer.get_extra_info("socket")
            if sock is not None:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()
        else:
            writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
