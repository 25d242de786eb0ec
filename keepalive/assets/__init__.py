"""Files for browsers, read and compressed once. There is no build step: what is here is what is served.

`keepalive.js` is for everybody's pages, a file to copy; all else is our own page, its modules in `page/`.

May import nothing of the project.
"""

import functools
import gzip
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    content_type: str
    etag: str  # a weak one: the same for both encodings
    body: bytes = field(repr=False)
    gzipped: bytes = field(repr=False)


@functools.cache
def read() -> Mapping[str, Asset]:
    """Each file, by its path below this folder: "page/start.js"."""
    return dict(_read(files(__package__), ""))


def _read(folder: Traversable, path: str) -> Iterator[tuple[str, Asset]]:
    for file in folder.iterdir():
        if file.is_dir():
            yield from _read(file, f"{path}{file.name}/")
        elif content_type := CONTENT_TYPES.get(file.name[file.name.rfind(".") :]):
            body = file.read_bytes()
            etag = f'W/"{hashlib.sha256(body).hexdigest()[:16]}"'
            yield path + file.name, Asset(content_type, etag, body, gzip.compress(body, mtime=0))
