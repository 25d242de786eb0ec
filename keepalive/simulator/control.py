"""The simulator's own routes, under `/simulator/`, on the same port: look at the world and change it.

They are outside of it: not journalled, not counted, and no fault touches them (a restart does: the port is
closed).
"""

import json
from collections.abc import Callable
from typing import Any, cast
from urllib.parse import parse_qs

from keepalive.simulator.bodies import parsed
from keepalive.simulator.exchange import Reply, Request, json_reply, text_reply
from keepalive.simulator.faults import FAULTS, ROUTE_GROUPS, ROUTES
from keepalive.simulator.machine import Machine
from keepalive.simulator.models import Instance, Load, SimModel

# A restart asked for over HTTP comes a moment later, so that its own answer gets through.
BEFORE_RESTART_SECONDS = 0.05

HELP = """\
A stand-in for LM Studio. This is no real model: it says the same words every time.

GET   /simulator/state                   models, copies, loads under way, faults
GET   /simulator/log?since=N             what happened after event N
PATCH /simulator/faults                  {{"NAME": value, ...}}; null puts one back to its default
                                         limited: {{"NAME": {{"value": ..., "times": 2, "seconds": 5,
                                         "model": "key", "route": "chat", "chance": 0.1}}}}, or a list
                                         of such
GET   /simulator/faults                  the table below as JSON
POST  /simulator/load     {{"model"}}      somebody loads it by hand; optional: seconds,
                                         context_length, identifier
POST  /simulator/evict    {{"model"}} or {{"instance_id"}}
POST  /simulator/crash    {{"model"}}      optional: stays_listed
POST  /simulator/restart                 optional: {{"down_seconds": 20}}
POST  /simulator/vanish   {{"seconds"}}    it goes without a word, and what comes back began anew
POST  /simulator/advance  {{"seconds"}}    skip time
POST  /simulator/tier     {{"tier"}}       v1 (LM Studio 0.4), v0 (0.3), openai (another server)

Routes for "route": {routes}

Faults:
{faults}
"""


class ControlError(ValueError):
    """A control request that cannot be done, and what to write instead."""


def answer(machine: Machine, request: Request) -> Reply:
    name = request.path.removeprefix("/simulator").strip("/")
    routes: dict[tuple[str, str], Callable[[Machine, Request], Reply]] = {
        ("GET", ""): lambda machine, request: text_reply(help_text()),
        ("GET", "state"): lambda machine, request: json_reply(state(machine)),
        ("GET", "log"): _log,
        ("GET", "faults"): lambda machine, request: json_reply(fault_table(machine)),
        ("PATCH", "faults"): _faults,
        ("POST", "load"): _load,
        ("POST", "evict"): _evict,
        ("POST", "crash"): _crash,
        ("POST", "restart"): _restart,
        ("POST", "vanish"): _vanish,
        ("POST", "advance"): _advance,
        ("POST", "tier"): _tier,
    }
    act = routes.get((request.method, name))
    if act is None:
        return json_reply(
            {"error": f"no {request.method} {request.path}; GET /simulator/ lists what there is"}, 404
        )
    try:
        return act(machine, request)
    except ValueError as mistake:
        return json_reply({"error": str(mistake)}, 400)


def help_text() -> str:
    lines = [f"  {f.name} ({f.kind}, {json.dumps(f.default)})\n      {f.text}" for f in FAULTS.values()]
    return HELP.format(routes=", ".join((*ROUTES, *ROUTE_GROUPS)), faults="\n".join(lines))


def fault_table(machine: Machine) -> dict[str, Any]:
    now = machine.faults.shown()
    return {
        fault.name: {
            "kind": fault.kind,
            "default": fault.default,
            "now": now.get(fault.name, fault.default),
            "text": fault.text,
        }
        for fault in FAULTS.values()
    }


def state(machine: Machine) -> dict[str, Any]:
    return {
        "tier": machine.tier,
        "up": machine.up,
        "now": round(machine.clock.now(), 6),
        "in_flight": machine.in_flight,
        "events": machine.journal.count,
        "models": [_model(machine, model) for model in machine.memory.models.values()],
        "faults": machine.faults.shown(),
        "fired": dict(machine.faults.fired),
    }


