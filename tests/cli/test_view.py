"""What a person sees, at the widths that terminals have."""

import html
import io
import os
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from freezegun import freeze_time
from rich.console import Console
from rich.text import Text

from keepalive.admin import words
from keepalive.cli import view
from tests.kit import PROJECT

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)


def at(seconds: float) -> str:
    return (NOW + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")


def model(key: str, state: str = "warm", **more: Any) -> dict[str, Any]:
    return {
        "key": key,
        "upstream": "local",
        "state": state,
        "since": at(-120),
        "wanted": True,
        "listed": True,
        "busy": False,
        "load": None,
        "last_load_seconds": None,
        "next_ping_at": None,
        "retry_at": None,
        "reason": None,
        **more,
    }


def upstream(name: str = "local", state: str = "up", error: str | None = None) -> dict[str, Any]:
    return {"name": name, "url": "http://127.0.0.1:1234", "state": state, "error": error}


def status(*models: dict[str, Any], upstreams: Any = (), mistakes: Any = ()) -> dict[str, Any]:
    return {
        "models": list(models),
        "upstreams": list(upstreams) or [upstream()],
        "config": {"ok": not mistakes, "mistakes": list(mistakes)},
    }


def drawn(page: dict[str, Any], width: int = 100, *, terminal: bool = True, **options: Any) -> str:
    file = io.StringIO()
    console = Console(
        file=file, width=width, force_terminal=terminal, color_system=None, highlight=False, **options
    )
    with freeze_time(NOW):
        console.print(view.table(page))
    return file.getvalue()


LOADING = model(
    "medicine-llm",
    "loading",
    since=at(-31),
    load={"elapsed_seconds": 31.2, "eta_seconds": 93.0, "attempt": 1},
)
WARM = model("small-1b", last_load_seconds=3.04, next_ping_at=at(290))
FAILED = model(
    "huge-70b",
    "backoff",
    since=at(-3),
    retry_at=at(40),
    reason="Model loading was stopped due to insufficient system resources",
)


def test_a_wide_table_has_the_reason_in_the_row() -> None:
    assert drawn(status(LOADING, WARM, FAILED), 150) == (
        "MODEL         STATE               SINCE  LAST LOAD  NEXT PING  WHY\n"
        "medicine-llm  loading ━━────────  31 s   –          –          31 s so far, about 93 s to go\n"
        "small-1b      warm                2 min  3.0 s      in 5 min\n"
        "huge-70b      backoff             3.0 s  –          –          "
        "Model loading was stopped due to insufficient system resources; tries again in 40 s\n"
    )


def test_a_narrow_table_has_the_reason_below_the_row() -> None:
    assert drawn(status(LOADING, WARM, FAILED), 80) == (
        "MODEL         STATE               SINCE  LAST LOAD  NEXT PING\n"
        "medicine-llm  loading ━━────────  31 s   –          –\n"
        "    31 s so far, about 93 s to go                                               \n"
        "small-1b      warm                2 min  3.0 s      in 5 min\n"
        "huge-70b      backoff             3.0 s  –          –\n"
        "    Model loading was stopped due to insufficient system resources; tries again \n"
        "    in 40 s                                                                     \n"
    )


def test_a_long_reason_goes_on_in_its_own_column() -> None:
    lines = drawn(status(FAILED), 100).splitlines()

    assert lines[0] == "MODEL     STATE    SINCE  LAST LOAD  NEXT PING  WHY"
    assert lines[1] == (
        "huge-70b  backoff  3.0 s  –          –          Model loading was stopped due to insufficient system"
    )
    assert lines[2].rstrip() == " " * 48 + "resources; tries again in 40 s"


def test_a_key_that_is_too_long_keeps_both_its_ends() -> None:
    long = model("lmstudio-community/qwen3-30b-a3b-instruct-2507-mlx-8bit", last_load_seconds=100.0)

    lines = drawn(status(long), 60).splitlines()

    assert lines[1] == "lmstudio-com…07-mlx-8bit  warm   2 min  100 s      –"
    assert all(len(line) <= 60 for line in lines)


@pytest.mark.parametrize("width", [20, 40, 60, 80, 100, 120, 200, 100_000])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    page = status(LOADING, WARM, FAILED, model("k" * 300, "cold", reason="because " * 50))

    lines = drawn(page, width).splitlines()

    assert max(map(len, lines)) <= width


def test_elsewhere_than_on_a_terminal_a_model_is_one_line_without_bars() -> None:
    lines = drawn(status(LOADING, FAILED), 100_000, terminal=False).splitlines()

    assert lines == [
        "MODEL         STATE    SINCE  LAST LOAD  NEXT PING  WHY",
        "medicine-llm  loading  31 s   –          –          31 s so far, about 93 s to go",
        "huge-70b      backoff  3.0 s  –          –          "
        "Model loading was stopped due to insufficient system resources; tries again in 40 s",
    ]


def test_several_upstreams_are_told_apart() -> None:
    two = status(
        model("a"),
        model("a", "unknown", upstream="gpu"),
        upstreams=[upstream(), upstream("gpu", "down", "gone")],
    )

    lines = drawn(two).splitlines()

    assert lines[0] == "gpu (http://127.0.0.1:1234) is down: gone"
    assert [line.split()[:3] for line in lines[1:]] == [
        ["MODEL", "UPSTREAM", "STATE"],
        ["a", "local", "warm"],
        ["a", "gpu", "unknown"],
    ]


def test_what_is_wrong_comes_first() -> None:
    page = status(
        WARM,
        upstreams=[upstream(state="unauthorized", error="it wants a token")],
        mistakes=["config.toml:3: x is wrong"],
    )

    assert drawn(page).splitlines()[:2] == [
        "local (http://127.0.0.1:1234) is unauthorized: it wants a token",
        "config rejected: config.toml:3: x is wrong",
    ]


def test_what_others_wrote_is_text_and_no_markup() -> None:
    page = status(model("[red]a[/red]", "cold", reason="[bold]no[/bold] [link=x]"))

    text = drawn(page, 120)

    assert "[red]a[/red]" in text
    assert "[bold]no[/bold] [link=x]" in text


def test_colours_are_for_terminals_and_no_color_ends_them(monkeypatch: pytest.MonkeyPatch) -> None:
    def page(**options: Any) -> str:
        file = io.StringIO()
        Console(file=file, width=100, **options).print(view.table(status(WARM, FAILED)))
        return file.getvalue()

    monkeypatch.setenv("TERM", "xterm-256color")
    colourful = page(force_terminal=True)
    monkeypatch.setenv("NO_COLOR", "1")
    sober = page(force_terminal=True)
    plain = page(force_terminal=False)

    assert "\x1b[32mwarm" in colourful
    assert "\x1b[31mbackoff" in colourful
    assert "\x1b[3" not in sober
    assert "\x1b" not in plain


@pytest.mark.parametrize(
    ("page", "why"),
    [
        (model("a", "warm", wanted=False), "not wanted now"),
        (model("a", "cold", wanted=False, reason="outside its window"), "outside its window"),
        (
            model("a", "loading", load={"elapsed_seconds": 0.04, "eta_seconds": None, "attempt": 1}),
            "0.0 s so far",
        ),
        (
            model("a", "loading", load={"elapsed_seconds": 300, "eta_seconds": 0.0, "attempt": 1}),
            "5 min so far, longer than usual",
        ),
        (model("a", "backoff", retry_at=at(-1), reason="no"), "no; tries again now"),
        (model("a", "cold", reason="waits", eta_seconds=41.0), "waits; about 41 s to go"),
    ],
)
def test_why_says_it_in_a_few_words(page: dict[str, Any], why: str) -> None:
    assert drawn(status(page), 200).splitlines()[1].endswith(f"  {why}")


def test_a_busy_model_says_so() -> None:
    assert "warm (busy)" in drawn(status(model("a", busy=True)))


def test_an_opening_that_was_not_read_ahead_says_why() -> None:
    reason = "agent.json: the context is too small"
    torn, well = model("a", primed={"reason": reason}), model("b", primed={"reason": None})

    assert reason in drawn(status(torn))
    assert words.lines(status(torn)) == {"a": f"a is warm; {reason}"}
    assert words.lines(status(well)) == {"b": "b is warm"}


def test_an_answer_that_has_been_silent_for_long_says_so() -> None:
    quiet, thinking = model("a", silent_seconds=40.0), model("b", silent_seconds=29.0)

    assert "silent for 40 s" in drawn(status(quiet))
    assert words.lines(status(quiet)) == {"a": "a is warm, silent for 40 s"}
    assert "silent" not in drawn(status(thinking))
    assert words.lines(status(thinking)) == {"b": "b is warm"}


def test_in_plain_text_each_model_is_a_line_under_a_name_of_its_own() -> None:
    one = words.lines(status(LOADING, FAILED, WARM))
    two = words.lines(status(model("a"), model("a", upstream="gpu"), upstreams=[upstream(), upstream("gpu")]))

    assert one == {
        "medicine-llm": "medicine-llm is loading, 31 s so far, about 93 s to go",
        "huge-70b": "huge-70b is backoff: Model loading was stopped due to insufficient system resources",
        "small-1b": "small-1b is warm",
    }
    assert two == {"a on local": "a on local is warm", "a on gpu": "a on gpu is warm"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"),
        (9.94, "9.9 s"),
        (9.97, "10 s"),
        (119.4, "119 s"),
        (120, "2 min"),
        (7199, "120 min"),
        (7200, "2 h"),
        (172_799, "48 h"),
        (172_800, "2 d"),
    ],
)
def test_a_span_is_as_short_as_people_say_it(seconds: float, text: str) -> None:
    assert words.span(seconds) == text


