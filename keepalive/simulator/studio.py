"""A stand-in LM Studio without sockets: `Studio.handle` answers one HTTP request in process.

Rules:
- time is the running loop's and nothing else (`clock`), chance is the seeded generator's: the same loop, seed
  and requests give the same world, byte for byte;
- every switch of `faults` may be thrown at any moment and holds from the next request on;
- cancelling `handle`, or closing the body it returned, is the client leaving;
- the journal holds what happened, never a prompt, an answer or a token.
What real servers were not seen to do is a switch, with the believed behaviour as its default.
"""

import asyncio
import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, get_args
from urllib.parse import unquote

from keepalive.simulator import control
from keepalive.simulator.call import Body, Call
from keepalive.simulator.clock import Clock, Timer
from keepalive.simulator.exchange import (
    Cut,
    Hang,
    Refusal,
    Reply,
    Request,
    flat,
    html_500,
    json_reply,
    native_error,
    openai_error,
    spoiled,
)
from keepalive.simulator.faults import INFERENCE_ROUTES, LIST_ROUTES, FaultError, Faults
from keepalive.simulator.inference import embed, infer, only_known_fields, required, unknown_model
from keepalive.simulator.journal import Event, Happened, Journal
from keepalive.simulator.listing import load_config, openai_models, v0_models, v0_rows, v1_models
from keepalive.simulator.memory import Memory
from keepalive.simulator.models import DEFAULT_MODELS, Instance, Load, SimModel

__all__ = ["Cut", "FaultError", "Hang", "Reply", "Request", "SimModel", "Studio", "Tier"]

Tier = Literal["v1", "v0", "openai"]
TIERS: tuple[Tier, ...] = get_args(Tier)

LOAD_FIELDS = {
    "model": str,
    "context_length": int,
    "eval_batch_size": int,
    "flash_attention": bool,
    "num_experts": int,
    "offload_kv_cache_to_gpu": bool,
    "echo_load_config": bool,
}

# method and path -> route, and the tiers that have it. `/api/v0/models/{id}` and downloads carry an id: see
# _route.
PATHS: Mapping[tuple[str, str], tuple[str, tuple[Tier, ...]]] = {
    ("GET", "/lmstudio-greeting"): ("greeting", ("v1", "v0")),
    ("GET", "/v1/models"): ("list_openai", ("v1", "v0", "openai")),
    ("POST", "/v1/chat/completions"): ("chat", ("v1", "v0", "openai")),
    ("POST", "/v1/completions"): ("completions", ("v1", "v0", "openai")),
    ("POST", "/v1/embeddings"): ("embeddings", ("v1", "v0", "openai")),
    ("POST", "/v1/responses"): ("responses", ("v1", "v0")),
    ("POST", "/v1/messages"): ("messages", ("v1",)),
    ("GET", "/api/v0/models"): ("list_v0", ("v1", "v0")),
    ("POST", "/api/v0/chat/completions"): ("chat", ("v1", "v0")),
    ("POST", "/api/v0/completions"): ("completions", ("v1", "v0")),
    ("POST", "/api/v0/embeddings"): ("embeddings", ("v1", "v0")),
    ("GET", "/api/v1/models"): ("list", ("v1",)),
    ("POST", "/api/v1/models/load"): ("load", ("v1",)),
    ("POST", "/api/v1/models/unload"): ("unload", ("v1",)),
    ("POST", "/api/v1/models/download"): ("download", ("v1",)),
    ("POST", "/api/v1/chat"): ("native_chat", ("v1",)),
}


