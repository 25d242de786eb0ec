"""An inference request from its model name to its last token.

Name resolution, loads on demand, queueing and answers are as measured on 0.4.25; each rule names its source
where it would surprise. A refusal before the first byte is a JSON error, after it an event inside the stream.
"""

from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

from keepalive.simulator.call import Body, Call
from keepalive.simulator.exchange import (
    SSE_TYPE,
    Cut,
    Hang,
    Refusal,
    Reply,
    json_reply,
    native_error,
    openai_error,
    spoiled,
)
from keepalive.simulator.memory import CRASH, RELOADED, UNLOADED, UNLOADED_IN_QUEUE, broken_off
from keepalive.simulator.models import Instance, Load, SimModel
from keepalive.simulator.speech import EPOCH, SPEECHES, V0_SPEECHES, Speech, Told, words

if TYPE_CHECKING:
    from keepalive.simulator.studio import Studio

NOTHING_LOADED = "No models loaded. Please load a model in the developer page or use the 'lms load' command."
SEVERAL_LOADED = "Multiple models are loaded. Please specify a model by providing a 'model' field."

NATIVE_FIELDS = frozenset(
    [
        "model",
        "input",
        "system_prompt",
        "integrations",
        "stream",
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "repeat_penalty",
        "max_output_tokens",
        "reasoning",
        "context_length",
        "store",
        "previous_response_id",
    ]
)
# `ttl` means something on these alone; `/v1/responses` takes and ignores it (measured on 0.4.25).
TTL_ROUTES = ("chat", "embeddings")
V0_TTL_ROUTES = ("chat", "completions", "embeddings")


def only_known_fields(payload: dict[str, Any], known: frozenset[str]) -> None:
    """E15: the native routes have closed schemas."""
    if unknown := [field for field in payload if field not in known]:
        names = ", ".join(f"'{field}'" for field in unknown)
        raise native_error(
            400, "invalid_request", f"Unrecognized key(s) in object: {names}", code="unrecognized_keys"
        )


def required(payload: dict[str, Any], *fields: str) -> None:
    """E16."""
    for field in fields:
        if payload.get(field) is None:
            raise native_error(
                400,
                "invalid_request",
                f'"{field}" is required',
                code="missing_required_parameter",
                param=field,
            )


def unknown_model(studio: "Studio", call: Call, asked: str) -> Refusal:
    """E4, and E5 on the native route."""
    examples = ", ".join(list(studio.memory.models)[:2])
    message = (
        f'Invalid model identifier "{asked}". Please specify a valid downloaded model (e.g., {examples}).'
    )
    if call.route in ("native_chat", "load", "unload", "download"):
        return native_error(404, "model_not_found", message, code="model_not_found", param="model")
    if studio.tier == "openai":
        return openai_error(404, f"The model `{asked}` does not exist.", code="404", kind="NotFoundError")
    return openai_error(400, message, param="model", code="model_not_found")


def resolve(studio: "Studio", call: Call, kind: str) -> Instance | SimModel:
    """The instance that will answer, or the model on disk that has to be loaded for it."""
    memory = studio.memory
    old = studio.tier == "v0"  # 0.3.x said 404 where 0.4 says 400
    jit = studio.tier == "openai" or call.flag("jit")
    loaded = memory.chat_models()
    if "model" not in call.payload or call.payload["model"] is None:
        if not loaded:
            raise openai_error(404 if old else 400, NOTHING_LOADED, code="model_not_found")  # E6
        if len(loaded) > 1:
            raise openai_error(404 if old else 400, SEVERAL_LOADED, code="model_not_found")  # E7
        return _of_kind(memory.copies(loaded[0])[0], call, kind)
    asked = call.payload["model"]
    if not isinstance(asked, str) or not asked:
        shown = asked if isinstance(asked, str) else ""
        raise openai_error(400, f'Invalid model identifier "{shown}"', param="model", code="model_not_found")
    model = memory.find(asked)
    if model is not None and (copies := memory.copies(model)):
        # A bare key goes to the oldest copy, in any letter case. `key:2` is no key, so it falls through.
        return _of_kind(copies[0], call, kind)
    if asked in memory.instances:
        return _of_kind(memory.instances[asked], call, kind)
    if model is not None and jit:
        return _of_kind(model, call, kind)
    if call.route == "native_chat" or studio.tier == "openai":
        raise unknown_model(studio, call, asked)  # measured: no fallback to another model here
    if not memory.instances and not jit:
        raise openai_error(404 if old else 400, NOTHING_LOADED, code="model_not_found")  # E6
    if kind == "llm" and len(loaded) == 1 and call.flag("wrong_model_fallback"):
        return memory.copies(loaded[0])[0]
    raise unknown_model(studio, call, asked)


