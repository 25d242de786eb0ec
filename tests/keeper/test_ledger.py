"""Loads begun, on disk: written in time, struck out in time, and never in the way."""

import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from keepalive.core.apply import apply
from keepalive.core.facts import (
    Entry,
    Instance,
    Listed,
    ListingFailed,
    LoadEnded,
    LoadOutcome,
    LoadRemembered,
    LoadStarted,
    ModelFact,
    ModelId,
    Tier,
    Trouble,
    UnloadEnded,
    UnloadStarted,
    UpstreamFact,
)
from keepalive.core.records import Model, Policy
from keepalive.keeper.ledger import Ledger, LedgerError

GEMMA = ModelId("local", "gemma")
URLS = {"local": "http://127.0.0.1:1234", "gpu": "http://127.0.0.1:1235"}


def ledger(
    folder: Path, wall: float = 10_000.0, urls: dict[str, str] = URLS, boot: str | None = None
) -> Ledger:
    return Ledger(folder, lambda: urls, lambda: wall, lambda url: boot)


class Story:
    """One model whose facts a ledger observes."""

    def __init__(self, observer: Ledger, model: ModelId = GEMMA) -> None:
        self.observer = observer
        self.model = Model(id=model)

    def goes(self, *facts: ModelFact | UpstreamFact) -> "Story":
        for fact in facts:
            before, self.model = self.model, apply(self.model, fact)
            self.observer.observe(fact, before, self.model)
        return self


def listed(at: float, *instances: str, loading: bool | None = None) -> Listed:
    entry = Entry("gemma", instances=tuple(Instance(i) for i in instances), loading=loading)
    return Listed(at, "local", at, Tier.V1, {"gemma": entry})


def files(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.iterdir())] if folder.exists() else []