class Studio:
    """The world. Make it inside or outside a loop, use it inside one."""

    def __init__(
        self,
        models: Iterable[SimModel] = DEFAULT_MODELS,
        *,
        tier: Tier = "v1",
        faults: Mapping[str, Any] | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self.clock = Clock()
        self.journal = Journal(self.clock.now)
        self.faults = Faults(rng or random.Random(0))  # noqa: S311 - a simulation, not a secret
        self.memory = Memory(models, self.clock, self.faults, self.journal)
        self.tier: Tier = tier
        self.up = True
        # Whoever owns sockets for this studio hears of a restart: False as it goes down, True as it is back.
        self.on_power: list[Callable[[bool], None]] = []
        self._return: Timer | None = None
        self._calls: dict[int, Call] = {}
        self._count = 0
        self.faults.patch(faults or {})
        self.faults.watchers.append(self._faults_changed)

    # what tests and the control routes do to the world

    def set_faults(self, changes: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Merge changes into the faults; None puts one back to its default. `FaultError` names what is
        wrong."""
        self.faults.patch({**(changes or {}), **more})

    def load(
        self,
        model: str,
        *,
        seconds: float | None = None,
        context_length: int | None = None,
        identifier: str | None = None,
    ) -> Load:
        """Somebody loads a model by hand. With `seconds=0` it is there when this returns."""
        found = self._known(model)
        if identifier is not None and identifier in (self.memory.instances.keys() | self.memory.loads.keys()):
            raise ValueError(f'an instance with the identifier "{identifier}" already exists')

        def take(name: str) -> bool | int | float | str:
            return self.faults.take(name, found.key)

        return self.memory.start_load(
            found, "by hand", take, seconds=seconds, context_length=context_length, identifier=identifier
        )

    def evict(self, name: str) -> None:
        """An instance, or every copy of a model, goes as Auto-Evict would take it: in mid-answer if need
        be."""
        for instance in self._instances(name):
            self.memory.evict(instance, by="control")

    def crash(self, name: str, stays_listed: bool = False) -> None:
        for instance in self._instances(name):
            self.memory.crash(instance, stays_listed)

    def advance(self, seconds: float) -> None:
        """Skip time: timers, loads and pauses due on the way come due now."""
        self.clock.advance(seconds)

    def restart(self, down_seconds: float = 0.0) -> None:
        """LM Studio ends and starts again: nobody listens for a while, every answer breaks off, nothing is
        loaded."""
        self.journal.write(Happened.DOWN, seconds=down_seconds)
        self.up = False
        self.memory.forget_all()
        for call in list(self._calls.values()):
            call.fail(Cut("fin"))
        for tell in list(self.on_power):
            tell(False)
        if self._return is not None:
            self._return.cancel()  # a restart during a restart counts from its own beginning
        if down_seconds > 0:
            self._return = self.clock.call_later(down_seconds, self._back)
        else:
            self._back()

    def set_tier(self, tier: Tier) -> None:
        if tier not in TIERS:
            raise ValueError(f'there is no tier "{tier}"; write one of {", ".join(TIERS)}')
        self.tier = tier
        self.journal.write(Happened.TIER, tier=tier)

    def state(self) -> dict[str, Any]:
        return control.state(self)

    def log(self, since: int = 0) -> list[Event]:
        """What happened after event number `since`."""
        return self.journal.since(since)

    @property
    def in_flight(self) -> int:
        return len(self._calls)

    def close(self) -> None:
        """Stop all timers, so that nothing of this world outlives its test."""
        self.clock.stop()

    # one request

    async def handle(self, request: Request) -> Reply:
        """Answer a request. Raises `Cut` when the connection breaks before a status line; for a request
        that is never answered it never returns."""
        if not self.up:
            raise Cut("refused")
        if request.path == "/simulator" or request.path.startswith("/simulator/"):
            return control.answer(self, request)
        self._count += 1
        call = Call(self, self._count, request, self._route(request))
        self._calls[call.n] = call
        try:
            try:
                reply = await self._answer(call)
            except Refusal as refusal:
                reply = refusal.reply
            except Hang:
                await call.hang()
        except Cut as cut:
            self.call_ended(call, cut)
            raise
        except asyncio.CancelledError:
            self.client_gone(call)
            raise
        except Exception:
            self.call_ended(call)
            raise
        self.journal.write(Happened.REPLY, request=call.n, route=call.route, status=reply.status)
        if isinstance(reply.body, Body):
            return reply  # the body ends the call
        self.call_ended(call)
        return reply

    def _route(self, request: Request) -> str:
        path = request.path if request.path == "/" else request.path.rstrip("/")
        route, tiers = PATHS.get((request.method, path), ("unknown", TIERS))
        if request.method == "GET" and path.startswith("/api/v0/models/"):
            route, tiers = "model_v0", ("v1", "v0")
        elif request.method == "GET" and path.startswith("/api/v1/models/download/status/"):
            route, tiers = "download", ("v1",)
        return route if self.tier in tiers else "unknown"

    async def _answer(self, call: Call) -> Reply:
        request = call.request
        broken = self._read_body(call)
        self.journal.write(
            Happened.REQUEST,
            request=call.n,
            method=request.method[:20],
            path=request.path[:200],
            route=call.route,
            model=call.asked,
            stream=call.payload.get("stream") is True,
            max_tokens=limit if isinstance(limit := call.payload.get("max_tokens"), int) else None,
        )
        if call.flag("stalled"):
            await call.until(lambda: not self.faults.flag("stalled", call.key or call.asked, call.route))
        self._check_token(call)
        if call.route == "unknown":
            return self._unknown_route(call)
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise flat(415, "Unsupported Media Type")
        if broken is not None:
            raise broken
        if call.route in LIST_ROUTES:
            return await self._list(call)
        if call.route in INFERENCE_ROUTES:
            return await (embed if call.route == "embeddings" else infer)(self, call)
        match call.route:
            case "load":
                return await self._load(call)
            case "unload":
                return self._unload(call)
            case "download":
                return self._download(call)
        return json_reply({"lmstudio": True})

    def _read_body(self, call: Call) -> Refusal | None:
        """E20. The body is read before everything else only because the journal names the model it asks
        for."""
        if call.request.method != "POST" or call.route == "unknown":
            return None
        try:
            payload = control.parsed(call.request.body)
        except ValueError:
            if call.request.path.startswith("/api/v1/"):
                return native_error(400, "invalid_request", "Invalid JSON in the request body")
            return flat(400, "Invalid JSON in the request body")
        call.payload = payload
        asked = payload.get("instance_id" if call.route == "unload" else "model")
        if isinstance(asked, str):
            call.asked = asked[:200]
            if model := self.memory.find(asked):
                call.key = model.key
            elif instance := self.memory.instances.get(asked):
                call.key = instance.model.key
        return None

    def _check_token(self, call: Call) -> None:
        token = call.word("auth_token")
        if not token or call.route == "greeting":
            return
        if call.route not in INFERENCE_ROUTES and call.flag("auth_on_chat_only"):
            return
        status = int(call.number("auth_status"))
        scheme, _, given = call.request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            given = call.request.headers.get("x-api-key", "") if call.route == "messages" else ""
        given = given.strip()
        if given == token:
            return
        if not given:
            message = (
                "An LM Studio API token is required to make requests to this server, but none was provided."
            )
            raise native_error(status, "invalid_request", message, code="invalid_api_key")  # E2
        # E3. The real server echoes the beginning of what it was given; a client must not log that.
        message = f"Malformed LM Studio API token provided: {given[:4]}..."
        raise native_error(status, "invalid_request", message, code="invalid_api_key")

    def _unknown_route(self, call: Call) -> Reply:
        """E1: 200 in all recorded versions, but two reports say 404."""
        if self.tier == "openai":
            return json_reply({"detail": "Not Found"}, 404)
        request = call.request
        message = f"Unexpected endpoint or method. ({request.method} {request.path})"
        return json_reply({"error": message}, 404 if call.flag("unknown_route_404") else 200)

    # listings

    async def _list(self, call: Call) -> Reply:
        if self.faults.flag("gets_reset_ttl"):
            self.memory.touch_all()
        reply = self._listing(call)
        if (delay := call.number("list_delay_seconds")) > 0:
            await call.pause(delay)
        return reply

    def _listing(self, call: Call) -> Reply:
        memory = self.memory
        ident = unquote(call.request.path.removeprefix("/api/v0/models/")) if call.route == "model_v0" else ""
        if early := self._first_look(call, ident):
            return early
        match call.route:
            case "list":
                reply = json_reply(v1_models(memory, self.faults))
            case "list_v0":
                reply = json_reply(v0_models(memory, self.faults))
            case "list_openai":
                jit = self.tier == "openai" or self.faults.flag("jit")
                reply = json_reply(openai_models(memory, jit))
            case _:
                rows = [
                    row for model in memory.models.values() for row in v0_rows(model, memory, self.faults)
                ]
                found = [row for row in rows if row["id"] == ident]
                if not found:
                    raise openai_error(
                        404, f'Model "{ident}" not found', param="model", code="model_not_found"
                    )
                reply = json_reply(found[0])
        match call.word("list_reply"):
            case "huge":
                body = reply.body
                assert isinstance(body, bytes)
                filling = b" " * int(call.number("huge_bytes"))
                return Reply(200, reply.headers, body[:-1] + filling + b"}")
            case "other_shape":
                return json_reply([{"name": key} for key in memory.models])
            case "not_found":
                return json_reply({"detail": "Not Found"}, 404)
            case how:
                return spoiled(how, reply)

    def _first_look(self, call: Call, ident: str) -> Reply | None:
        """E21: one probe in 79 met an HTML 500, exactly when a load began."""
        mode = call.word("html_500_at_load_start")
        model = self.memory.find(ident) if ident else None
        fresh = [model.key] if model else [] if ident else list(self.memory.first_looks)
        seen = [self.memory.first_looks.pop(key, False) for key in fresh]
        if mode == "listing" or (mode == "model_v0" and call.route == "model_v0"):
            return html_500() if any(seen) else None
        return None

    # loads

    async def _load(self, call: Call) -> Reply:
        only_known_fields(call.payload, frozenset(LOAD_FIELDS))
        required(call.payload, "model")
        for field, value in call.payload.items():
            if not isinstance(value, LOAD_FIELDS[field]) or (LOAD_FIELDS[field] is int and value is True):
                raise native_error(
                    400,
                    "invalid_request",
                    f'"{field}" must be {LOAD_FIELDS[field].__name__}',
                    code="invalid_type",
                    param=field,
                )
        asked = call.payload["model"]
        model = self.memory.find(asked)
        if model is None:
            raise unknown_model(self, call, asked)
        config = {
            field: value
            for field, value in call.payload.items()
            if field not in ("model", "context_length", "echo_load_config")
        }
        load = self.memory.start_load(
            model, "rest", call.fault, context_length=call.payload.get("context_length"), config=config
        )
        call.phase = "loading"
        call.load = load
        load.waiters.append(call)
        how = call.word("load_reply")
        after = call.number("load_reply_after_seconds")
        if how != "true" and after >= 0:
            await call.pause(after)
            return spoiled(how, json_reply(_load_reply(call, load)))
        await call.until(lambda: load.ended)
        if (delay := call.number("load_reply_delay_seconds")) > 0:
            await call.pause(delay)
        call.load = None
        reply = spoiled(how, json_reply(_load_reply(call, load)))
        if load.failure is not None and how == "true":
            message = f'Failed to load model "{model.key}". Error: {load.failure}'  # E9
            raise native_error(int(call.number("load_error_status")), "model_load_failed", message)
        return reply

    def _unload(self, call: Call) -> Reply:
        only_known_fields(call.payload, frozenset({"instance_id"}))
        required(call.payload, "instance_id")
        ident = call.payload["instance_id"]
        instance = self.memory.instances.get(ident) if isinstance(ident, str) else None
        if instance is None:
            message = f'No loaded instance with id "{ident}" found.'
            raise native_error(404, "model_not_found", message, code="model_not_found", param="instance_id")
        self.memory.unload(instance, by="rest")
        return json_reply({"instance_id": ident})

    def _download(self, call: Call) -> Reply:
        if call.request.method == "GET":
            raise native_error(404, "job_not_found", "Download job not found.", code="job_not_found")
        required(call.payload, "model")
        if isinstance(asked := call.payload["model"], str) and self.memory.find(asked):
            return json_reply({"status": "already_downloaded"})
        raise unknown_model(self, call, str(asked))

    # what calls tell

    def generation_started(self, call: Call, instance: Instance) -> None:
        call.generating = True
        self.journal.write(
            Happened.GENERATION_STARTED,
            request=call.n,
            route=call.route,
            model=instance.model.key,
            instance_id=instance.id,
            owner=instance.owner,
            asked=call.asked,
        )

    def generation_ended(self, call: Call, outcome: str) -> None:
        """Frees the slot; idempotent, so that every way out may call it."""
        instance = call.instance
        self.memory.leave(call)
        if call.generating:
            call.generating = False
            self.journal.write(
                Happened.GENERATION_ENDED,
                request=call.n,
                model=call.key,
                instance_id=instance.id if instance else None,
                tokens=call.tokens,
                outcome=outcome,
            )

    def client_gone(self, call: Call) -> None:
        if self._calls.pop(call.n, None) is None:
            return
        self.journal.write(Happened.CLIENT_GONE, request=call.n, route=call.route, phase=call.phase)
        if call.load is not None:
            if call in call.load.waiters:
                call.load.waiters.remove(call)
            if call.flag("load_cancelled_by_disconnect") and not call.load.waiters:
                self.memory.cancel_load(call.load)
        if call.prompt_ends is not None and call.flag("prompt_finishes_after_disconnect"):
            # The server's own log line: "If the model is busy processing the prompt, it will finish first."
            self.clock.call_at(call.prompt_ends, lambda: self.generation_ended(call, "client_gone"))
        else:
            self.generation_ended(call, "client_gone")

    def call_ended(self, call: Call, end: BaseException | None = None) -> None:
        if self._calls.pop(call.n, None) is None:
            return
        if isinstance(end, Cut):
            self.journal.write(Happened.CUT, request=call.n, route=call.route, how=end.how)
        self.generation_ended(call, "cut" if isinstance(end, Cut) else "ended")

    # inner

    def _back(self) -> None:
        self.up = True
        self.journal.write(Happened.UP)
        for tell in list(self.on_power):
            tell(True)

    def _faults_changed(self, names: list[str]) -> None:
        self.journal.write(Happened.FAULTS, names=names)
        for call in list(self._calls.values()):
            call.wake()  # those held by `stalled` look again

    def _known(self, name: str) -> SimModel:
        if model := self.memory.find(name):
            return model
        raise ValueError(
            f'there is no model "{name}" on this disk; there are {", ".join(self.memory.models)}'
        )

    def _instances(self, name: str) -> list[Instance]:
        if name in self.memory.instances and name not in self.memory.models:
            return [self.memory.instances[name]]
        found = self.memory.copies(self._known(name))
        if not found:
            raise ValueError(f'"{name}" is not loaded')
        return found


def _load_reply(call: Call, load: Load) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "type": load.model.kind,
        "instance_id": load.instance_id,
        "load_time_seconds": round(load.instance.load_seconds, 3) if load.instance else 0.0,
        "status": "loaded",
    }
    if call.payload.get("echo_load_config") is True:
        reply["load_config"] = load_config(load.model, load.context_length, load.config)
    return reply