@pytest.mark.parametrize(
    ("page", "keys", "code"),
    [
        (status(), [], 0),
        (status(model("a"), model("b")), [], 0),
        (status(model("a"), model("b", "loading")), [], 1),
        (status(model("a"), model("b", "cold")), [], 1),
        (status(model("a", "unknown")), [], 1),
        (status(model("a"), model("b", "backoff")), [], 2),
        (status(model("a", "loading"), model("b", "backoff")), [], 2),
        (status(model("a", "cold", listed=False)), [], 2),
        (status(model("a", "unknown"), upstreams=[upstream(state="down")]), [], 2),
        (status(model("a", "unknown"), upstreams=[upstream(state="unauthorized")]), [], 2),
        (status(model("a", "cold", wanted=False)), [], 0),
        (status(model("a", "backoff", wanted=False)), [], 0),
        (status(model("a"), model("b", "backoff")), ["a"], 0),
        (status(model("a"), model("b", "loading")), ["a", "b"], 1),
        (status(model("a", "cold", wanted=False)), ["a"], 1),
        (status(model("a"), upstreams=[upstream(), upstream("gpu", "down")]), [], 0),
    ],
)
def test_the_exit_code_is_that_of_the_worst_model_that_was_asked_for(
    page: dict[str, Any], keys: list[str], code: int
) -> None:
    assert view.exit_code(page, keys) == code


