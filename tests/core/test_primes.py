"""Openings that are replayed: when, and what becomes of a model by what came of it."""

from dataclasses import replace
from typing import Any

import pytest

from keepalive.core.actions import GiveUpPrime, Load, Prime, Refresh, SendPing, Unload
from keepalive.core.errors import Reason
from keepalive.core.facts import (
    Fact,
    Instance,
    InstanceLost,
    LoadStarted,
    OpeningRead,
    OpeningsLearned,
    PingEnded,
    PingOutcome,
    PingStarted,
    PrimedAnswered,
    PrimeEnded,
    PrimeOutcome,
    PrimeStarted,
    ReleaseAsked,
    RequestEnded,
    RequestStarted,
    Tier,
    UnloadCause,
    WaitEnded,
    WaitStarted,
)
from keepalive.core.primes import chosen, label, next_primes
from keepalive.core.records import Model, Pending, Ping, Primed, Priming
from keepalive.core.states import IllegalMove, State
from tests.kit.models import (
    GEMMA,
    POLICY,
    QWEN,
    Box,
    a_model,
    after,
    cold,
    entry,
    every_model,
    found,
    listed,
    ours,
    refused,
    warm,
)

QUIET, AGAIN = 5.0, 60.0
WISHES = chosen(Priming(), {"agent": None, "second": None})
OK, ERROR = PrimeOutcome.OK, PrimeOutcome.ERROR


def primed(at: float, opening: str = "agent", outcome: PrimeOutcome = OK, **more: Any) -> list[Fact]:
    return [PrimeStarted(at, GEMMA, opening), PrimeEnded(at + 5, GEMMA, opening, outcome, 5.0, **more)]


def a_box(*others: Model, **changes: Any) -> Box:
    """Gemma is loaded and proved since 13, and has two openings to be replayed."""
    return Box(ours(priming=WISHES, **changes), *others).see(listed(20, *rows(*others)))


def rows(*others: Model) -> list[Any]:
    return [entry("gemma", "gemma"), *(entry(m.id.key) for m in others)]


def primes(box: Box, now: float) -> list[Any]:
    return [action for action in box.plan(now) if isinstance(action, Prime | GiveUpPrime)]


def first(box: Box, now: float) -> list[Any]:
    """What is primed once it has been asked what is there."""
    wants = box.plan(now)
    assert not [action for action in wants if isinstance(action, Prime)]
    others = [m for m in box.models.values() if m.id != GEMMA]
    return primes(box.see(listed(now + 0.1, *rows(*others))), now + 0.1)


# --- when -----------------------------------------------------------------------------------------------


def test_an_opening_is_replayed_once_the_model_is_proved_and_after_a_look_that_shows_loads():
    box = Box(cold(priming=WISHES))
    box.see(LoadStarted(2, GEMMA))
    assert primes(box, 3) == []
    box = Box(found(priming=WISHES)).see(listed(20, *rows()))
    assert primes(box, 20) == []  # it has not answered yet

    box = a_box()

    assert box.plan(30) == [Refresh("local", loading=True)]
    assert primes(box.see(listed(30.1, *rows())), 30.1) == [Prime(GEMMA, "gemma", "agent")]


def test_openings_are_replayed_in_their_order_one_at_a_time_and_once():
    box = a_box()
    assert first(box, 30) == [Prime(GEMMA, "gemma", "agent")]

    box.see(PrimeStarted(31, GEMMA, "agent"))
    assert primes(box, 31) == []
    box.see(PrimeEnded(36, GEMMA, "agent", OK, 5.0, 5900))
    assert first(box, 40) == [Prime(GEMMA, "gemma", "second")]
    box.see(*primed(41, "second"))

    assert primes(box.see(listed(50, *rows())), 50) == []
    done = [(one.opening, one.at, one.tokens) for one in box[GEMMA].priming.done]
    assert done == [("agent", 36, 5900), ("second", 46, None)]


