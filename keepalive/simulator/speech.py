"""What an answer looks like on each inference route: one class per protocol, without clock or world.

A stream is `opening`, then `word` per token, then `closing`; or `broken` where it goes wrong. `whole` is the
answer in one piece. The native protocol also tells of loading and prompt processing; the others keep silent
about both.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from keepalive.simulator.exchange import compact
from keepalive.simulator.models import Instance, SimModel

# Deterministic ids and times: the same requests give the same bytes.
EPOCH = 1_790_000_000

# fmt: off
PLAIN = [
    "This", "answer", "comes", "from", "a", "simulator", "that", "stands", "in", "for", "LM", "Studio.",
    "It", "says", "the", "same", "words", "every", "time,", "one", "token", "after", "the", "other,",
    "so", "that", "you", "can", "watch", "a", "stream", "begin,", "wait", "and", "end", "without", "a",
    "real", "model", "in", "memory.",
]
MULTIBYTE = [
    "Olá,", "ação", "não", "é", "só", "«café»;", "日本語の文", "и", "кириллица,", "ελληνικά,", "🙂",
    "👩\u200d⚕️", "𝛑", "—", "fim…",
]
# fmt: on


def words(count: int, text: str, multibyte: bool) -> list[str]:
    source = text.split() or (MULTIBYTE if multibyte else PLAIN)
    return [source[n % len(source)] if n == 0 else f" {source[n % len(source)]}" for n in range(count)]


def data(payload: Any) -> bytes:
    return f"data: {compact(payload)}\n\n".encode()


def event(name: str, payload: Any) -> bytes:
    return f"event: {name}\ndata: {compact(payload)}\n\n".encode()


@dataclass(frozen=True, slots=True)
class Told:
    """What a request asked of its answer, besides the words."""

    n: int
    created: int
    prompt_tokens: int
    include_usage: bool = False
    response_id: str = ""
    stored: bool = False
    previous: str | None = None
    done_after_error: bool = False


@dataclass(slots=True)
class Speech:
    told: Told
    model: str = ""
    said: list[str] = field(default_factory=list)  # joined when all is there: a long answer has many words
    thoughts: list[str] = field(default_factory=list)
    tokens: int = 0
    thought_tokens: int = 0
    seconds: float = 0.0
    prompt_seconds: float = 0.0
    load_seconds: float | None = None
    instance: Instance | None = None
    starts_at_once: ClassVar[bool] = False

    def begin(self, instance_id: str) -> list[bytes]:
        """Sent before anything is known about the model's state; only where `starts_at_once`."""
        self.model = instance_id
        return []

    def load_started(self) -> list[bytes]:
        return []

    def load_progress(self, progress: float) -> list[bytes]:
        return []

    def load_ended(self) -> list[bytes]:
        return []

    def prompt(self, progress: float) -> list[bytes]:
        return []

    def opening(self) -> list[bytes]:
        return []

    def heard(self, text: str, thinking: bool) -> None:
        self.tokens += 1
        self.thought_tokens += thinking
        if text:
            (self.thoughts if thinking else self.said).append(text)

    @property
    def text(self) -> str:
        return "".join(self.said)

    @property
    def thought(self) -> str:
        return "".join(self.thoughts)

    def word(self, text: str, thinking: bool) -> list[bytes]:
        raise NotImplementedError

    def closing(self, finish: str) -> list[bytes]:
        raise NotImplementedError

    def broken(self, message: str, **fields: Any) -> list[bytes]:
        raise NotImplementedError

    def whole(self, finish: str) -> dict[str, Any]:
        raise NotImplementedError


