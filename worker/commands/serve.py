"""Answer slate lookups over HTTP until SIGTERM or SIGINT; pending requests are answered first.

  GET /v1/slates/{user_id}   the slate as JSON, or the popular one for a user without a slate; 404 without either
  GET /livez, /readyz        200 while the process runs; 200 while Redis answers

example:
  millrace serve --port 8080 &
  curl --retry 5 --retry-connrefused localhost:8080/v1/slates/u1
"""

import socket
from argparse import ArgumentParser, Namespace

from worker.commands.arguments import port
from worker.commands.config import add_config

GRACE_S = 10  # for pending requests, after a signal


def configure(parser: ArgumentParser) -> None:
    parser.add_argument("--host", help="address to listen on (default: serve.host)")
    parser.add_argument("--port", type=port, help="port to listen on, 0 for a free one (default: serve.port)")
    add_config(parser)


def run(args: Namespace) -> int:
    import signal

    from worker import config_file, logging
    from worker.errors import ConfigError

    try:
        import uvicorn

        from worker.lookup.http import application
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error.name} is not installed; run pip install 'millrace[serve]'") from error

    loaded = config_file.load(args.config)
    logging.configure(loaded.log)
    listening = listen(args.host or loaded.serve.host, loaded.serve.port if args.port is None else args.port)
    options = uvicorn.Config(
        application(loaded),
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        backlog=loaded.serve.max_concurrent_lookups,
    )
    for each in (signal.SIGTERM, signal.SIGINT):  # uvicorn raises them again after its shutdown: ignore that
        signal.signal(each, lambda *_: None)
    server = uvicorn.Server(options)
    server.run(sockets=[listening])
    return 0 if server.started else 1


def listen(host: str, number: int) -> socket.socket:
    """Return a listening socket. ConfigError when the address is in use or not this machine's.

    Opened here because uvicorn would exit with 3, the code of an ArtifactError.
    """
    from worker.errors import ConfigError

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, number), family=family)
    except OSError as error:
        raise ConfigError(f"cannot listen on {host}:{number}: {error.strerror}; set serve.port, or 0") from error