def test_two_models_of_one_server_are_primed_one_after_the_other():
    other = replace(ours(), id=QWEN, rank=1, priming=WISHES)
    box = Box(other, ours(priming=WISHES))
    there = [entry("gemma", "gemma"), entry("qwen", "gemma")]
    assert primes(box.see(listed(30, *there)), 30) == [Prime(GEMMA, "gemma", "agent")]

    box.see(PrimeStarted(30, GEMMA, "agent"))

    assert primes(box.see(listed(31, *there)), 31) == []


SOMEBODY: list[tuple[str, list[Fact]]] = [
    ("asks it", [RequestStarted(25, GEMMA)]),
    ("waits for it", [WaitStarted(25, GEMMA)]),
    ("asks another model there", [RequestStarted(25, QWEN)]),
    ("waits for another model there", [WaitStarted(25, QWEN)]),
    ("has just been answered", [RequestStarted(25, GEMMA), RequestEnded(29, GEMMA, True)]),
    ("has it released", [ReleaseAsked(25, GEMMA)]),
]


@pytest.mark.parametrize("facts", [facts for _, facts in SOMEBODY], ids=[name for name, _ in SOMEBODY])
def test_nothing_is_replayed_while_somebody(facts: list[Fact]):
    box = a_box(a_model(QWEN, rank=1, window_open=False))

    assert first(box.see(*facts), 30) == []


def test_it_is_replayed_when_the_last_one_has_been_quiet_for_a_while():
    box = a_box().see(RequestStarted(25, GEMMA), RequestEnded(29, GEMMA, True))
    seen = listed(28.9 + QUIET, *rows())

    assert primes(box.see(seen), 28.9 + QUIET) == []
    assert primes(box, 29 + QUIET) == [Prime(GEMMA, "gemma", "agent")]


def test_nothing_is_replayed_while_another_model_of_the_server_loads_whoever_loads_it():
    box = a_box(a_model(QWEN, rank=1))
    assert Load(QWEN) in box.see(listed(30, entry("gemma", "gemma"), entry("qwen"))).plan(30)
    assert primes(box, 30) == []
    box.see(LoadStarted(30, QWEN), listed(31, entry("gemma", "gemma"), entry("qwen")))
    assert primes(box, 31) == []

    box = a_box()
    loading = listed(30, entry("gemma", "gemma"), entry("stranger", loading=True))

    assert primes(box.see(loading), 30) == []
    assert first(box, 50) == [Prime(GEMMA, "gemma", "agent")]


# --- given up -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "facts", [facts for _, facts in SOMEBODY if "just" not in _], ids=lambda f: type(f[0]).__name__
)
def test_what_is_under_way_is_given_up_the_moment_somebody_comes(facts: list[Fact]):
    box = a_box(a_model(QWEN, rank=1, window_open=False)).see(PrimeStarted(24, GEMMA, "agent"))
    assert primes(box, 25) == []

    assert primes(box.see(*facts), 25) == [GiveUpPrime(GEMMA, "agent")]


@pytest.mark.parametrize(
    "fact",
    [
        listed(25, entry("gemma")),  # it was evicted
        listed(25, entry("gemma", "gemma"), entry("stranger", loading=True)),
        listed(25, entry("gemma", "gemma"), entry("qwen")),  # which is to be loaded now
        refused(25),
        InstanceLost(25, GEMMA, "Model unloaded."),
    ],
)
def test_it_is_given_up_when_the_model_goes_or_another_one_comes(fact: Fact):
    box = a_box(a_model(QWEN, rank=1)).see(PrimeStarted(24, GEMMA, "agent"))

    assert GiveUpPrime(GEMMA, "agent") in box.see(fact).plan(25)


def test_it_is_gone_on_with_later():
    box = a_box().see(PrimeStarted(24, GEMMA, "agent"), RequestStarted(25, GEMMA))
    box.see(PrimeEnded(25, GEMMA, "agent", PrimeOutcome.GIVEN_UP), RequestEnded(30, GEMMA, True))

    assert first(box, 30 + QUIET) == [Prime(GEMMA, "gemma", "agent")]


def test_a_waiting_caller_who_leaves_is_in_nobodys_way_any_more():
    box = a_box().see(WaitStarted(25, GEMMA), WaitEnded(26, GEMMA, 1.0, False))

    assert first(box, 30) == [Prime(GEMMA, "gemma", "agent")]


