"""Bytes of a streamed answer to timings: what a user felt, told from events, since tokens cannot be seen."""

from keepalive.routes import Protocol

#: Upper bounds, in seconds, of the gaps between events; one more bucket holds the rest.
GAP_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Meter:
    """One streamed answer. Never raises, never parses JSON while tokens flow, keeps at most one partial line."""

    __slots__ = ("ended", "error", "events", "first_token_seconds", "gap_seconds", "gaps", "last_at")

    def __init__(self, protocol: Protocol, sent_at: float) -> None:
        #: From `sent_at` to the first non-empty delta; None until then.
        self.first_token_seconds: float | None = None
        #: Events so far, of any kind.
        self.events: int = 0
        #: Gaps between events from the first token to the end, counted per bucket of GAP_BOUNDS.
        self.gaps: list[int] = [0] * (len(GAP_BOUNDS) + 1)
        #: Their sum.
        self.gap_seconds: float = 0.0
        #: When the last bytes came.
        self.last_at: float = sent_at
        #: The route's own sign that the answer is complete was seen. False at the end of the body: it was cut.
        self.ended: bool = False
        #: The data of an error event, for `routes.looks_lost`; never for a log.
        self.error: bytes | None = None

    def feed(self, now: float, chunk: bytes) -> None:
        """The next bytes of the body, decoded from their transfer coding, at monotonic time `now`."""
        raise NotImplementedError
