"""Whether what the file wants in memory fits there, as far as the file says what takes how much.

What does not fit is no mistake that keeps a daemon from starting: the first models are kept, and the rest is said.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

from keepalive.config.mistakes import shown
from keepalive.config.tables import Config, Kept


def overbooked(
    config: Config, known: Mapping[tuple[str, str], int] = MappingProxyType({})
) -> list[tuple[Kept, str]]:
    """The models for which there can be no room, each with why, in a sentence.

    `known` is what models take of which the file does not say it, by upstream and key.
    """
    told = [(kept, kept.memory or known.get((kept.upstream, kept.key))) for kept in config.kept]
    sizes = [(kept, size) for kept, size in told if size is not None]
    return [
        found
        for upstream in config.upstreams
        if upstream.memory is not None
        for found in _on([(k, size) for k, size in sizes if k.upstream == upstream.name], upstream.memory)
    ]


def _on(told: Sequence[tuple[Kept, int]], budget: int) -> Iterator[tuple[Kept, str]]:
    always = 0
    for kept, size in told:
        if kept.auto:
            continue
        if always + size > budget:
            beside = f", of which {_written(always)} are kept for those before it" if always else ""
            yield kept, f"{_lacks(kept, size, budget)}{beside}"
        else:
            always += size
    for kept, size in told:
        if kept.auto and always + size > budget:
            beside = f", of which {_written(always)} are always in use" if always else ""
            yield kept, f"{_lacks(kept, size, budget)}{beside}"


def _lacks(kept: Kept, size: int, budget: int) -> str:
    return (
        f"{shown(kept.key)} never fits on {shown(kept.upstream)}: it takes {_written(size)}, and memory is "
        f"{_written(budget)}"
    )


def _written(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
