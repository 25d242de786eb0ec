"""Files for browsers, read and compressed once. There is no build step: what is here is what is served.

May import nothing of the project.
"""

import gzip
import hashlib
from dataclasses import dataclass, field
from importlib.resources import files

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


def read() -> dict[str, Asset]:
    """Each file, by its name."""
    found = {}
    for file in files(__package__).iterdir():
        content_type = CONTENT_TYPES.get(file.name[file.name.rfind(".") :])
        if content_type:
            body = file.read_bytes()
            etag = f'W/"{hashlib.sha256(body).hexdigest()[:16]}"'
            found[file.name] = Asset(content_type, etag, body, gzip.compress(body, mtime=0))
    return found
