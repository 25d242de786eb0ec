"""A model server that costs next to nothing: paced streams, small answers, streams that stay open.

`POST` with `"stream":true` streams; any other `POST` answers with a small JSON.
`GET /pace?rate=50&events=150` sets what streams do from then on: `rate` 0 sends everything at once, and
`events` 0 sends one and stays open. To those who list and load it is an LM Studio with two models, of which
`bench` is loaded unless `loaded=0` was set; loads of it then end once `loaded=1` is. `others=100` has it list as many
more, all loaded: `other-0` and so on. `GET /seen` tells when it was listed, and when `quiet` was asked anything.
"""

import asyncio
import json
import sys
import time
from urllib.parse import parse_qs, urlsplit

import uvloop

EVENT = (
    b'data: {"id":"chatcmpl-x1y2z3","object":"chat.completion.chunk","created":1790000000,"model":"bench",'
    b'"system_fingerprint":"bench","choices":[{"index":0,"delta":{"content":" token"},"logprobs":null,'
    b'"finish_reason":null}]}\n\n'
)
ROLE = EVENT.replace(b'"content":" token"', b'"role":"assistant","content":""')
LAST = EVENT.replace(b'{"content":" token"}', b"{}").replace(
    b'"finish_reason":null', b'"finish_reason":"stop"'
)
JSON = (
    b'{"id":"chatcmpl-x1y2z3","object":"chat.completion","created":1790000000,"model":"bench","choices":[{"index":0,'
    b'"message":{"role":"assistant","content":"Hi"},"finish_reason":"stop"}],"usage":{"prompt_tokens":9,'
    b'"completion_tokens":1,"total_tokens":10},"end":1}'
)
ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json; charset=utf-8\r\nContent-Length: %d\r\n\r\n%s"
    % (len(JSON), JSON)
)
HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nCache-Control: no-cache\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n"
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


FIRST = HEAD + chunk(ROLE)
# Words that differ, as those of a model do: one with a quote, one with a line break.
WORDS = ["kittens", "sleep", "a", "lot", ",", "and", r"\"", "they", "play", ";", "some", "purr", r".\n"]
TOKENS = [chunk(EVENT.replace(b"token", word.encode())) for word in WORDS]
TOKEN = TOKENS[0]
END = chunk(LAST) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

GREETING = b'{"lmstudio":true}'
NO_ROUTE = b'{"error":"Unexpected endpoint or method."}'

pace = {"rate": 50.0, "events": 150.0, "loaded": 1.0, "others": 0.0}
seen: dict[str, list[float]] = {"listed": [], "pinged": []}
loading: list[asyncio.Transport] = []


def answer(body: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%b" % (
        len(body),
        body,
    )


def listing() -> bytes:
    """As much of LM Studio's as says what is loaded."""
    rows = []
    for key in ("bench", "quiet", *(f"other-{n}" for n in range(int(pace["others"])))):
        there = key != "bench" or pace["loaded"]
        instances = [{"id": key, "config": {"context_length": 4096}}] if there else []
        rows.append({"type": "llm", "key": key, "size_bytes": 1_000_000, "loaded_instances": instances})
    return json.dumps({"models": rows}).encode()


def loaded() -> None:
    """The load of all who asked for one is over."""
    told = {"type": "llm", "instance_id": "bench", "load_time_seconds": 1.0, "status": "loaded"}
    for transport in loading:
        transport.write(answer(json.dumps(told).encode()))
    loading.clear()


class Answering(asyncio.Protocol):
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.received = b""
        self.timer: asyncio.TimerHandle | None = None

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        lowered = head.lower()
        if b"\r\ncontent-length:" in lowered:
            length = int(lowered.partition(b"\r\ncontent-length:")[2].split(b"\r\n")[0])
            if len(body) < length:
                return
        elif b"\r\ntransfer-encoding: chunked" in lowered and not body.endswith(b"0\r\n\r\n"):
            return
        self.received = b""
        if head.startswith(b"GET"):
            self.transport.write(answer(self.told(head.split(b" ")[1].decode())))
        elif b'"stream":true' in body or b'"stream": true' in body:
            self.stream()
        elif head.startswith(b"POST /api/v1/models/load"):
            loading.append(self.transport)
            if pace["loaded"]:
                loaded()
        elif b'"quiet"' in body:
            seen["pinged"].append(time.monotonic())
            self.transport.write(answer(JSON.replace(b'"bench"', b'"quiet"')))
        elif b'"other-' in body:
            name = b'"other-' + body.partition(b'"other-')[2].partition(b'"')[0] + b'"'
            self.transport.write(answer(JSON.replace(b'"bench"', name)))
        else:
            self.transport.write(ANSWER)

    def told(self, target: str) -> bytes:
        path, query = urlsplit(target).path, parse_qs(urlsplit(target).query)
        if path == "/pace":
            pace.update({name: float(value[0]) for name, value in query.items()})
            if pace["loaded"]:
                loaded()
            return b"{}"
        if path == "/seen":
            return json.dumps(seen).encode()
        if path == "/api/v1/models":
            seen["listed"].append(time.monotonic())
            return listing()
        return GREETING if path == "/lmstudio-greeting" else NO_ROUTE

    def stream(self) -> None:
        if not pace["events"]:
            self.transport.write(FIRST + TOKEN)
        elif not pace["rate"]:
            count = int(pace["events"])
            self.transport.write(FIRST + b"".join(TOKENS[i % len(TOKENS)] for i in range(count)) + END)
        else:
            self.transport.write(FIRST)
            self.left = int(pace["events"])
            self.gap = 1 / pace["rate"]
            loop = asyncio.get_running_loop()
            self.due = loop.time() + self.gap
            self.timer = loop.call_at(self.due, self.tick)

    def tick(self) -> None:
        self.left -= 1
        if self.left < 0:
            self.timer = None
            self.transport.write(END)
            return
        self.transport.write(TOKENS[self.left % len(TOKENS)])
        # By the clock and not after the last one, so that a late event does not slow the stream.
        self.due += self.gap
        self.timer = asyncio.get_running_loop().call_at(self.due, self.tick)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.timer is not None:
            self.timer.cancel()


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(
        Answering, "127.0.0.1", int(sys.argv[1]), backlog=4096
    )
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
