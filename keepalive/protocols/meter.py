"""Bytes of a streamed answer to timings: what a user felt, told from events, since tokens cannot be seen.

No JSON is parsed while tokens flow. That is safe because a quote inside a JSON string is always escaped: what
looks like a key followed by its value is one, whatever the model wrote.
"""

import re
from bisect import bisect_left
from typing import Final

from keepalive.protocols.answers import error_message
from keepalive.protocols.routes import Protocol

#: Upper bounds, in seconds, of the gaps between events; one more bucket holds the rest.
GAP_BOUNDS: Final = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.1,
    0.25,
    0.5,
    1.0,
    2.5,
    5.0,
    10.0,
    30.0,
)

_LOOKS: Final = 16  # for the form of a stream's events, before it is given up

_LINE_BYTES: Final = 16 * 1024  # a longer line is looked at in pieces
_OVERLAP: Final = 128  # longer than anything that is looked for

# The first delta that is not empty. A role, `null`, "" and usage are no tokens; reasoning and tool calls are.
_FIRST: Final = {
    Protocol.CHAT: re.compile(
        rb'"(?:content|reasoning_content|reasoning|refusal)"\s*:\s*"[^"]|"tool_calls"\s*:\s*\[\s*[^\s\]]'
    ),
    Protocol.COMPLETIONS: re.compile(rb'"text"\s*:\s*"[^"]'),
    Protocol.RESPONSES: re.compile(rb'"delta"\s*:\s*"[^"]'),
    Protocol.MESSAGES: re.compile(
        rb'"content_block_delta"[^\n]*"(?:text|thinking|partial_json)"\s*:\s*"[^"]'
        rb'|"content_block_start"[^\n]*"tool_use"'
    ),
    Protocol.NATIVE: re.compile(
        rb'^data:\s*\{"type"\s*:\s*"(?:(?:message|reasoning)\.delta"[^\n]*"content"\s*:\s*"[^"]|tool_call\.start")',
        re.MULTILINE,
    ),
}

# The route's own sign that the answer is whole. A finish reason is enough: many servers send no [DONE].
_FINISH: Final = re.compile(rb'"finish_reason"\s*:\s*"')
_DONE: Final = re.compile(rb"^data:\s*\[DONE\]", re.MULTILINE)
_END: Final = {
    Protocol.CHAT: _FINISH,
    Protocol.COMPLETIONS: _FINISH,
    Protocol.RESPONSES: re.compile(rb'"type"\s*:\s*"response\.(?:completed|incomplete)"'),
    Protocol.MESSAGES: re.compile(rb'"type"\s*:\s*"message_stop"'),
    # Anchored: this protocol carries a tool's arguments as plain JSON, written by the model.
    Protocol.NATIVE: re.compile(rb'^data:\s*\{"type"\s*:\s*"chat\.end"', re.MULTILINE),
}
# What has to be there before a closer look is worth it: patterns that begin with much text are quick by
# themselves, the others are not.
_END_HINT: Final = {
    Protocol.CHAT: b"",
    Protocol.COMPLETIONS: b"",
    Protocol.RESPONSES: b"mplete",
    Protocol.MESSAGES: b"message_stop",
    Protocol.NATIVE: b"chat.end",
}

# Spaces and line ends alone are no word: it is what a model says that has lost its way.
_BLANKS: Final = re.compile(rb"(?: |\\[nrt])+")
_SAID: Final = rb'\s*:\s*"(?: |\\[nrt])*+(?:[^"\\ ]|\\[^nrt])'

# A word of any kind in an answer that is no stream, or in the event that ends one and repeats all of it: text,
# reasoning, a refusal, a call of a tool, a picture. What has none of these says nothing, however well formed.
_WORD: Final = {
    Protocol.CHAT: re.compile(
        rb'"(?:content|reasoning_content|reasoning|refusal|text|thinking)"'
        + _SAID
        + rb'|"(?:tool_calls|images|reasoning_details)"\s*:\s*\[\s*[^\s\]]|"(?:audio|function_call)"\s*:\s*\{'
        rb'|"type"\s*:\s*"(?:\w+_)?(?:image|audio|video|file)'
    ),
    # What is to be gone on with may well go on with a space.
    Protocol.COMPLETIONS: _FIRST[Protocol.COMPLETIONS],
    Protocol.RESPONSES: re.compile(
        rb'"(?:text|refusal|delta)"'
        + _SAID
        + rb'|"(?:result|encrypted_content)"\s*:\s*"[^"]|"type"\s*:\s*"\w+_call"'
    ),
    Protocol.MESSAGES: re.compile(
        rb'"(?:text|thinking)"' + _SAID + rb'|"type"\s*:\s*"(?:\w*tool_use|redacted_thinking)"'
    ),
    Protocol.NATIVE: re.compile(rb'"content"' + _SAID + rb'|"type"\s*:\s*"(?:invalid_)?tool_call'),
}