class Chat(Speech):
    """OpenAI chat completions, as recorded on 0.4.25."""

    def _usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.told.prompt_tokens,
            "completion_tokens": self.tokens,
            "total_tokens": self.told.prompt_tokens + self.tokens,
            "completion_tokens_details": {"reasoning_tokens": self.thought_tokens},
        }

    def _chunk(self, choices: list[Any], **more: Any) -> bytes:
        return data(
            {
                "id": f"chatcmpl-sim{self.told.n:06d}",
                "object": "chat.completion.chunk",
                "created": self.told.created,
                "model": self.model,
                "system_fingerprint": self.model,
                "choices": choices,
                **more,
            }
        )

    def word(self, text: str, thinking: bool) -> list[bytes]:
        # The role rides with the first word: LM Studio sends no chunk of its own for it.
        delta = {"role": "assistant"} if self.tokens == 0 else {}
        delta["reasoning_content" if thinking else "content"] = text
        self.heard(text, thinking)
        return [self._chunk([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}])]

    def closing(self, finish: str) -> list[bytes]:
        end = [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": finish}]
        events = [self._chunk(end, **self._last(finish))]
        if self.told.include_usage:
            events.append(self._chunk([], usage=self._usage()))
        return [*events, b"data: [DONE]\n\n"]

    def broken(self, message: str, **fields: Any) -> list[bytes]:
        error = {"message": message, "type": "server_error", "param": None, "code": None, **fields}
        return [
            event("error", {"error": error}),
            *([b"data: [DONE]\n\n"] if self.told.done_after_error else []),
        ]

    def _last(self, finish: str) -> dict[str, Any]:
        return {}

    def whole(self, finish: str) -> dict[str, Any]:
        message = {
            "role": "assistant",
            "content": self.text,
            "reasoning_content": self.thought,
            "tool_calls": [],
        }
        return {
            "id": f"chatcmpl-sim{self.told.n:06d}",
            "object": "chat.completion",
            "created": self.told.created,
            "model": self.model,
            "choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": finish}],
            "usage": self._usage(),
            "stats": {},
            "system_fingerprint": self.model,
            **self._last(finish),
        }


class Completion(Chat):
    """OpenAI legacy completions: text in place of a message."""

    def _choice(self, text: str, finish: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "logprobs": None, "finish_reason": finish}

    def _chunk(self, choices: list[Any], **more: Any) -> bytes:
        return data(
            {
                "id": f"cmpl-sim{self.told.n:06d}",
                "object": "text_completion",
                "created": self.told.created,
                "model": self.model,
                "choices": choices,
                **more,
            }
        )

    def word(self, text: str, thinking: bool) -> list[bytes]:
        self.heard(text, False)  # a raw prompt has no reasoning section
        return [self._chunk([self._choice(text, None)])]

    def closing(self, finish: str) -> list[bytes]:
        events = [self._chunk([self._choice("", finish)], **self._last(finish))]
        if self.told.include_usage:
            events.append(self._chunk([], usage=self._usage()))
        return [*events, b"data: [DONE]\n\n"]

    def whole(self, finish: str) -> dict[str, Any]:
        return {
            "id": f"cmpl-sim{self.told.n:06d}",
            "object": "text_completion",
            "created": self.told.created,
            "model": self.model,
            "choices": [self._choice(self.text, finish)],
            "usage": self._usage(),
            "stats": {},
            **self._last(finish),
        }


def _v0_extras(speech: Speech, finish: str) -> dict[str, Any]:
    model = speech.instance.model if speech.instance else SimModel(speech.model)
    generating = max(speech.seconds - speech.prompt_seconds, 0.001)
    return {
        "stats": {
            "tokens_per_second": round(speech.tokens / generating, 3),
            "time_to_first_token": round(speech.prompt_seconds, 3),
            "generation_time": round(generating, 3),
            "stop_reason": "maxPredictedTokensReached" if finish == "length" else "eosFound",
        },
        "model_info": {
            "arch": model.architecture,
            "quant": model.quantization,
            "format": "gguf",
            "context_length": speech.instance.context_length if speech.instance else 4096,
        },
        "runtime": {"name": "llama.cpp-simulator", "version": "1.0.0", "supported_formats": ["gguf"]},
    }