def test_keys_that_nobody_keeps_are_found() -> None:
    assert view.unknown_keys(status(model("a")), ["a", "b", "c"]) == ["b", "c"]


def test_memory_says_who_has_it_who_goes_next_and_who_waits() -> None:
    def one(key: str, state: str, **more: Any) -> dict[str, Any]:
        there = {
            "instances": int(state == "warm"),
            "ours": True,
            "memory_bytes": 9_000_000_000,
            "keep": "auto",
        }
        return model(key, state, **{**there, "wanted": False, **more})

    known = {
        "budget_bytes": 40 * 10**9,
        "used_bytes": 33 * 10**9,
        "source": "config",
        "strangers": [{"key": "x", "bytes": 6 * 10**9}, {"key": "y", "bytes": None}],
        "next_to_go": ["b", "a"],
        "waiting": ["c"],
    }
    models = [one("a", "warm"), one("b", "warm"), one("f", "warm", ours=False), one("c", "cold")]

    page = drawn(status(*models, upstreams=[{**upstream(), "memory": known}]), 160)

    assert page.splitlines()[0] == (
        "memory of local: 33.0 of 40.0 GB: a 9.0, b 9.0, f 9.0 (not ours), x 6.0 (not ours), y ? (not ours); "
        "b goes next; c waits for room"
    )
    assert "on demand" in page
    assert "not wanted" not in page
    known.update(budget_bytes=None, next_to_go=[], waiting=["c", "d"], strangers=[])
    assert words.memory({**upstream(), "memory": known}, models[:1]) == "33.0 GB: a 9.0; c, d wait for room"
    known.update(places=2, waiting=[])
    assert (
        words.memory({**upstream(), "memory": known}, models[:1])
        == "33.0 GB: a 9.0; no more than 2 at a time"
    )
    assert words.memory({**upstream(), "memory": None}, models) is None
    assert words.memory(upstream(), models) is None


