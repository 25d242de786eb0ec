"""Windows against a slow reference that looks at every single minute."""

from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from functools import cache
from itertools import pairwise
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive.core.window import Window, parse

LISBON = ZoneInfo("Europe/Lisbon")
ZONES = ("Europe/Lisbon", "Australia/Lord_Howe", "Pacific/Chatham", "America/St_Johns")
MINUTE = timedelta(minutes=1)
MONDAY, TUESDAY, WEDNESDAY, THURSDAY, FRIDAY, SATURDAY, SUNDAY = range(7)

# What a person means by a text, spelled out: (days, first minute, minutes that it lasts).
MEANT: dict[str, list[tuple[tuple[int, ...], int, int]]] = {
    "Mon-Fri 08:00-19:00": [((MONDAY, TUESDAY, WEDNESDAY, THURSDAY, FRIDAY), 8 * 60, 11 * 60)],
    "Sun-Thu 22:00-06:00": [((SUNDAY, MONDAY, TUESDAY, WEDNESDAY, THURSDAY), 22 * 60, 8 * 60)],
    "01:15-02:45": [(tuple(range(7)), 75, 90)],
    "Sat 23:30-01:30; Sun 02:00-02:30": [((SATURDAY,), 23 * 60 + 30, 120), ((SUNDAY,), 120, 30)],
    "22:00-06:00": [(tuple(range(7)), 22 * 60, 8 * 60)],
}


def meant(text: str, local: datetime) -> bool:
    """The slow reference: does a span that starts today or started yesterday reach this wall-clock minute?"""
    minute = local.hour * 60 + local.minute
    for days, start, length in MEANT[text]:
        if local.weekday() in days and start <= minute < start + length:
            return True
        if (local.weekday() - 1) % 7 in days and start <= minute + 24 * 60 < start + length:
            return True
    return False


@cache
def transitions(name: str) -> tuple[datetime, ...]:
    """The instants from 2026 to 2036 at which the zone changes its offset, by looking at each day."""
    zone = ZoneInfo(name)
    found = []
    for day in range((date(2037, 1, 1) - date(2026, 1, 1)).days):
        moment = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(days=day)
        before = moment.astimezone(zone).utcoffset()
        if before != (moment + timedelta(days=1)).astimezone(zone).utcoffset():
            minutes = (moment + offset * MINUTE for offset in range(1441))
            found.append(next(minute for minute in minutes if minute.astimezone(zone).utcoffset() != before))
    return tuple(found)


def at(text: str, zone: tzinfo = LISBON) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=zone)


# --- What the text means ---


@pytest.mark.parametrize(
    ("text", "minutes"),
    [
        ("Mon 08:00-19:00", [(480, 1140)]),
        ("Mon-Tue 8:00-9:30", [(480, 570), (1920, 2010)]),
        ("monday - TUESDAY 08:00 - 09:30", [(480, 570), (1920, 2010)]),
        ("Mon–Tue 08:00–09:30", [(480, 570), (1920, 2010)]),
        ("Sun-Mon 00:00-24:00", [(0, 1440), (8640, 10080)]),
        ("Fri-Mon 12:00-13:00", [(720, 780), (6480, 6540), (7920, 7980), (9360, 9420)]),
        ("Mon 08:00-12:00, 13:00-19:00", [(480, 720), (780, 1140)]),
        ("Mon, Wed 08:00-12:00, 13:00-14:00", [(480, 720), (780, 840), (3360, 3600), (3660, 3720)]),
        ("Mon 08:00-12:00; Sat 09:00-12:00", [(480, 720), (7740, 7920)]),
        ("Mon 22:00-06:00", [(1320, 1800)]),
        ("Sun 22:00-06:00", [(0, 360), (9960, 10080)]),
        ("Mon 22:00-00:00", [(1320, 1440)]),
        ("Mon 08:00-12:00, 11:00-13:00, 13:00-14:00", [(480, 840)]),
        ("00:00-24:00", [(0, 10080)]),
        ("00:00-12:00, 12:00-24:00", [(0, 10080)]),
    ],
)
def test_a_window_is_the_minutes_of_the_week_that_a_person_means(
    text: str, minutes: list[tuple[int, int]]
) -> None:
    window = parse(text)

    assert list(window.minutes) == minutes


def test_no_days_means_every_day_and_a_semicolon_starts_anew() -> None:
    window = parse("Mon 08:00-09:00; 12:00-13:00")

    assert window == parse("Mon 08:00-09:00; Mon-Sun 12:00-13:00")


def test_a_window_keeps_the_text_it_was_written_as() -> None:
    window = parse("  Mon-Fri   08:00-19:00 ")

    assert str(window) == "Mon-Fri 08:00-19:00"


