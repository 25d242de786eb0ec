"""Where LM Studio may be, and which pages may ask: as they are written, and as they are used."""

import re
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keepalive.config.addresses import read_origin, read_url
from tests.kit.configs import MODEL, mistakes, parse

# --- Upstreams ---


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://host/lm", "http://host/lm"),
        ("http://host:1234/lm/", "http://host:1234/lm"),
        ("HTTPS://Host.Example/Team/LM///", "https://host.example/Team/LM"),
        ("http://[::1]:8080/a/b.c/~d", "http://[::1]:8080/a/b.c/~d"),
        ("http://host/l%20m", "http://host/l%20m"),
        ("http://host/v1/lm", "http://host/v1/lm"),
        ("http://host/", "http://host"),
    ],
)
def test_an_upstream_may_be_published_under_a_path(text: str, url: str) -> None:
    (upstream,) = parse(f'[[upstreams]]\nurl = "{text}"\n{MODEL}').upstreams

    assert upstream.url == url


def test_two_paths_of_one_host_are_two_servers_and_one_path_is_one() -> None:
    def upstreams(first: str, second: str) -> str:
        return f'[[upstreams]]\nname = "a"\nurl = "{first}"\n[[upstreams]]\nname = "b"\nurl = "{second}"\n'

    both = MODEL + 'upstream = "a, b"\n'
    found = parse(upstreams("http://host/one", "http://host/two") + both)
    report = mistakes(upstreams("http://host/one", "http://HOST:80/one/") + both)

    assert [kept.upstream for kept in found.kept] == ["a", "b"]
    assert report == [
        '6: upstreams[1].url: "http://host:80/one" is the url of upstreams[0] too; write another one'
    ]


@pytest.mark.parametrize("url", ["http://[::1]:1234", "http://0.0.0.0:1234", "http://LOCALHOST.:1234/"])
def test_several_addresses_of_this_machine_are_one_server(url: str) -> None:
    text = f'[[upstreams]]\nname = "a"\nurl = "http://127.0.0.1:1234"\n[[upstreams]]\nname = "b"\nurl = "{url}"\n'

    (report,) = mistakes(text + MODEL + 'upstream = "a, b"\n')

    assert "is the url of upstreams[0] too" in report


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "http://[fe80::1%eth0]:1234",
            "is an address of one link alone, which is none without its interface; write the name of that machine, "
            'such as "http://studio.local:1234"',
        ),
        ("http://box/lm?x=1", 'has a query; write "http://box/lm"'),
        ("http://box?x=1", 'has a query; write "http://box"'),
        ("http://box/lm?", 'has a query; write "http://box/lm"'),
        ("http://box/lm#top", 'has a fragment; write "http://box/lm"'),
        ("http://box/a/../lm", 'has empty or dot segments; write "http://box/lm"'),
        ("http://box/lm/.", 'has empty or dot segments; write "http://box/lm"'),
        ("http://box/../..", 'has empty or dot segments; write "http://box"'),
        ("http://box/%2E%2e/lm", 'has empty or dot segments; write "http://box/lm"'),
        ("http://box//lm", 'has empty or dot segments; write "http://box/lm"'),
        (
            "http://box/lm/v1",
            'ends in a path of LM Studio itself, which keepalive adds; write "http://box/lm"',
        ),
        (
            "http://box/api/v1/models/load",
            'ends in a path of LM Studio itself, which keepalive adds; write "http://box"',
        ),
        ("http://Müller:1234", 'is not scheme, host and port; write "http://xn--mller-kva:1234"'),
        ("http://box/V1/", 'ends in a path of LM Studio itself, which keepalive adds; write "http://box"'),
        (
            "http://box/lm/api/v0/models",
            'ends in a path of LM Studio itself, which keepalive adds; write "http://box/lm"',
        ),
        ("http://box/l m", 'has characters that stand in no path; write "http://box/l%20m"'),
        ("http://box/100%", 'has characters that stand in no path; write "http://box/100%25"'),
        ("http://box/é", 'has characters that stand in no path; write "http://box/%C3%A9"'),
        ("ftp://box/lm", 'is not scheme, host and port; write "http://127.0.0.1:1234"'),
        ("app://box", 'is not scheme, host and port; write "http://127.0.0.1:1234"'),
        ("box/lm", 'is not scheme, host and port; write "http://box"'),
        ("http//box:1234", 'is not scheme, host and port; write "http://box:1234"'),
        ("http:/box:1234/lm", 'is not scheme, host and port; write "http://box:1234"'),
        ("https:box", 'is not scheme, host and port; write "https://box"'),
        ("http://http://box:1234", 'is not scheme, host and port; write "http://box:1234"'),
        (" http://box:1234 ", 'is not scheme, host and port; write "http://box:1234"'),
        ("htp://box:1234", 'is not scheme, host and port; write "http://box:1234"'),
    ],
)
def test_a_path_with_a_mistake(url: str, message: str) -> None:
    assert mistakes(f'[[upstreams]]\nurl = "{url}"\n{MODEL}') == [f'2: upstreams[0].url: "{url}" {message}']