# --- what came of it ------------------------------------------------------------------------------------


def test_an_opening_that_was_read_counts_as_the_ping_of_its_interval():
    model = after(ours(priming=WISHES), *primed(100))

    assert (model.ping_at, model.pinged_at, model.seen_at) == (405, 105, 105)
    assert model.last_ping == Ping(105, PingOutcome.OK, 5.0)
    assert model.state is State.WARM
    assert not model.calling


def test_the_next_ping_is_an_opening_that_was_read_where_that_is_in_nobodys_way():
    box = a_box(a_model(QWEN, rank=1, window_open=False)).see(*primed(25), *primed(31, "second"))
    seen = listed(400, *rows(a_model(QWEN)))
    assert box.see(seen).plan(400) == [Prime(GEMMA, "gemma", "agent")]

    box.see(RequestStarted(400, QWEN))

    assert SendPing(GEMMA, "gemma") in box.plan(400)
    assert primes(box, 400) == []


@pytest.mark.parametrize("outcome", [PrimeOutcome.ERROR, PrimeOutcome.TIMEOUT])
def test_where_that_fails_a_ping_of_its_own_is_the_verdict(outcome: PrimeOutcome):
    box = a_box().see(*primed(25), *primed(31, "second"), *primed(400, "agent", outcome, message="no"))

    assert box.see(listed(406, *rows())).plan(406) == [SendPing(GEMMA, "gemma")]
    assert box[GEMMA].priming.unfit == ()


def test_what_users_read_by_themselves_is_not_replayed_and_is_no_ping():
    box = a_box().see(
        OpeningRead(25, GEMMA, "agent"), OpeningRead(26, GEMMA, "agent"), OpeningRead(26, GEMMA, "x")
    )
    assert box[GEMMA].priming.done == (Primed("agent", 25, 0.0, ours=False),)

    assert first(box, 30) == [Prime(GEMMA, "gemma", "second")]
    assert SendPing(GEMMA, "gemma") in box.see(listed(400, *rows())).plan(400)


def test_who_reads_an_opening_of_a_model_that_is_gone_leaves_nothing_behind():
    assert after(cold(priming=WISHES), OpeningRead(25, GEMMA, "agent")).priming.done == ()


def test_a_listing_from_while_it_was_read_says_nothing_of_what_came_after():
    model = after(ours(priming=WISHES), *primed(100))

    assert after(model, listed(106, entry("gemma"), asked=104)).instances == model.instances


@pytest.mark.parametrize(
    "fact",
    [
        listed(120, entry("gemma")),
        listed(120, entry("gemma", "gemma:2")),
        refused(120),
        InstanceLost(120, GEMMA, "Model unloaded."),
    ],
)
def test_what_was_read_is_gone_with_the_instance(fact: Fact):
    model = after(ours(priming=WISHES), *primed(100))
    assert model.priming.done == (Primed("agent", 105, 5.0),)

    assert after(model, fact).priming.done == ()


def test_an_instance_that_is_still_there_still_knows():
    model = after(ours(priming=WISHES), *primed(100), listed(120, entry("gemma", "gemma")))
    model = after(model, PingStarted(405, GEMMA), PingEnded(406, GEMMA, PingOutcome.TIMEOUT))

    assert [one.opening for one in model.priming.done] == ["agent"]


def test_a_refusal_is_told_and_the_next_opening_has_its_turn_while_the_model_stays_warm():
    box = a_box().see(*primed(25, outcome=PrimeOutcome.REFUSED, message="the context is too small"))

    assert box[GEMMA].state is State.WARM
    assert box[GEMMA].priming.unfit == (("agent", "the context is too small"),)
    assert first(box, 40) == [Prime(GEMMA, "gemma", "second")]


def test_what_did_not_fit_is_not_tried_again_after_the_next_load_but_after_the_config_was_read_anew():
    model = after(ours(priming=WISHES), *primed(25, outcome=PrimeOutcome.REFUSED, message="no"))
    model = after(model, listed(120, entry("gemma")))
    assert model.priming.next == "second"

    assert chosen(model.priming, {"agent": None}).next == "agent"


