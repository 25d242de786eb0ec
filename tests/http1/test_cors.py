import pytest

from keepalive.http1 import RequestHead, cors

MINE = "https://mine.example"
ORIGINS = frozenset([MINE, "app://obsidian.md"])


def head(*lines: str, method: bytes = b"OPTIONS") -> RequestHead:
    pairs = [line.encode("latin-1").split(b": ", 1) for line in lines]
    return RequestHead(method, b"/v1/chat/completions", [(name, value) for name, value in pairs])


GRANT = cors.granted(head(f"Origin: {MINE}"), ORIGINS)


@pytest.mark.parametrize("origin", sorted(ORIGINS))
def test_a_page_that_may_ask_may_read_the_answer(origin):
    granted = dict(cors.granted(head(f"Origin: {origin}"), ORIGINS))

    assert granted[b"Access-Control-Allow-Origin"] == origin.encode()
    assert granted[b"Vary"] == b"Origin"
    assert b"Retry-After" in granted[b"Access-Control-Expose-Headers"]


def test_safari_names_its_extensions_in_capital_letters_and_reads_its_own_name_back():
    origin = "safari-web-extension://140BB581-A2C0-422A-9DD3-6982A5ABEE5E"

    granted = cors.granted(head(f"Origin: {origin}"), frozenset([origin.lower()]))

    assert granted[0] == (b"Access-Control-Allow-Origin", origin.encode())


@pytest.mark.parametrize(
    "lines", [[], ["Origin: https://evil.example"], ["Origin: null"], [f"Origin: {MINE}", f"Origin: {MINE}"]]
)
def test_others_are_granted_nothing(lines):
    assert cors.granted(head(*lines), ORIGINS) == []
    assert cors.preflight(head(*lines, "Access-Control-Request-Method: POST"), ORIGINS) is None


@pytest.mark.parametrize(
    ("theirs", "allowed"),
    [
        ([], MINE.encode()),
        ([(b"access-control-allow-origin", b"*")], b"*"),
        ([(b"Access-Control-Allow-Origin", MINE.encode()), (b"Vary", b"Accept, origin")], MINE.encode()),
        ([(b"Access-Control-Allow-Origin", b"http://localhost:3000")], MINE.encode()),
    ],
)
def test_beside_an_upstreams_own_grant_nothing_stands_twice(theirs, allowed):
    headers = cors.joined([(b"X", b"1"), *theirs], GRANT)
    found = [value for name, value in headers if name.lower() == b"access-control-allow-origin"]

    assert found == [allowed]
    assert headers[0] == (b"X", b"1")
    assert sum(b"rigin" in value for name, value in headers if name == b"Vary") == 1
    assert any(name == b"Access-Control-Expose-Headers" for name, _ in headers)
    assert cors.joined(theirs, []) == theirs


def test_a_preflight_is_answered_for_what_it_asks():
    asked = [
        f"Origin: {MINE}",
        "Access-Control-Request-Method: POST",
        "Access-Control-Request-Headers: authorization, x-keepalive-heartbeat",
        "Access-Control-Request-Private-Network: true",
    ]
    answer = dict(cors.preflight(head(*asked), ORIGINS))

    assert answer[b"Access-Control-Allow-Origin"] == MINE.encode()
    assert b"POST" in answer[b"Access-Control-Allow-Methods"]
    assert answer[b"Access-Control-Allow-Headers"] == b"authorization, x-keepalive-heartbeat"
    assert answer[b"Access-Control-Allow-Private-Network"] == b"true"
    assert b"Access-Control-Allow-Private-Network" not in dict(cors.preflight(head(*asked[:3]), ORIGINS))
    assert cors.preflight(head(asked[0]), ORIGINS) is None
    assert cors.preflight(head(*asked, method=b"POST"), ORIGINS) is None
