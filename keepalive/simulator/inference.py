"""An answer in words: from an inference request that is fit to be answered to its last token.

A refusal before the first byte is a JSON error, after it an event inside the stream.
"""

from codecs import BOM_UTF8
from collections.abc import AsyncGenerator
from dataclasses import replace
from hashlib import sha256

from keepalive.simulator.bodies import (
    NATIVE_FIELDS,
    contents,
    has_image,
    only_known_fields,
    prompt_tokens,
    required,
)
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
)
from keepalive.simulator.memory import broken_off
from keepalive.simulator.models import Instance, Load, SimModel, Stored
from keepalive.simulator.naming import not_stored, resolve
from keepalive.simulator.speech import EPOCH, SPEECHES, V0_SPEECHES, Speech, Told, words
from keepalive.simulator.turn import load_on_demand, loaded, misanswer, process_prompt, work_on

STORING_ROUTES = ("responses", "native_chat")


async def infer(call: Call) -> Reply:
    if call.route == "native_chat":
        only_known_fields(call.payload, NATIVE_FIELDS)
        required(call.payload, "model", "input")
    target = resolve(call, "llm")
    speech = _speech(call)
    _check(call, target, speech)
    stream = call.payload.get("stream") is True and call.word("answer") != "json_despite_stream"
    answer = Answer(call, target, speech, stream)
    pieces = answer.events()
    if not stream:
        async for _ in pieces:
            pass
        reply = json_reply(speech.whole(answer.finish))
        return _half(call, reply) if call.word("answer") == "half_hang" else reply
    headers = {"Content-Type": SSE_TYPE, "Cache-Control": "no-cache"}
    close = call.flag("close_after_stream")
    mark = BOM_UTF8 if call.flag("stream_bom") else b""
    if call.flag("headers_before_first_token"):
        answer.begun = True
        return Reply(200, headers, Body(call, mark or None, pieces), close)
    first = await anext(pieces)
    return Reply(200, headers, Body(call, mark + first, pieces), close)


