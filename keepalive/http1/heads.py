"""Heads: the bytes before a body, read by a grammar that has no second reading.

A head is checked line by line against RFC 9112, and what the RFC merely tolerates is refused: bare CR or LF,
folded lines, whitespace around a name, bytes that are not text. Two programs that read the same bytes
differently are how one request becomes two, so what is passed on is always written anew from what was read,
never copied. llhttp is not asked about heads: it tolerates some of this, and one grammar is enough.
How the bytes were cut into segments never changes the result, errors included.
"""

import re
from collections.abc import Collection

Headers = list[tuple[bytes, bytes]]

_TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]++"
_REQUEST_LINE = re.compile(rb"(" + _TOKEN + rb") ([\x21-\x7e]++) HTTP/([0-9]\.[0-9])\r\n")
_STATUS_LINE = re.compile(rb"HTTP/1\.([01]) ([0-9]{3})(?: ([\t\x20-\x7e\x80-\xff]*+))?\r\n")
_FIELD_LINE = re.compile(rb"(" + _TOKEN + rb"):[\t ]*+([\t\x20-\x7e\x80-\xff]*+)\r\n")
# Lines of headers to the empty one, by the same grammar: nearly every head comes whole, and is read at one go.
_FIELD_LINES = re.compile(rb"(?:" + _TOKEN + rb":[\t\x20-\x7e\x80-\xff]*+\r\n)*+\r\n")
# Clients send the zone of an address along, as RFC 6874 writes it or bare.
_HOST = re.compile(
    rb"(\[[0-9A-Fa-f:.]{2,45}(?:%[0-9A-Za-z._~-]{1,32})?\]|[0-9A-Za-z._~!$&'()*+,;=%-]*)(?::([0-9]{0,5}))?"
)

# As text or quoted, and with parameters, of which none is known (RFC 7240). People write fractions, too.
_WAIT = re.compile(
    rb"[ \t]*wait[ \t]*=[ \t]*\"?([0-9]{1,9}(?:\.[0-9]{1,9})?)\"?[ \t]*(?:;.*)?", re.IGNORECASE
)

#: A body whose end only the end of the connection shows; one in chunks.
UNTIL_CLOSE = -2
CHUNKED = -1

#: Of an answer of our own: it is for this caller, now, and is what we say it is.
NO_STORE: Headers = [(b"Cache-Control", b"no-store"), (b"X-Content-Type-Options", b"nosniff")]

# What is said to the next neighbour alone. Where a request came from (Via, X-Forwarded-For) is for the other
# end: it passes as it came, and nothing is added to it.
_HOP_BY_HOP = frozenset(
    [
        b"connection",
        b"keep-alive",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    ]
)