def _of_kind(target: Instance | SimModel, call: Call, kind: str) -> Instance | SimModel:
    model = target.model if isinstance(target, Instance) else target
    call.key = model.key
    if model.kind == kind:
        return target
    what = "not an embedding model" if kind == "embedding" else "an embedding model"  # E19
    message = f'Model "{model.key}" is {what}.'
    if call.route == "native_chat":
        raise native_error(400, "invalid_request", message, param="model")
    raise openai_error(400, message, param="model", code=None)


def idle_ttl(studio: "Studio", call: Call) -> float | None:
    """The idle time of an instance that this request loads; an invalid `ttl` is as none (measured on
    0.4.25)."""
    if not call.flag("jit_expires"):
        return None
    routes = V0_TTL_ROUTES if call.request.path.startswith("/api/v0/") else TTL_ROUTES
    asked = call.payload.get("ttl") if call.route in routes and studio.tier != "openai" else None
    if isinstance(asked, bool) or not isinstance(asked, (int, float)) or asked <= 0:
        return call.number("default_ttl_seconds")
    cap = call.number("ttl_cap_seconds")
    return min(float(asked), cap) if cap > 0 else float(asked)


def load_on_demand(studio: "Studio", call: Call, model: SimModel) -> Load:
    running = studio.memory.loads_of(model)
    if running and (studio.tier == "openai" or not call.flag("jit_stampede")):
        load = running[0]
    else:
        load = studio.memory.start_load(model, "jit", call.fault, ttl_seconds=idle_ttl(studio, call))
    call.phase = "loading"
    call.load = load
    load.waiters.append(call)
    return load


def loaded(studio: "Studio", call: Call, load: Load) -> Instance:
    """E8: the load that this request needed has ended, one way or the other."""
    call.load = None
    if load.instance is not None:
        return load.instance
    message = f'Failed to load model "{load.model.key}". Error: {load.failure}'
    if call.route == "native_chat":
        raise native_error(400, "model_load_failed", message, param="model")
    if studio.tier == "v0":
        raise openai_error(404, message, param="model", code="model_not_found")
    if studio.tier == "openai":
        raise openai_error(500, f"model name={load.model.key} failed to load", code=None, kind="server_error")
    raise openai_error(400, message, param="model", code=None)


async def work_on(studio: "Studio", call: Call, instance: Instance) -> None:
    """Wait for a slot of an instance. From here on the instance's fate is the request's."""
    if not studio.memory.holds(instance):
        raise broken_off(call, UNLOADED_IN_QUEUE)  # thrown out between its load and this line
    call.key = instance.model.key
    if instance.crashed:
        if not call.flag("crash_reloads"):
            raise broken_off(call, CRASH)
        call.phase = "loading"
        await call.pause(instance.load_seconds)
        studio.memory.revive(instance)
        if not studio.memory.holds(instance):
            raise broken_off(call, UNLOADED_IN_QUEUE)
    studio.memory.enter(instance, call)
    await call.until(lambda: call.granted)
    studio.generation_started(call, instance)


async def process_prompt(studio: "Studio", call: Call, seconds: float) -> None:
    call.phase = "prompt"
    call.prompt_ends = studio.clock.now() + seconds
    await call.pause(seconds)
    call.prompt_ends = None
    call.phase = "generating"


async def misanswer(studio: "Studio", call: Call, instance: Instance, usual: Reply) -> None:
    """The `answer` fault, where a request's turn has come and its answer would begin."""
    match call.word("answer"):
        case "ok" | "json_despite_stream":
            return
        case "crash":
            studio.memory.crash(instance, call.flag("crash_stays_listed"))
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