def _half(call: Call, reply: Reply) -> Reply:
    async def silence() -> AsyncGenerator[bytes]:
        call.leave_hanging()
        await call.until(lambda: False)
        yield b""  # never: what makes this a generator

    assert isinstance(reply.body, bytes)
    return replace(reply, body=Body(call, reply.body[: len(reply.body) // 2], silence()))


# is it fit to be answered


def _check(call: Call, target: Instance | SimModel, speech: Speech) -> None:
    model = target.model if isinstance(target, Instance) else target
    _check_reasoning(call, model)
    wanted = call.payload.get("response_format")
    if isinstance(wanted, dict) and wanted.get("type") == "json_object":
        raise openai_error(400, "'response_format.type' must be 'json_schema' or 'text'", code=None)
    context = target.context_length if isinstance(target, Instance) else target.usual_context_length
    tokens = speech.told.prompt_tokens
    if tokens > context:  # E18
        message = (
            f"The number of tokens to keep from the initial prompt is greater than the context length "
            f"({tokens} > {context}). Try to load the model with a larger context length, "
            f"or provide a shorter input."
        )
        if call.route == "native_chat":
            raise native_error(400, "invalid_request", message)
        raise openai_error(400, message, code=None)


def _went_before(call: Call) -> Stored | None:
    """What this request goes on from. Where it is not stored, the words of the answer are not known from reality."""
    ident = call.payload.get("previous_response_id")
    if ident is None or call.route not in STORING_ROUTES:
        return None
    if isinstance(ident, str) and ident in call.machine.stored:
        return call.machine.stored[ident]
    raise not_stored(call, str(ident), "previous_response_id")


def _check_content(call: Call, model: SimModel) -> None:
    """What the model's template makes of the messages, and what the model cannot be asked without."""
    if status := int(call.number("turned_away")):
        raise openai_error(status, "Too many requests", code=None)
    kinds = {"plain" if isinstance(content, str) else "list" for content in contents(call.payload)}
    how = call.word("content_refused")
    if how in kinds:
        if call.number("content_refused_status") == 500:
            raise openai_error(
                500, "Error: Jinja Exception: Unexpected content", code=None, kind="server_error"
            )
        wanted = "an iterable, got StringValue" if how == "plain" else "a string, got ArrayValue"
        message = f'Error rendering prompt with jinja template: "Expected `content` as {wanted}".'
        raise broken_off(call, message)
    if call.flag("needs_image") and not has_image(call.payload):
        raise broken_off(call, f'Model "{model.key}" needs an image in the request.')


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


def _speech(call: Call) -> Speech:
    payload = call.payload
    options = payload.get("stream_options")
    before = _went_before(call)
    made_from = f"{call.machine.mark}:{call.n}"
    told = Told(
        n=call.n,
        created=EPOCH + int(call.machine.clock.now()),
        prompt_tokens=prompt_tokens(payload) + (before.tokens if before else 0),
        include_usage=isinstance(options, dict) and options.get("include_usage") is True,
        response_id=f"resp_{sha256(made_from.encode()).hexdigest()[:48]}",
        stored=call.route in STORING_ROUTES and payload.get("store") is not False,
        previous=payload.get("previous_response_id"),
        done_after_error=call.flag("done_after_error"),
    )
    if call.request.path.startswith("/api/v0/"):
        return V0_SPEECHES[call.route](told)
    return SPEECHES[call.route](told)


# one answer


class Answer:
    """The events of one answer, as they come. Without `stream` none comes, and `speech` has heard it all."""

    def __init__(self, call: Call, target: Instance | SimModel, speech: Speech, stream: bool) -> None:
        self.begun = False  # the client has been sent something
        self.finish = "stop"
        self._call = call
        self._target = target
        self._speech = speech
        self._stream = stream

    async def events(self) -> AsyncGenerator[bytes]:
        try:
            async for piece in self._told():
                if self._stream:
                    self.begun = True
                    yield piece
        except Hang:
            await self._call.hang()
        except Refusal as refusal:
            self._call.generation_ended("refused")
            if not self.begun:
                raise
            for piece in self._speech.broken(refusal.message, **refusal.fields):
                yield piece

    async def _told(self) -> AsyncGenerator[bytes]:
        call, speech, target = self._call, self._speech, self._target
        if isinstance(target, Instance):
            instance = target
            for piece in self._beginning(instance.id):
                yield piece
        else:
            load = load_on_demand(call, target)
            for piece in self._beginning(load.instance_id):
                yield piece
            async for piece in self._loading(load):
                yield piece
            instance = loaded(call, load)
            speech.load_seconds = instance.load_seconds
            for piece in speech.load_ended():
                yield piece
        speech.instance = instance
        await work_on(call, instance)
        _check_content(call, instance.model)
        began = call.machine.clock.now()
        for piece in speech.prompt(0.0):
            yield piece
        await process_prompt(call, instance, call.number("prompt_seconds"))
        speech.prompt_seconds = call.machine.clock.now() - began
        for piece in speech.prompt(1.0):
            yield piece
        await misanswer(call, instance, json_reply(speech.whole("stop")))
        async for piece in self._said(instance, began):
            yield piece

    def _beginning(self, instance_id: str) -> list[bytes]:
        return self._speech.begin(self._call.word("answer_model") or instance_id)

    async def _loading(self, load: Load) -> AsyncGenerator[bytes]:
        call, speech = self._call, self._speech
        for piece in speech.load_started():
            yield piece
        # Many small steps: 113 were counted for one load of 7 s.
        step = max(0.06, load.seconds / 100) if self._stream and speech.starts_at_once else None
        while not await call.until(lambda: load.ended, within=step):
            for piece in speech.load_progress(load.progress(call.machine.clock.now())):
                yield piece

    async def _said(self, instance: Instance, began: float) -> AsyncGenerator[bytes]:
        call, speech = self._call, self._speech
        count, self.finish = _length(call)
        thoughts = 0
        if instance.model.reasoning and call.payload.get("reasoning") != "off":
            thoughts = max(1, count // 4)  # one token asked for is a token of reasoning, with empty content
        how = call.word("stream_breaks") if self._stream else "no"
        breaks_at = -1 if how == "no" else int(call.number("stream_breaks_after"))
        vocabulary = words(count, call.word("answer_text"), call.flag("multibyte_words"))
        for piece in speech.opening():
            yield piece
        for n, word in enumerate(vocabulary):
            if n == breaks_at:
                async for piece in self._broken(instance, how, word):
                    yield piece
                if how != "stall":
                    return
            await call.pause(call.number("token_seconds") if n else 0.0)
            call.tokens += 1
            speech.seconds = call.machine.clock.now() - began
            for piece in speech.word(word, n < thoughts):
                yield piece
        call.generation_ended("ok")
        told = speech.told
        if told.stored:
            shown = speech.whole(self.finish) if call.route == "responses" else None
            call.machine.stored[told.response_id] = Stored(told.prompt_tokens + call.tokens, shown)
        for piece in speech.closing(self.finish):
            yield piece

    async def _broken(self, instance: Instance, how: str, word: str) -> AsyncGenerator[bytes]:
        """The `stream_breaks` fault."""
        call = self._call
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
                call.machine.memory.crash(instance, call.flag("crash_stays_listed"))
                await call.until(lambda: False)
            case "unload":
                call.machine.memory.unload(instance, by="stream_breaks")
                await call.until(lambda: False)
        if how.startswith("half_event"):
            event = self._speech.word(word, False)[-1]
            yield event[: len(event) // 2]
        call.generation_ended("broken")
        if how.endswith("fin"):
            raise Cut("fin")
        if how.endswith("rst"):
            raise Cut("rst")


def _length(call: Call) -> tuple[int, str]:
    count = max(0, int(call.number("answer_tokens")))
    for field in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
        limit = call.payload.get(field)
        if isinstance(limit, int) and 0 < limit <= count:
            return limit, "length"
    return count, "stop"