def test_an_opening_that_failed_is_tried_once_more_a_while_later():
    box = a_box().see(*primed(25, outcome=PrimeOutcome.ERROR, message="cut"))
    assert box[GEMMA].ping_at == 30  # the verdict on the model is a ping's
    box.see(PingStarted(31, GEMMA), PingEnded(32, GEMMA, PingOutcome.OK))

    assert first(box, 29 + AGAIN) == []
    assert primes(box, 30 + AGAIN) == [Prime(GEMMA, "gemma", "agent")]
    box.see(*primed(100, outcome=PrimeOutcome.ERROR, message="cut again"))
    assert box[GEMMA].priming.unfit == (("agent", "cut again"),)


def test_a_model_that_dies_of_an_opening_dies_of_it_no_more_than_twice_whatever_goes_well_between():
    model = ours(priming=chosen(Priming(), {"good": None, "deadly": None}))
    for at in (100, 200):
        model = after(
            model, *primed(at, "good"), *primed(at + 10, "deadly", PrimeOutcome.ERROR, message="cut")
        )
        model = after(model, refused(at + 20), listed(at + 30, entry("gemma", "gemma")))
        model = after(model, PingStarted(at + 31, GEMMA), PingEnded(at + 32, GEMMA, PingOutcome.OK))

    assert model.priming.unfit == (("deadly", "cut"),)
    assert model.priming.next == "good"


def test_an_opening_that_crashes_the_model_is_not_tried_again():
    model = after(
        ours(priming=WISHES),
        *primed(25, outcome=PrimeOutcome.ERROR, message="has crashed", why=Reason.CRASHED),
    )

    assert model.priming.unfit == (("agent", "has crashed"),)


@pytest.mark.parametrize("why", [Reason.UNAUTHORIZED, Reason.LOADING, Reason.UNLOADED, Reason.UNKNOWN_MODEL])
def test_what_an_opening_is_not_to_blame_for_is_not_held_against_it(why: Reason):
    model = ours(priming=WISHES)
    for at in (100, 200, 300):
        model = after(model, *primed(at, outcome=PrimeOutcome.ERROR, message="no", why=why))

    assert model.priming.unfit == ()
    assert model.priming.again_at == 305 + AGAIN


def test_an_answer_that_came_too_late_is_not_waited_for_again():
    model = after(ours(priming=WISHES), *primed(25, outcome=PrimeOutcome.TIMEOUT, message="no answer"))

    assert (model.state, model.priming.unfit) == (State.WARM, (("agent", "no answer"),))


def test_a_model_that_went_away_meanwhile_is_not_warm_by_an_opening():
    model = after(ours(priming=WISHES), PrimeStarted(25, GEMMA, "agent"), listed(26, entry("gemma")))
    answered = after(model, PrimeEnded(30, GEMMA, "agent", OK, 5.0))

    assert answered.state is State.LOADING
    assert (answered.priming.done, answered.priming.under_way) == ((), None)
    assert after(answered, listed(31, entry("gemma"))).state is State.COLD


def test_an_answer_tells_that_no_load_goes_on_behind_an_opening_that_came_too_late():
    away = after(ours(priming=WISHES), PrimeStarted(25, GEMMA, "agent"))
    gone = after(away, listed(26, entry("gemma")))

    def ends(outcome: PrimeOutcome, *facts: Fact) -> Model:
        return after(gone, PrimeEnded(30, GEMMA, "agent", outcome, 5.0), *facts)

    why = "what was being replayed to it may have loaded it again"
    assert gone.reason == f"an earlier load may still be under way, because {why}"
    assert ends(PrimeOutcome.GIVEN_UP, listed(40, entry("gemma"))).state is State.LOADING
    assert ends(PrimeOutcome.TIMEOUT, listed(40, entry("gemma"))).state is State.LOADING
    assert ends(PrimeOutcome.GIVEN_UP, listed(92, entry("gemma"))).state is State.COLD
    assert ends(PrimeOutcome.ERROR, listed(40, entry("gemma"))).state is State.COLD
    assert ends(PrimeOutcome.OK, listed(40, entry("gemma"))).state is State.COLD
    assert ends(PrimeOutcome.OK, listed(40, entry("gemma", "gemma"))).present
    # Of another's load it tells nothing.
    theirs = Pending(26, 91, alive_at=26, why="b began it")
    assert after(replace(away, pending=theirs), PrimeEnded(30, GEMMA, "agent", ERROR, 5.0)).pending == theirs


