"""The configuration: TOML and environment in, frozen models out, every mistake at once.

Rules of this folder:

- `find` looks for the file and `read` opens it; from there on it is text in, value out.
- A mistake never stops the search for more. What is wrong is reported and left out, and the rest is read on.
- A message says what stands there and what to write instead. It never holds a secret: values of unknown keys
  and whatever looks like a secret are not repeated.
- What a KEEPALIVE_… variable says comes before the file, and the file comes before the defaults in `tables`.

    reading    the file, the environment, and our words for what pydantic finds
    checks     what no table can see by itself
    memory     whether what is wanted fits there
    tables     every key with its type, its default and its help
    values     readers of single values
    addresses  the same for what is a place on the net
    ping       the same for a ping of one's own
    openings   the files that `prime` names
    lines      where in the text a key stands
    mistakes   what is told to a person

`python -m keepalive.config` prints the JSON schema for editors, which is kept in docs/config.schema.json.

May import: core.
"""

from keepalive.config.addresses import Address
from keepalive.config.memory import overbooked
from keepalive.config.mistakes import ConfigError, Mistake
from keepalive.config.openings import Opening, read_openings, with_openings
from keepalive.config.reading import find, load, parse, read
from keepalive.config.schema import schema
from keepalive.config.tables import (
    LEARN,
    LOAD_FIELDS,
    AccessKey,
    Auth,
    Cluster,
    Config,
    Defaults,
    History,
    Kept,
    Model,
    Notify,
    Ping,
    Prompt,
    Server,
    Upstream,
)
from keepalive.config.values import seconds, written

__all__ = [
    "LEARN", "LOAD_FIELDS", "AccessKey", "Address", "Auth", "Cluster", "Config", "ConfigError", "Defaults", "History",
    "Kept", "Mistake", "Model", "Notify", "Opening", "Ping", "Prompt", "Server", "Upstream",
    "find", "load", "overbooked", "parse", "read", "read_openings", "schema", "seconds", "with_openings", "written",
]  # fmt: skip
