"""Everything about the simulator that can be switched while it runs, each with its default and one line.

A value may be limited, `{"value": …, "times": 2, "seconds": 5, "model": "key", "route": "chat", "chance": 0.1}`,
and a list of such rules is tried in its order; where none fits, the default holds. `times` counts requests (or
loads), not looks: a request settles each fault when it first meets it. `seconds` count from the switching.
`chance` draws from the studio's seeded random numbers.
"""

import difflib
import json
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from keepalive.simulator.clock import Clock

Value = bool | int | float | str

INFERENCE_ROUTES = ("chat", "completions", "embeddings", "rerank", "responses", "messages", "native_chat")
LIST_ROUTES = ("list", "list_v0", "list_openai", "model_v0")
ROUTES = (
    *INFERENCE_ROUTES,
    *LIST_ROUTES,
    "load",
    "unload",
    "download",
    "stored",
    "greeting",
    "sdk",
    "unknown",
)
ROUTE_GROUPS = {"inference": INFERENCE_ROUTES, "listing": LIST_ROUTES}


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    default: Value
    text: str
    choices: tuple[str, ...] = ()
    secret: bool = False

    @property
    def kind(self) -> str:
        return "|".join(self.choices) if self.choices else type(self.default).__name__


LOAD_FAIL_REASON = (
    "Error loading model. (Exit code: 18446744072635812000). Unknown error. "
    "Try a different model and/or config."
)

