"""What the head of a request says to the proxy: found out once for all requests that have the same head."""

from keepalive.core.callers import Key
from keepalive.http1 import RequestHead, cors, preferred_wait
from keepalive.protocols.encodings import codings
from keepalive.protocols.forms import boundary_of
from keepalive.protocols.routes import Heartbeat, Route, chosen_heartbeat, heartbeat_in, route_of
from keepalive.proxy.access import Refused, admit
from keepalive.proxy.settings import Settings

_MODES = frozenset(Heartbeat)


class Reading:
    """One head, read under some settings. Does not change."""

    __slots__ = (
        "begins",
        "codings",
        "form",
        "grant",
        "headers",
        "heartbeat",
        "key",
        "names",
        "no_mode",
        "ours",
        "preflight",
        "refused",
        "route",
        "settings",
        "target",
        "websocket",
        "wish",
    )

    def __init__(self, head: RequestHead, settings: Settings, route: Route | None = None) -> None:
        mode, target = heartbeat_in(head.target)
        self.settings = settings
        #: Without the heartbeat mode in front of it.
        self.target = target
        self.headers = head.headers
        self.route = route or route_of(head.method, target)
        #: Its body says who is meant.
        self.names = self.route.names and head.method == b"POST"
        #: It is this daemon that asks, and meant this upstream.
        self.ours = _ours(head, settings.mark)
        self.key: Key | None
        self.refused: Refused | None
        self.key, self.refused = admit(head, settings)
        self.grant = cors.granted(head, settings.allowed_origins)
        self.preflight = cors.preflight(head, settings.allowed_origins)
        #: A heartbeat mode in front of the target that is none.
        self.no_mode = None if mode is None or mode in _MODES else mode
        self.heartbeat = None
        if self.no_mode is None:
            self.heartbeat = chosen_heartbeat(head.get(b"x-keepalive-heartbeat"), mode)
        # With GET alone: a body that names a model is for the keeper, whatever else stands in the head.
        wish = (head.upgrade or b"").lower()
        self.websocket = head.method == b"GET" and wish == b"websocket"
        #: Of the body; None: one that is not known.
        self.codings = codings(head.values(b"content-encoding"))
        #: What stands between the fields of its body, where that is a form that may name a model.
        self.form = boundary_of(head.get(b"content-type")) if self.route.form else None
        #: How long the caller would wait.
        self.wish = preferred_wait(head)
        #: How the head begins that an upstream is sent, by its name and whether the answer is to be read.
        self.begins: dict[tuple[str, bool], bytes] = {}


def _ours(head: RequestHead, mark: str) -> str | None:
    said, _, upstream = (head.get(b"x-keepalive-asks") or b"").decode("latin-1").partition(" ")
    return upstream if mark and said == mark else None


def reading(head: RequestHead, settings: Settings, route: Route | None = None) -> Reading:
    """What `head` says; `route` where it is not its path that tells."""
    if route is not None:
        return Reading(head, settings, route)
    known = head.like.reading
    if isinstance(known, Reading) and known.settings is settings:
        return known
    found = head.like.reading = Reading(head.like, settings)
    return found