class V0Chat(Chat):
    def _last(self, finish: str) -> dict[str, Any]:
        return _v0_extras(self, finish)


class V0Completion(Completion):
    def _last(self, finish: str) -> dict[str, Any]:
        return _v0_extras(self, finish)


class Responses(Speech):
    """OpenAI Responses: every event is named, and there is no `[DONE]`."""

    def _response(self, status: str) -> dict[str, Any]:
        done = status == "completed"
        usage = {
            "input_tokens": self.told.prompt_tokens,
            "output_tokens": self.tokens,
            "total_tokens": self.told.prompt_tokens + self.tokens,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        return {
            "id": self.told.response_id,
            "object": "response",
            "created_at": self.told.created,
            "status": status,
            "error": None,
            "model": self.model,
            "output": [self._item("completed")] if done else [],
            "parallel_tool_calls": True,
            "tool_choice": "auto",
            "tools": [],
            "previous_response_id": self.told.previous,
            "store": self.told.stored,
            "usage": usage if done else None,
        }

    def _part(self) -> dict[str, Any]:
        return {"type": "output_text", "text": self.text, "annotations": [], "logprobs": []}

    def _item(self, status: str) -> dict[str, Any]:
        content = [self._part()] if status == "completed" else []
        ident = f"msg_sim{self.told.n:06d}"
        return {"id": ident, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, name: str, **fields: Any) -> bytes:
        return event(name, {"type": name, **fields})

    def _at(self) -> dict[str, Any]:
        return {"item_id": f"msg_sim{self.told.n:06d}", "output_index": 0, "content_index": 0}

    def opening(self) -> list[bytes]:
        return [
            self._event("response.created", response=self._response("in_progress")),
            self._event("response.in_progress", response=self._response("in_progress")),
            self._event("response.output_item.added", output_index=0, item=self._item("in_progress")),
            self._event("response.content_part.added", **self._at(), part=self._part()),
        ]

    def word(self, text: str, thinking: bool) -> list[bytes]:
        self.heard(text, False)
        return [self._event("response.output_text.delta", **self._at(), delta=text, logprobs=[])]

    def closing(self, finish: str) -> list[bytes]:
        return [
            self._event("response.output_text.done", **self._at(), text=self.text, logprobs=[]),
            self._event("response.content_part.done", **self._at(), part=self._part()),
            self._event("response.output_item.done", output_index=0, item=self._item("completed")),
            self._event("response.completed", response=self._response("completed")),
        ]

    def broken(self, message: str, **fields: Any) -> list[bytes]:
        return [
            event(
                "error",
                {"code": "server_error", "message": message, "param": None, **fields, "type": "error"},
            )
        ]

    def whole(self, finish: str) -> dict[str, Any]:
        return self._response("completed")


class Messages(Speech):
    """Anthropic Messages."""

    def _stop(self, finish: str) -> str:
        return "max_tokens" if finish == "length" else "end_turn"

    def _message(self, content: list[Any], stop: str | None, output_tokens: int) -> dict[str, Any]:
        return {
            "id": f"msg_sim{self.told.n:06d}",
            "type": "message",
            "role": "assistant",
            "content": content,
            "model": self.model,
            "stop_reason": stop,
            "stop_sequence": None,
            "usage": {"input_tokens": self.told.prompt_tokens, "output_tokens": output_tokens},
        }

    def _event(self, name: str, **fields: Any) -> bytes:
        return event(name, {"type": name, **fields})

    def opening(self) -> list[bytes]:
        return [
            self._event("message_start", message=self._message([], None, 0)),
            self._event("content_block_start", index=0, content_block={"type": "text", "text": ""}),
        ]

    def word(self, text: str, thinking: bool) -> list[bytes]:
        self.heard(text, False)
        return [self._event("content_block_delta", index=0, delta={"type": "text_delta", "text": text})]

    def closing(self, finish: str) -> list[bytes]:
        delta = {"stop_reason": self._stop(finish), "stop_sequence": None}
        return [
            self._event("content_block_stop", index=0),
            self._event("message_delta", delta=delta, usage={"output_tokens": self.tokens}),
            self._event("message_stop"),
        ]

    def broken(self, message: str, **fields: Any) -> list[bytes]:
        return [self._event("error", error={"type": "api_error", "message": message, **fields})]

    def whole(self, finish: str) -> dict[str, Any]:
        return self._message([{"type": "text", "text": self.text}], self._stop(finish), self.tokens)


class Native(Speech):
    """`POST /api/v1/chat`: tells of loading and prompt processing, and ends with `chat.end` even after an
    error."""

    starts_at_once: ClassVar[bool] = True

    def _event(self, name: str, **fields: Any) -> bytes:
        return event(name, {"type": name, **fields})

    def begin(self, instance_id: str) -> list[bytes]:
        self.model = instance_id
        return [self._event("chat.start", model_instance_id=instance_id)]

    def load_started(self) -> list[bytes]:
        return [self._event("model_load.start", model_instance_id=self.model)]

    def load_progress(self, progress: float) -> list[bytes]:
        return [self._event("model_load.progress", model_instance_id=self.model, progress=round(progress, 4))]

    def load_ended(self) -> list[bytes]:
        seconds = round(self.load_seconds or 0.0, 3)
        return [self._event("model_load.end", model_instance_id=self.model, load_time_seconds=seconds)]

    def prompt(self, progress: float) -> list[bytes]:
        if progress == 0.0:
            return [
                self._event("prompt_processing.start"),
                self._event("prompt_processing.progress", progress=0.0),
            ]
        return [
            self._event("prompt_processing.progress", progress=1.0),
            self._event("prompt_processing.end"),
        ]

    def word(self, text: str, thinking: bool) -> list[bytes]:
        section = "reasoning" if thinking else "message"
        events = []
        if not thinking and not self.said:
            if self.thoughts:
                events.append(self._event("reasoning.end"))
            events.append(self._event("message.start"))
        elif thinking and not self.thoughts:
            events.append(self._event("reasoning.start"))
        self.heard(text, thinking)
        return [*events, self._event(f"{section}.delta", content=text)]

    def closing(self, finish: str) -> list[bytes]:
        ends = [self._event("message.end")] if self.said else []
        if self.thoughts and not self.said:
            ends = [self._event("reasoning.end")]
        return [*ends, self._event("chat.end", result=self.whole(finish))]

    def broken(self, message: str, **fields: Any) -> list[bytes]:
        error = {"type": "internal_error", "message": message, **fields}
        return [self._event("error", error=error), self._event("chat.end", result=self.whole("stop"))]

    def whole(self, finish: str) -> dict[str, Any]:
        generating = max(self.seconds - self.prompt_seconds, 0.001)
        output = [{"type": "reasoning", "content": self.thought}] if self.thought else []
        if self.text or not output:
            output.append({"type": "message", "content": self.text})
        stats: dict[str, Any] = {
            "input_tokens": self.told.prompt_tokens,
            "total_output_tokens": self.tokens,
            "reasoning_output_tokens": self.thought_tokens,
            "tokens_per_second": round(self.tokens / generating, 3),
            "time_to_first_token_seconds": round(self.prompt_seconds, 3),
        }
        if self.load_seconds is not None:
            stats["model_load_time_seconds"] = round(self.load_seconds, 3)
        result: dict[str, Any] = {"model_instance_id": self.model, "output": output, "stats": stats}
        if self.told.stored:
            result["response_id"] = self.told.response_id
        return result


SPEECHES: dict[str, type[Speech]] = {
    "chat": Chat,
    "completions": Completion,
    "responses": Responses,
    "messages": Messages,
    "native_chat": Native,
}
V0_SPEECHES: dict[str, type[Speech]] = {"chat": V0Chat, "completions": V0Completion}