# fmt: off
FAULTS: Mapping[str, Fault] = {fault.name: fault for fault in (
    # the server
    Fault("stalled", False,
          "no request is answered while this is on; they go on when it is off"),
    Fault("unknown_route_404", False,
          "unknown routes answer 404 instead of 200 with an error (reports disagree)"),
    Fault("auth_token", "",
          "every request must carry this bearer token (E2, E3); empty: no authentication",
          secret=True),
    Fault("unauthorized", False,
          "every request is refused with 401, whatever token it carries"),
    Fault("loading_503", "no",
          "every path answers 503 `Loading model`, as llama-server's: while this is on; while any load is under "
          "way",
          choices=("no", "always", "during_loads")),
    Fault("loading_retry_after", 0,
          "seconds in the `Retry-After` of such a 503; 0: no such header"),
    Fault("auth_on_chat_only", False,
          "the token is asked for by the inference routes alone"),
    Fault("auth_status", 401,
          "the status that refuses a missing or wrong token"),
    Fault("close_after_stream", False,
          "the connection is closed after a stream, and no header announces it"),
    Fault("websocket", "sdk",
          "what a WebSocket of an SDK (/llm, /embedding, /system, …) meets: LM Studio's protocol; the same and "
          "every other frame sent back; a refusal of the upgrade",
          choices=("sdk", "echo", "refuse")),
    Fault("sdk_answers", "ok",
          "what is said on an SDK's socket: LM Studio's protocol; the greeting is refused; what is no JSON; nothing "
          "after the greeting; an error to each call and channel; the socket is ended at each call and channel",
          choices=("ok", "refused", "garbled", "silent", "errors", "drops")),
    Fault("load_cuts_socket", -1,
          "an SDK's socket is ended after this many messages about a load, which goes on; -1: it is not"),
    Fault("sdk_cancel", "closes",
          "what becomes of a load whose channel is cancelled: it ends, and its channel is closed without a word; it "
          "ends with an error (E14); it goes on (unknown in reality)",
          choices=("closes", "errors", "ignored")),
    # what stays in memory
    Fault("jit", True,
          "an inference request for a model that is not loaded loads it (Just-in-Time loading)"),
    Fault("jit_stampede", True,
          "simultaneous requests for a cold model each load a copy; off: they share one load"),
    Fault("jit_expires", True,
          "models loaded on demand are unloaded when idle (Auto Unload Unused JIT Models)"),
    Fault("auto_evict", True,
          "a load on demand throws out all other models loaded on demand, even generating ones"),
    Fault("default_ttl_seconds", 3600.0,
          "idle time of a model loaded on demand whose request named no valid ttl"),
    Fault("ttl_cap_seconds", 0.0,
          "a larger requested ttl is cut down to this; 0: no cap (unknown in reality)"),
    Fault("gets_reset_ttl", False,
          "listings renew the idle timer too (unknown in reality, believed not)"),
    Fault("idle_starts", "end",
          "idle time is counted from a request's end or start (unknown in reality)",
          choices=("end", "start")),
    Fault("wrong_model_fallback", True,
          "an unknown model is answered, with 200, by the only chat model loaded"),
    Fault("variant_ids", "key",
          "what an instance asked for by a variant's name is called: by the model's key, or by that name "
          "(unknown in reality)",
          choices=("key", "variant")),
    Fault("key_means_selected", False,
          "the bare key means the selected variant alone; off: whichever variant is loaded answers to it "
          "(unknown in reality)"),
    Fault("reranker_listed_as", "embedding",
          "the type that the listings give a reranker (unknown in reality)",
          choices=("embedding", "llm")),
    Fault("stored_error_status", 404,
          "the status for a response id that is not stored here (404 or 400; not pinned down in reality)"),
    Fault("restart_forgets_responses", False,
          "stored responses are lost with a restart (unknown in reality)"),
    Fault("memory_bytes", 0,
          "the guardrails refuse loads beyond this much memory; 0: no limit"),
    Fault("estimate_factor", 1.0,
          "what the socket estimates for a load is that many times what it should be"),
    Fault("fragmentation", 0.0,
          "this part of what a copy took is of no use after it has gone, until nothing is loaded at all"),
    Fault("growth_bytes", 0,
          "a copy takes so much more with each answer; one that no longer fits into memory_bytes crashes (E10)"),
    Fault("drops_after_seconds", -1.0,
          "a load ends well, and so long after it its copy crashes for want of memory; -1: it does not"),
    Fault("unload_hangs_requests", False,
          "requests on an instance that goes away hang instead of E11 or E12"),
    # loads
    Fault("load_seconds", -1.0,
          "how long a load takes; -1: what the model says"),
    Fault("load_result", "ok",
          "how a load ends: well; failed after its time; refused by the guardrails; never, at 0 %",
          choices=("ok", "fail", "guardrail", "stuck")),
    Fault("load_fail_reason", LOAD_FAIL_REASON,
          "the reason given after `Error:` by load_result=fail"),
    Fault("load_error_status", 500,
          "status of a failed POST /api/v1/models/load (E9; not pinned down in reality)"),
    Fault("load_reply", "true",
          "what POST /api/v1/models/load is told, whatever becomes of the load itself",
          choices=("true", "error_500", "error_200", "html_500", "empty_body", "truncated_json", "hang",
                   "fin", "rst")),
    Fault("load_reply_after_seconds", -1.0,
          "when such a reply comes, counted from the request; -1: as the load ends"),
    Fault("load_reply_delay_seconds", 0.0,
          "how late a load that ended is answered"),
    Fault("load_cancelled_by_disconnect", False,
          "a client that leaves ends the load it asked for (unknown in reality)"),
    Fault("loads_in_parallel", True,
          "loads of different models run at once; off: one after another (unknown in reality)"),
    # listings
    Fault("list_reply", "ok",
          "what the listing routes answer",
          choices=("ok", "error_200", "error_500", "html_500", "empty_body", "truncated_json", "huge",
                   "other_shape", "not_found", "hang", "fin", "rst")),
    Fault("list_delay_seconds", 0.0,
          "how long a listing takes; it shows what was true when it was asked"),
    Fault("huge_bytes", 50_000_000,
          "size of a listing under list_reply=huge"),
    Fault("listing_lag_seconds", 0.0,
          "how long after its load ended an instance appears in the listings"),
    Fault("lists_while_loading", False,
          "/api/v1/models shows an instance that is still loading (unknown in reality)"),
    Fault("v0_shows_loading", True,
          "/api/v0/models says `loading` during loads (measured on 0.4.23)"),
    Fault("v0_lists_loaded_only", False,
          "with jit off, /api/v0/models leaves out what is not loaded (some servers)"),
    Fault("html_500_at_load_start", "no",
          "the first look after a load began is an HTML 500 (E21, once in 79)",
          choices=("no", "model_v0", "listing")),
    # answers
    Fault("content_refused", "no",
          "the model's template fails (400) on messages whose content is plain text; on those that have a list of "
          "parts",
          choices=("no", "plain", "list")),
    Fault("content_refused_status", 400,
          "the status for that; with 500 in the words of llama.cpp"),
    Fault("turned_away", 0,
          "with this status something in front turns away every request for an answer (429, 504); 0: none"),
    Fault("needs_image", False,
          "a request without an image is refused (400)"),
    Fault("answer", "ok",
          "what an inference request is answered once its turn has come (E10 to E13 and E18 included); "
          "is_unloaded comes before its turn, half_hang is half of an answer that is no stream, then silence",
          choices=("ok", "crash", "error_200", "error_500", "html_500", "empty_body", "truncated_json",
                   "json_despite_stream", "unloaded_in_queue", "unloaded", "is_unloaded", "reloaded",
                   "context_length", "half_hang", "hang", "fin", "rst")),
    Fault("answer_model", "",
          "the model name put into answers; empty: the instance that answers"),
    Fault("answer_tokens", 64,
          "tokens a model says when max_tokens does not stop it before; 0: a good answer without one word"),
    Fault("answer_text", "",
          "the words of the answers, repeated as needed; empty: built-in ones"),
    Fault("multibyte_words", False,
          "answers are made of words of two- to four-byte characters"),
    Fault("prompt_seconds", 0.05,
          "silence before the first token, a slot being taken"),
    Fault("prompt_token_seconds", 0.0,
          "time for each token of a prompt that the cache of its slot does not hold, besides prompt_seconds"),
    Fault("prompt_cache", True,
          "a slot remembers what it read last, and reads on from where the next prompt differs"),
    Fault("disconnect_noticed_seconds", 0.0,
          "how long a client that left during prompt processing is worked for, where that does not go on to its end"),
    Fault("token_seconds", 0.02,
          "time between tokens"),
    Fault("parallel", 4,
          "requests an instance works on at once; the others wait in its queue"),
    Fault("headers_before_first_token", False,
          "a stream's headers come at once, not with the first token (unknown)"),
    Fault("flat_errors", True,
          'crash and unload errors are `{"error": "text"}`; off: the OpenAI layout'),
    Fault("prompt_finishes_after_disconnect", True,
          "a client leaving during prompt processing frees its slot only after it"),
    Fault("stream_bom", False,
          "a stream begins with a byte order mark"),
    Fault("stream_breaks", "no",
          "how a stream goes wrong: an error event; silence; the engine crashes; the model is unloaded; an "
          "end without terminator (eof), a connection ended or reset, each also in mid-event",
          choices=("no", "error", "stall", "crash", "unload", "eof", "fin", "rst", "half_event_eof",
                   "half_event_fin", "half_event_rst")),
    Fault("stream_breaks_after", 3,
          "tokens before stream_breaks happens"),
    Fault("stall_seconds", 0.0,
          "how long stream_breaks=stall is silent; 0: for ever"),
    Fault("done_after_error", False,
          "`[DONE]` follows an error inside an OpenAI stream (unknown in reality)"),
    # crashes
    Fault("crash_stays_listed", False,
          "a crashed instance stays in the listings (unknown in reality)"),
    Fault("crash_reloads", False,
          "a crashed instance that stayed listed loads again at the next request"),
)}
# fmt: on


