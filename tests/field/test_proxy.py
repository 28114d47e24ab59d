"""The fault test's cable does each fault that is ordered, to that site and direction alone."""

import asyncio
import contextlib
import ssl
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from tests.field.proxy import Cable
from tests.server import office

HERE = "127.0.0.1"
SENT = bytes(range(256)) * 40

Talk = Callable[[Cable, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]


def through(talk: Talk) -> Any:
    """What a talk through a cable to an echo comes to."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
        writer.close()

    async def run() -> Any:
        far = await asyncio.start_server(echo, HERE, 0)
        cable = Cable(*far.sockets[0].getsockname())
        near = await asyncio.start_server(cable.take, HERE, 0)
        reader, writer = await asyncio.open_connection(*near.sockets[0].getsockname())
        try:
            async with asyncio.timeout(10):
                return await talk(cable, reader, writer)
        finally:
            await cable.order({"site": HERE, "cut": True})
            writer.transport.abort()
            near.close()
            far.close()
            await asyncio.sleep(0.05)  # so that every end is closed before the loop is

    return asyncio.run(run())


async def said_back(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(SENT)
    return await reader.readexactly(len(SENT))


async def set_mode(cable: Cable, way: str, **mode: object) -> None:
    await cable.order({"site": HERE, "way": way, "mode": mode})


def test_without_an_order_every_byte_passes():
    assert through(lambda _, *ends: said_back(*ends)) == SENT


@pytest.mark.parametrize("way", ["up", "down"])
def test_one_bit_of_the_byte_that_is_named_is_flipped_once(way):
    async def talk(cable, *ends):
        await set_mode(cable, way, spoil_after=5000)
        return await said_back(*ends), await said_back(*ends)

    first, second = through(talk)
    assert [i for i in range(len(SENT)) if first[i] != SENT[i]] == [5000]
    assert second == SENT


@pytest.mark.parametrize("way", ["up", "down"])
def test_a_cut_resets_after_the_bytes_that_are_named(way):
    async def talk(cable, reader, writer):
        await set_mode(cable, way, cut_after=5000)
        writer.write(SENT)
        got = b""
        with pytest.raises(ConnectionResetError):
            while True:
                data = await reader.read(1 << 16)
                got += data
                assert data, "an orderly end is no cut"
        return got

    assert through(talk) in {SENT[:5000], b""}  # a reset takes what was not read yet


def test_a_cut_at_once_resets():
    async def talk(cable, reader, writer):
        await said_back(reader, writer)
        await cable.order({"site": HERE, "cut": True})
        with pytest.raises(ConnectionResetError):
            await reader.read(1)

    through(talk)


def test_a_black_hole_swallows_and_its_connections_stay_half_open():
    async def talk(cable, reader, writer):
        await said_back(reader, writer)
        await set_mode(cable, "up", lost=True)
        writer.write(b"lost")
        await asyncio.sleep(0.1)
        await set_mode(cable, "up")
        writer.write(b"after it")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(reader.read(1), 0.3)

    through(talk)


@pytest.mark.parametrize(("mode", "least"), [({"delay": 0.3}, 0.3), ({"rate": 30_000.0}, 0.3)])
def test_delay_and_rate_take_their_time_in_one_direction(mode, least):
    async def talk(cable, *ends):
        await set_mode(cable, "down", **mode)
        began = time.monotonic()
        await said_back(*ends)
        return time.monotonic() - began

    assert least <= through(talk) < 5


def test_another_site_has_its_own_faults():
    async def talk(cable, *ends):
        await cable.order({"site": "127.0.0.9", "way": "up", "mode": {"lost": True}})
        return await said_back(*ends)

    assert through(talk) == SENT


def test_what_was_said_is_said_again(tmp_path):
    """A replayed TLS connection gets as far as the server's half of a new handshake."""
    folder = office.make_coordinator(tmp_path / "c")
    heard = list[bytes]()  # what came through TLS

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            heard.append(await reader.read(100))
        writer.close()

    async def run() -> int:
        server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        server.load_cert_chain(folder.server_certificate, folder.server_key)
        far = await asyncio.start_server(listen, HERE, 0, ssl=server)
        cable = Cable(*far.sockets[0].getsockname())
        near = await asyncio.start_server(cable.take, HERE, 0)
        client = ssl.create_default_context(cafile=folder.ca)
        port = near.sockets[0].getsockname()[1]
        reader, writer = await asyncio.open_connection(HERE, port, ssl=client)
        writer.write(b"secret")
        await reader.read()
        writer.close()
        await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            back = await cable.order({"site": HERE, "replay": True})
        near.close()
        far.close()
        await asyncio.sleep(0.05)
        return back

    assert asyncio.run(run()) > 500
    assert heard == [b"secret"]
