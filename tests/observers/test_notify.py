"""Who is told of trouble: what is worth a message, once; and that no target holds up anybody."""

import json
import threading
import warnings
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from keepalive.core.facts import Fact, LoadOutcome, LoadStarted, ModelId, ReleaseAsked, Tier, Trouble
from keepalive.core.records import Cause, Eviction, Model, Upstream
from keepalive.core.states import State
from keepalive.core.upstreams import apply_upstream
from keepalive.observers.notify import Event, Message, News, Post
from keepalive.observers.notify.news import GATHER
from keepalive.service.tokens import TokenError
from keepalive.simulator.models import SimModel
from tests.kit.live import daemon, settings, simulator, until, wait_until
from tests.kit.models import GEMMA, POLICY, QWEN, a_model, after, entry, failed, listed, load_ended, ours

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of what it imports itself
    import apprise

pytestmark = pytest.mark.xdist_group("apprise")
ALL = frozenset(Event)
URLS = {"local": "http://127.0.0.1:1234"}


@pytest.fixture(scope="module", autouse=True)
def services() -> None:
    """It reads all that it knows at the first use: here, once, and not in each process that collects tests."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        apprise.Apprise.instantiate("json://127.0.0.1/")


def news(*models: ModelId, events: frozenset[Event] = ALL, urls: dict[str, str] = URLS) -> News:
    found = News()
    found.configure(events, models or (GEMMA,), urls, after=60, pause=900)
    return found


def see(story: News, at: float, model: Model, before: Model | None = None) -> None:
    story.observe(Fact(at), before or model, model)


def failing(identity: ModelId = GEMMA, reason: str = "no memory") -> Model:
    return a_model(identity, state=State.BACKOFF, reason=reason)


def warm(identity: ModelId = GEMMA) -> Model:
    return a_model(identity, state=State.WARM, reason=None)


def lost(model: Model, cause: Cause, times: int = 1) -> Model:
    return replace(model, evictions=model.evictions + times, last_eviction=Eviction(0.0, cause, 0.0))


def told(story: News, at: float) -> list[tuple[str, str]]:
    return [(message.event.value, message.title) for message in story.due(at)]


# --- what is worth a message --------------------------------------------------------------------------


def test_a_model_that_fails_is_told_once_when_that_has_lasted_and_once_when_it_is_over() -> None:
    story = news()
    see(story, 100, failing())

    assert told(story, 159) == []
    assert story.due(160) == [
        Message(
            Event.FAILING,
            "gemma: cannot be kept loaded",
            "gemma: no memory.\nkeepalive tries again by itself. What to do: keepalive doctor; why: keepalive status.",
        )
    ]
    see(story, 1000, failing(reason="still no memory"))
    assert told(story, 5000) == []
    see(story, 6000, warm())
    assert told(story, 6059) == []
    assert story.due(6060) == [Message(Event.RECOVERED, "gemma: well again", "gemma is well again.")]
    assert told(story, 9999) == []


def test_what_mends_itself_before_is_told_nobody() -> None:
    story = news()
    see(story, 100, failing())
    meanwhile = told(story, 149)
    see(story, 150, warm())

    assert (meanwhile, told(story, 400)) == ([], [])


def test_a_load_between_two_failures_does_not_begin_anew() -> None:
    story = news()
    see(story, 100, failing())
    see(story, 130, a_model(state=State.LOADING))
    see(story, 150, failing())

    assert told(story, 160) == [("failing", "gemma: cannot be kept loaded")]


def test_one_that_flaps_is_told_no_more_often_than_the_pause_allows() -> None:
    story, messages = news(), []
    for at in range(0, 7200, 20):
        see(story, at, failing() if at // 120 % 2 == 0 else warm())
        messages += told(story, at)

    assert 2 <= sum(kind == "failing" for kind, _ in messages) <= 8
    assert [kind for kind, _ in messages] == ["failing", "recovered"] * (len(messages) // 2)


def test_a_model_that_is_released_meanwhile_is_no_longer_told_of() -> None:
    story = news()
    see(story, 0, failing())
    assert told(story, 60) != []
    see(story, 100, after(failing(), ReleaseAsked(100, GEMMA)))
    see(story, 200, warm())

    assert told(story, 1000) == []


def test_a_model_that_is_kept_on_demand_may_be_cold_and_not_fail() -> None:
    story, on_demand = news(), replace(POLICY, auto=True)
    see(story, 0, replace(failing(), policy=on_demand))

    assert told(story, 60) == [("failing", "gemma: cannot be kept loaded")]
    see(story, 100, a_model(state=State.COLD, policy=on_demand))
    assert told(story, 200) == [("recovered", "gemma: well again")]
    assert told(story, 9999) == []


def test_an_upstream_that_is_down_is_one_message_and_its_models_are_none() -> None:
    story = news()
    upstream = Upstream("local")
    for fact in (
        listed(1, entry("gemma", "gemma"), tier=Tier.V1),
        failed(2, Trouble.REFUSED, "nothing listens"),
    ):
        before, upstream = upstream, apply_upstream(upstream, fact)
        story.observe(fact, before, upstream)
    see(story, 3, a_model(state=State.UNKNOWN))

    assert [(m.event, m.title) for m in story.due(100)] == [
        (Event.UPSTREAM_DOWN, "LM Studio 'local': does not serve models")
    ]
    fact = listed(200, entry("gemma", "gemma"))
    story.observe(fact, upstream, apply_upstream(upstream, fact))
    assert told(story, 300) == [("recovered", "LM Studio 'local': well again")]


def test_what_a_restart_throws_out_is_one_message() -> None:
    story = news(GEMMA, QWEN)
    see(story, 10, lost(warm(), Cause.RESTART), warm())
    see(story, 12, lost(warm(QWEN), Cause.RESTART), warm(QWEN))

    assert told(story, 14) == []
    [message] = story.due(10 + GATHER + 2)
    assert message.title == "gemma and 1 more: thrown out of memory"
    assert message.body.splitlines()[:2] == [
        "gemma was thrown out: LM Studio was restarted.",
        "qwen was thrown out: LM Studio was restarted.",
    ]


def test_by_whom_it_was_pushed_out_is_said() -> None:
    story = news()
    before = replace(warm(), beside=frozenset({"gemma"}))
    fact = listed(10, entry("intruder-70b", "intruder-70b"))
    story.observe(fact, before, lost(before, Cause.DISPLACED))

    [message] = story.due(20)
    assert "gemma was thrown out: intruder-70b was loaded in its place" in message.body


def test_evictions_in_the_pause_are_counted_and_told_after_it() -> None:
    story = news()
    see(story, 0, lost(warm(), Cause.TIMER), warm())
    assert len(story.due(10)) == 1
    for at in (100, 200, 300):
        see(story, at, lost(warm(), Cause.BY_HAND), warm())

    assert told(story, 900) == []
    [message] = story.due(911)
    assert message.body.startswith("gemma was thrown out, 3 times: somebody unloaded it")


def test_only_what_is_asked_for_is_told_and_no_end_of_what_was_not_told() -> None:
    story = news(events=frozenset({Event.RECOVERED, Event.EVICTED}))
    see(story, 0, failing())
    assert told(story, 100) == []
    see(story, 200, warm())

    assert told(story, 400) == []


def test_with_several_upstreams_each_name_says_which() -> None:
    story = news(urls={"a": "http://a", "local": "http://b"})
    see(story, 0, failing())

    assert told(story, 60) == [("failing", "gemma on local: cannot be kept loaded")]


def test_a_hundred_models_are_one_message_of_bounded_length() -> None:
    many = [ModelId("local", f"m{n}") for n in range(100)]
    story = news(*many)
    for model in many:
        see(story, 0, failing(model))

    [message] = story.due(100)
    assert message.title == "m0 and 99 more: cannot be kept loaded"
    assert "… and 90 more." in message.body
    assert len(message.body.splitlines()) == 12


def test_what_is_no_longer_configured_is_forgotten() -> None:
    story = news()
    see(story, 0, failing())
    story.configure(ALL, (QWEN,), URLS, after=60, pause=900)

    assert told(story, 100) == []
    see(story, 200, failing())
    assert told(story, 400) == []


def test_a_load_that_really_failed_is_told_with_its_reason() -> None:
    story, model = news(), ours()
    for fact in (
        listed(20, entry("gemma")),
        LoadStarted(21, GEMMA),
        load_ended(30, LoadOutcome.REFUSED, message="insufficient system resources"),
    ):
        before, model = model, after(model, fact)
        story.observe(fact, before, model)

    bodies = {message.event: message.body for message in story.due(100)}
    assert set(bodies) == {Event.FAILING, Event.EVICTED}
    assert "insufficient system resources" in bodies[Event.FAILING]


# --- the targets --------------------------------------------------------------------------------------


class Receiver(ThreadingHTTPServer):
    """What takes messages; `status` 0: it takes them and never answers."""

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status = 200
        self.got: list[dict[str, Any]] = []
        self.tries = 0
        self.over = threading.Event()
        self.address = f"json://127.0.0.1:{self.server_address[1]}/sk-canary-4711"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        self.server.tries += 1
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.status == 0:
            self.server.over.wait()
            return
        if self.server.status == 200:
            self.server.got.append(body)
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.over.set()
            server.shutdown()
            thread.join()


NOTE = Message(Event.FAILING, "gemma: cannot be kept loaded", "gemma: no memory.")


class Said:
    """What the log is given."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, fields: Any) -> None:
        self.lines.append((event, dict(fields)))

    @property
    def events(self) -> list[str]:
        return [event for event, _ in self.lines]