def test_a_load_is_on_disk_when_its_start_has_been_told(tmp_path: Path) -> None:
    folder = tmp_path / "state" / "keepalive"

    Story(ledger(folder)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    assert files(folder) == [
        {
            "url": "http://127.0.0.1:1234",
            "key": "gemma",
            "started": 10_000.0,
            "expected": None,
            "tells_loading": False,
            "boot": None,
        }
    ]
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("outcome", [LoadOutcome.FAILED, LoadOutcome.REFUSED])
def test_a_load_that_failed_is_struck_out(tmp_path: Path, outcome: LoadOutcome) -> None:
    story = Story(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    story.goes(LoadEnded(3.0, GEMMA, outcome, 1.0, message="no"))

    assert files(tmp_path) == []


@pytest.mark.parametrize("outcome", [LoadOutcome.OK, LoadOutcome.UNKNOWN])
def test_a_load_whose_result_is_not_listed_yet_stays_until_it_is(
    tmp_path: Path, outcome: LoadOutcome
) -> None:
    story = Story(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    story.goes(LoadEnded(3.0, GEMMA, outcome, 1.0, instance_id="gemma", message="?"), listed(4.0))
    kept = files(tmp_path)
    story.goes(listed(5.0, "gemma"))

    assert len(kept) == 1
    assert files(tmp_path) == []


def test_a_load_that_may_have_ended_with_its_server_is_kept_until_a_listing_tells(tmp_path: Path) -> None:
    story = Story(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    story.goes(LoadEnded(3.0, GEMMA, LoadOutcome.UNKNOWN, 1.0, message="cut"))
    story.goes(ListingFailed(4.0, "local", 4.0, Trouble.REFUSED, "nothing listens"))
    kept = files(tmp_path)
    story.goes(listed(5.0, "gemma"))

    assert len(kept) == 1
    assert files(tmp_path) == []


@pytest.mark.parametrize(
    ("written_in", "read_in", "is_alive"),
    [("a", "a", True), ("a", "b", False), ("a", None, True), (None, "b", True)],
)
def test_a_load_dies_with_its_machine(
    tmp_path: Path, written_in: str | None, read_in: str | None, is_alive: bool
) -> None:
    Story(ledger(tmp_path, boot=written_in)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    remembered = ledger(tmp_path, boot=read_in).recall(GEMMA, 50.0)

    assert (remembered is not None) is is_alive
    assert bool(files(tmp_path)) is is_alive


def test_a_file_of_version_1_is_read(tmp_path: Path) -> None:
    Story(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))
    (path,) = tmp_path.iterdir()
    old = json.loads(path.read_text())
    del old["boot"]
    path.write_text(json.dumps(old))

    assert ledger(tmp_path, wall=10_020.0, boot="b").recall(GEMMA, 50.0) == LoadRemembered(
        50.0, GEMMA, 30.0, None
    )


def test_that_a_listing_showed_the_load_is_written_down_while_it_goes_on(tmp_path: Path) -> None:
    story = Story(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))
    before = files(tmp_path)[0]
    story.goes(listed(4.0, loading=True))
    (after,) = files(tmp_path)

    assert (before["tells_loading"], after["tells_loading"]) == (False, True)
    assert ledger(tmp_path).recall(GEMMA, 50.0) == LoadRemembered(50.0, GEMMA, 50.0 - 2.0, None, True)


def test_somebody_elses_load_is_not_written_down(tmp_path: Path) -> None:
    Story(ledger(tmp_path)).goes(listed(1.0, loading=True))

    assert files(tmp_path) == []


def test_the_next_life_remembers_what_was_begun_when_and_how_long_it_takes(tmp_path: Path) -> None:
    story = Story(ledger(tmp_path, wall=10_000.0)).goes(listed(1.0), LoadStarted(2.0, GEMMA))
    story.goes(LoadEnded(32.0, GEMMA, LoadOutcome.OK, 30.0, instance_id="gemma"), listed(33.0, "gemma"))
    story.goes(listed(34.0, loading=False), listed(40.0), LoadStarted(41.0, GEMMA))

    remembered = ledger(tmp_path, wall=10_025.0).recall(GEMMA, at=500.0)

    assert remembered == LoadRemembered(500.0, GEMMA, 475.0, expected=30.0, tells_loading=False)


def test_what_the_next_life_remembers_it_strikes_out_when_it_is_resolved(tmp_path: Path) -> None:
    Story(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))
    second = ledger(tmp_path, wall=10_001.0)
    remembered = second.recall(GEMMA, at=500.0)
    assert remembered is not None

    story = Story(second).goes(remembered, listed(501.0))
    kept = files(tmp_path)
    story.goes(listed(502.0, "gemma"))

    assert len(kept) == 1
    assert files(tmp_path) == []
    assert ledger(tmp_path).recall(GEMMA, at=600.0) is None


def test_what_this_life_began_is_not_recalled_as_an_earlier_ones(tmp_path: Path) -> None:
    observer = ledger(tmp_path)
    Story(observer).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    assert observer.recall(GEMMA, at=3.0) is None


def test_a_clock_that_was_set_back_does_not_put_a_load_into_the_future(tmp_path: Path) -> None:
    Story(ledger(tmp_path, wall=10_000.0)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    remembered = ledger(tmp_path, wall=10_000.0 - 86_400).recall(GEMMA, at=500.0)

    assert remembered == LoadRemembered(500.0, GEMMA, 500.0, expected=None)


@pytest.mark.parametrize(
    ("urls", "model"),
    [
        ({"local": "http://10.0.0.9:1234"}, GEMMA),
        (URLS, ModelId("gpu", "gemma")),
        (URLS, ModelId("local", "Gemma")),
        ({}, GEMMA),
    ],
)
def test_another_server_under_the_same_name_or_another_key_is_another_story(
    tmp_path: Path, urls: dict[str, str], model: ModelId
) -> None:
    Story(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    assert ledger(tmp_path, urls=urls).recall(model, at=5.0) is None


GOOD = {
    "url": "http://127.0.0.1:1234",
    "key": "gemma",
    "started": 9_000.0,
    "expected": 60.0,
    "tells_loading": True,
}


def path_of_entry(folder: Path) -> Path:
    Story(ledger(folder)).goes(listed(1.0), LoadStarted(2.0, GEMMA))
    return next(folder.iterdir())


def damaged() -> Iterator[bytes]:
    whole = json.dumps(GOOD).encode()
    yield from (whole[:end] for end in range(len(whole)))
    yield from (b"\x00" * 100, os.urandom(200), b"\xff\xfe", b"[" * 60_000, b'{"a":' * 12_000, b" " * 100_000)
    yield from (b"null", b"[]", b'"text"', b"7", b"{}")
    for name, values in {
        "url": ["http://elsewhere", None, 7],
        "key": ["other", None, {}],
        "started": ["soon", None, [], 10**400],
        "expected": ["long", [], 10**400, -1, 1e300],
    }.items():
        yield from (json.dumps({**GOOD, name: value}).encode() for value in values)
    for word in (b"NaN", b"Infinity", b"-Infinity"):
        yield whole.replace(b"9000.0", word)
        yield whole.replace(b"60.0", word)


def test_an_entry_that_makes_sense_is_recalled(tmp_path: Path) -> None:
    path_of_entry(tmp_path).write_text(json.dumps(GOOD))

    remembered = ledger(tmp_path).recall(GEMMA, at=5_000.0)

    assert remembered == LoadRemembered(5_000.0, GEMMA, 4_000.0, expected=60.0, tells_loading=True)


def test_a_damaged_entry_is_as_good_as_none(tmp_path: Path) -> None:
    path = path_of_entry(tmp_path)
    for content in damaged():
        path.write_bytes(content)

        recalled = ledger(tmp_path).recall(GEMMA, at=5_000.0)

        assert recalled is None, content[:80]


def test_a_directory_in_place_of_an_entry_is_as_good_as_none(tmp_path: Path) -> None:
    path = path_of_entry(tmp_path)
    path.unlink()
    path.mkdir()

    assert ledger(tmp_path).recall(GEMMA, at=5.0) is None


def test_two_daemons_in_one_directory_do_not_trip_over_each_other(tmp_path: Path) -> None:
    first, second = Story(ledger(tmp_path)), Story(ledger(tmp_path))
    first.goes(listed(1.0), LoadStarted(2.0, GEMMA))
    second.goes(listed(1.0), LoadStarted(2.0, GEMMA))

    first.goes(LoadEnded(3.0, GEMMA, LoadOutcome.FAILED, 1.0))
    second.goes(LoadEnded(3.0, GEMMA, LoadOutcome.FAILED, 1.0))

    assert files(tmp_path) == []


def test_a_directory_that_cannot_be_written_is_said_and_leaves_no_draft(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    story = Story(ledger(tmp_path / "file")).goes(listed(1.0))

    with pytest.raises(LedgerError) as caught:
        story.goes(LoadStarted(2.0, GEMMA))

    assert str(caught.value) == (
        f"server.state_dir: loads cannot be noted in {tmp_path / 'file'} (file exists); "
        "if the daemon ends during one, the next may begin it again"
    )
    story.goes(LoadEnded(3.0, GEMMA, LoadOutcome.FAILED, 1.0))


@pytest.mark.parametrize(
    ("options", "reason"),
    [("size=4k,nr_inodes=3", "no space left on device"), ("ro", "read-only file system")],
)
def test_a_full_or_read_only_disk_is_said_in_the_same_words_each_time(
    tmp_path: Path, options: str, reason: str
) -> None:
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(tmp_path)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("a file system can be mounted by root only")
    try:
        if "size" in options:
            (tmp_path / "ballast").write_bytes(b"x" * 4096)
        said = []
        for model in (GEMMA, ModelId("gpu", "gemma")):
            story = Story(ledger(tmp_path), model)
            story.goes(Listed(1.0, model.upstream, 1.0, Tier.V1, {"gemma": Entry("gemma")}))
            with pytest.raises(LedgerError) as caught:
                story.goes(LoadStarted(2.0, model))
            said.append(str(caught.value))
        left = {path.name for path in tmp_path.iterdir()}
    finally:
        subprocess.run(["umount", "-l", str(tmp_path)], check=True)

    assert f"({reason})" in said[0]
    assert said[0] == said[1]
    assert left <= {"ballast"}


# --- what is ours, across lives -------------------------------------------------------------------


def auto(observer: Ledger) -> Story:
    story = Story(observer)
    story.model = replace(story.model, policy=Policy(auto=True))
    return story


def loads_it(story: Story, seconds: float = 12.0) -> Story:
    ended = LoadEnded(4.0, GEMMA, LoadOutcome.OK, seconds, instance_id="gemma")
    return story.goes(listed(1.0), LoadStarted(2.0, GEMMA), ended, listed(5.0, "gemma"))


def comes_back(folder: Path, wall: float, boot: str | None = None) -> Model:
    """The model of the next life after its first listing, at 101."""
    again = ledger(folder, wall, boot=boot)
    story = auto(again)
    recalled = again.recall_ours(GEMMA, 100.0)
    return story.goes(*([recalled] if recalled else []), listed(101.0, "gemma")).model


def test_what_was_loaded_on_demand_is_ours_in_the_next_life_that_begins_soon(tmp_path: Path) -> None:
    loads_it(auto(ledger(tmp_path)))

    assert ledger(tmp_path).owned() == [GEMMA]
    assert comes_back(tmp_path, 10_020.0).ours == {"gemma"}


@pytest.mark.parametrize(
    ("load_seconds", "later", "ours"),
    [(12.0, 28.0, True), (12.0, 31.0, False), (90.0, 80.0, True), (90.0, 91.0, False)],
)
def test_nobody_can_have_loaded_it_anew_in_less_time_than_that_takes(
    tmp_path: Path, load_seconds: float, later: float, ours: bool
) -> None:
    loads_it(auto(ledger(tmp_path)), load_seconds)

    assert (comes_back(tmp_path, 10_000.0 + later).ours == {"gemma"}) is ours


@pytest.mark.parametrize(("wall", "ours"), [(9_000.0, False), (9_997.0, False), (9_999.0, True)])
def test_a_clock_that_was_set_back_by_more_than_a_file_system_rounds_makes_nothing_ours(
    tmp_path: Path, wall: float, ours: bool
) -> None:
    loads_it(auto(ledger(tmp_path)))

    assert (comes_back(tmp_path, wall).ours == {"gemma"}) is ours


def test_what_an_earlier_life_loaded_stays_noted_until_a_listing_tells(tmp_path: Path) -> None:
    loads_it(auto(ledger(tmp_path)))
    again = ledger(tmp_path, 10_010.0)
    recalled = again.recall_ours(GEMMA, 100.0)
    assert recalled is not None

    auto(again).goes(recalled, ListingFailed(101.0, "local", 101.0, Trouble.TIMEOUT, "no answer"))

    assert comes_back(tmp_path, 10_020.0).ours == {"gemma"}


def test_a_model_of_which_an_earlier_life_began_a_load_is_named_too(tmp_path: Path) -> None:
    auto(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))

    assert ledger(tmp_path).owned() == [GEMMA]


def test_a_load_that_is_over_is_struck_out_though_what_is_ours_cannot_be_noted(tmp_path: Path) -> None:
    story = auto(ledger(tmp_path)).goes(listed(1.0), LoadStarted(2.0, GEMMA))
    story.model = replace(story.model, blind=True)
    (tmp_path / ledger(tmp_path)._path(GEMMA, "ours").name).mkdir()  # type: ignore[union-attr]

    with pytest.raises(LedgerError):
        story.goes(LoadEnded(4.0, GEMMA, LoadOutcome.OK, 2.0, instance_id="gemma", proved=True))

    assert list(tmp_path.glob("load-*.json")) == []


def test_a_first_listing_that_comes_too_late_proves_nothing(tmp_path: Path) -> None:
    loads_it(auto(ledger(tmp_path)))
    again = ledger(tmp_path, 10_020.0)
    recalled = again.recall_ours(GEMMA, 100.0)
    assert recalled is not None

    late = auto(again).goes(recalled, listed(recalled.until + 0.1, "gemma"))

    assert late.model.ours == frozenset()
    assert again.owned() == []


def test_each_listing_that_shows_it_makes_it_ours_for_longer(tmp_path: Path) -> None:
    folder = tmp_path
    loads_it(auto(ledger(folder)))
    story = auto(ledger(folder, 10_500.0))
    story.model = replace(story.model, ours=frozenset({"gemma"}), instances=(Instance("gemma"),))
    story.goes(listed(9.0, "gemma"))

    assert comes_back(folder, 10_520.0).ours == {"gemma"}


def test_it_is_ours_no_longer_once_it_is_gone_or_its_machine_was_started_anew(tmp_path: Path) -> None:
    story = loads_it(auto(ledger(tmp_path, boot="one")))

    assert comes_back(tmp_path, 10_001.0, boot="two").ours == frozenset()
    story.goes(UnloadStarted(6.0, GEMMA, "gemma"), UnloadEnded(7.0, GEMMA, "gemma"))
    assert list(tmp_path.iterdir()) == []


def test_what_is_always_kept_leaves_no_such_note(tmp_path: Path) -> None:
    loads_it(Story(ledger(tmp_path)))

    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["", "{", "[]", '{"url": 1}', '{"seen": "x"}'])
def test_a_note_of_ours_that_makes_no_sense_is_no_note(tmp_path: Path, text: str) -> None:
    loads_it(auto(ledger(tmp_path)))
    next(tmp_path.glob("ours-*.json")).write_text(text)

    assert ledger(tmp_path, 10_001.0).recall_ours(GEMMA, 1.0) is None
    assert ledger(tmp_path).owned() == []


@pytest.mark.parametrize(
    "wrong", [{"seen": float("inf")}, {"seen": float("nan")}, {"shortest_load": -1}, {"ids": "gemma"}]
)
def test_a_note_of_ours_is_no_note_for_one_value_that_makes_no_sense(
    tmp_path: Path, wrong: dict[str, object]
) -> None:
    loads_it(auto(ledger(tmp_path)))
    (path,) = tmp_path.glob("ours-*.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **wrong}))

    assert ledger(tmp_path, 10_001.0).recall_ours(GEMMA, 1.0) is None
    assert ledger(tmp_path).owned() == []
