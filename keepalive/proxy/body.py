"""The bodies of requests that wait, and the room that all of them share."""

from keepalive.http1 import Caller
from keepalive.protocols.asked import Asked, ModelFinder, read_body
from keepalive.protocols.renamed import renamed


class Room:
    """For the bodies of all requests that wait, together."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0


class Body:
    """The body of one request, while it may still be needed."""

    __slots__ = ("_kept", "_room", "data")

    def __init__(self, room: Room) -> None:
        self.data = b""
        self._room = room
        self._kept = 0

    async def gather(self, caller: Caller) -> Asked | None:
        """Reads all of it, since the last of several `model` keys counts; None: no room for it."""
        pieces: list[bytes] = []
        finder: ModelFinder | None = None
        while data := await caller.read():
            if self._room.taken + len(data) > self._room.most:
                return None
            self._room.taken += len(data)
            self._kept += len(data)
            if caller.body_ended and not pieces:
                self.data = data
                return read_body(data)
            finder = finder or ModelFinder()
            finder.feed(data)
            pieces.append(data)
        self.data = b"".join(pieces)
        return finder.finish() if finder is not None else Asked()

    def rename(self, name: str) -> None:
        """It asks for `name` from now on."""
        self.data = renamed(self.data, name) or self.data

    def release(self) -> None:
        self.data = b""
        self._room.taken -= self._kept
        self._kept = 0
