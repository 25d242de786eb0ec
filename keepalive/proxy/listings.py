"""The models of all upstreams as one list, with the aliases of those that we keep."""

import asyncio

from keepalive.core.callers import Outcome
from keepalive.core.errors import UpstreamError
from keepalive.core.keeping import Keeping
from keepalive.http1 import end_to_end
from keepalive.protocols.listings import Listing, merged
from keepalive.proxy.call import Call
from keepalive.proxy.upstreams import Looked, Upstreams

# For one that is known not to answer. The others' models are not to be missing where a client gives up after seconds.
_AWAY_SECONDS = 1.0
# They are about one upstream's answer, or about its bytes.
_ITS_OWN = (b"content-length", b"content-encoding", b"etag", b"last-modified", b"accept-ranges")


async def answer_listing(call: Call, upstreams: Upstreams, keeping: Keeping, within: float) -> None:
    """What an unreachable upstream listed last stays away; where none answers, the first says why."""
    head, route = call.caller.head, call.route

    async def look(name: str) -> Looked | UpstreamError:
        bound = min(within, _AWAY_SECONDS) if keeping.is_away(name) else within
        try:
            return await upstreams.look(name, head.target, head.headers, bound)
        except UpstreamError as error:
            return error

    names = list(upstreams.pools)
    answers = await asyncio.gather(*map(look, names))
    good: list[Looked] = []
    listings = []
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, Looked) and answer.head.status == 200:
            try:
                listings.append((Listing(answer.body, route.rows), keeping.rows(name)))
            except ValueError:
                continue
            good.append(answer)
    if good:
        headers = end_to_end(good[0].head.headers, without=_ITS_OWN)
        call.answer.whole(200, headers, merged(listings, route.rows))
        call.account.outcome = Outcome.OK
    elif isinstance(first := answers[0], Looked):
        headers = end_to_end(first.head.headers, without=(b"content-length",))
        call.answer.whole(first.head.status, headers, first.body)
    else:
        call.answer.broken(first)