# --- the picture in the documentation -----------------------------------------------------------------

PICTURE = PROJECT / "docs/status.svg"


def picture(page: dict[str, Any]) -> str:
    """What is shown on a terminal, as a picture that asks nobody for its letters."""
    console = Console(
        file=io.StringIO(),
        width=100,
        force_terminal=True,
        color_system="truecolor",
        record=True,
        highlight=False,
    )
    with freeze_time(NOW):
        console.print(Text("$ keepalive status", style="bold"), view.table(page))
    drawn = console.export_svg(title="keepalive status", unique_id="status")
    drawn = re.sub(r"<!--.*?-->\s*|@font-face \{.*?\}\s*", "", drawn, flags=re.DOTALL)
    return drawn.replace("Fira Code, monospace", "ui-monospace, Menlo, Consolas, monospace")


def said(svg: str) -> list[str]:
    words = " ".join(re.findall(r"<text[^>]*>(.*?)</text>", svg))
    return html.unescape(words).replace("\xa0", " ").split()


def test_the_picture_in_the_documentation_is_what_is_drawn() -> None:
    """`KEEPALIVE_SCREENSHOTS=1` draws it anew (`make pictures`)."""
    drawn = picture(status(LOADING, WARM))
    if os.environ.get("KEEPALIVE_SCREENSHOTS"):
        PICTURE.write_text(drawn)

    assert said(PICTURE.read_text()) == said(drawn)
    assert "http" not in PICTURE.read_text().replace("http://www.w3.org/", "")


def test_of_several_daemons_it_says_who_acts_and_of_what_was_last_seen_that_it_is_past():
    cluster = {
        "name": "ward",
        "instance": "a",
        "engine": {"up": True, "error": None},
        "members": [{"instance": "a"}, {"instance": "b"}],
        "holders": {"local": "b"},
        "differences": [],
    }
    away = {**cluster, "engine": {"up": False, "error": "etcd does not answer"}}
    up, down = ({**status(model("gemma")), "cluster": one} for one in (cluster, away))

    assert drawn(up).splitlines()[0].rstrip() == "cluster ward: a (this one); b acts on local"
    said = [line.rstrip() for line in drawn(down).splitlines()[:2]]
    assert said == [
        "cluster ward: a (this one); b acted on local",
        "nothing is loaded or unloaded, what is warm is served: etcd does not answer",
    ]
    members = [{"instance": "a", "version": "1.1.0"}, {"instance": "b", "version": "1.0.0"}]
    upgraded = {**status(model("gemma")), "cluster": {**cluster, "members": members}}
    assert drawn(upgraded).startswith("cluster ward: a (this one) 1.1.0; b 1.0.0 acts on local")
    assert words.summary(up) == "1/1 models warm"
    assert words.summary(down) == f"1/1 models warm; {said[1]}"