class FaultError(ValueError):
    """A fault that does not exist, or a value that it cannot have."""


LIMITS = ("times", "seconds", "model", "route", "chance")


@dataclass(frozen=True, slots=True)
class Rule:
    value: Value
    times: int | None = None
    model: str | None = None
    route: str | None = None
    chance: float | None = None
    seconds: float | None = None
    ends_at: float | None = None

    def fits(self, model: str | None, route: str | None, path: str | None) -> bool:
        if self.model is not None and (model is None or model.lower() != self.model.lower()):
            return False
        if self.route is None or self.route in (route, path):
            return True
        return route in ROUTE_GROUPS.get(self.route, ())

    def shown(self) -> Any:
        limits = {name: getattr(self, name) for name in LIMITS}
        limits = {name: limit for name, limit in limits.items() if limit is not None}
        return {"value": self.value, **limits} if limits else self.value


class Faults:
    """The switches as they stand. `take` spends one of a rule's `times`, `look` does not."""

    def __init__(self, rng: random.Random, clock: Clock) -> None:
        self._rng = rng
        self._clock = clock
        self._rules: dict[str, list[Rule]] = {}
        self.fired: dict[str, int] = {}
        self.watchers: list[Callable[[list[str]], None]] = []

    def patch(self, changes: Mapping[str, Any]) -> None:
        """Merge: null puts a fault back to its default. All or nothing, and a mistake names the nearest right
        name."""
        checked = {name: _rules(name, value) for name, value in changes.items()}
        for name, rules in checked.items():
            if rules:
                self._rules[name] = [self._timed(rule) for rule in rules]
            else:
                self._rules.pop(name, None)
        self._tell(list(checked))

    def _timed(self, rule: Rule) -> Rule:
        if rule.seconds is None:
            return rule
        timer = self._clock.call_later(rule.seconds, self._time_is_up)
        return replace(rule, ends_at=timer.when)

    def _time_is_up(self) -> None:
        now, over = self._clock.now(), []
        for name, rules in self._rules.items():
            left = [rule for rule in rules if rule.ends_at is None or rule.ends_at > now]
            if len(left) < len(rules):
                self._rules[name] = left
                over.append(name)
        self._tell(over)

    def _tell(self, names: list[str]) -> None:
        for watcher in list(self.watchers):
            watcher(names)

    def reset(self) -> None:
        self.patch(dict.fromkeys(self._rules))

    def take(
        self, name: str, model: str | None = None, route: str | None = None, path: str | None = None
    ) -> Value:
        for index, rule in enumerate(self._rules.get(name, ())):
            if not rule.fits(model, route, path):
                continue
            if rule.chance is not None and self._rng.random() >= rule.chance:
                continue
            if rule.times is not None:
                if rule.times == 1:
                    del self._rules[name][index]
                else:
                    self._rules[name][index] = replace(rule, times=rule.times - 1)
            self.fired[name] = self.fired.get(name, 0) + 1
            return rule.value
        return FAULTS[name].default

    def look(self, name: str, model: str | None = None, route: str | None = None) -> Value:
        for rule in self._rules.get(name, ()):
            if rule.chance is None and rule.fits(model, route, None):
                self.fired[name] = self.fired.get(name, 0) + 1
                return rule.value
        return FAULTS[name].default

    def flag(self, name: str, model: str | None = None, route: str | None = None) -> bool:
        return bool(self.look(name, model, route))

    def number(self, name: str, model: str | None = None, route: str | None = None) -> float:
        return float(self.look(name, model, route))

    def shown(self) -> dict[str, Any]:
        """What differs from the defaults, in the form `patch` takes; secrets are named, not shown."""
        shown: dict[str, Any] = {}
        for name, rules in sorted(self._rules.items()):
            if not rules:
                continue
            values = ["(set)" if FAULTS[name].secret else rule.shown() for rule in rules]
            shown[name] = values[0] if len(values) == 1 else values
        return shown