# Where the first word stands in nearly every answer: looked for first, since the patterns are slow in text without one.
_USUAL: Final = {
    Protocol.CHAT: b'"content"',
    Protocol.COMPLETIONS: b'"text"',
    Protocol.RESPONSES: b'"text"',
    Protocol.MESSAGES: b'"text"',
    Protocol.NATIVE: b'"content"',
}

_BACKSLASH: Final = ord("\\")

_ERROR: Final = re.compile(rb'"error"\s*:\s*["{]|"(?:type|object)"\s*:\s*"error"')


def closing_quote(text: bytes, quote: int) -> int:
    """The first quote from `quote` on that no backslash stands before; 0 where that is not seen at once."""
    while quote > 1 and text[quote - 1] == _BACKSLASH:
        if text[quote - 2] == _BACKSLASH:
            return 0  # whether that one is itself written by two is for a closer look
        quote = text.find(b'"', quote + 1)
    return max(quote, 0)


class Meter:
    """One streamed answer. Never raises, and keeps at most one partial line."""

    __slots__ = (
        "_carry",
        "_end",
        "_end_hint",
        "_first",
        "_looks",
        "_mid_line",
        "_sent_at",
        "_uncounted",
        "_word",
        "ended",
        "error",
        "event_at",
        "first_token_seconds",
        "gaps",
        "prefix",
        "said",
        "suffix",
        "wire_suffix",
    )

    def __init__(self, protocol: Protocol, sent_at: float) -> None:
        #: From `sent_at` to the first non-empty delta; None until then.
        self.first_token_seconds: float | None = None
        #: Gaps between events from the first token to the end, counted per bucket of GAP_BOUNDS. Events that
        #: come together have none between them, and count in the first bucket.
        self.gaps: list[int] = [0] * (len(GAP_BOUNDS) + 1)
        #: The route's own sign that the answer is whole was seen, or it knows none. An answer that is over
        #: without it was cut, however properly its body ended.
        self.ended: bool = protocol not in _END
        #: The data of an error event, for `looks_lost`; never for a log.
        self.error: bytes | None = None

        #: A word of any kind has come, or this route is not of words.
        self.said: bool = protocol not in _WORD

        self._sent_at = sent_at
        self._uncounted = 0  # events that no gap stands for
        #: When the last event came that a gap stands for, or may.
        self.event_at = sent_at
        self._first = _FIRST.get(protocol)
        self._word = _WORD.get(protocol)
        self._end = _END.get(protocol)
        self._end_hint = _END_HINT.get(protocol, b"")
        self._carry = b""  # the line that has begun, without its end
        self._mid_line = False  # its beginning was looked at already
        #: What stands around the text in the events of this stream, where that is known; see `_learn`. An event that
        #: begins and ends like this, with no quote between, says nothing but its text.
        self.prefix = b""
        self.suffix = b""
        #: And at the end of the chunk that it came in.
        self.wire_suffix = b""
        self._looks = _LOOKS

    @property
    def events(self) -> int:
        """Events so far, of any kind; comments are none."""
        return self._uncounted + sum(self.gaps)

    @property
    def gap_seconds(self) -> float:
        """The sum of the gaps."""
        if self.first_token_seconds is None:
            return 0.0
        return self.event_at - self._sent_at - self.first_token_seconds

    def feed(self, now: float, chunk: bytes) -> None:
        """The next bytes of the body, decoded from their transfer coding, at monotonic time `now`."""
        prefix = self.prefix
        if prefix and not self._carry:
            # Event by event: the form that was learnt, and whatever stands between two quotes in it.
            suffix, end = self.suffix, len(chunk)
            at = events = 0
            while chunk.startswith(prefix, at):
                quote = chunk.find(b'"', at + len(prefix))
                if not chunk.startswith(suffix, quote):
                    quote = closing_quote(chunk, quote)
                    if not chunk.startswith(suffix, quote):
                        break
                events += 1
                at = quote + len(suffix)
                if at == end:
                    self.count(now, events)
                    return
        self._look(now, chunk)

    def count(self, now: float, events: int) -> None:
        """As `feed`, for whoever has seen that what came is so many whole events of the known form."""
        self.gaps[bisect_left(GAP_BOUNDS, now - self.event_at)] += 1
        self.event_at = now
        if events > 1:
            self.gaps[0] += events - 1

    def _look(self, now: float, chunk: bytes) -> None:
        if self._carry:
            chunk = self._carry + chunk
            self._carry = b""
        mid_line = self._mid_line
        if chunk.endswith(b"\n"):
            self._mid_line = False
        else:
            chunk = self._whole_lines(chunk)
        if not chunk:
            return

        events = chunk.count(b"\ndata:")
        if chunk.startswith(b"data:") and not mid_line:
            events += 1
        self._uncounted += events
        if b'"error"' in chunk and _ERROR.search(chunk):
            self._read_error(chunk)
        if self.ended:
            return
        end = self._find_end(chunk)
        if end >= 0:
            self.ended = True
            self.prefix = b""
            # Neither the event that ends the answer nor what follows it is a delta.
            events = chunk.count(b"\ndata:", 0, end) - (not chunk.startswith(b"data:"))
        if self.first_token_seconds is not None:
            if not self.said:
                self._listen(chunk)
            if events > 0:
                self._uncounted -= events
                self.count(now, events)
                if events == 1 and self._looks and end < 0 and self.said:
                    self._learn(chunk)
            return
        if self._first is None:
            return
        # The event that ends the answer may carry text, too; what stands behind it is of no interest.
        stop = chunk.find(b"\n", end) if end >= 0 else len(chunk)
        if first := self._first.search(chunk, 0, stop):
            self.first_token_seconds = now - self._sent_at
            self.event_at = now
            behind = max(chunk.count(b"\ndata:", first.end(), stop) - (end >= 0), 0)
            self._uncounted -= behind
            self.gaps[0] += behind
        self._listen(chunk)

    def _listen(self, chunk: bytes) -> None:
        if not self.said and self._word is not None and self._word.search(chunk):
            self.said = True

    def _learn(self, chunk: bytes) -> None:
        """Remembers what stands around the text of this event, which was found to be a plain one.

        The next events mostly differ in their text alone. One that begins and ends in the same way, with no
        quote between, is as plain as this one, and that is seen at a fraction of the cost.
        """
        self._looks -= 1
        if self._first is None or self._carry or not chunk.startswith((b"data:", b"event:")):
            return
        if not chunk.endswith((b"\n\n", b"\r\n\r\n")):
            return  # not all of an event
        text = self._first.search(chunk)
        if text is None or b'"error"' in chunk:
            return
        begin = text.end() - 1
        end = chunk.find(b'"', begin)
        if b"\\" not in chunk[begin:end]:
            self.prefix, self.suffix = chunk[:begin], chunk[end:]
            self.wire_suffix = self.suffix + b"\r\n"

    def _whole_lines(self, chunk: bytes) -> bytes:
        """`chunk` up to its last line end; the rest is kept for the next time, or looked at now if too long.

        A stream with CR alone as its line end always comes by here, and here alone pays for it.
        """
        chunk = chunk.replace(b"\r", b"\n")  # empty lines more or less say nothing here
        begin = chunk.rfind(b"\n") + 1
        if len(chunk) - begin <= _LINE_BYTES:
            if begin:
                self._mid_line = False
            self._carry = chunk[begin:]
            return chunk[:begin]
        self._carry = chunk[-_OVERLAP:]
        self._mid_line = True
        return chunk

    def _find_end(self, chunk: bytes) -> int:
        pattern = self._end
        if pattern is None or (self._end_hint and self._end_hint not in chunk):
            return -1
        found = pattern.search(chunk)
        end = found.end() if found else -1
        if pattern is _FINISH and b"[DONE]" in chunk and (found := _DONE.search(chunk)):
            end = found.end() if end < 0 else min(end, found.end())
        return end

    def _read_error(self, chunk: bytes) -> None:
        for line in chunk.split(b"\n"):
            if line.startswith(b"data:") and len(line) <= _LINE_BYTES and b'"error"' in line:
                data = line[5:].strip()
                if error_message(data) is not None:
                    self.error = data


class Words:
    """Whether an answer that is no stream says anything, told while it passes. Never raises."""

    __slots__ = ("_carry", "_usual", "_word", "said")

    def __init__(self, protocol: Protocol) -> None:
        self._word = _WORD.get(protocol)
        self._usual = _USUAL.get(protocol, b"")
        self._carry = b""
        #: As in `Meter`.
        self.said: bool = self._word is None

    def feed(self, chunk: bytes) -> None:
        if self._word is None or self.said:
            return
        chunk = self._carry + chunk
        at = chunk.find(self._usual)
        found = self._word.match(chunk, at) if at >= 0 else None
        self.said = found is not None or self._word.search(chunk) is not None
        if not self.said:
            # Of blanks one is enough, however many stand before the first word.
            self._carry = _BLANKS.sub(b" ", chunk)[-_OVERLAP:]
