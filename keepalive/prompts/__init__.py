"""The streaming prompt API of the client address: a named prompt in, a few kinds of events out.

Rules of this folder:

- Here a request is read, checked and rendered. From there on it is a request to the proxy like anybody's: the
  one load that all share, retries, limits, back-pressure, metrics and log lines are the proxy's alone.
- Whatever is wrong with a request is said before the stream begins, all of it at once; what goes wrong later
  is an `error` event.
- A value is put into a prompt as text, once: what looks like a variable inside of a value stays what it is.
- What is asked and answered goes to the caller and the upstream, and nowhere else.

    asked    what a request says, and all that is wrong with it      pure
    stream   one answer: what the proxy takes for its caller
    api      the routes: who may ask, what is read, warming up

May import: protocols, http1, config, assets, core.
"""

from keepalive.prompts.api import PATHS, Prompts, serves
from keepalive.prompts.asked import BODY_BYTES, Settings

__all__ = ["BODY_BYTES", "PATHS", "Prompts", "Settings", "serves"]
