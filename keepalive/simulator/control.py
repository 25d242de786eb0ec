"""The simulator's own routes, under `/simulator/`, on the same port: look at the world and change it.

They are outside of it: not journalled, not counted, and no fault touches them (a restart does: the port is
closed).
"""

import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import parse_qs

from keepalive.simulator.exchange import Reply, Request, json_reply, text_reply
from keepalive.simulator.faults import FAULTS, ROUTE_GROUPS, ROUTES
from keepalive.simulator.models import Instance, Load, SimModel

if TYPE_CHECKING:
    from keepalive.simulator.studio import Studio

# A restart asked for over HTTP comes a moment later, so that its own answer gets through.
BEFORE_RESTART_SECONDS = 0.05

HELP = """\
A stand-in for LM Studio. This is no real model: it says the same words every time.

GET   /simulator/state                   models, copies, loads under way, faults
GET   /simulator/log?since=N             what happened after event N
PATCH /simulator/faults                  {{"NAME": value, ...}}; null puts one back to its default
                                         limited: {{"NAME": {{"value": ..., "times": 2, "model": "key",
                                         "route": "chat", "chance": 0.1}}}}, or a list of such
GET   /simulator/faults                  the table below as JSON
POST  /simulator/load     {{"model"}}      somebody loads it by hand; optional: seconds,
                                         context_length, identifier
POST  /simulator/evict    {{"model"}} or {{"instance_id"}}
POST  /simulator/crash    {{"model"}}      optional: stays_listed
POST  /simulator/restart                 optional: {{"down_seconds": 20}}
POST  /simulator/advance  {{"seconds"}}    skip time
POST  /simulator/tier     {{"tier"}}       v1 (LM Studio 0.4), v0 (0.3), openai (another server)

Routes for "route": {routes}

Faults:
{faults}
"""


class ControlError(ValueError):
    """A control request that cannot be done, and what to write instead."""


def parsed(body: bytes) -> dict[str, Any]:
    value = json.loads(body or b"{}")
    if not isinstance(value, dict):
        raise ControlError("the body is no JSON object")
    return value


def answer(studio: "Studio", request: Request) -> Reply:
    name = request.path.removeprefix("/simulator").strip("/")
    routes: dict[tuple[str, str], Callable[[Studio, Request], Reply]] = {
        ("GET", ""): lambda studio, request: text_reply(help_text()),
        ("GET", "state"): lambda studio, request: json_reply(studio.state()),
        ("GET", "log"): _log,
        ("GET", "faults"): lambda studio, request: json_reply(fault_table(studio)),
        ("PATCH", "faults"): _faults,
        ("POST", "load"): _load,
        ("POST", "evict"): _evict,
        ("POST", "crash"): _crash,
        ("POST", "restart"): _restart,
        ("POST", "advance"): _advance,
        ("POST", "tier"): _tier,
    }
    act = routes.get((request.method, name))
    if act is None:
        return json_reply(
            {"error": f"no {request.method} {request.path}; GET /simulator/ lists what there is"}, 404
        )
    try:
        return act(studio, request)
    except ValueError as mistake:
        return json_reply({"error": str(mistake)}, 400)


def help_text() -> str:
    lines = [f"  {f.name} ({f.kind}, {json.dumps(f.default)})\n      {f.text}" for f in FAULTS.values()]
    return HELP.format(routes=", ".join((*ROUTES, *ROUTE_GROUPS)), faults="\n".join(lines))


def fault_table(studio: "Studio") -> dict[str, Any]:
    now = studio.faults.shown()
    return {
        fault.name: {
            "kind": fault.kind,
            "default": fault.default,
            "now": now.get(fault.name, fault.default),
            "text": fault.text,
        }
        for fault in FAULTS.values()
    }


def state(studio: "Studio") -> dict[str, Any]:
    return {
        "tier": studio.tier,
        "up": studio.up,
        "now": round(studio.clock.now(), 6),
        "in_flight": studio.in_flight,
        "events": studio.journal.count,
        "models": [_model(studio, model) for model in studio.memory.models.values()],
        "faults": studio.faults.shown(),
        "fired": dict(studio.faults.fired),
    }


