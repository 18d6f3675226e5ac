"""Pages of a worker's health server."""

import urllib.error
import urllib.request


def read_page(port: int, page: str) -> tuple[int, str]:
    """Return the status and the text of `page`, as /readyz."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{page}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def read_metric(port: int, name: str) -> float:
    """Return the value of a metric that has no labels."""
    lines = read_page(port, "/metrics")[1].splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(f"{name} "))