class BadHead(Exception):
    """A head, or the body behind it, that cannot be accepted; `status` is what a client is told."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


def _whole(
    start_line: re.Pattern[bytes], data: bytes, limit: int
) -> tuple[tuple[bytes, ...], Headers, bytes] | None:
    """A head that has come at one go, and the bytes behind it: what `HeadReader` makes of it; None of any other."""
    line = start_line.match(data)
    if line is None:
        return None
    begin = line.end()
    lines = _FIELD_LINES.match(data, begin)
    if lines is None:
        return None
    end = lines.end()
    if end > limit:
        return None
    found = [(name, value.rstrip(b" \t")) for name, value in _FIELD_LINE.findall(data, begin, end)]
    return line.groups(b""), found, data[end:]


class HeadReader:
    """Reads one head. After `feed` returned the bytes behind it, `start` and `headers` hold what it said."""

    __slots__ = ("_kept", "_length", "_limit", "_start_line", "headers", "start")

    def __init__(self, start_line: re.Pattern[bytes], limit: int) -> None:
        self._start_line = start_line
        self._limit = limit
        self._kept = bytearray()
        self._length = 0  # of the lines that are done
        self.start: tuple[bytes, ...] = ()
        self.headers: Headers = []

    @property
    def begun(self) -> bool:
        return bool(self._length or self._kept)

    def feed(self, data: bytes) -> bytes | None:
        """The bytes behind the head once it is complete, until then None. Raises BadHead, once."""
        search_from = 0
        if not self._length and not self._kept:
            whole = _whole(self._start_line, data, self._limit)
            if whole is not None:
                self.start, self.headers, rest = whole
                return rest
        if self._kept:
            search_from = len(self._kept)
            self._kept += data
            data = bytes(self._kept) if b"\n" in data else b""
            if not data:
                self._refuse_oversize(len(self._kept))
                return None
            self._kept.clear()
        position = 0
        while True:
            end = data.find(b"\n", max(position, search_from)) + 1
            if not end:
                self._refuse_oversize(len(data) - position)
                self._refuse_no_text(data, position)
                self._kept += memoryview(data)[position:]
                return None
            self._refuse_oversize(end - position)
            if not self.start:
                self._refuse_no_text(data, position)
                match = self._start_line.fullmatch(data, position, end)
                if match is None:
                    raise BadHead(400, "the first line is not HTTP/1.1")
                self.start = tuple(part or b"" for part in match.groups())
            elif end - position == 2 and data[position] == 13:
                return data[end:]
            else:
                match = _FIELD_LINE.fullmatch(data, position, end)
                if match is None:
                    raise BadHead(400, "a header line is malformed")
                self.headers.append((match[1], match[2].rstrip(b" \t")))
            self._length += end - position
            position = end

    def _refuse_oversize(self, more: int) -> None:
        if self._length + more > self._limit:
            raise BadHead(431 if self.start else 414, f"the head is larger than {self._limit} bytes")

    def _refuse_no_text(self, data: bytes, position: int) -> None:
        # A TLS hello holds no line end: without this its sender would wait for the head's timeout.
        if not self.start and len(data) > position and not 0x21 <= data[position] <= 0x7E:
            raise BadHead(400, "this port speaks plain HTTP/1.1")


_FORGOTTEN: Headers = []
_NAMES_FORGOTTEN: dict[bytes, list[bytes]] = {}
_NO_VALUES: list[bytes] = []


class _Head:
    """Headers that can be asked for by name, which is in lower case."""

    __slots__ = ("_by_name", "headers")

    def __init__(self, headers: Headers) -> None:
        self.say(headers)

    def say(self, headers: Headers) -> None:
        """From now on it has these."""
        self.headers = headers
        # A dozen of them are asked for, one after the other.
        by_name: dict[bytes, list[bytes]] = {}
        for name, value in headers:
            name = name.lower()
            if name in by_name:
                by_name[name].append(value)
            else:
                by_name[name] = [value]
        self._by_name = by_name

    def forget(self) -> None:
        """Nobody will ask for the headers any more: a stream goes on for long, and needs none."""
        self.headers, self._by_name = _FORGOTTEN, _NAMES_FORGOTTEN

    def values(self, name: bytes) -> list[bytes]:
        """Every value of the header `name`."""
        return self._by_name.get(name, _NO_VALUES)

    def get(self, name: bytes) -> bytes | None:
        """The value of the one header `name`; None when there are none or several."""
        found = self.values(name)
        return found[0] if len(found) == 1 else None

    def listed(self, name: bytes) -> set[bytes]:
        """The members of a comma-separated header, in lower case."""
        found = self.values(name)
        return _members(found) if found else set()


class RequestHead(_Head):
    """What a caller asked. `body` is the length of its body, or CHUNKED."""

    __slots__ = (
        "body",
        "expects",
        "keeps_alive",
        "like",
        "method",
        "minor",
        "reading",
        "shared",
        "target",
        "upgrade",
    )

    def __init__(self, method: bytes, target: bytes, headers: Headers, minor: int = 1) -> None:
        super().__init__(headers)
        #: The first of the heads that said the same, and what whoever answers made of that one. It does not change.
        self.like: RequestHead = self
        self.shared = False  # it is remembered, for others
        self.reading: object = None
        self.method = method
        self.target = target
        self.minor = minor
        self.body = 0
        self.expects = False
        self.upgrade: bytes | None = None  # what the caller asks to speak instead of HTTP
        # HTTP/1.0 clients that want to be kept are older than the models: one request each is enough.
        self.keeps_alive = minor == 1 and b"close" not in self.listed(b"connection")

    def again(self, body: int) -> "RequestHead":
        """Another one that says the same, but for the length of its body."""
        head = object.__new__(RequestHead)
        head.headers, head._by_name = self.headers, self._by_name
        head.like, head.reading, head.shared = self, None, False
        head.method, head.target, head.minor = self.method, self.target, self.minor
        head.body, head.expects, head.upgrade = body, self.expects, self.upgrade
        head.keeps_alive = self.keeps_alive
        return head


class ReplyHead(_Head):
    """What an upstream answered. `body` is the length of its body, CHUNKED or UNTIL_CLOSE."""

    __slots__ = ("body", "events", "keeps_alive", "minor", "reason", "status", "stream")

    def __init__(self, status: int, reason: bytes, headers: Headers, minor: int) -> None:
        super().__init__(headers)
        self.status = status
        self.reason = reason
        self.minor = minor
        self.body = 0
        self.keeps_alive = minor == 1 and b"close" not in self.listed(b"connection")
        kind = self.get(b"content-type")
        #: Server-sent events; those that can be read, not being compressed.
        self.events = kind is not None and kind.lower().startswith(b"text/event-stream")
        self.stream = self.events and not self.values(b"content-encoding")


#: Of heads that are remembered: how many, and how long one may be.
_REMEMBERED = 128
_REMEMBERED_BYTES = 4096


class Familiar:
    """Heads that came before. A program that asks a thousand times says the same each time, but for one number.

    Only what was read whole and found to be a request is remembered. So whatever is found here was checked byte for
    byte: what differs are the digits of its one Content-Length, and that is not among its headers.
    """

    __slots__ = ("_heads",)

    def __init__(self) -> None:
        self._heads: dict[tuple[bytes, bytes], RequestHead] = {}

    def find(self, data: bytes) -> tuple[RequestHead, bytes] | None:
        """The head that `data` begins with, and the bytes behind it; None where it comes for the first time."""
        end = data.find(b"\r\n\r\n") + 4
        if not 4 <= end <= _REMEMBERED_BYTES:
            return None
        begin, stop = _length_in(data, end)
        known = self._heads.get((data[:begin], data[stop:end]))
        if known is None:
            return None
        return known.again(int(data[begin:stop]) if stop else known.body), data[end:]

    def remember(self, data: bytes, head: RequestHead) -> None:
        """`head` is what `data` begins with."""
        end = data.find(b"\r\n\r\n") + 4
        if not 4 <= end <= _REMEMBERED_BYTES:
            return
        if len(self._heads) >= _REMEMBERED:
            del self._heads[next(iter(self._heads))]
        begin, stop = _length_in(data, end)
        head.like = head.again(head.body)
        head.like.like, head.like.shared = head.like, True
        if stop:
            head.like.say([pair for pair in head.headers if pair[0].lower() != b"content-length"])
        # In two parts: joined, a Content-Length without digits would be the same as one whose digits were left out.
        self._heads[data[:begin], data[stop:end]] = head.like


def _length_in(data: bytes, end: int) -> tuple[int, int]:
    """Where the digits of a Content-Length begin and stop in a head of `end` bytes; nowhere where none are seen."""
    at = data.find(b"ength: ", 0, end)
    if at < 11 or data[at - 11 : at].lower() != b"\r\ncontent-l":
        return 0, 0
    begin = at + len(b"ength: ")
    stop = data.find(b"\r\n", begin)
    digits = data[begin:stop]
    return (begin, stop) if digits.isdigit() and len(digits) <= 18 else (0, 0)


def request_reader(limit: int) -> HeadReader:
    return HeadReader(_REQUEST_LINE, limit)


def head_so_far(reader: HeadReader) -> RequestHead | None:
    """What is known of a request whose head is no head, or no whole one: whoever sent it is told in its words."""
    if not reader.start:
        return None
    method, target, _ = reader.start
    return RequestHead(method, target, reader.headers)


def reply_reader(limit: int) -> HeadReader:
    return HeadReader(_STATUS_LINE, limit)


def request_head(reader: HeadReader) -> RequestHead:
    """The request in a complete head. Raises BadHead for everything that could be read in two ways."""
    method, target, version = reader.start
    if version not in (b"1.1", b"1.0"):
        raise BadHead(505, "only HTTP/1.1 and HTTP/1.0 are spoken here")
    head = RequestHead(method, target, reader.headers, int(version[2:]))
    _refuse_target(method, target)
    _refuse_host(head)
    head.body = _request_body(head)
    head.expects = _expects(head)
    protocols = head.values(b"upgrade")
    if len(protocols) == 1 and head.minor == 1 and b"upgrade" in head.listed(b"connection"):
        head.upgrade = protocols[0]
    return head


def _refuse_target(method: bytes, target: bytes) -> None:
    # No absolute form: that is how one speaks to a forward proxy, and joining it to anything is how requests
    # are sent to hosts nobody configured.
    if not (target.startswith(b"/") or (target == b"*" and method == b"OPTIONS")):
        why = "the request target is not a path: this is no proxy for other hosts"
        raise BadHead(400, f"{why}; take its address out of HTTP_PROXY and ALL_PROXY, or name it in NO_PROXY")
    if b"#" in target:
        raise BadHead(400, "the request target holds a fragment")


def _refuse_host(head: RequestHead) -> None:
    hosts = head.values(b"host")
    if len(hosts) != 1 and not (head.minor == 0 and not hosts):
        raise BadHead(400, "there must be one Host header")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise BadHead(400, "the Host header is malformed")


def _request_body(head: RequestHead) -> int:
    """The length of the body, or CHUNKED: never both, and never a guess."""
    codings = head.values(b"transfer-encoding")
    lengths = head.values(b"content-length")
    if codings:
        if lengths or head.minor == 0:
            raise BadHead(400, "Transfer-Encoding cannot stand beside Content-Length or in HTTP/1.0")
        if len(codings) > 1 or codings[0].lower() != b"chunked":
            raise BadHead(501, "the only transfer coding here is chunked")
        return CHUNKED
    return _length(lengths) if lengths else 0


def _expects(head: RequestHead) -> bool:
    """Whether the caller waits for 100 before it sends its body."""
    expectations = head.values(b"expect")
    if not expectations or head.minor != 1:
        return False
    if len(expectations) > 1 or expectations[0].lower() != b"100-continue":
        raise BadHead(417, "the only expectation met here is 100-continue")
    return True


def reply_head(reader: HeadReader, method: bytes) -> ReplyHead:
    """The answer in a complete head, to a request of `method`. Raises BadHead."""
    return _reply_head(reader.start, reader.headers, method)


def whole_reply(data: bytes, limit: int, method: bytes) -> tuple[ReplyHead, bytes] | None:
    """The same of a head that has come at one go, as nearly all do, and the bytes behind it; None of any other."""
    whole = _whole(_STATUS_LINE, data, limit)
    if whole is None:
        return None
    start, headers, rest = whole
    return _reply_head(start, headers, method), rest


def _reply_head(start: tuple[bytes, ...], headers: Headers, method: bytes) -> ReplyHead:
    minor, status, reason = start
    head = ReplyHead(int(status), reason, headers, int(minor))
    codings = head.values(b"transfer-encoding")
    lengths = head.values(b"content-length")
    if codings and (lengths or len(codings) > 1 or codings[0].lower() != b"chunked"):
        raise BadHead(502, "its transfer coding is not exactly chunked")
    if lengths:
        head.body = _length(lengths)
    if method == b"HEAD" or head.status in (204, 304) or head.status < 200:
        head.body = 0
    elif codings:
        head.body = CHUNKED
    elif not lengths:
        head.body = UNTIL_CLOSE
    return head


def _length(found: list[bytes]) -> int:
    digits = found[0]
    if len(found) > 1 or not digits.isdigit() or len(digits) > 18:
        raise BadHead(400, "there must be one Content-Length, and it must be a number")
    return int(digits)


def values(headers: Headers, name: bytes) -> list[bytes]:
    """Every value of the header `name`, which is in lower case."""
    size = len(name)
    return [value for key, value in headers if len(key) == size and key.lower() == name]


def listed(headers: Headers, name: bytes) -> set[bytes]:
    """The members of a comma-separated header, in lower case."""
    return _members(values(headers, name))


def _members(found: list[bytes]) -> set[bytes]:
    return {part.strip(b" \t").lower() for value in found for part in value.split(b",")}


def preferred_wait(head: RequestHead) -> float | None:
    """Seconds of `Prefer: wait=N`."""
    for value in head.values(b"prefer"):
        for part in value.split(b","):
            if found := _WAIT.fullmatch(part):
                return float(found[1])
    return None


def end_to_end(headers: Headers, *, without: Collection[bytes] = ()) -> Headers:
    """The headers meant for the other end: not those between two neighbours, nor any in `without`."""
    kept, between = [], False
    for pair in headers:
        name = pair[0].lower()
        if name in _HOP_BY_HOP:
            between = True
        elif name not in without:
            kept.append(pair)
    if between:
        named = listed(headers, b"connection") - _HOP_BY_HOP
        if named:
            return [pair for pair in kept if pair[0].lower() not in named]
    return kept


def host_of(value: bytes) -> str:
    """The host in a Host header, without its port and brackets, in lower case."""
    match = _HOST.fullmatch(value)
    return match[1].strip(b"[]").rstrip(b".").lower().decode("ascii") if match else ""


def write_head(first_line: bytes, headers: Headers) -> bytes:
    lines = [first_line]
    lines += [b"%b: %b" % pair for pair in headers]
    lines.append(b"\r\n")
    return b"\r\n".join(lines)