def test_a_target_that_is_dead_is_one_line_and_gets_the_message_when_it_is_back(receiver: Receiver) -> None:
    said = Said()
    receiver.status = 500
    post = Post(1, receiver.address, said, retry=0.05)
    post.put(NOTE)
    wait_until(lambda: receiver.tries >= 3, "three tries")
    receiver.status = 200
    wait_until(lambda: "notify.sent" in said.events, "it arrives")
    post.end()

    assert said.events == ["notify.failed", "notify.works_again", "notify.sent"]
    assert [(note["type"], note["message"]) for note in receiver.got] == [("failure", "gemma: no memory.")]
    assert receiver.got[0]["title"].endswith(": gemma: cannot be kept loaded")
    assert "canary" not in str(said.lines)


def test_an_address_that_apprise_does_not_know_is_a_line_without_it() -> None:
    said = Said()
    Post(2, "nonsense://sk-canary-4711", said).put(NOTE)
    wait_until(lambda: said.lines, "the line")

    assert said.events == ["notify.unavailable"]
    assert said.lines[0][1] == {"target": 2, "reason": "apprise knows no such address"}
    assert "canary" not in str(said.lines)


async def test_people_are_told_by_a_daemon_and_one_target_that_hangs_holds_up_nobody(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    hanging = Receiver()
    hanging.status = 0
    serving = threading.Thread(target=hanging.serve_forever, args=(0.01,))
    serving.start()
    try:
        async with simulator(SimModel("gemma", load_seconds=0.05), load_result="fail") as server:
            text = settings(server.url, "gemma")
            text += '\n[notify]\nurls_env = "TELL"\nafter = "100ms"\npause = "10ms"\n'
            async with daemon(text, environ={"TELL": f"{hanging.address} {receiver.address}"}) as running:
                await until(lambda: receiver.got, "the failure is told")
                await until(lambda: hanging.tries, "the other target hangs")
                server.studio.set_faults(load_result="ok")
                running.warm(GEMMA)
                await until(lambda: len(receiver.got) > 1, "its end is told")
    finally:
        hanging.over.set()
        hanging.shutdown()
        hanging.server_close()
        serving.join()

    first, last = receiver.got[0], receiver.got[-1]
    assert first["title"].endswith("gemma: cannot be kept loaded")
    assert "What to do: keepalive doctor" in first["message"]
    assert (last["type"], last["message"]) == ("success", "gemma is well again.")
    assert "canary" not in caplog.text


async def test_a_variable_that_is_not_set_keeps_it_from_starting() -> None:
    with pytest.raises(TokenError, match=r"notify\.urls_env: the environment variable TELL is not set"):
        async with daemon(settings("http://127.0.0.1:1", "x") + '\n[notify]\nurls_env = "TELL"\n'):
            pass
