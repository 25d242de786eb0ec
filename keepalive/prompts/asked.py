"""What a request says, and all that is wrong with it."""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NoReturn

from keepalive.config import Prompt
from keepalive.config.mistakes import dotted, nearest, shown
from keepalive.core.callers import Outcome
from keepalive.core.facts import ModelId
from keepalive.http1 import Headers

#: A prompt is text. A body larger than this takes noticeable time to be read, and nothing streams meanwhile.
BODY_BYTES: Final = 16 * 1024 * 1024
#: The largest number that is a whole one in 32 bits, for a client in any language.
MOST: Final = 2**31 - 1
SHOWN_MAX: Final = 20

VARIABLE: Final = re.compile(r"\{\{\s*+([\w.-]++)\s*+\}\}")

Find = Callable[[str], Sequence[ModelId]]


@dataclass(frozen=True, slots=True)
class Settings:
    prompts: Sequence[Prompt] = ()
    models: Callable[[], Collection[str]] = tuple  # the keys of those that may be asked for
    heartbeat: float = 5.0
    body_bytes: int = BODY_BYTES
    allowed_origins: frozenset[str] = frozenset()


class Refusal(Exception):
    """What a caller is told instead of what was asked for; `field` is what to mend in the request."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str,
        *,
        field: str | None = None,
        headers: Headers | None = None,
        outcome: Outcome = Outcome.REJECTED,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.field = field
        self.headers = headers or []
        self.outcome = outcome

    def body(self) -> bytes:
        error = {"message": str(self), "code": self.code, "field": self.field}
        return encode({"success": False, "error": error})


@dataclass(frozen=True, slots=True)
class Order:
    """A request that can be carried out; `timeout` in milliseconds, to the first delta."""

    prompt: Prompt | None  # None: the request brought its own text
    models: Sequence[ModelId]
    text: str
    max_tokens: float | None
    timeout: float | None

    def body(self) -> bytes:
        """The same, in chat completions."""
        said = {
            "model": self.models[0].key,
            "stream": True,
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": self.max_tokens,
        }
        return encode({name: value for name, value in said.items() if value is not None})


def read_order(body: bytes, settings: Settings, find: Find) -> Order:
    """What `body` asks for. Raises Refusal with all that is wrong with it."""
    fields = Fields(body)
    prompt, inline, model = _prompt(fields, settings), fields.text("prompt"), fields.text("model")
    if prompt is not None and model is not None:
        fields.add("model", "stands beside promptId; write modelId to use another model")
    override = fields.text("modelId")
    given = fields.variables()
    max_tokens, timeout = fields.number("maxTokens", whole=True), fields.number("timeout")
    content = inline if prompt is None else prompt.content
    models: Sequence[ModelId] = ()
    text = ""
    if content is not None:
        where = "modelId" if override is not None else "model" if prompt is None else "promptId"
        key = override or (model if prompt is None else prompt.model)
        models = _models(fields, where, key, settings, find)
        if given is not None:
            text = _render(fields, content, given, settings.body_bytes)
    fields.check()
    if max_tokens is None and prompt is not None:
        max_tokens = prompt.max_tokens
    return Order(prompt, models, text, max_tokens, timeout)


def read_warmup(body: bytes, settings: Settings, find: Find) -> Sequence[ModelId]:
    """The models that `body` asks to be warm. Raises Refusal."""
    fields = Fields(body)
    models = _models(fields, "modelId", fields.text("modelId"), settings, find)
    fields.check()
    return models


def variables(content: str) -> list[str]:
    """The names that a template has, in their order."""
    return list(dict.fromkeys(VARIABLE.findall(content)))


def _prompt(fields: "Fields", settings: Settings) -> Prompt | None:
    asked = fields.get("promptId")
    if asked is None:
        if fields.get("prompt") is None:
            fields.add("promptId", 'is missing; write one, or "prompt" and "model"')
        return None
    if fields.get("prompt") is not None:
        fields.add("prompt", "stands beside promptId; leave one of them out")
    if isinstance(asked, bool) or not isinstance(asked, int | str):
        fields.add("promptId", "is neither a number nor text")
        return None
    # As text, because 28 and "28" are one prompt: see the checks of the config.
    known = {str(prompt.id): prompt for prompt in settings.prompts}
    found = known.get(str(asked))
    if found is None:
        near = nearest(str(asked), known)
        advice = f"write {near or ' or '.join(list(known)[:SHOWN_MAX])}" if known else "none are configured"
        fields.add("promptId", f"{shown(asked)} is no prompt here; {advice}", 404, "prompt_not_found")
    return found


def _models(
    fields: "Fields", where: str, key: str | None, settings: Settings, find: Find
) -> Sequence[ModelId]:
    if key is None:
        if where not in fields.wrong:
            fields.add(where, "is missing; write the key of a configured model")
        return ()
    models = find(key)
    if not models:
        known = list(settings.models())
        near = nearest(key, known)
        some = [near] if near else known[:SHOWN_MAX]
        advice = f"write {' or '.join(map(shown, some))}" if some else "none are configured"
        fields.add(where, f"{shown(key)} is no model that is kept here; {advice}", 404, "model_not_found")
    return models


def _render(fields: "Fields", content: str, given: Mapping[str, str], most: int) -> str:
    named = Counter(VARIABLE.findall(content))
    missing = [name for name in named if name not in given]
    for name in missing:
        fields.add(dotted(("variables", name)), "is missing", 400, "missing_variables")
    if missing:
        return ""
    # Before it is built: a short template can make much of one large value.
    if len(content) + sum(len(given[name]) * times for name, times in named.items()) > most:
        fields.add("variables", f"make the prompt larger than {most} bytes", 413, "too_large")
        return ""
    text = VARIABLE.sub(lambda found: given[found[1]], content)
    if not text.strip():
        fields.add("variables", "leave nothing of the prompt")
    return text


class Fields:
    """A JSON object that somebody sent, and what is wrong with it. A field that is null is missing."""

    def __init__(self, body: bytes) -> None:
        self._object = read_object(body)
        self.wrong: dict[str, str] = {}
        self._kinds: set[tuple[int, str]] = set()

    def add(self, field: str, message: str, status: int = 400, code: str = "invalid_request") -> None:
        self.wrong.setdefault(field, message)
        self._kinds.add((status, code))

    def check(self) -> None:
        """Raises Refusal with everything that is wrong."""
        if not self.wrong:
            return
        told = [f"{field}: {message}" for field, message in list(self.wrong.items())[:SHOWN_MAX]]
        if len(self.wrong) > SHOWN_MAX:
            told.append(f"and {len(self.wrong) - SHOWN_MAX} more")
        status, code = next(iter(self._kinds)) if len(self._kinds) == 1 else (400, "invalid_request")
        raise Refusal(status, "; ".join(told), code, field=next(iter(self.wrong)))

    def get(self, name: str) -> object:
        return self._object.get(name)

    def text(self, name: str) -> str | None:
        value = self.get(name)
        if value is None:
            return None
        if not isinstance(value, str):
            self.add(name, "is not text")
        elif not value.strip():
            self.add(name, "is empty")
        elif not _is_unicode(value):
            self.add(name, "holds half a character (a lone surrogate)")
        else:
            return value
        return None

    def number(self, name: str, *, whole: bool = False) -> float | None:
        value = self.get(name)
        kinds = int if whole else (int, float)
        if value is None:
            return None
        # True is a number only to Python; NaN compares with nothing.
        if isinstance(value, kinds) and not isinstance(value, bool) and 1 <= value <= MOST:
            return value
        self.add(name, f"is no {'whole ' if whole else ''}number from 1 to {MOST}")
        return None

    def variables(self) -> dict[str, str] | None:
        """Names to what is put in their places; None where that cannot be said."""
        given = self.get("variables")
        if given is None:
            return {}
        if not isinstance(given, dict):
            self.add("variables", 'is no object; write {"topic": "SSE"}')
            return None
        found = {name: _text_of(value) for name, value in given.items()}
        for name, text in found.items():
            if text is None:
                self.add(dotted(("variables", name)), "is neither text nor a number nor true or false")
            elif not _is_unicode(text):
                self.add(dotted(("variables", name)), "holds half a character (a lone surrogate)")
        return {name: text or "" for name, text in found.items()}


def _text_of(value: object) -> str | None:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    return value if isinstance(value, str) else None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def read_object(body: bytes) -> dict[str, object]:
    """The object in `body`. Raises Refusal, in words that repeat nothing of it but names of fields."""
    repeated: list[str] = []

    def pairs(items: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(items)
        if len(found) < len(items):
            repeated.extend(name for name, times in Counter(name for name, _ in items).items() if times > 1)
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(name)

    try:
        # Some programs put a byte order mark first, which LM Studio reads over.
        found = json.loads(body.decode("utf-8-sig"), object_pairs_hook=pairs, parse_constant=constant)
    except json.JSONDecodeError as error:
        wrong = f"is not JSON: {error.msg} (line {error.lineno}, column {error.colno})"
    except UnicodeDecodeError:
        wrong = "is not UTF-8"
    except ValueError:
        wrong = "holds a number that is none, such as NaN, or one of thousands of digits"
    except RecursionError:
        wrong = "is nested too deeply"
    else:
        if repeated:
            name = dotted((repeated[0],))
            raise Refusal(400, f"{name}: stands there more than once", "invalid_request", field=name)
        if isinstance(found, dict):
            return found
        wrong = 'is no object; write {"promptId": 28}'
    raise Refusal(400, f"the body {wrong}", "invalid_json")


# In ASCII, so that half a character, which a model may well send in each of two deltas, arrives as it is.
_ENCODER: Final = json.JSONEncoder(separators=(",", ":"))


def encode(value: object) -> bytes:
    return _ENCODER.encode(value).encode()