def answers(*seconds: float, opening: str = "agent") -> list[Fact]:
    return [PrimedAnswered(200 + n, GEMMA, opening, took) for n, took in enumerate(seconds)]


def test_where_no_answer_comes_faster_than_its_opening_is_read_priming_says_so_and_stops():
    box = a_box().see(*primed(25), *answers(5.1, 4.2, 9.0, 5.0))
    assert box[GEMMA].priming.useless is None

    box.see(PrimedAnswered(210, GEMMA, "agent", 30.0))

    assert box[GEMMA].priming.useless == (
        "priming has not made answers faster: the first tokens of the last 5 that began with what had been read took "
        "84% of the time of reading it, or more"
    )
    assert first(box, 220) == []
    assert chosen(box[GEMMA].priming, {"agent": None, "second": None}).useless is None


def test_one_quick_answer_of_the_last_few_is_enough_to_go_on():
    model = after(ours(priming=WISHES), *primed(25), *answers(9, 9, 9, 9, 0.3, 9, 9, 9, 9))

    assert model.priming.useless is None
    useless = after(model, PrimedAnswered(300, GEMMA, "agent", 9.0))
    assert useless.priming.useless is not None
    assert after(useless, PrimedAnswered(301, GEMMA, "agent", 0.1)).priming.useless is not None


def test_an_opening_that_is_read_in_no_time_proves_nothing():
    quick = [PrimeStarted(25, GEMMA, "agent"), PrimeEnded(26, GEMMA, "agent", OK, 0.9)]

    model = after(
        ours(priming=WISHES), *quick, *answers(*[9.0] * 9), *answers(*[9.0] * 9, opening="nobody knows")
    )

    assert (model.priming.useless, model.priming.answers) == (None, ())


def test_what_counts_is_how_long_an_opening_took_that_was_not_in_the_cache():
    again = [PrimeStarted(50, GEMMA, "agent"), PrimeEnded(51, GEMMA, "agent", OK, 0.1)]

    model = after(ours(priming=WISHES), *primed(25), *again, PrimedAnswered(60, GEMMA, "agent", 0.5))

    assert model.priming.answers == (0.1,)


# --- which ----------------------------------------------------------------------------------------------


def test_a_file_that_changed_is_another_opening_and_what_is_still_wished_stays_known():
    model = after(ours(priming=WISHES), *primed(100), *primed(110, "second"))

    priming = chosen(model.priming, {"agent of today": None, "second": None})

    assert [one.opening for one in priming.done] == ["second"]
    assert priming.next == "agent of today"


def test_a_file_that_cannot_be_read_is_passed_over_with_its_reason():
    priming = chosen(Priming(), {"broken": '"x.json" is no JSON', "agent": None})

    assert priming.next == "agent"
    assert priming.unfit == (("broken", '"x.json" is no JSON'),)


def test_what_was_learnt_comes_behind_the_files_and_is_forgotten_when_it_is_out_of_use():
    model = after(ours(priming=chosen(Priming(), {"agent": None})), OpeningsLearned(50, GEMMA, ("x", "y")))
    assert model.priming.wished == ("agent", "x", "y")
    model = after(
        model, *primed(100), *primed(110, "x"), *primed(120, "y", PrimeOutcome.REFUSED, message="no")
    )

    model = after(model, OpeningsLearned(130, GEMMA, ("z",)))

    assert [one.opening for one in model.priming.done] == ["agent"]
    assert (model.priming.unfit, model.priming.next) == ((), "z")


def test_what_was_learnt_is_kept_when_the_config_is_read_anew_while_the_model_is_to_learn():
    model = after(ours(), OpeningsLearned(50, GEMMA, ("x",)), *primed(100, "x"))

    assert chosen(model.priming, {}, learns=True).learned == ("x",)
    assert [one.opening for one in chosen(model.priming, {}, learns=True).done] == ["x"]
    assert chosen(model.priming, {}, learns=False) == chosen(model.priming, {}) == Priming()


