"""Ask what listens on an address: it may be another service than the one that is configured there."""

import asyncio
import ssl

PROBE_S = 0.8  # for each question


async def first_bytes(host: str, port: int, question: bytes) -> bytes | None:
    """Return the beginning of the listener's answer: nothing when it closes the connection, None when it is silent.

    OSError when there is no connection.
    """
    reader, writer = await asyncio.open_connection(host, port)
    try:
        async with asyncio.timeout(PROBE_S):
            writer.write(question)
            return await reader.read(8)
    except TimeoutError:
        return None
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def accepts_tls(host: str, port: int) -> bool:
    """Whether a TLS connection comes about, whoever signed the certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False  # nothing is sent: only whether the listener speaks TLS is asked
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(PROBE_S):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
            writer.close()
    except (OSError, TimeoutError):
        return False
    return True
