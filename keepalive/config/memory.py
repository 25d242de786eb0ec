"""Whether what the file wants in memory fits there, as far as the file says what takes how much.

What does not fit is no mistake that keeps a daemon from starting: the first models are kept, and the rest is said.
"""

from collections.abc import Iterator

from keepalive.config.mistakes import shown
from keepalive.config.tables import Config, Kept


def overbooked(config: Config) -> list[tuple[Kept, str]]:
    """The models for which there can be no room, each with why, in a sentence."""
    return [found for upstream in config.upstreams for found in _on(config, upstream.name, upstream.memory)]


def _on(config: Config, upstream: str, budget: int | None) -> Iterator[tuple[Kept, str]]:
    if budget is None:
        return
    told = [
        (kept, kept.memory) for kept in config.kept if kept.upstream == upstream and kept.memory is not None
    ]
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
