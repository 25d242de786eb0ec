import base64
import socket

import pytest

from keepalive.core.callers import Key
from keepalive.http1 import RequestHead
from keepalive.proxy.access import admit
from keepalive.proxy.settings import Settings

OPEN = Settings({})
NAMED = Settings({}, allowed_hosts=frozenset(["studio.lan"]), allowed_origins=frozenset(["https://app.lan"]))
KEYS = (Key("ci", "secret"), Key("desk", "other"), Key("lm", "sk-lm-a:b"), Key("odd", "'it'"))
LOCKED = Settings({}, keys=KEYS, allowed_origins=frozenset(["https://app.lan"]))
PUBLIC = Settings({}, loopback=False)
APPS = Settings({}, allowed_origins=frozenset(["app://obsidian.md", "safari-web-extension://1af9"]))
MACHINE = socket.gethostname()


def head(*lines: str, method: bytes = b"POST") -> RequestHead:
    pairs = [line.encode("latin-1").split(b": ", 1) for line in lines]
    return RequestHead(method, b"/v1/chat/completions", [(name, value) for name, value in pairs])


@pytest.mark.parametrize(
    ("settings", "lines", "code"),
    [
        (OPEN, ["Host: localhost:1235"], None),
        (OPEN, ["Host: 127.0.0.1:1235"], None),
        (OPEN, ["Host: [::1]:1235"], None),
        (OPEN, ["Host: [fe80::1%25eth0]:1235"], None),
        (OPEN, ["Host: [fe80::1%eth0]"], None),
        (OPEN, ["Host: 127.1:1235"], None),
        (PUBLIC, ["Host: 0x7f.1"], None),
        (OPEN, ["Host: 127.1.evil"], "host"),
        (OPEN, ["Host: 1.2.3.4.5"], "host"),
        (OPEN, ["Host: 127.0x"], "host"),
        (OPEN, [], None),
        (OPEN, ["Host: evil.example"], "host"),
        (OPEN, ["Host: studio.lan"], "host"),
        (NAMED, ["Host: studio.lan"], None),
        (OPEN, ["Host: keepalive.localhost:1235"], None),
        (OPEN, ["Host: notlocalhost"], "host"),
        (OPEN, ["Host: localhost.localdomain:1235"], None),
        (OPEN, ["Host: evil.localdomain"], "host"),
        (OPEN, ["Host: kubernetes.docker.internal:1235"], None),
        (OPEN, ["Host: host.docker.internal:1235"], None),
        (PUBLIC, ["Host: Host.Containers.Internal"], None),
        (OPEN, ["Host: host.container.internal"], None),
        (OPEN, ["Host: localhost4.localdomain4:1235"], None),
        (OPEN, ["Host: localhost6"], None),
        (OPEN, ["Host: ip6-localhost:1235"], None),
        (OPEN, ["Host: localhost7"], "host"),
        (OPEN, ["Host: docker.internal"], "host"),
        (OPEN, ["Host: host.evil.internal"], "host"),
        (OPEN, ["Host: host.evil.example.internal"], "host"),
        (OPEN, ["Host: host.docker.internal.evil.example"], "host"),
        (OPEN, ["Host: localhost", "Sec-Fetch-Site: same-origin"], None),
        (OPEN, ["Host: localhost", "Sec-Fetch-Site: none"], None),
        (OPEN, ["Host: localhost", "Sec-Fetch-Site: cross-site"], "origin"),
        (OPEN, ["Host: localhost:1235", "Origin: http://localhost:1235"], None),
        (OPEN, ["Host: localhost:1235", "Origin: http://localhost:1"], "origin"),
        (OPEN, ["Host: localhost", "Origin: https://app.lan"], "origin"),
        (NAMED, ["Host: localhost", "Origin: https://app.lan", "Sec-Fetch-Site: cross-site"], None),
        # Who listens for others has more to guard, not less; who asks for keys needs nothing else.
        (PUBLIC, ["Host: evil.example"], "host"),
        (PUBLIC, ["Host: 10.0.0.7:1235"], None),
        (PUBLIC, ["Host: 10.0.0.7", "Origin: https://evil.example"], "origin"),
        (PUBLIC, ["Host: 10.0.0.7", "Sec-Fetch-Site: cross-site"], "origin"),
        (PUBLIC, [f"Host: {MACHINE}:1235"], None),
        (PUBLIC, [f"Host: {MACHINE.partition('.')[0].upper()}.local"], None),
        (OPEN, ["Host: ward-7"], "host"),
        (APPS, ["Host: localhost", "Origin: app://obsidian.md", "Sec-Fetch-Site: cross-site"], None),
        (APPS, ["Host: localhost", "Origin: safari-web-extension://1AF9"], None),
        (LOCKED, ["Host: evil.example", "Authorization: Bearer secret"], None),
        (LOCKED, ["Host: localhost"], "invalid_api_key"),
        (LOCKED, ["Host: localhost", "Authorization: Bearer wrong"], "invalid_api_key"),
        (LOCKED, ["Host: localhost", "Authorization: secret"], None),
        (LOCKED, ["Host: localhost", "Authorization: Token secret"], None),
        (LOCKED, ["Host: localhost", "Authorization: Bearer Bearer secret"], None),
        (LOCKED, ["Host: localhost", "x-api-key: Bearer secret"], None),
        (LOCKED, ["Host: localhost", 'Authorization: Bearer "secret"'], None),
        (LOCKED, ["Host: localhost", "x-api-key: 'secret'"], None),
        (LOCKED, ["Host: localhost", 'Authorization: Bearer "secret'], "invalid_api_key"),
        (LOCKED, ["Host: localhost", "Authorization: secret wrong"], "invalid_api_key"),
        (LOCKED, ["Host: localhost", "Authorization: "], "invalid_api_key"),
        (LOCKED, ["Host: localhost", "Authorization: Basic secret"], "invalid_api_key"),
        (LOCKED, ["Host: localhost", "Proxy-Authorization: Bearer secret"], "invalid_api_key"),
    ],
)
def test_who_may_ask(settings, lines, code):
    _, refused = admit(head(*lines), settings)

    assert (refused and refused[2]) == code


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("Authorization: Bearer secret", "ci"),
        ("authorization: BEARER  other ", "desk"),
        ("X-Api-Key: other", "desk"),
        ("Api-Key: secret", "ci"),
        ('Authorization: Bearer "other"', "desk"),
        ("Authorization: Bearer 'it'", "odd"),
        ("Authorization: Basic " + base64.b64encode(b"me:secret").decode(), "ci"),
        ("Authorization: Basic " + base64.b64encode(b"other:").decode(), "desk"),
        ("Authorization: Basic " + base64.b64encode(b"sk-lm-a:b").decode(), "lm"),
        ("Authorization: Basic " + base64.b64encode(b"sk-lm-a:b:").decode(), "lm"),
        ("Authorization: Basic " + base64.b64encode(b"me:sk-lm-a:b").decode(), "lm"),
    ],
)
def test_a_key_is_known_by_its_name(line, name):
    key, refused = admit(head("Host: localhost", line), LOCKED)

    assert refused is None
    assert key is not None
    assert key.name == name
    assert "secret" not in repr(KEYS)


def test_a_preflight_of_an_allowed_page_needs_no_key():
    asked = ["Host: localhost", "Origin: https://app.lan"]

    assert admit(head(*asked, method=b"OPTIONS"), LOCKED) == (None, None)
    assert admit(head(*asked), LOCKED)[1] is not None
    assert (
        admit(head("Host: localhost", "Origin: https://evil.lan", method=b"OPTIONS"), LOCKED)[1] is not None
    )


@pytest.mark.parametrize(
    ("lines", "named"),
    [
        (["Host: Studio.Home:1235"], '"studio.home"'),
        (["Host: localhost", "Origin: https://chat.lan"], '"https://chat.lan"'),
        (["Host: localhost", "Sec-Fetch-Site: cross-site"], "of another origin"),
        (["Host: localhost", "Origin: null"], "serve it by HTTP"),
        (["Host: " + "x" * 9999], '"' + "x" * 100 + '"'),
    ],
)
def test_who_is_turned_away_is_told_by_which_name(lines, named):
    refused = admit(head(*lines), OPEN)[1]

    assert refused is not None
    assert named in refused[1]
