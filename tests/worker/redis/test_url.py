"""`redis.url`: an option, a flag or a path that is wrong is one sentence, exit code 2; a password is never printed."""

import pytest

from worker.cli import main
from worker.config import RedisConfig
from worker.redis.client import RedisClient
from worker.redis.url import CERT_REQS, FLAGS, TEXT, TLS_FLAGS, TLS_TEXT, WHOLE_NUMBERS, check_url

HOST = "127.0.0.1:1"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"redis://{HOST}/0?foo=bar", "unknown option 'foo'; known are username, password"),
        (f"redis://{HOST}/0?socket_timeout=nan", "unknown option 'socket_timeout'"),
        (f"redis://{HOST}/0?protocol=3", "unknown option 'protocol'"),
        (f"redis://{HOST}/0?ssl_cert_reqs=none", "write rediss:// instead of redis://"),
        (f"rediss://{HOST}/0?ssl_cert_reqs=nope", "ssl_cert_reqs is 'nope'; want none, optional, required"),
        (f"rediss://{HOST}/0?ssl_check_hostname=nope", "ssl_check_hostname is 'nope'; want true or false"),
        (f"redis://{HOST}/0?socket_keepalive=ja", "socket_keepalive is 'ja'; want true or false"),
        (f"redis://{HOST}/?db=one", "db is 'one'; want a whole number"),
        (f"redis://{HOST}/notadb", "its path '/notadb' is not the number of a database"),
        ("redis://127.0.0.1:port/0", "its port is not a number"),
        ("redis://127.0.0.1:70000/0", "its port is not a number from 0 to 65535"),
        ("http://127.0.0.1:80", "its scheme is 'http'; want redis://"),
        ("localhost", "its scheme is ''; want redis://"),
    ],
)
def test_wrong_part_of_a_url_is_named_in_one_sentence(url: str, words: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MILLRACE__REDIS__URL", url)
    assert main(["lookup", "u1"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("password", ["xyz#qqq", "xyz/qqq", "xyz?qqq", "12#xyzqqq", "12/xyzqqq", "12?xyzqqq=3"])
@pytest.mark.parametrize("user", ["", "shop"])
def test_password_with_a_reserved_character_is_never_printed(user: str, password: str, monkeypatch, capsys) -> None:
    monkeypatch.setenv("MILLRACE__REDIS__URL", f"redis://{user}:{password}@{HOST}/0")
    assert main(["lookup", "u1"]) == 2
    assert main(["config", "show"]) == 0
    printed = capsys.readouterr()
    assert "percent-encode it" in printed.err
    assert "xyz" not in printed.err + printed.out
    assert "qqq" not in printed.err + printed.out


def test_secret_option_of_a_url_is_masked_and_the_others_are_shown(monkeypatch, capsys) -> None:
    monkeypatch.setenv("MILLRACE__REDIS__URL", f"rediss://u:hunter1@{HOST}/0?password=hunter2&db=1&username=u")
    assert main(["config", "show"]) == 0
    printed = capsys.readouterr().out
    assert f"rediss://***@{HOST}/0?password=***&db=1&username=u" in printed
    assert "hunter" not in printed


@pytest.mark.parametrize("cluster", [False, True])
def test_every_known_option_is_accepted(cluster: bool) -> None:
    values = dict.fromkeys((*TEXT, *TLS_TEXT), "x") | dict.fromkeys((*FLAGS, *TLS_FLAGS), "true")
    values |= dict.fromkeys(WHOLE_NUMBERS, "0") | {"max_connections": "5"}
    options = [f"{name}={value}" for name, value in values.items()] + [f"ssl_cert_reqs={each}" for each in CERT_REQS]
    for option in options:
        assert RedisClient(RedisConfig(url=f"rediss://{HOST}/0?{option}", cluster=cluster)).address == HOST


@pytest.mark.parametrize("url", ["redis://h", "redis://h:1/", "rediss://u:p%2F%40@h:1/15", "unix:///run/redis@1.sock"])
def test_usual_urls_are_accepted(url: str) -> None:
    check_url(url)