ANY_DAY = 'write "Mon", "Tue", "Wed", "Thu", "Fri", "Sat" or "Sun"'
QS = "q" * 50


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", 'a span is missing; write one such as "Mon-Fri 08:00-19:00"'),
        ("Mon 08:00-09:00;", 'a span is missing; write one such as "Mon-Fri 08:00-19:00"'),
        ("Mon 08:00-09:00, ", 'a span is missing; write one such as "Mon-Fri 08:00-19:00"'),
        ("Mon-Fri", '"Mon-Fri" has no times; write "Mon-Fri 00:00-24:00"'),
        ("Mon 08:00-09:00, Sat", '"Sat" has no times; write "Sat 00:00-24:00"'),
        ("Mon-Fry 08:00-19:00", '"Fry" is no day; write "Fri"'),
        ("Wendesday 08:00-19:00", '"Wendesday" is no day; write "Wed"'),
        ("Thurs 08:00-19:00", '"Thurs" is no day; write "Thu"'),
        ("M 08:00-19:00", '"M" is no day; write "Mon"'),
        ("Weekdays 08:00-19:00", '"Weekdays" is no day; write "Mon-Fri"'),
        ("weekend 08:00-19:00", '"weekend" is no day; write "Sat-Sun"'),
        (
            "daily 08:00-19:00",
            '"daily" is no day; leave it out, because without days every day is meant',
        ),
        ("lun-ven 08:00-19:00", f'"lun" is no day; {ANY_DAY}'),
        ("M\0n 08:00-19:00", '"M?n" is no day; write "Mon"'),
        (f"{QS[:40]} 08:00-19:00", f'"{QS[:40]}" is no day; {ANY_DAY}'),
        (f"{QS[:41]} 08:00-19:00", f'"{QS[:39]}…" is no day; {ANY_DAY}'),
        ("xyz 08:00-19:00", '"xyz" is no day; write "Mon", "Tue", "Wed", "Thu", "Fri", "Sat" or "Sun"'),
        ("Mon- 08:00-19:00", '"" is no day; write "Mon", "Tue", "Wed", "Thu", "Fri", "Sat" or "Sun"'),
        ("Mon 8-19", '"Mon 8-19" has no time span; write one such as "Mon-Fri 08:00-19:00"'),
        ("Mon 08:00", '"Mon 08:00" has no time span; write one such as "Mon-Fri 08:00-19:00"'),
        ("Mon 08:00-25:00", '"25:00" is no time of day; write one from "00:00" to "24:00"'),
        ("Mon 08:00-24:01", '"24:01" is no time of day; write one from "00:00" to "24:00"'),
        ("Mon 08:60-09:00", '"08:60" is no time of day; write one from "00:00" to "24:00"'),
        ("Mon 24:00-06:00", '24:00 can only end a span; write "00:00" to start one'),
        (
            "Mon 08:00-08:00",
            '"08:00-08:00" has no length, so it is never open; write "00:00-24:00" for a whole day',
        ),
        (
            "08:00-12:00 13:00-19:00",
            '"13:00-19:00" follows a time; write days before the time and "," between spans',
        ),
        ("Mon 08:00-09:00, " * 100, "has 1700 characters; write at most 1000"),
        ("08:00-19:00 Mon", '"Mon" follows a time; write days before the time and "," between spans'),
    ],
)
def test_a_window_that_cannot_be_read_is_told_with_what_to_write(text: str, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        parse(text)

    assert str(raised.value) == message


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        ("weekday weekdays workday workdays working_days business_days", 'write "Mon-Fri"'),
        ("weekend weekends", 'write "Sat-Sun"'),
        ("daily everyday every_day all_days", "leave it out, because without days every day is meant"),
    ],
)
def test_what_people_write_for_several_days_is_known(words: str, advice: str) -> None:
    said = {}
    for word in words.replace("_", "-").split():
        with pytest.raises(ValueError) as raised:
            parse(f"{word.replace('-', ' ')} 08:00-19:00")
        said[word] = str(raised.value)

    assert said == {word: f'"{word.replace("-", " ")}" is no day; {advice}' for word in said}


def test_a_window_may_be_as_long_as_a_thousand_characters() -> None:
    longest = "Mon 08:00-09:00" + " " * 985

    assert parse(longest) == parse("Mon 08:00-09:00")
    with pytest.raises(ValueError, match=r"^has 1001 characters; write at most 1000$"):
        parse(longest + " ")


def test_the_last_minute_of_the_week_does_not_reach_into_the_first() -> None:
    assert parse("Sun 00:00-24:00").minutes == ((8640, 10080),)


# --- When it is open ---


