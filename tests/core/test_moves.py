"""What several kinds of fact lead to: how long it waits, and from when on it is warm."""

from keepalive.core.errors import Reason
from keepalive.core.facts import PingEnded, PingOutcome, PingStarted
from tests.kit.models import GEMMA, after, ours


def test_a_ping_that_failed_in_between_begins_the_five_minutes_anew():
    model = after(
        ours(failures=2),
        PingStarted(20, GEMMA),
        PingEnded(21, GEMMA, PingOutcome.ERROR, why=Reason.OTHER),
        PingStarted(300, GEMMA),
        PingEnded(330, GEMMA, PingOutcome.OK),
        PingStarted(400, GEMMA),
        PingEnded(430, GEMMA, PingOutcome.OK),
    )

    assert (model.warm_since, model.failures) == (330, 3)