def test_strangers_that_lm_studios_own_socket_shows_are_left_alone_too():
    busy = replace(entry("gemma"), instances=(Instance("gemma", busy=True, queued=1),))
    assert primes(a_box().see(listed(30, busy)), 30) == []
    beside = replace(entry("gemma"), instances=(Instance("gemma", busy=True, queued=2),))
    box = a_box().see(PrimeStarted(24, GEMMA, "agent"))

    assert primes(box.see(listed(30, busy)), 30) == []  # that is ours
    assert primes(box.see(listed(31, beside)), 31) == [GiveUpPrime(GEMMA, "agent")]


# --- whatever happens -------------------------------------------------------------------------------------


def test_an_opening_is_never_sent_to_what_is_not_loaded_nor_beside_another_call():
    for name, model in every_model().items():
        there = bool(model.instances) or (model.blind and model.state is State.WARM)
        if model.calling or not there:
            with pytest.raises(
                IllegalMove, match="an opening though nothing is loaded, or a call is under way"
            ):
                after(model, PrimeStarted(200, GEMMA, "agent"))
        else:
            assert after(model, PrimeStarted(200, GEMMA, "agent")).calling, name


def test_the_end_of_an_opening_changes_no_state_whatever_it_was():
    for model in every_model().values():
        for outcome in PrimeOutcome:
            for why in (None, *Reason):
                ended = after(model, PrimeEnded(200, GEMMA, "agent", outcome, 1.0, message="m", why=why))
                assert ended.state is model.state
                assert ended.priming.under_way is None


def test_where_residency_does_not_show_a_model_that_answers_is_primed_by_its_key():
    blind = replace(warm(), instances=(), blind=True, priming=WISHES)
    box = Box(blind)

    assert primes(box.see(listed(20, entry("gemma"), tier=Tier.OPENAI)), 20) == [
        Prime(GEMMA, "gemma", "agent")
    ]


def test_a_model_that_is_loaded_when_asked_for_is_primed_too_and_not_when_it_is_about_to_go():
    on_demand = replace(ours(priming=WISHES), policy=replace(POLICY, auto=True))
    box = Box(on_demand).see(listed(20, *rows()))
    assert first(box, 30) == [Prime(GEMMA, "gemma", "agent")]

    going = Box(replace(on_demand, draining=True)).see(listed(20, *rows()))

    assert first(going, 30) == []


# --- line by line ---------------------------------------------------------------------------------------


def a_pair(**changes: Any) -> Box:
    """Gemma has read an opening, both are loaded, and all pings are due from 400 on."""
    beside = replace(
        ours(), id=QWEN, rank=1, instances=(Instance("qwen:2"),), ours=frozenset({"qwen:2"}), **changes
    )
    copy = {"instances": (Instance("gemma:2"),), "ours": frozenset({"gemma:2"})}
    return Box(replace(ours(priming=WISHES), **copy), beside).see(*primed(25), *primed(31, "second"))


def pair(at: float, *more: Any) -> Fact:
    return listed(at, entry("gemma", "gemma:2"), entry("qwen", "qwen:2"), *more)


def sent(box: Box, now: float) -> list[Any]:
    return [action for action in box.plan(now) if isinstance(action, Prime | SendPing | GiveUpPrime)]


def test_one_opening_stands_for_one_ping_and_goes_to_the_instance():
    assert sent(a_pair().see(pair(400)), 400) == [Prime(GEMMA, "gemma:2", "agent"), SendPing(QWEN, "qwen:2")]


def test_an_opening_goes_to_the_instance_and_where_none_shows_to_the_key():
    unread = Box(replace(a_pair()[GEMMA], priming=WISHES)).see(listed(50, entry("gemma", "gemma:2")))
    blind = replace(ours(priming=WISHES), instances=(), blind=True, state=State.WARM)
    read = Box(blind).see(*primed(25), *primed(31, "second"), listed(340, entry("gemma"), tier=Tier.OPENAI))

    assert primes(unread, 50) == [Prime(GEMMA, "gemma:2", "agent")]
    assert sent(read, 340) == [Prime(GEMMA, "gemma", "agent")]