@pytest.mark.parametrize(
    ("moment", "inside"),
    [
        ("2026-11-22T22:00", True),
        ("2026-11-22T21:59:59", False),
        ("2026-11-23T05:59:59", True),
        ("2026-11-23T06:00", False),
        ("2026-11-27T05:59", True),
        ("2026-11-27T22:00", False),
        ("2026-11-28T03:00", False),
    ],
)
def test_a_span_over_midnight_belongs_to_the_day_on_which_it_starts(moment: str, inside: bool) -> None:
    window = parse("Sun-Thu 22:00-06:00")

    assert window.contains(at(moment), LISBON) is inside


def test_the_repeated_hour_is_inside_twice() -> None:
    window = parse("Sun 01:15-01:45")
    first, second = datetime(2026, 10, 25, 0, 30, tzinfo=UTC), datetime(2026, 10, 25, 1, 30, tzinfo=UTC)

    assert first.astimezone(LISBON).time() == second.astimezone(LISBON).time()
    assert window.contains(first, LISBON)
    assert window.contains(second, LISBON)
    assert window.next_change(first, LISBON) == datetime(2026, 10, 25, 0, 45, tzinfo=UTC)
    assert window.next_change(first + timedelta(minutes=15), LISBON) == datetime(
        2026, 10, 25, 1, 15, tzinfo=UTC
    )


def test_a_span_that_runs_through_the_repeated_hour_does_not_close_in_it() -> None:
    window = parse("Sun 01:00-02:00")
    opened = datetime(2026, 10, 25, 0, 0, tzinfo=UTC)

    assert window.next_change(opened, LISBON) == datetime(2026, 10, 25, 2, 0, tzinfo=UTC)


def test_a_span_in_the_skipped_hour_opens_a_week_later() -> None:
    window = parse("Sun 01:15-01:45")
    closed = at("2026-03-22T01:45")

    assert window.next_change(closed, LISBON) == at("2026-04-05T01:15")


def test_a_span_that_starts_in_the_skipped_hour_opens_when_the_clock_has_jumped() -> None:
    window = parse("Sun 01:30-03:00")
    jump = datetime(2026, 3, 29, 1, 0, tzinfo=UTC)

    assert window.next_change(at("2026-03-29T00:00"), LISBON) == jump
    assert window.next_change(jump - timedelta(seconds=1), LISBON) == jump


def test_an_edge_soon_after_the_week_begins_is_met_to_the_second_from_the_week_before() -> None:
    window = parse("Mon 02:00-03:00")

    assert window.next_change(at("2026-11-22T23:00"), LISBON) == at("2026-11-23T02:00")


def test_the_29th_of_february_is_a_day_like_others() -> None:
    window = parse("Tue 08:00-19:00")

    assert window.contains(at("2028-02-29T12:00"), LISBON)
    assert window.next_change(at("2028-02-28T12:00"), LISBON) == at("2028-02-29T08:00")
    assert window.next_change(at("2028-02-29T12:00"), LISBON) == at("2028-02-29T19:00")


def test_a_window_that_is_always_open_never_changes() -> None:
    window = parse("Mon-Sun 00:00-24:00")

    assert window.always
    assert window.next_change(at("2026-11-22T12:00"), LISBON) is None


def test_the_next_change_is_told_in_utc() -> None:
    found = parse("08:00-19:00").next_change(at("2026-07-01T21:00"), LISBON)

    assert found is not None
    assert found.isoformat() == "2026-07-02T07:00:00+00:00"


def test_seconds_do_not_blur_an_edge() -> None:
    window = parse("08:00-19:00")
    just_before = at("2026-11-23T07:59:59.999999")

    assert not window.contains(just_before, LISBON)
    assert window.next_change(just_before, LISBON) == at("2026-11-23T08:00")
    assert window.next_change(at("2026-11-23T08:00"), LISBON) == at("2026-11-23T19:00")


def test_a_moment_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError) as raised:
        parse("08:00-19:00").contains(datetime(2026, 11, 22), LISBON)

    assert str(raised.value) == "a window needs a moment that knows its zone"


# --- Against the reference ---


def test_the_zones_change_their_clocks_as_the_tests_below_assume() -> None:
    changes = {name: len(transitions(name)) for name in ZONES}

    assert changes == dict.fromkeys(ZONES, 22)


@pytest.mark.parametrize("name", ZONES)
@pytest.mark.parametrize("text", MEANT)
def test_every_minute_around_every_clock_change_until_2036_is_as_the_reference_says(
    name: str, text: str
) -> None:
    zone, window = ZoneInfo(name), parse(text)
    wrong = []
    for transition in transitions(name):
        # Four hours around the change minute by minute; the day around it at every quarter of an hour.
        near = [transition + offset * MINUTE for offset in range(-120, 120)]
        days = [transition + offset * 15 * MINUTE for offset in range(-48, 48)]
        wrong += [
            moment
            for moment in near + days
            if window.contains(moment, zone) != meant(text, moment.astimezone(zone))
        ]

    assert wrong == []


