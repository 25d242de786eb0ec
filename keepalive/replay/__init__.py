"""What another budget, or another policy, would have cost: the pure core on a virtual clock, against a trace.

    trace      requests and models, from files
    shelf      one upstream on a clock of its own: the core decides, and what it decides takes its time
    policies   ours and those that it is compared with, and what each came to
    picture    who was in memory when, and who waited, as SVG

May import: core.
"""

from keepalive.replay.picture import picture
from keepalive.replay.policies import POLICIES, Report, replay
from keepalive.replay.trace import Card, Request, TraceError, read_cards, read_requests

__all__ = [
    "POLICIES", "Card", "Report", "Request", "TraceError", "picture", "read_cards", "read_requests", "replay",
]  # fmt: skip
