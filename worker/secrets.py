"""Mask secrets before a value is printed or logged."""

import re
from typing import Any

MASK = "***"
SECRETS = ("password", "secret")  # in the name of a key, of a field or of an option in a URL
_URL_OPTION = re.compile(rf"([?&][^=&#]*(?:{'|'.join(SECRETS)})[^=&#]*=)[^&#]*", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a key of this name holds a secret."""
    return any(secret in name for secret in SECRETS)


def masked(name: str, value: Any) -> Any:
    """Return the value of the key `name` as it may be printed."""
    if value and is_secret(name):
        return MASK
    return masked_url(value) if isinstance(value, str) and "://" in value else value


def masked_url(url: str) -> str:
    """Return the URL without user, password, and the values of options whose names say that they are secret."""
    scheme, rest = url.split("://", 1)
    if "@" in rest:
        rest = f"{MASK}@{rest.rsplit('@', 1)[1]}"
    return f"{scheme}://" + _URL_OPTION.sub(rf"\1{MASK}", rest)
