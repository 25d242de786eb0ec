"""A model server that costs next to nothing: paced streams, small answers, streams that stay open.

`POST` with `"stream":true` streams; any other `POST` answers with a small JSON.
`GET /pace?rate=50&events=150` sets what streams do from then on: `rate` 0 sends everything at once, and
`events` 0 sends one and stays open.
"""

import asyncio
import sys
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
TOKEN = chunk(EVENT)
END = chunk(LAST) + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"

pace = {"rate": 50.0, "events": 150.0}


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
        if head.startswith(b"GET /pace"):
            query = parse_qs(urlsplit(head.split(b" ")[1].decode()).query)
            pace.update({name: float(value[0]) for name, value in query.items()})
            self.transport.write(ANSWER)
        elif b'"stream":true' in body or b'"stream": true' in body:
            self.stream()
        else:
            self.transport.write(ANSWER)

    def stream(self) -> None:
        if not pace["events"]:
            self.transport.write(FIRST + TOKEN)
        elif not pace["rate"]:
            self.transport.write(FIRST + TOKEN * int(pace["events"]) + END)
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
        self.transport.write(TOKEN)
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