@pytest.mark.parametrize("url", ["http://me:hunter2@box/lm", "http://box/lm@hunter2", "http://me@hunter2"])
def test_credentials_are_refused_wherever_they_stand_and_not_repeated(url: str) -> None:
    report = mistakes(f'[[upstreams]]\nurl = "{url}"\n{MODEL}')

    assert report == [
        "2: upstreams[0].url: holds credentials, which do not stand here; write api_token_env or "
        "api_token_file"
    ]


def test_keepalive_does_not_ask_itself_under_a_path_either() -> None:
    report = mistakes(f'[[upstreams]]\nurl = "http://localhost:1235/lm"\n{MODEL}')

    assert report == [
        '2: upstreams[0].url: "http://localhost:1235/lm" is server.listen, so keepalive would ask itself; '
        "write where LM Studio listens"
    ]


# --- Origins ---


@pytest.mark.parametrize(
    ("text", "origin"),
    [
        ("https://chat.example.org", "https://chat.example.org"),
        ("HTTPS://Chat.Example.org:443/", "https://chat.example.org"),
        ("http://localhost:80", "http://localhost"),
        ("http://localhost:443", "http://localhost:443"),
        ("http://localhost:05173", "http://localhost:5173"),
        ("http://[0:0:0:0:0:0:0:1]:3000", "http://[::1]:3000"),
        ("app://obsidian.md", "app://obsidian.md"),
        ("tauri://localhost", "tauri://localhost"),
        ("capacitor://localhost", "capacitor://localhost"),
        (
            "chrome-extension://ABCDEFGHIJKLMNOPabcdefghijklmnop",
            "chrome-extension://abcdefghijklmnopabcdefghijklmnop",
        ),
        (
            "moz-extension://1f2d3c4b-5a69-7887-96a5-b4c3d2e1f001/",
            "moz-extension://1f2d3c4b-5a69-7887-96a5-b4c3d2e1f001",
        ),
        (
            "vscode-webview://0n1qf7s5fl8tkq9v6a2c3d4e5f60n1qf7s5fl8tkq9v6a2c3d4e5",
            "vscode-webview://0n1qf7s5fl8tkq9v6a2c3d4e5f60n1qf7s5fl8tkq9v6a2c3d4e5",
        ),
        ("app://localhost:80", "app://localhost:80"),
        ("app://-/", "app://-"),
        ("app://.", "app://."),
        ("capacitor-electron://-", "capacitor-electron://-"),
    ],
)
def test_an_origin_is_read_as_a_browser_sends_it(text: str, origin: str) -> None:
    server = parse(f'[server]\nallowed_origins = ["{text}"]\n{MODEL}').server

    assert server.allowed_origins == (origin,)


NULL = (
    'would let any page in, because every sandboxed page and every file sends "null"; serve the page and '
    'write its address, such as "http://localhost:8000"'
)