@pytest.mark.parametrize("text", MEANT)
def test_every_minute_of_a_week_with_a_clock_change_is_as_the_reference_says(text: str) -> None:
    wrong = []
    for name in ZONES:
        zone, window = ZoneInfo(name), parse(text)
        for transition in transitions(name)[:1]:
            moments = [transition + offset * MINUTE for offset in range(-4 * 1440, 3 * 1440)]
            wrong += [m for m in moments if window.contains(m, zone) != meant(text, m.astimezone(zone))]

    assert wrong == []


@pytest.mark.parametrize("name", ZONES)
def test_every_day_from_2026_to_2036_is_as_the_reference_says(name: str) -> None:
    zone, window, text = ZoneInfo(name), parse("Sun-Thu 22:00-06:00"), "Sun-Thu 22:00-06:00"
    start = datetime(2026, 1, 1, tzinfo=UTC)
    days = (date(2037, 1, 1) - date(2026, 1, 1)).days
    # Four times a day, by a step with no divisor in common with a day, so that every minute of it is met.
    moments = (start + offset * 389 * MINUTE for offset in range(days * 1440 // 389))
    wrong = [m for m in moments if window.contains(m, zone) != meant(text, m.astimezone(zone))]

    assert wrong == []


@pytest.mark.parametrize("name", ZONES)
@pytest.mark.parametrize("text", MEANT)
def test_the_next_change_around_a_clock_change_is_the_first_minute_that_differs(name: str, text: str) -> None:
    zone, window = ZoneInfo(name), parse(text)
    wrong = []
    # The nights of three years; the others fall on the same weekdays, and are looked at minute by minute above.
    for transition in (*transitions(name)[:4], *transitions(name)[-2:]):
        now = start = transition - timedelta(hours=14)
        # Walk from change to change over the night, and walk it again a minute at a time.
        walked = []
        while (following := window.next_change(now, zone)) and following < transition + timedelta(hours=14):
            now = following.astimezone(UTC)
            walked.append(now)
        minutes = [start + offset * MINUTE for offset in range(28 * 60)]
        states = [meant(text, minute.astimezone(zone)) for minute in minutes]
        seen = [
            minute
            for minute, (was, now_is) in zip(minutes[1:], pairwise(states), strict=True)
            if was != now_is
        ]
        wrong += [] if walked == seen else [(transition, walked, seen)]

    assert wrong == []


clock = st.integers(0, 24 * 60 - 1).map(lambda minute: f"{minute // 60:02}:{minute % 60:02}")
spans = st.tuples(
    st.sampled_from(["", "Mon ", "Fri-Mon ", "Sun ", "Tue-Sat ", "Sat, Sun "]), clock, clock
).filter(lambda span: span[1] != span[2])
texts = st.lists(spans, min_size=1, max_size=4).map(
    lambda found: "; ".join(f"{days}{start}-{end}" for days, start, end in found)
)
moments = st.datetimes(datetime(2026, 1, 1), datetime(2036, 12, 31), timezones=st.just(UTC))
zones = st.sampled_from([*map(ZoneInfo, ZONES), UTC, timezone(timedelta(hours=5, minutes=45))])
near_changes = st.builds(
    lambda name, which, minutes: transitions(name)[which] + minutes * MINUTE,
    st.sampled_from(ZONES),
    st.integers(0, 21),
    st.integers(-24 * 60, 24 * 60),
)


@settings(max_examples=60, deadline=None)
@given(texts, moments | near_changes, zones)
def test_nothing_changes_before_the_next_change_and_everything_at_it(
    text: str, moment: datetime, zone: tzinfo
) -> None:
    window = parse(text)
    inside = window.contains(moment, zone)

    found = window.next_change(moment, zone)

    if found is None:
        assert window.always
        return
    assert window.contains(found, zone) is not inside
    assert found > moment
    first_minute = moment.replace(second=0, microsecond=0) + MINUTE
    minutes = int((found - first_minute) / MINUTE)
    assert all(window.contains(first_minute + offset * MINUTE, zone) is inside for offset in range(minutes))


@given(texts)
def test_a_window_written_again_is_the_same_window(text: str) -> None:
    window = parse(text)

    assert parse(str(window)) == window
    assert parse(f" {text.upper()} ") == window


@given(st.text(max_size=40) | st.text("MonFri0123456789:-,; ", max_size=40))
def test_any_text_is_a_window_or_a_value_error(text: str) -> None:
    try:
        found: Window | str = parse(text)
    except ValueError as error:
        found = str(error)

    assert found
    assert "\n" not in str(found)
