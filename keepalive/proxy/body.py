"""The bodies of requests that wait, and the room that all of them share."""

import asyncio
from typing import Final

from keepalive.http1 import BadHead, Caller
from keepalive.protocols.asked import NO_BODY, Asked, ModelFinder, read_body
from keepalive.protocols.encodings import BadEncoding, Unpacker, unpacked
from keepalive.protocols.forms import asked_in_form, renamed_form
from keepalive.protocols.renamed import renamed

#: So much is unpacked before others have their turn.
_TURN_BYTES: Final = 1024 * 1024


class Room:
    """For the bodies of all requests that wait, together."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.taken = 0


class Body:
    """The body of one request, while it may still be needed."""

    __slots__ = ("_codings", "_form", "_kept", "_room", "data")

    def __init__(self, room: Room) -> None:
        self.data = b""  # as it came
        self._codings: list[str] = []
        self._form: bytes | None = None
        self._room = room
        self._kept = 0

    async def gather(
        self, caller: Caller, codings: list[str], most: int, *, conversation: bool = True
    ) -> Asked | None:
        """Reads all of it, since the last of several `model` keys counts; None: no room for it.

        Which `conversation` it goes on with need not be told where there is one place for all of them.

        Raises BadHead where it is not what its `codings` say, or holds more than `most` bytes.
        """
        self._codings = codings
        whole = caller.read_whole() if not codings else None
        if whole:  # as nearly always
            return self._read(whole, conversation=conversation)
        finder = _Packed(codings, most) if codings else _Plain(conversation=conversation)
        pieces: list[bytes] = []
        while data := await caller.read():
            if self._room.taken + len(data) > self._room.most:
                return None
            self._room.taken += len(data)
            self._kept += len(data)
            pieces.append(data)
            await finder.feed(data, last=caller.body_ended)
        self.data = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        return finder.finish() if pieces else NO_BODY

    def _read(self, data: bytes, *, conversation: bool) -> Asked | None:
        size = len(data)
        if self._room.taken + size > self._room.most:
            return None
        self._room.taken += size
        self._kept = size
        self.data = data
        return read_body(data, conversation=conversation)

    def read_form(self, boundary: bytes) -> Asked:
        """What it asks for, gathered as a form with this between its fields."""
        self._form = boundary
        return asked_in_form(self.plain(), boundary)

    @property
    def packed(self) -> bool:
        return bool(self._codings)

    def plain(self) -> bytes:
        """Without its codings."""
        return unpacked(self.data, self._codings)

    def rename(self, name: str, field: str = "model") -> bool:
        """It asks for `name` from now on. True: it is not packed any more, and its Content-Encoding has to go."""
        plain, form = self.plain(), self._form
        changed = renamed(plain, name, field) if form is None else renamed_form(plain, form, name)
        if changed is None:
            return False
        more = len(changed) - len(self.data)
        self.data, self._codings = changed, []
        self._kept += more
        self._room.taken += more
        return True

    def release(self) -> None:
        self.data = b""
        self._room.taken -= self._kept
        self._kept = 0


#: Of every request whose body nobody needs any more.
RELEASED: Final = Body(Room(0))


class _Plain:
    """What a body asks for, that can be read as it comes."""

    def __init__(self, *, conversation: bool) -> None:
        self._conversation = conversation
        self._finder: ModelFinder | None = None
        self._asked: Asked | None = None

    async def feed(self, data: bytes, *, last: bool) -> None:
        if last and self._finder is None:
            self._asked = read_body(data, conversation=self._conversation)
            return
        self._finder = self._finder or ModelFinder()
        self._finder.feed(data)

    def finish(self) -> Asked:
        if self._asked is not None:
            return self._asked
        return self._finder.finish() if self._finder is not None else Asked()


class _Packed:
    """The same, where it has to be unpacked: beside it, a piece at a time, and never more than `most` bytes."""

    def __init__(self, codings: list[str], most: int) -> None:
        self._unpacker = Unpacker(codings)
        self._finder = ModelFinder()
        self._most = most
        self._bytes = 0

    async def feed(self, data: bytes, *, last: bool) -> None:
        turn = 0
        try:
            for piece in self._unpacker.feed(data):
                self._bytes += len(piece)
                if self._bytes > self._most:
                    raise BadHead(413, f"unpacked, the body is larger than {self._most} bytes")
                self._finder.feed(piece)
                turn += len(piece)
                if turn >= _TURN_BYTES:
                    turn = 0
                    await asyncio.sleep(0)
        except BadEncoding as bad:
            raise BadHead(400, str(bad)) from None

    def finish(self) -> Asked:
        try:
            self._unpacker.finish()
        except BadEncoding as bad:
            raise BadHead(400, str(bad)) from None
        return self._finder.finish()