@pytest.mark.parametrize(
    ("origin", "message"),
    [
        ("null", NULL),
        ("file:///home/me/chat.html", NULL),
        ("data:text/html", NULL),
        ("*", "would let every web page load models; name each origin by itself"),
        ("https://*.example.org", "is what no browser sends; name each origin by itself"),
        ("chrome-extension://*", "is what no browser sends; name each origin by itself"),
        ("localhost:5173", 'is not scheme, host and port; write "http://localhost:5173"'),
        ("127.0.0.1:5173", 'is not scheme, host and port; write "http://127.0.0.1:5173"'),
        ("localhost.example.org", 'is not scheme, host and port; write "https://localhost.example.org"'),
        ("ws://localhost:5173", 'is not scheme, host and port; write "http://localhost:5173"'),
        ("wss://chat.example.org", 'is not scheme, host and port; write "https://chat.example.org"'),
        ("htps://chat.example.org", 'is not scheme, host and port; write "https://chat.example.org"'),
        ("https://chat.example.org/app", 'is not scheme, host and port; write "https://chat.example.org"'),
        ("app://obsidian.md/index.html", 'is not scheme, host and port; write "app://obsidian.md"'),
        ("app://[1]", 'is not scheme, host and port; write "https://chat.example.org"'),
        ("https://-", 'is not scheme, host and port; write "https://chat.example.org"'),
        ("chrome-extension:abc", 'is not scheme, host and port; write "https://chat.example.org"'),
        ("https://chat.example.org:0", 'is not scheme, host and port; write "https://chat.example.org"'),
        ("", 'is not scheme, host and port; write "https://chat.example.org"'),
    ],
)
def test_an_origin_with_a_mistake(origin: str, message: str) -> None:
    report = mistakes(f'[server]\nallowed_origins = ["{origin}"]\n{MODEL}')

    assert report == [f'2: server.allowed_origins[0]: "{origin}" {message}']


# --- Any address ---

PIECES = """
    http:// https:// HTTP:// app:// ws:// // / . .. %2e %zz %20 : :80 :443 :0 ? # @ [::1] box Host.example
    v1 api v0 models lm é * null localhost 127.0.0.1
"""
pieces = st.sampled_from(PIECES.split())


def taken(read: Callable[[str], str], text: str) -> tuple[str, str]:
    """What is read, or what is said of it."""
    try:
        return read(text), ""
    except ValueError as refused:
        return "", str(refused)


addresses = st.lists(pieces | st.text(max_size=3), max_size=8).map("".join)


@settings(deadline=None)
@given(addresses | addresses.map("http://box/".__add__))
@example("http://box/v1/v1")
@example("http://box/v1/../v1?")
def test_a_url_that_is_taken_is_plain_and_one_that_is_advised_is_taken(text: str) -> None:
    url, told = taken(read_url, text)
    advised = re.search(r'; write "([^"]*)"$', told)

    assert told.isprintable()
    assert advised is None or read_url(advised[1])
    if url:
        parts = urlsplit(url)

        assert read_url(url) == url
        assert url == f"{parts.scheme}://{parts.netloc}{parts.path}"
        assert parts.netloc == parts.netloc.lower()
        assert url.isascii()
        assert not re.search(r"[\s\\?#@]|//.*//|/\.\.?(/|$)|/$", url)


@settings(deadline=None)
@given(addresses)
@example("ws://box:80")
@example("https://[::]")
def test_an_origin_that_is_taken_is_plain_and_one_that_is_advised_is_taken(text: str) -> None:
    origin, told = taken(read_origin, text)
    advised = re.search(r'; write "([^"]*)"$', told)

    assert told.isprintable()
    assert advised is None or read_origin(advised[1])
    if origin:
        assert read_origin(origin) == origin
        assert re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9.:_\[\]-]+", origin)
        assert not re.search(r"^http:.*[^\]:]:80$|^https:.*[^\]:]:443$", origin)
