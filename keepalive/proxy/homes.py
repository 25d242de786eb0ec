"""Where conversations were last: on that upstream, what was said before is still in its cache."""

from collections import OrderedDict

from keepalive.core.facts import ModelId

#: Conversations whose home is remembered.
HOMES = 4096


class Homes:
    """The model that each conversation was last answered by."""

    def __init__(self) -> None:
        self._models: OrderedDict[bytes, ModelId] = OrderedDict()

    def find(self, conversation: bytes) -> ModelId | None:
        return self._models.get(conversation)

    def remember(self, conversation: bytes, model: ModelId) -> None:
        self._models[conversation] = model
        self._models.move_to_end(conversation)
        if len(self._models) > HOMES:
            self._models.popitem(last=False)