PLAIN = [SendPing(GEMMA, "gemma:2"), SendPing(QWEN, "qwen:2")]


def test_pings_are_plain_while_a_stranger_loads():
    assert sent(a_pair().see(pair(400, entry("stranger", loading=True))), 400) == PLAIN


def test_pings_are_plain_while_another_model_answers_or_reads():
    assert sent(a_pair().see(pair(400), RequestStarted(400, QWEN)), 400) == PLAIN[:1]
    reads = a_pair(priming=WISHES).see(PrimeStarted(399, QWEN, "agent"), pair(400))
    assert sent(reads, 400) == PLAIN[:1]


def test_pings_are_plain_where_priming_is_useless_or_the_model_is_to_go():
    box = a_pair().see(*answers(9, 9, 9, 9, 9))
    assert sent(box.see(pair(400)), 400) == PLAIN

    box = a_pair()
    box.models[GEMMA] = replace(box[GEMMA], draining=True)

    assert sent(box.see(pair(400)), 400) == PLAIN


def test_a_stranger_beside_our_opening_is_seen_on_whichever_copy_he_is():
    copies = (Instance("gemma", queued=1), Instance("gemma:2", queued=2))
    box = a_box().see(PrimeStarted(24, GEMMA, "agent"))

    there = listed(30, replace(entry("gemma"), instances=copies))

    assert primes(box.see(there), 30) == [GiveUpPrime(GEMMA, "agent")]


@pytest.mark.parametrize(
    "beside",
    [
        replace(ours(), id=QWEN, rank=1, in_flight=1),
        replace(ours(), id=QWEN, rank=1, instances=(Instance("gemma", busy=True, queued=1),)),
        replace(
            cold(), id=QWEN, rank=1, pending=Pending(since=20, until=900, alive_at=20), state=State.LOADING
        ),
        replace(ours(), id=QWEN, rank=1, active_at=29.0),
    ],
    ids=["answers", "answers a stranger", "may be loading", "has just answered"],
)
def test_nothing_is_replayed_while_another_model_of_the_server(beside: Model):
    model = ours(priming=WISHES)

    assert next_primes([model, beside], 30, free=True) == []
    assert next_primes([model, replace(ours(), id=QWEN, rank=1)], 30, free=True) != []


def test_nothing_is_replayed_beside_a_ping():
    box = a_box().see(PingStarted(29, GEMMA), listed(30, *rows()))

    assert primes(box, 30) == []


def test_an_opening_that_is_no_longer_wished_is_given_up():
    box = a_box().see(PrimeStarted(24, GEMMA, "agent"))
    box.models[GEMMA] = replace(box[GEMMA], priming=chosen(box[GEMMA].priming, {"second": None}))

    assert primes(box, 25) == [GiveUpPrime(GEMMA, "agent")]


def test_whoever_reads_the_config_anew_begins_anew_but_for_what_was_read_of_what_is_still_wished():
    model = after(
        ours(priming=chosen(Priming(), {"agent": None, "second": None, "third": None, "bad": "no file"})),
        *primed(100),
        *primed(110, "second"),
        *primed(120, "third", PrimeOutcome.ERROR, message="cut"),
        *primed(200),
        *primed(210, "second"),
        *answers(9, 9, 9, 9, 9),
    )
    before = model.priming
    assert (before.failed, before.again_at, before.answers[-1]) == ({"third"}, 125 + AGAIN, 1.8)

    assert chosen(before, {"agent": None, "other": "no file"}) == Priming(
        openings=("agent", "other"),
        done=(Primed("agent", 205, 5.0),),
        unfit=(("other", "no file"),),
        longest=(("agent", 5.0),),
    )


def test_what_was_learnt_anew_keeps_what_came_of_the_files():
    model = after(
        ours(priming=chosen(Priming(), {"agent": None, "bad": "no file"})),
        OpeningsLearned(50, GEMMA, ("x",)),
        *primed(100),
        *primed(110, "x"),
        OpeningsLearned(130, GEMMA, ("y",)),
    )

    assert model.priming == Priming(
        openings=("agent", "bad"),
        learned=("y",),
        done=(Primed("agent", 105, 5.0),),
        unfit=(("bad", "no file"),),
        longest=(("agent", 5.0),),
    )