async def embed(studio: "Studio", call: Call) -> Reply:
    target = resolve(studio, call, "embedding")
    if isinstance(target, SimModel):
        load = load_on_demand(studio, call, target)
        await call.until(lambda: load.ended)
        target = loaded(studio, call, load)
    await work_on(studio, call, target)
    await process_prompt(studio, call, call.number("prompt_seconds"))
    asked = call.payload.get("input", "")
    count = len(asked) if isinstance(asked, list) and asked and not isinstance(asked[0], int) else 1
    rows = [
        {
            "object": "embedding",
            "embedding": [round(0.01 * (n + 1) * (i + 1), 4) for i in range(8)],
            "index": n,
        }
        for n in range(count)
    ]
    reply = json_reply(
        {
            "object": "list",
            "data": rows,
            "model": call.word("answer_model") or target.id,
            "usage": {"prompt_tokens": 0, "total_tokens": 0},  # always 0, in every version measured
        }
    )
    await misanswer(studio, call, target, reply)
    studio.generation_ended(call, "ok")
    return reply


async def infer(studio: "Studio", call: Call) -> Reply:
    payload = call.payload
    if call.route == "native_chat":
        only_known_fields(payload, NATIVE_FIELDS)
        required(payload, "model", "input")
    target = resolve(studio, call, "llm")
    model = target.model if isinstance(target, Instance) else target
    _check_reasoning(call, model)
    wanted = payload.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_object":
        raise openai_error(400, "'response_format.type' must be 'json_schema' or 'text'", code=None)
    speech = _speech(studio, call)
    context = target.context_length if isinstance(target, Instance) else target.usual_context_length
    if speech.told.prompt_tokens > context:  # E18
        raise _in_layout(
            call,
            f"The number of tokens to keep from the initial prompt is greater than the context length "
            f"({speech.told.prompt_tokens} > {context}). Try to load the model with a larger context length, "
            f"or provide a shorter input.",
        )
    stream = payload.get("stream") is True and call.word("answer") != "json_despite_stream"
    ending = _Ending()
    pieces = speak(studio, call, target, speech, stream, ending)
    if not stream:
        async for _ in pieces:
            pass
        return json_reply(speech.whole(ending.finish))
    headers = {"Content-Type": SSE_TYPE, "Cache-Control": "no-cache"}
    close = call.flag("close_after_stream")
    if call.flag("headers_before_first_token"):
        ending.begun = True
        return Reply(200, headers, Body(studio, call, None, pieces), close)
    first = await anext(pieces)
    return Reply(200, headers, Body(studio, call, first, pieces), close)


class _Ending:
    """Shared by a stream and its caller: whether the client has been sent anything, and how the answer
    ended."""

    def __init__(self) -> None:
        self.begun = False
        self.finish = "stop"


def _speech(studio: "Studio", call: Call) -> Speech:
    payload = call.payload
    options = payload.get("stream_options")
    native = call.route == "native_chat"
    told = Told(
        n=call.n,
        created=EPOCH + int(studio.clock.now()),
        prompt_tokens=_prompt_tokens(payload),
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        stored=payload.get("store") is not False if native or call.route == "responses" else False,
        previous=payload.get("previous_response_id"),
        done_after_error=call.flag("done_after_error"),
    )
    if call.request.path.startswith("/api/v0/"):
        return V0_SPEECHES[call.route](told)
    return SPEECHES[call.route](told)


def _prompt_tokens(payload: dict[str, Any]) -> int:
    """Words stand for tokens; 8 more for the template."""
    count = 8
    pending: list[Any] = [
        payload.get(field) for field in ("messages", "prompt", "input", "system", "system_prompt")
    ]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            count += len(part.split())
        elif isinstance(part, list):
            pending.extend(part)
        elif isinstance(part, dict):
            pending.extend(part.get(field) for field in ("content", "text"))
    return count


def _check_reasoning(call: Call, model: SimModel) -> None:
    setting = call.payload.get("reasoning")
    if call.route != "native_chat" or setting is None or setting in model.reasoning:
        return
    supported = ", ".join(f"'{option}'" for option in model.reasoning)
    raise native_error(  # E17
        400,
        "invalid_request",
        f"Reasoning setting '{setting}' is not supported by model '{model.key}'. "
        f"Supported settings: {supported}",
        code="invalid_value",
        param="reasoning",
    )


def _in_layout(call: Call, message: str) -> Refusal:
    if call.route == "native_chat":
        return native_error(400, "invalid_request", message)
    return openai_error(400, message, code=None)


