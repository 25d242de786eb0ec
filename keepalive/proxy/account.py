"""What is measured of one request while it goes: its caller is told some of it, metrics and the log the rest."""

from collections.abc import Callable

from keepalive.core.callers import Begun, Key, Outcome, Seen
from keepalive.core.facts import ModelId
from keepalive.http1 import Headers
from keepalive.protocols.meter import Meter


class Account:
    """Times are those of the event loop."""

    __slots__ = (
        "began",
        "begun",
        "error",
        "key",
        "model",
        "now",
        "outcome",
        "route",
        "sent_at",
        "state",
        "status",
        "waited",
    )

    def __init__(self, route: str, now: Callable[[], float]) -> None:
        self.now = now
        self.route = route
        self.began = self.now()
        self.key: Key | None = None
        self.model: ModelId | None = None
        self.state: str | None = None  # of the model, when the request came
        self.begun: Begun | None = None  # with what, where the model had read that before
        self.waited = 0.0
        self.sent_at = 0.0
        self.status = 0
        self.outcome = Outcome.UPSTREAM_ERROR
        self.error: str | None = None  # the code of ours

    def headers(self) -> Headers:
        """What the caller is told of it."""
        waited = self.waited * 1000
        if self.sent_at:
            timing = b"wait;dur=%.1f, upstream;dur=%.1f" % (waited, (self.now() - self.sent_at) * 1000)
        else:
            timing = b"wait;dur=%.1f" % waited
        headers = [(b"Server-Timing", timing)]
        if self.state is not None:
            headers.append((b"X-Keepalive-Model-State", self.state.encode("ascii", "replace")))
        return headers

    def seen(self, passed: int, meter: Meter | None) -> Seen:
        """The same in the end; `passed` are bytes."""
        start = None
        if self.state is not None:
            start = "warm" if self.state == "warm" else "cold"
            if start == "warm" and self.begun is not None:
                start = "primed"
        # By their places: fifteen names cost four times as much, at each request.
        return Seen(
            self.model,
            self.route,
            self.key.name if self.key is not None else None,
            self.outcome,
            self.status,
            start,
            self.begun,
            self.waited,
            meter.first_token_seconds if meter is not None else None,
            self.now() - self.began,
            passed,
            meter.events if meter is not None else 0,
            tuple(meter.gaps) if meter is not None else (),
            meter.gap_seconds if meter is not None else 0.0,
            self.error,
        )