def test_an_answer_too_late_is_held_against_what_was_not_read_before_whatever_else_was():
    model = after(ours(priming=WISHES), *primed(100, "second"))

    late = after(model, *primed(110, "agent", PrimeOutcome.TIMEOUT, message="late"))

    assert late.priming.unfit == (("agent", "late"),)


def test_an_opening_counts_as_use_and_as_a_call_of_ours_however_it_ends():
    for outcome in PrimeOutcome:
        model = after(replace(ours(priming=WISHES), contested=True), *primed(100, outcome=outcome))

        assert (model.used_at, model.touched_at, model.contested) == (105, 105, False)


def test_who_answers_late_what_was_read_before_is_busy_and_the_opening_is_not_to_blame():
    read = after(ours(priming=WISHES), *primed(100))

    assert after(read, *primed(110, outcome=PrimeOutcome.TIMEOUT)).priming.failed == frozenset()
    assert after(read, *primed(110, outcome=PrimeOutcome.ERROR)).priming.failed == {"agent"}


def test_what_failed_once_is_not_blamed_for_what_it_is_not_to_blame_for():
    model = after(ours(priming=WISHES), *primed(100, outcome=PrimeOutcome.ERROR, message="cut"))

    again = after(model, *primed(200, outcome=PrimeOutcome.ERROR, message="no", why=Reason.UNAUTHORIZED))

    assert (again.priming.unfit, again.priming.failed) == ((), {"agent"})


def test_what_went_well_meanwhile_has_not_failed_before():
    error, well = PrimeOutcome.ERROR, PrimeOutcome.OK
    model = ours(priming=WISHES)
    for at, outcome in ((100, error), (200, well), (300, error)):
        model = after(model, *primed(at, outcome=outcome, message="cut"))

    assert (model.priming.unfit, model.priming.failed) == ((), {"agent"})


def test_an_opening_that_was_read_twice_is_in_the_cache_once():
    model = after(ours(priming=WISHES), *primed(100), *primed(200))

    assert model.priming.done == (Primed("agent", 205, 5.0),)


def test_an_opening_that_is_read_in_a_second_counts_and_eight_tenths_of_that_are_as_long():
    second = [PrimeStarted(25, GEMMA, "agent"), PrimeEnded(26, GEMMA, "agent", OK, 1.0)]

    assert after(ours(priming=WISHES), *second, *answers(*[0.8] * 5)).priming.useless is not None
    assert after(ours(priming=WISHES), *second, *answers(*[0.79] * 5)).priming.useless is None


def test_a_model_that_nobody_is_to_ping_is_not_pinged_because_of_an_opening():
    quiet = after(
        ours(priming=WISHES, policy=replace(POLICY, pinged=False)), listed(20, *rows()), *primed(100)
    )

    assert (quiet.state, quiet.ping_at) == (State.WARM, None)


def test_an_opening_that_is_refused_after_all_is_unfit_once_with_the_last_reason_and_no_longer_read():
    refused_twice = after(
        ours(priming=WISHES),
        *primed(100),
        *primed(200, outcome=PrimeOutcome.REFUSED),
        *primed(300, outcome=PrimeOutcome.REFUSED, message="no"),
        *primed(400, "second", PrimeOutcome.REFUSED),
    )

    assert refused_twice.priming.unfit == (("agent", "no"), ("second", "no words"))
    assert refused_twice.priming.done == ()


def test_people_call_an_opening_by_its_file_without_the_mark_of_what_it_holds():
    assert label("prompts/my agent.json 9f86d081") == "prompts/my agent.json"
    assert label("agent") == "agent"


def test_what_is_let_go_is_not_primed_any_more():
    idle = replace(ours(priming=WISHES), policy=replace(POLICY, auto=True, idle=60.0), use_at=13.0)
    box = Box(idle).see(listed(100, *rows()))

    assert box.plan(100) == [Unload(GEMMA, "gemma", UnloadCause.IDLE)]
