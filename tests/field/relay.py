"""The wire of the field test: it ends TLS with the coordinator's own certificate and keeps a copy.

``python -m tests.field.relay FOLDER COPIES`` listens where sites look for the coordinator of a
folder, and passes on to where the coordinator listens. What passed stands in clear in the folder
COPIES, one file for each connection and direction.
"""

import asyncio
import itertools
import ssl
import sys
from pathlib import Path

from fedward.server.coordinator_folder import CoordinatorFolder

_PIECE = 1 << 16


async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, copy: Path) -> None:
    """Pass on and keep all bytes of one direction."""
    try:
        with copy.open("wb", buffering=0) as file:
            while data := await reader.read(_PIECE):
                file.write(data)
                writer.write(data)
                await writer.drain()
    except OSError:
        pass  # one side is gone, as in every test of kills and cuts
    finally:
        writer.close()


async def serve(folder: CoordinatorFolder, copies: Path) -> None:
    config, numbers = folder.config(), itertools.count()
    near = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    near.load_cert_chain(folder.server_certificate, folder.server_key)
    far = ssl.create_default_context(cafile=folder.ca)

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_connection(
                config.listen, config.port, ssl=far, server_hostname=config.host
            )
        except OSError:  # the coordinator is dead at the moment
            writer.close()
            return
        name = f"{next(numbers):06}"
        await asyncio.gather(
            pump(reader, there[1], copies / f"{name}.from-site"),
            pump(there[0], writer, copies / f"{name}.to-site"),
        )

    server = await asyncio.start_server(take, config.host, config.port, ssl=near)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve(CoordinatorFolder.load(Path(sys.argv[1])), Path(sys.argv[2])))
