"""Values that came with the quotes around them.

`docker run --env-file`, and editors of settings, take the quotes of `NAME="value"` for a part of the value. Whoever was
given it so shows it so.
"""

from typing import Final

_QUOTES: Final = ("''", '""')


def unquoted(text: str) -> str:
    """What stands between a pair of quotes; any other text as it is."""
    return text[1:-1] if text[:1] + text[1:][-1:] in _QUOTES else text