def _model(machine: Machine, model: SimModel) -> dict[str, Any]:
    return {
        "key": model.key,
        "kind": model.kind,
        "size_bytes": model.size_bytes,
        "load_seconds": model.load_seconds,
        "max_context_length": model.max_context_length,
        "instances": [_instance(machine, instance) for instance in machine.memory.copies(model)],
        "loads": [_loading(machine, load) for load in machine.memory.loads_of(model)],
    }


def _instance(machine: Machine, instance: Instance) -> dict[str, Any]:
    now = machine.clock.now()
    return {
        "id": instance.id,
        "variant": instance.variant,
        "owner": instance.owner,
        "jit": instance.owner == "jit",
        "ttl_seconds": instance.ttl_seconds,
        "idle_seconds": round(instance.idle_seconds(now), 3),
        "context_length": instance.context_length,
        "generating": len(instance.working),
        "queued": len(instance.queue),
        "listed": machine.memory.listed(instance),
        "crashed": instance.crashed,
    }


def _loading(machine: Machine, load: Load) -> dict[str, Any]:
    now = machine.clock.now()
    return {
        "instance_id": load.instance_id,
        "owner": load.owner,
        "started": load.started_at is not None,
        "elapsed_seconds": round(now - load.asked_at, 3),
        "seconds": load.seconds,
        "progress": round(load.progress(now), 3),
    }


def _log(machine: Machine, request: Request) -> Reply:
    since = parse_qs(request.query).get("since", ["0"])[0]
    if not since.isdecimal():
        raise ControlError(f'since is "{since}"; write the n of the last event you have')
    return json_reply({"events": machine.log(int(since)), "last": machine.journal.count})


def _faults(machine: Machine, request: Request) -> Reply:
    machine.set_faults(parsed(request.body))
    return json_reply({"faults": machine.faults.shown()})


def _load(machine: Machine, request: Request) -> Reply:
    fields = _fields(request, model=str, seconds=float, context_length=int, identifier=str)
    load = machine.load(
        _wanted(fields, "model"),
        seconds=fields.get("seconds"),
        context_length=fields.get("context_length"),
        identifier=fields.get("identifier"),
    )
    status = "loaded" if load.instance else "loading" if not load.ended else "failed"
    return json_reply({"instance_id": load.instance_id, "status": status})


def _evict(machine: Machine, request: Request) -> Reply:
    fields = _fields(request, model=str, instance_id=str)
    machine.evict(_wanted(fields, "instance_id" if "instance_id" in fields else "model"))
    return json_reply({"status": "evicted"})


def _crash(machine: Machine, request: Request) -> Reply:
    fields = _fields(request, model=str, stays_listed=bool)
    machine.crash(_wanted(fields, "model"), fields.get("stays_listed", False))
    return json_reply({"status": "crashed"})


def _restart(machine: Machine, request: Request) -> Reply:
    seconds = _fields(request, down_seconds=float).get("down_seconds", 0.0)
    machine.clock.call_later(BEFORE_RESTART_SECONDS, lambda: machine.restart(seconds))
    return json_reply({"status": "restarting", "down_seconds": seconds})


def _vanish(machine: Machine, request: Request) -> Reply:
    seconds = _wanted(_fields(request, seconds=float), "seconds")
    machine.clock.call_later(BEFORE_RESTART_SECONDS, lambda: machine.vanish(seconds))
    return json_reply({"status": "vanishing", "seconds": seconds})


def _advance(machine: Machine, request: Request) -> Reply:
    machine.advance(_wanted(_fields(request, seconds=float), "seconds"))
    return json_reply({"now": round(machine.clock.now(), 6)})


def _tier(machine: Machine, request: Request) -> Reply:
    machine.set_tier(_wanted(_fields(request, tier=str), "tier"))
    return json_reply({"tier": machine.tier})


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
