"""The states of a model, and the table that says where what happens leads."""

from collections.abc import Mapping
from enum import StrEnum


class State(StrEnum):
    UNKNOWN = "unknown"
    COLD = "cold"
    LOADING = "loading"
    WARM = "warm"
    BACKOFF = "backoff"


class Sign(StrEnum):
    """What a fact means to one model: the column heads of the table."""

    UNREACHABLE = "upstream cannot be asked"
    ABSENT = "listed without an instance"
    HELD_OFF = "absent, to be tried again later"
    SEEN_LOADING = "being loaded"
    PRESENT = "listed with an instance"
    UNASKED = "an instance that nobody wants"
    LOAD_STARTED = "we load it"
    LOAD_FAILED = "the load failed"
    PROVED = "it answered"
    DISPROVED = "it answered wrongly"


U, C, L, W, B = State.UNKNOWN, State.COLD, State.LOADING, State.WARM, State.BACKOFF

# Where a sign leads. A gap is a move that only we could make and never may.
TABLE: Mapping[State, Mapping[Sign, State | None]] = {
    state: dict(zip(Sign, row, strict=True))
    for state, row in {
        #   unreach absent held_off seen_l present unasked started failed proved disproved
        U: (U, C, B, L, U, U, None, B, W, B),
        C: (U, C, B, L, U, U, L, B, C, B),
        L: (U, C, B, L, L, U, None, B, W, B),
        W: (U, C, B, L, W, W, None, B, W, B),
        B: (U, C, B, L, B, U, L, B, W, B),
    }.items()
}


class IllegalMove(AssertionError):
    """We were about to do what must never be done; the process had better end here."""


def diagram() -> str:
    """The table as a Mermaid state diagram, for the README."""
    lines = ["stateDiagram-v2", "    [*] --> unknown"]
    for state, row in TABLE.items():
        leads: dict[State, list[str]] = {}
        for sign, target in row.items():
            if target is not None and target is not state:
                leads.setdefault(target, []).append(sign.value)
        lines += [f"    {state} --> {target}: {' / '.join(signs)}" for target, signs in leads.items()]
    return "\n".join(lines)
