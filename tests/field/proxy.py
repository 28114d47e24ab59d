"""The cable between hospitals and coordinator of the fault test, with faults on order.

``python -m tests.field.proxy ADDRESS PORT BEHIND SOCKET`` listens where sites look for the
coordinator and passes every byte on to where it listens. TLS goes through unopened. Who a byte is
from is told by its address. An order is a line of JSON to the Unix socket SOCKET, a number of bytes
comes back (:class:`Cable`).
"""

import asyncio
import contextlib
import json
import socket
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

_PIECE = 1 << 16
_KEPT_LINES, _KEPT_PIECES = 16, 32
_REPLAY_SECONDS, _PAUSE_SECONDS = 5.0, 0.05
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: close with RST


@dataclass(kw_only=True)
class Mode:
    """What happens to the bytes of one direction.

    Args:
        delay: Seconds that each piece of at most 64 KiB waits, one after the other.
        rate: Most bytes a second.
        lost: A black hole: nothing passes, and no connection of now ever passes anything again.
        cut_after: So many bytes on, every connection of the site is reset; once.
        spoil_after: So many bytes on, one bit is flipped; once.
    """

    delay: float = 0.0
    rate: float = float("inf")
    lost: bool = False
    cut_after: int | None = None
    spoil_after: int | None = None


@dataclass(kw_only=True)
class Line:
    """One connection: its ends, whether it is half open, what the site has said."""

    ends: tuple[asyncio.StreamWriter, asyncio.StreamWriter]
    dead: bool = False
    said: list[bytes] = field(default_factory=list)


class Cable:
    """Passes connections on, and does what orders ask.

    An order names a ``site`` by its address and has one of: ``way`` (``up`` or ``down``) with
    ``mode``, the fields of a :class:`Mode`; ``cut``: reset its connections now; ``replay``: send
    all that was kept of its connections again, in new ones, and return how many bytes came back
    after the server's part of the handshakes; ``inject``: what was kept, into its open connections.

    Args:
        host: Where the coordinator listens.
        port: Its port.
    """

    def __init__(self, host: str, port: int) -> None:
        self._far = (host, port)
        self._modes = dict[tuple[str, str], Mode]()
        self._open = dict[str, list[Line]]()
        self._kept = dict[str, list[list[bytes]]]()

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a site, from beginning to end."""
        site = writer.get_extra_info("peername")[0]
        try:
            there = await asyncio.open_connection(*self._far)
        except OSError:  # the coordinator is dead at the moment
            writer.close()
            return
        line = Line(ends=(writer, there[1]))
        lines = self._open.setdefault(site, [])
        lines.append(line)
        try:
            await asyncio.gather(
                self._pump(reader, there[1], site, "up", line),
                self._pump(there[0], writer, site, "down", line),
            )
        finally:
            lines.remove(line)
            kept = self._kept.setdefault(site, [])
            kept.append(line.said)
            del kept[:-_KEPT_LINES]

    async def _pump(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        site: str,
        way: str,
        line: Line,
    ) -> None:
        with contextlib.suppress(OSError):  # one side is gone
            while data := await reader.read(_PIECE):
                if way == "up" and len(line.said) < _KEPT_PIECES:
                    line.said.append(data)
                await self._pass(data, writer, site, way, line)
        if not line.dead:  # the other side of a half-open connection does not learn of it
            writer.close()

    async def _pass(
        self, data: bytes, writer: asyncio.StreamWriter, site: str, way: str, line: Line
    ) -> None:
        mode = self._modes.get((site, way), Mode())
        line.dead = line.dead or mode.lost
        if line.dead:
            return
        if wait := mode.delay + len(data) / mode.rate:
            await asyncio.sleep(wait)
        if mode.spoil_after is not None:
            if mode.spoil_after < len(data):
                spoiled = bytearray(data)
                spoiled[mode.spoil_after] ^= 1
                data, mode.spoil_after = bytes(spoiled), None
            else:
                mode.spoil_after -= len(data)
        if mode.cut_after is not None:
            if mode.cut_after < len(data):
                writer.write(data[: mode.cut_after])
                await writer.drain()
                mode.cut_after = None
                self._cut(site)
                return
            mode.cut_after -= len(data)
        writer.write(data)
        await writer.drain()

    def _cut(self, site: str) -> None:
        for line in self._open.get(site, []):
            for end in line.ends:
                end.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                end.transport.abort()

    async def order(self, order: dict[str, Any]) -> int:
        """Do what an order asks; returns a number of bytes, 0 where none is meant."""
        site, open_lines = order["site"], self._open.get(order["site"], [])
        if "way" in order:
            self._modes[site, order["way"]] = Mode(**order["mode"])
        elif "cut" in order:
            self._cut(site)
        elif "inject" in order:
            for line in open_lines:
                line.ends[1].writelines(line.said)
            return sum(sum(map(len, line.said)) for line in open_lines)
        elif "replay" in order:
            stored = [*self._kept.get(site, []), *(line.said for line in open_lines)]
            return sum(await asyncio.gather(*map(self._replay, stored)))
        return 0

    async def _replay(self, said: Sequence[bytes]) -> int:
        """Say piece by piece what was said before; returns how many bytes come back."""
        reader, writer = await asyncio.open_connection(*self._far)
        back = 0
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(_REPLAY_SECONDS):
                for piece in said:
                    writer.write(piece)
                    await asyncio.sleep(_PAUSE_SECONDS)  # it answers to one after the other
                while data := await reader.read(_PIECE):
                    back += len(data)
        writer.close()
        return back


async def serve(address: str, port: int, behind: str, control: str) -> None:
    cable = Cable(behind, port)

    async def obey(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        done = await cable.order(json.loads(await reader.readline()))
        writer.write(b"%d\n" % done)
        writer.close()

    async with (
        await asyncio.start_server(cable.take, address, port) as server,
        await asyncio.start_unix_server(obey, control),
    ):
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]))