def _length(call: Call) -> tuple[int, str]:
    count = max(0, int(call.number("answer_tokens")))
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        limit = call.payload.get(field)
        if isinstance(limit, int) and 0 < limit <= count:
            return limit, "length"
    return count, "stop"


async def speak(
    studio: "Studio", call: Call, target: Instance | SimModel, speech: Speech, stream: bool, ending: _Ending
) -> AsyncGenerator[bytes]:
    """The events of one answer, as they come."""
    try:
        load = load_on_demand(studio, call, target) if isinstance(target, SimModel) else None
        name = load.instance_id if load else target.id if isinstance(target, Instance) else ""
        opening = speech.begin(call.word("answer_model") or name)
        for piece in opening if stream else ():
            ending.begun = True
            yield piece
        if load is not None:
            for piece in speech.load_started() if stream else ():
                yield piece
            # Many small steps: 113 were counted for one load of 7 s.
            step = max(0.06, load.seconds / 100) if stream and speech.starts_at_once else None
            while not await call.until(lambda: load.ended, within=step):
                for piece in speech.load_progress(load.progress(studio.clock.now())):
                    yield piece
            instance = loaded(studio, call, load)
            speech.load_seconds = instance.load_seconds
            for piece in speech.load_ended() if stream else ():
                yield piece
        else:
            assert isinstance(target, Instance)
            instance = target
        speech.instance = instance
        await work_on(studio, call, instance)
        began = studio.clock.now()
        for piece in speech.prompt(0.0) if stream else ():
            yield piece
        await process_prompt(studio, call, call.number("prompt_seconds"))
        speech.prompt_seconds = studio.clock.now() - began
        for piece in speech.prompt(1.0) if stream else ():
            yield piece
        await misanswer(studio, call, instance, json_reply(speech.whole("stop")))
        async for piece in _say(studio, call, instance, speech, stream, ending, began):
            yield piece
    except Hang:
        await call.hang()
    except Refusal as refusal:
        studio.generation_ended(call, "refused")
        if not ending.begun:
            raise
        for piece in speech.broken(refusal.message):
            yield piece


async def _say(
    studio: "Studio",
    call: Call,
    instance: Instance,
    speech: Speech,
    stream: bool,
    ending: _Ending,
    began: float,
) -> AsyncGenerator[bytes]:
    count, ending.finish = _length(call)
    thoughts = 0
    if instance.model.reasoning and call.payload.get("reasoning") != "off":
        thoughts = max(1, count // 4)  # one token asked for is a token of reasoning, with empty content
    how = call.word("stream_breaks") if stream else "no"
    breaks_at = -1 if how == "no" else int(call.number("stream_breaks_after"))
    vocabulary = words(count, call.word("answer_text"), call.flag("multibyte_words"))
    for piece in speech.opening() if stream else ():
        ending.begun = True
        yield piece
    for n, word in enumerate(vocabulary):
        if n == breaks_at:
            async for piece in _break(studio, call, instance, speech, how, word):
                yield piece
            if how != "stall":
                return
        await call.pause(call.number("token_seconds") if n else 0.0)
        call.tokens += 1
        speech.seconds = studio.clock.now() - began
        for piece in speech.word(word, n < thoughts):
            ending.begun = True
            yield piece
    studio.generation_ended(call, "ok")
    for piece in speech.closing(ending.finish) if stream else ():
        yield piece


async def _break(
    studio: "Studio", call: Call, instance: Instance, speech: Speech, how: str, word: str
) -> AsyncGenerator[bytes]:
    match how:
        case "error":
            raise Refusal(json_reply({"error": "Generation failed."}, 500), "Generation failed.")
        case "stall":
            seconds = call.number("stall_seconds")
            if seconds <= 0:
                await call.hang()
            await call.pause(seconds)
            return
        case "crash":
            studio.memory.crash(instance, call.flag("crash_stays_listed"))
            await call.until(lambda: False)
        case "unload":
            studio.memory.unload(instance, by="stream_breaks")
            await call.until(lambda: False)
    if how.startswith("half_event"):
        event = speech.word(word, False)[-1]
        yield event[: len(event) // 2]
    studio.generation_ended(call, "broken")
    if how.endswith("fin"):
        raise Cut("fin")
    if how.endswith("rst"):
        raise Cut("rst")
