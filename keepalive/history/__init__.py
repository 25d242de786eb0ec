"""What happened, remembered: an observer of the keeper.

story      what is remembered of one model, and bounded
"""

from collections.abc import Callable, Iterable

from keepalive.facts import Fact, ModelId
from keepalive.history.story import Changed, Story, entries
from keepalive.lifecycle import Model, State, Upstream

__all__ = ["History", "Story"]


class History:
    """That of all configured models; `wall` gives Unix seconds."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._stories: dict[ModelId, Story] = {}

    def configure(self, models: Iterable[ModelId]) -> None:
        """Remember these from now on; what was known of others is forgotten."""
        self._stories = {model: self._stories.get(model) or self._begun() for model in models}

    def _begun(self) -> Story:
        story = Story()
        story.add(Changed(self._wall(), State.UNKNOWN))
        return story

    def observe(self, fact: Fact, before: Model | Upstream, after: Model | Upstream) -> None:
        if not isinstance(before, Model) or not isinstance(after, Model):
            return
        story = self._stories.get(after.id)
        if story is not None:
            for entry in entries(fact, before, after, self._wall()):
                story.add(entry)

    def story(self, model: ModelId) -> Story | None:
        return self._stories.get(model)

    @property
    def trouble(self) -> str | None:
        """Why nothing of it outlives this process; None when all does."""
        return "it is kept in memory only"