def parse_fault(text: str) -> tuple[str, Any]:
    """`NAME=VALUE` from a command line; VALUE is JSON, or a bare word."""
    name, equals, written = text.partition("=")
    name = name.strip()
    if not equals:
        raise FaultError(f'fault "{text}" has no value; write {name or "NAME"}=VALUE')
    fault = _fault(name)
    value: Any
    try:
        value = json.loads(written)
    except ValueError:
        value = written
    if isinstance(fault.default, str) and not isinstance(value, (str, dict, list)) and value is not None:
        value = written
    _rules(name, value)
    return name, value


def _fault(name: str) -> Fault:
    if name in FAULTS:
        return FAULTS[name]
    raise FaultError(f'there is no fault "{name}"{_nearest(name, FAULTS)}')


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
    return f'; did you mean "{close[0]}"?' if close else ""


def _rules(name: str, value: Any) -> list[Rule]:
    fault = _fault(name)
    if value is None:
        return []
    return [_rule(fault, entry) for entry in (value if isinstance(value, list) else [value])]


def _rule(fault: Fault, entry: Any) -> Rule:
    if not isinstance(entry, dict):
        return Rule(_checked(fault, entry))
    for field in entry:
        if field not in ("value", *LIMITS):
            raise FaultError(
                f'{fault.name}: "{field}" limits nothing; '
                f"a limited value is an object of value, {', '.join(LIMITS)}"
            )
    if "value" not in entry:
        raise FaultError(f'{fault.name}: the object has no "value"')
    times, seconds, model, route, chance = (entry.get(field) for field in LIMITS)
    if times is not None and (type(times) is not int or times < 1):
        raise FaultError(f"{fault.name}: times is {times!r}; write a whole number from 1")
    if model is not None and not isinstance(model, str):
        raise FaultError(f"{fault.name}: model is {model!r}; write a model key")
    if route is not None and not (isinstance(route, str) and route.startswith("/")):
        known = (*ROUTES, *ROUTE_GROUPS)
        if route not in known:
            raise FaultError(
                f'{fault.name}: there is no route "{route}"{_nearest(str(route), known)}'
                f" (or write a path, beginning with /)"
            )
    if chance is not None and not _is_number(chance):
        raise FaultError(f"{fault.name}: chance is {chance!r}; write a number from 0 to 1")
    if seconds is not None and not (_is_number(seconds) and seconds > 0):
        raise FaultError(f"{fault.name}: seconds is {seconds!r}; write a number above 0")
    return Rule(_checked(fault, entry["value"]), times, model, route, chance, seconds)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _checked(fault: Fault, value: Any) -> Value:
    if fault.choices:
        if value in fault.choices:
            return str(value)
        choices = ", ".join(fault.choices)
        raise FaultError(f'{fault.name}: "{value}" is none of {choices}{_nearest(str(value), fault.choices)}')
    if isinstance(fault.default, bool):
        if isinstance(value, bool):
            return value
        wanted = "true or false"
    elif isinstance(fault.default, int):
        if type(value) is int:
            return value
        wanted = "a whole number"
    elif isinstance(fault.default, float):
        if _is_number(value):
            return float(value)
        wanted = "a number"
    else:
        if isinstance(value, str):
            return value
        wanted = "a text"
    raise FaultError(f"{fault.name}: {json.dumps(value, default=str)} is not {wanted}")
