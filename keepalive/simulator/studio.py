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
from collections.abc import Mapping
from typing import Any
from urllib.parse import unquote

from keepalive.simulator import control
from keepalive.simulator.bodies import inflated, parsed
from keepalive.simulator.call import Body, Call
from keepalive.simulator.exchange import (
    Cut,
    Hang,
    Refusal,
    Reply,
    Request,
    flat,
    json_reply,
    loading_model,
    native_error,
)
from keepalive.simulator.faults import INFERENCE_ROUTES, LIST_ROUTES, FaultError
from keepalive.simulator.inference import infer
from keepalive.simulator.journal import Happened
from keepalive.simulator.listing import answer_listing
from keepalive.simulator.loading import download, load, unload
from keepalive.simulator.machine import TIERS, Machine, Tier
from keepalive.simulator.models import SimModel
from keepalive.simulator.naming import not_stored
from keepalive.simulator.vectors import embed, rerank

__all__ = ["TIERS", "Cut", "FaultError", "Hang", "Reply", "Request", "SimModel", "Studio", "Tier"]

# method and path -> route, and the tiers that have it. `/api/v0/models/{id}`, stored responses and downloads carry
# an id: see _route.
PATHS: Mapping[tuple[str, str], tuple[str, tuple[Tier, ...]]] = {
    ("GET", "/lmstudio-greeting"): ("greeting", ("v1", "v0")),
    ("GET", "/v1/models"): ("list_openai", ("v1", "v0", "openai")),
    ("POST", "/v1/chat/completions"): ("chat", ("v1", "v0", "openai")),
    ("POST", "/v1/completions"): ("completions", ("v1", "v0", "openai")),
    ("POST", "/v1/embeddings"): ("embeddings", ("v1", "v0", "openai")),
    ("POST", "/v1/rerank"): ("rerank", ("v1", "v0", "openai")),
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


class Studio(Machine):
    """The machine with a door: its HTTP routes."""

    def state(self) -> dict[str, Any]:
        return control.state(self)

    async def handle(self, request: Request) -> Reply:
        """Answer a request. Raises `Cut` when the connection breaks before a status line; for a request
        that is never answered it never returns."""
        if self.vanished:
            await asyncio.get_running_loop().create_future()  # it does not even refuse
        if not self.up:
            raise Cut("refused")
        if request.path == "/simulator" or request.path.startswith("/simulator/"):
            return control.answer(self, request)
        call = Call(self, self.next_number(), request, self._route(request))
        try:
            try:
                reply = await self._answer(call)
            except Refusal as refusal:
                reply = refusal.reply
            except Hang:
                await call.hang()
        except Cut as cut:
            call.ended(cut)
            raise
        except asyncio.CancelledError:
            call.client_gone()
            raise
        except Exception:
            call.ended()
            raise
        self.journal.write(Happened.REPLY, request=call.n, route=call.route, status=reply.status)
        if isinstance(reply.body, Body):
            return reply  # the body ends the call
        call.ended()
        return reply

    def _route(self, request: Request) -> str:
        path = request.path if request.path == "/" else request.path.rstrip("/")
        route, tiers = PATHS.get((request.method, path), ("unknown", TIERS))
        if request.method == "GET" and path.startswith("/api/v0/models/"):
            route, tiers = "model_v0", ("v1", "v0")
        elif request.method == "GET" and path.startswith("/api/v1/models/download/status/"):
            route, tiers = "download", ("v1",)
        elif request.method in ("GET", "DELETE") and path.startswith("/v1/responses/"):
            route, tiers = "stored", ("v1", "v0")
        if route == "rerank" and not any(model.kind == "reranker" for model in self.memory.models.values()):
            route = "unknown"
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
        when = call.word("loading_503")
        if when == "always" or (when == "during_loads" and self.memory.loads):
            return loading_model(int(call.number("loading_retry_after")))
        self._check_token(call)
        if call.route == "unknown":
            return self._unknown_route(call)
        if request.headers.get("content-type", "").lower().startswith("multipart/"):
            raise flat(415, "Unsupported Media Type")
        if broken is not None:
            raise broken
        if call.route in LIST_ROUTES:
            return await answer_listing(call)
        match call.route:
            case "embeddings":
                return await embed(call)
            case "rerank":
                return await rerank(call)
            case "stored":
                return self._stored(call)
            case "load":
                return await load(call)
            case "unload":
                return unload(call)
            case "download":
                return download(call)
            case "greeting":
                return json_reply({"lmstudio": True})
        return await infer(call)

    def _read_body(self, call: Call) -> Refusal | None:
        """E20. The body is read before everything else only because the journal names the model it asks
        for."""
        if call.request.method != "POST" or call.route == "unknown":
            return None
        try:
            body = inflated(call.request.body, call.request.headers.get("content-encoding", ""))
            payload = parsed(body)
        except Refusal as refusal:
            return refusal
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
        if call.route == "greeting":
            return
        if call.flag("unauthorized"):
            raise native_error(401, "invalid_request", "Unauthorized", code="invalid_api_key")
        token = call.word("auth_token")
        if not token:
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

    def _stored(self, call: Call) -> Reply:
        ident = unquote(call.request.path.rstrip("/").removeprefix("/v1/responses/"))
        kept = self.stored.get(ident)
        if kept is None or kept.response is None:
            raise not_stored(call, ident, "response_id")
        if call.request.method == "GET":
            return json_reply(kept.response)
        del self.stored[ident]
        return json_reply({"id": ident, "object": "response", "deleted": True})

    def _unknown_route(self, call: Call) -> Reply:
        """E1: 200 in all recorded versions, but two reports say 404."""
        if self.tier == "openai":
            return json_reply({"detail": "Not Found"}, 404)
        request = call.request
        message = f"Unexpected endpoint or method. ({request.method} {request.path})"
        return json_reply({"error": message}, 404 if call.flag("unknown_route_404") else 200)
