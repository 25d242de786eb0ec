"""People told without Prometheus: an observer that knows what is worth a message, and threads that send them.

What fails, what recovered, what was thrown out and by whom: once, with what to do, and not again and again while
it goes on. Nobody waits for a message: facts are noted, and what is due is handed to a thread of each target.

    news    what is worth a message, and when                 pure
    post    the targets, each in a thread of its own: apprise

May import: core.
"""

from collections.abc import Callable, Collection, Mapping, Sequence

from keepalive.core.facts import Fact, ModelId
from keepalive.core.records import Model, Upstream
from keepalive.observers.notify.news import Event, Message, News
from keepalive.observers.notify.post import Post

__all__ = ["Event", "Message", "News", "Notify", "Post"]

Tell = Callable[[str, Mapping[str, object]], None]


class Notify:
    """Observer of the keeper; `tell` is given what goes wrong and right with the targets, from their threads."""

    def __init__(self, tell: Tell) -> None:
        self._tell = tell
        self._news: News | None = None
        self._posts: list[Post] = []
        self._addresses: tuple[str, ...] = ()

    def configure(
        self,
        addresses: Sequence[str],
        events: Collection[str],
        models: Collection[ModelId],
        urls: Mapping[str, str],
        *,
        after: float,
        pause: float,
    ) -> None:
        """Tell these addresses (of apprise) from now on; without any, nobody. `urls` are those of the upstreams."""
        if not addresses:
            self._news = None
        elif self._news is None:
            self._news = News()
        if self._news is not None:
            self._news.configure(frozenset(map(Event, events)), models, urls, after=after, pause=pause)
        if tuple(addresses) != self._addresses:
            self.close()
            self._posts = [Post(number, url, self._tell) for number, url in enumerate(addresses, 1)]
            self._addresses = tuple(addresses)

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if self._news is not None:
            self._news.observe(fact, before, after)

    def tick(self, now: float) -> None:
        """Send what is due by now; to be called about once a second."""
        for message in self._news.due(now) if self._news is not None else ():
            for post in self._posts:
                post.put(message)

    def close(self) -> None:
        """Send no more. Nobody waits for what is under way."""
        for post in self._posts:
            post.end()
        self._posts, self._addresses = [], ()