def _model(studio: "Studio", model: SimModel) -> dict[str, Any]:
    return {
        "key": model.key,
        "kind": model.kind,
        "size_bytes": model.size_bytes,
        "load_seconds": model.load_seconds,
        "max_context_length": model.max_context_length,
        "instances": [_instance(studio, instance) for instance in studio.memory.copies(model)],
        "loads": [_loading(studio, load) for load in studio.memory.loads_of(model)],
    }


def _instance(studio: "Studio", instance: Instance) -> dict[str, Any]:
    now = studio.clock.now()
    return {
        "id": instance.id,
        "owner": instance.owner,
        "jit": instance.owner == "jit",
        "ttl_seconds": instance.ttl_seconds,
        "idle_seconds": round(instance.idle_seconds(now), 3),
        "context_length": instance.context_length,
        "generating": len(instance.working),
        "queued": len(instance.queue),
        "listed": studio.memory.listed(instance),
        "crashed": instance.crashed,
    }


def _loading(studio: "Studio", load: Load) -> dict[str, Any]:
    now = studio.clock.now()
    return {
        "instance_id": load.instance_id,
        "owner": load.owner,
        "started": load.started_at is not None,
        "elapsed_seconds": round(now - load.asked_at, 3),
        "seconds": load.seconds,
        "progress": round(load.progress(now), 3),
    }


def _log(studio: "Studio", request: Request) -> Reply:
    since = parse_qs(request.query).get("since", ["0"])[0]
    if not since.isdecimal():
        raise ControlError(f'since is "{since}"; write the n of the last event you have')
    return json_reply({"events": studio.log(int(since)), "last": studio.journal.count})


def _faults(studio: "Studio", request: Request) -> Reply:
    studio.set_faults(parsed(request.body))
    return json_reply({"faults": studio.faults.shown()})


def _load(studio: "Studio", request: Request) -> Reply:
    fields = _fields(request, model=str, seconds=float, context_length=int, identifier=str)
    load = studio.load(
        _wanted(fields, "model"),
        seconds=fields.get("seconds"),
        context_length=fields.get("context_length"),
        identifier=fields.get("identifier"),
    )
    status = "loaded" if load.instance else "loading" if not load.ended else "failed"
    return json_reply({"instance_id": load.instance_id, "status": status})


def _evict(studio: "Studio", request: Request) -> Reply:
    fields = _fields(request, model=str, instance_id=str)
    studio.evict(_wanted(fields, "instance_id" if "instance_id" in fields else "model"))
    return json_reply({"status": "evicted"})


def _crash(studio: "Studio", request: Request) -> Reply:
    fields = _fields(request, model=str, stays_listed=bool)
    studio.crash(_wanted(fields, "model"), fields.get("stays_listed", False))
    return json_reply({"status": "crashed"})


def _restart(studio: "Studio", request: Request) -> Reply:
    seconds = _fields(request, down_seconds=float).get("down_seconds", 0.0)
    studio.clock.call_later(BEFORE_RESTART_SECONDS, lambda: studio.restart(seconds))
    return json_reply({"status": "restarting", "down_seconds": seconds})


def _advance(studio: "Studio", request: Request) -> Reply:
    studio.advance(_wanted(_fields(request, seconds=float), "seconds"))
    return json_reply({"now": round(studio.clock.now(), 6)})


def _tier(studio: "Studio", request: Request) -> Reply:
    studio.set_tier(_wanted(_fields(request, tier=str), "tier"))
    return json_reply({"tier": studio.tier})


def _fields(request: Request, **kinds: type) -> dict[str, Any]:
    given = parsed(request.body)
    for name, value in given.items():
        if name not in kinds:
            raise ControlError(f'"{name}" is not known here; write {", ".join(kinds)}')
        fits = isinstance(value, (int, float)) if kinds[name] is float else isinstance(value, kinds[name])
        if not fits or (isinstance(value, bool) and kinds[name] is not bool):
            raise ControlError(f"{name} is {value!r}; it must be a {kinds[name].__name__}")
    return given


def _wanted(fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise ControlError(f'"{name}" is missing')
    return cast(Any, fields[name])
