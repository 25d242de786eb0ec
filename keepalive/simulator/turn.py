"""A request's turn at a model: loaded on demand, its wait for a slot, its prompt, and the ways to lose the turn."""

from keepalive.simulator.bodies import prompt_words
from keepalive.simulator.call import Call
from keepalive.simulator.exchange import Refusal, Reply, context_exceeded, native_error, openai_error, spoiled
from keepalive.simulator.memory import CRASH, IS_UNLOADED, RELOADED, UNLOADED, UNLOADED_IN_QUEUE, broken_off
from keepalive.simulator.models import Instance, Load, SimModel

# `ttl` means something on these alone; `/v1/responses` takes and ignores it (measured on 0.4.25).
TTL_ROUTES = ("chat", "embeddings")
V0_TTL_ROUTES = ("chat", "completions", "embeddings")


def idle_ttl(call: Call) -> float | None:
    """The idle time of an instance that this request loads; an invalid `ttl` is as none (measured on
    0.4.25)."""
    if not call.flag("jit_expires"):
        return None
    routes = V0_TTL_ROUTES if call.request.path.startswith("/api/v0/") else TTL_ROUTES
    asked = call.payload.get("ttl") if call.route in routes and call.machine.tier != "openai" else None
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or asked <= 0:
        return call.number("default_ttl_seconds")
    cap = call.number("ttl_cap_seconds")
    return min(float(asked), cap) if cap > 0 else float(asked)


def load_on_demand(call: Call, model: SimModel) -> Load:
    wanted = call.variant or model.variant
    running = [load for load in call.machine.memory.loads_of(model) if load.variant == wanted]
    if running and (call.machine.tier == "openai" or not call.flag("jit_stampede")):
        load = running[0]
    else:
        load = call.machine.memory.start_load(
            model, "jit", call.fault, ttl_seconds=idle_ttl(call), variant=call.variant
        )
    call.phase = "loading"
    call.load = load
    load.waiters.append(call)
    return load


def loaded(call: Call, load: Load) -> Instance:
    """E8: the load that this request needed has ended, one way or the other."""
    call.load = None
    if load.instance is not None:
        return load.instance
    message = f'Failed to load model "{load.model.key}". Error: {load.failure}'
    if call.route == "native_chat":
        raise native_error(400, "model_load_failed", message, param="model")
    if call.machine.tier == "v0":
        raise openai_error(404, message, param="model", code="model_not_found")
    if call.machine.tier == "openai":
        raise openai_error(500, f"model name={load.model.key} failed to load", code=None, kind="server_error")
    raise openai_error(400, message, param="model", code=None)


async def work_on(call: Call, instance: Instance) -> None:
    """Wait for a slot of an instance. From here on the instance's fate is the request's."""
    if call.word("answer") == "is_unloaded":
        raise broken_off(call, IS_UNLOADED)
    if not call.machine.memory.holds(instance):
        raise broken_off(call, UNLOADED_IN_QUEUE)  # thrown out between its load and this line
    call.key = instance.model.key
    if instance.crashed:
        if not call.flag("crash_reloads"):
            raise broken_off(call, CRASH)
        call.phase = "loading"
        await call.pause(instance.load_seconds)
        call.machine.memory.revive(instance)
        if not call.machine.memory.holds(instance):
            raise broken_off(call, UNLOADED_IN_QUEUE)
    call.machine.memory.enter(instance, call)
    await call.until(lambda: call.granted)
    call.generation_started(instance)


async def process_prompt(call: Call, instance: Instance, seconds: float) -> None:
    """What the slot does not remember of the prompt is read word by word, and remembered from then on."""
    pace, words = call.number("prompt_token_seconds"), prompt_words(call.payload)
    call.slot, known = instance.slot(call.n, words, int(call.number("parallel")))
    call.prompt_words, call.cached_words = len(words), known
    began = call.machine.clock.now()
    call.phase = "prompt"
    seconds += pace * (len(words) - known)
    call.prompt_ends = began + seconds
    read = words
    try:
        await call.pause(seconds)
    except BaseException:
        if pace > 0 and not call.flag("prompt_finishes_after_disconnect"):
            read = words[: known + int((call.machine.clock.now() - began) / pace)]
        raise
    finally:
        call.slot.read = read if call.flag("prompt_cache") else []
    call.prompt_ends = None
    call.phase = "generating"


async def misanswer(call: Call, instance: Instance, usual: Reply) -> None:
    """The `answer` fault, where a request's turn has come and its answer would begin."""
    match call.word("answer"):
        case "ok" | "json_despite_stream" | "half_hang":
            return
        case "context_length":
            raise context_exceeded(instance.context_length, instance.context_length + 1)
        case "crash":
            call.machine.memory.crash(instance, call.flag("crash_stays_listed"))
            await call.until(lambda: False)
        case "unloaded_in_queue":
            raise broken_off(call, UNLOADED_IN_QUEUE)
        case "unloaded":
            raise broken_off(call, UNLOADED)
        case "reloaded":
            raise broken_off(call, RELOADED)
        case how:
            reply = spoiled(how, usual)
            raise Refusal(reply, "Internal error.")
