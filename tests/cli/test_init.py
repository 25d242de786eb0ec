"""The first command that somebody types: what is found, what is written, and a sentence for everything else."""

import os
import signal
import socket
import stat
from pathlib import Path

import pytest
from typer.testing import CliRunner

from keepalive import config
from keepalive.cli import app as cli
from keepalive.cli import init
from keepalive.cli.init import Found, InitError
from keepalive.config import Upstream
from keepalive.core.facts import Entry, Instance, Tier
from keepalive.lmstudio import wire
from keepalive.simulator.models import SimModel
from tests.kit.live import KEEPALIVE, Running, SimulatorProcess, command, ending, reserved_port, simulator
from tests.kit.terminal import Terminal

BIG = Entry(
    "acme/big-13b", size_bytes=8_540_000_000, instances=(Instance("acme/big-13b", 8192),), context_max=32768
)
SMALL = Entry("acme/small-1b", size_bytes=1_280_000_000, context_max=40960, variants=("acme/small-1b@q8_0",))
WORDS = Entry("text-embedding-tiny", "embedding", 84_106_624, context_max=2048)


def found(*entries: Entry, tier: Tier = Tier.V1, **upstream: str) -> Found:
    server = Upstream.model_validate({"url": "http://127.0.0.1:1234", **upstream})
    return init._found(server, init.Listing(tier, wire.by_key(entries)))


def typed(*answers: str) -> tuple[list[str], tuple[str, ...]]:
    """What is said to somebody who answers so, and what is chosen in the end."""
    said: list[str] = []
    left = list(answers)
    chosen = init.asked(found(SMALL, WORDS, BIG), lambda _: left.pop(0), said.append, 80)
    assert not left
    return said, chosen


async def tried(
    url: str, *, patience: float = init.PATIENCE, **environ: str
) -> tuple[Found | str, list[str]]:
    """What is found at that address, or the words that are said instead, and those meanwhile."""
    said: list[str] = []
    try:
        server = init.upstream_at(url, None, None)
        return await init.find([server], environ, said.append, patience=patience), said
    except InitError as error:
        return str(error), said


# --- what is there ------------------------------------------------------------------------------------


async def test_a_listing_is_shown_with_what_is_in_memory_first() -> None:
    models = SimModel("a/cold", size_bytes=900_000_000), SimModel("b/warm", size_bytes=2_500_000_000)
    async with simulator(*models) as server:
        server.studio.load("b/warm", seconds=0)
        there, _ = await tried(server.url)

    assert isinstance(there, Found)
    assert [entry.key for entry in there.entries] == ["b/warm", "a/cold"]
    assert init.about_model(there.entries[0]) == "2.5 GB, loaded, context 4096 of 32768"
    assert init.about_model(there.entries[1]) == "900 MB, context up to 32768"


@pytest.mark.clock_jumps
async def test_a_server_that_answers_after_half_a_minute_is_waited_for_and_one_is_told() -> None:
    async with simulator(SimModel("a"), list_delay_seconds=30.0) as server:
        there, said = await tried(server.url)

    assert isinstance(there, Found)
    assert said == [f"{server.url} is slow to answer; waiting for it, Ctrl-C ends that."]


@pytest.mark.clock_jumps
async def test_a_server_that_never_answers_is_given_up() -> None:
    async with simulator(SimModel("a"), list_reply="hang") as server:
        there, _ = await tried(server.url)

    assert str(there).startswith(f"{server.url} did not answer within 120 s; is LM Studio stuck?\n")


async def test_what_is_no_model_server_is_called_so() -> None:
    async with simulator(list_reply="other_shape") as server:
        there, _ = await tried(server.url)

    assert "listed" in str(there) or "without a list" in str(there)
    assert "keepalive init --url http://HOST:PORT" in str(there)


async def test_where_nothing_listens_one_is_told_how_to_start_it() -> None:
    with reserved_port() as port:
        there, _ = await tried(f"127.0.0.1:{port}")

    assert str(there).startswith(f"nothing listens at http://127.0.0.1:{port}\nStart LM Studio's server (its")
    assert "lms server start" in str(there)


async def test_a_server_without_models_says_how_to_get_one() -> None:
    async with simulator() as server:
        for model in list(server.studio.memory.models):
            del server.studio.memory.models[model]
        there, _ = await tried(server.url)

    assert str(there).startswith(f"LM Studio (0.4 or newer) at {server.url} has no models yet. Download one")


async def test_a_token_that_is_needed_is_asked_for_by_the_name_of_its_variable() -> None:
    async with simulator(SimModel("a"), auth_token="sk-lm-secret") as server:
        without, _ = await tried(server.url)
        wrong, _ = await tried(server.url, LM_API_TOKEN="nonsense")
        right, _ = await tried(server.url, LM_API_TOKEN="sk-lm-secret")

    assert "wants an API token" in str(without)
    assert "LM_API_TOKEN" in str(without)
    assert "does not accept" in str(wrong) or "wants an API token" in str(wrong)
    assert isinstance(right, Found)
    assert 'api_token_env = "LM_API_TOKEN"' in init.document(right, ["a"])
    assert "secret" not in init.document(right, ["a"])


def test_the_first_that_answers_is_taken_also_where_lm_studio_noted_its_port(tmp_path: Path) -> None:
    noted = tmp_path / "elsewhere/.internal/http-server-config.json"
    noted.parent.mkdir(parents=True)
    noted.write_text('{"port":41234,"networkInterface":"127.0.0.1"}')
    (tmp_path / ".lmstudio-home-pointer").write_text(f"{tmp_path / 'elsewhere'}\n")

    assert init.usual_urls(tmp_path) == ["http://127.0.0.1:1234", "http://127.0.0.1:41234"]
    noted.write_text('{"port":"nonsense"')
    assert init.usual_urls(tmp_path) == ["http://127.0.0.1:1234"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("http://127.0.0.1:1234/v1", 'write "http://127.0.0.1:1234"'),
        ("http://127.0.0.1:1235", "is server.listen, so keepalive would ask itself"),
        ("http://user:word@host:1", "holds credentials"),
        ("what is this", "is not scheme, host and port"),
    ],
)
def test_an_address_that_cannot_be_meant_is_told_so(url: str, told: str) -> None:
    with pytest.raises(InitError) as caught:
        init.upstream_at(url, None, None)

    assert str(caught.value).startswith("--url: ")
    assert told in str(caught.value)


def test_an_address_may_leave_out_its_scheme() -> None:
    assert init.upstream_at("box.local:1234", None, None).url == "http://box.local:1234"


# --- which of it is meant -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        ([""], ["acme/big-13b"]),
        (["2"], ["acme/small-1b"]),
        (["2, 1"], ["acme/small-1b", "acme/big-13b"]),
        (["1-2 2"], ["acme/big-13b", "acme/small-1b"]),
        (["ACME/SMALL-1B"], ["acme/small-1b"]),
        (["tiny"], ["text-embedding-tiny"]),
        (["acme", "1"], ["acme/big-13b"]),
        (["0", "4", "3-1", "1,x", "3"], ["text-embedding-tiny"]),
    ],
)
def test_one_chooses_by_number_by_name_or_by_part_of_a_name(answers: list[str], chosen: list[str]) -> None:
    assert list(typed(*answers)[1]) == chosen


def test_part_of_a_name_shows_fewer_with_the_numbers_that_they_had() -> None:
    said, _ = typed("small-1b no", "acme", "2")

    assert said[1] == "There is no 'small-1b no' among them."
    assert said[2].startswith("Of these 3 models 2 have that in their name:\n")
    assert "2  acme/small-1b  1.3 GB, context up to 40960" in said[2]
    assert "text-embedding-tiny" not in said[2]


def test_five_hundred_models_are_a_screen_and_a_file_of_bounded_length() -> None:
    many = found(*[Entry(f"acme/model-{n}", context_max=4096) for n in range(500)])
    said: list[str] = []
    chosen = init.asked(many, lambda _: "499", said.append, 80)
    text = init.document(many, chosen)

    assert len(said[0].splitlines()) < 40
    assert "… and 470 more: a part of a name shows fewer" in said[0]
    assert "# … and 479 more: `lms ls` shows them all." in text
    assert len(text.splitlines()) < 80


def test_forty_columns_are_enough() -> None:
    rows = init._rows(found(BIG, SMALL), found(BIG, SMALL).entries, 40)

    assert max(map(len, rows)) <= 40
    assert "1  acme/big-13b" in rows
    assert "   8.5 GB, loaded, context 8192 of 32768"[:40].strip() in " ".join(rows)


def test_names_on_the_command_line_are_those_of_lm_studio_in_any_letter_case() -> None:
    there = found(SMALL, BIG)

    assert init.named(there, ["Acme/Big-13B", "acme/small-1b@q8_0", "acme/big-13b"]) == (
        "acme/big-13b",
        "acme/small-1b@q8_0",
    )
    with pytest.raises(InitError, match=r"lists no big-13b; it lists acme/big-13b"):
        init.named(there, ["big-13b"])


@pytest.mark.parametrize(
    ("tier", "why"), [(Tier.V1, "no model is loaded now"), (Tier.OPENAI, "does not show")]
)
def test_where_nobody_can_be_asked_and_nothing_is_loaded_names_are_asked_for(tier: Tier, why: str) -> None:
    with pytest.raises(InitError, match=why) as caught:
        init.unasked(found(SMALL, tier=tier))

    assert "--model KEY, among: acme/small-1b" in str(caught.value)


# --- the file -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tier", list(Tier))
def test_what_is_written_is_a_good_config_that_says_what_was_found(tier: Tier) -> None:
    there = found(BIG, SMALL, WORDS, tier=tier)
    text = init.document(there, [BIG.key, WORDS.key])
    kept = config.parse(text, "config.toml", {})

    assert [(model.key, model.context_length) for model in kept.models] == [
        (BIG.key, None if tier is Tier.LLAMA else 8192),  # what has no effect there is not written
        (WORDS.key, None),
    ]
    assert "# 8.5 GB, loaded, context 8192 of 32768\n[[models]]" in text
    assert '#[[models]]  # 1.3 GB, context up to 40960\n#key = "acme/small-1b"' in text
    assert max(map(len, text.splitlines())) <= 120
    assert text.splitlines()[0].startswith("# Written by `keepalive init` for ")
    assert (" for a server" in text) is (tier is Tier.OPENAI)


def test_what_is_commented_out_is_good_where_it_is_taken_in() -> None:
    text = init.document(found(BIG, SMALL, WORDS), [BIG.key])
    opened = [
        line[1:] if line.startswith("#") and line[1:2] not in (" ", "") else line
        for line in text.splitlines()
    ]
    kept = config.parse("\n".join(opened), "config.toml", {})

    assert [model.key for model in kept.models] == [BIG.key, SMALL.key, WORDS.key]


def test_names_with_quotes_are_written_as_they_are_and_those_with_controls_are_not_offered() -> None:
    odd = Entry('a"b\\c é')
    there = found(odd, Entry("evil\x1b[2J"), Entry("line\nbreak"))

    assert [entry.key for entry in there.entries] == [odd.key]
    assert config.parse(init.document(there, [odd.key]), "x", {}).models[0].key == odd.key


def test_a_file_that_is_there_stays_unless_told(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("mine")
    path.chmod(0o640)

    with pytest.raises(InitError, match="is there already"):
        init.refuse(path, force=False)
    with pytest.raises(InitError, match="is there already"):
        init.write(path, "theirs", force=False)
    assert path.read_text() == "mine"
    init.write(path, "new", force=True)
    assert (path.read_text(), stat.S_IMODE(path.stat().st_mode)) == ("new", 0o640)
    assert os.listdir(tmp_path) == ["config.toml"]


def test_a_link_that_leads_nowhere_is_not_written_through(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.symlink_to(tmp_path / "elsewhere.toml")

    with pytest.raises(InitError, match="is there already"):
        init.refuse(path, force=False)


def test_a_place_where_nothing_can_be_written_is_told_before_anybody_chooses(tmp_path: Path) -> None:
    with pytest.raises(InitError, match="there is no folder"):
        init.refuse(tmp_path / "missing/config.toml", force=False)
    with pytest.raises(InitError, match="is a folder"):
        init.refuse(tmp_path, force=True)
    with pytest.raises(InitError, match="cannot be written"):
        init.write(Path("/proc/config.toml"), "x", force=False)


def test_a_disk_that_is_full_leaves_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InitError, match="No space left on device"):
        init.write(tmp_path / "config.toml", "x", force=False)

    assert os.listdir(tmp_path) == []


# --- as it is typed -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lm_studio(tmp_path_factory: pytest.TempPathFactory):
    running = SimulatorProcess(
        tmp_path_factory.mktemp("init"), "org/gemma:500ms:2GB", "org/long-name-of-a-model:1s"
    )
    with ending(running):
        yield running


def test_a_script_writes_a_config_that_check_accepts_and_says_what_comes_next(
    lm_studio: SimulatorProcess, tmp_path: Path
) -> None:
    told = command("init", "--url", lm_studio.url, "--model", "org/gemma", cwd=tmp_path)
    checked = command("check", cwd=tmp_path)
    again = command("init", "--url", lm_studio.url, cwd=tmp_path)

    assert (told.returncode, told.stderr) == (0, "")
    assert told.stdout.startswith(
        "Wrote config.toml, which keeps org/gemma loaded. Next:\n\n    keepalive run\n"
    )
    assert "http://127.0.0.1:1235/v1" in told.stdout
    assert checked.stdout == "config.toml is good: 1 model to keep warm on 1 upstream\n"
    assert (again.returncode, again.stdout) == (1, "")
    assert (
        again.stderr == "config.toml is there already; another file: -c FILE; --force writes over this one\n"
    )


@pytest.mark.parametrize("closed", ["<&-", ">&-"])
def test_nobody_is_asked_where_nobody_can_answer(
    lm_studio: SimulatorProcess, tmp_path: Path, closed: str
) -> None:
    words = ["sh", "-c", f'exec "$@" {closed}', "sh", *KEEPALIVE, "init", "--url", lm_studio.url]
    running = Running(words, tmp_path, "init")
    with ending(running):
        code = running.ended()

    assert code == 1
    assert running.err.read_text().startswith("no model is loaded now; name those to keep by --model KEY")


def test_on_a_narrow_terminal_one_chooses_and_ctrl_c_leaves_nothing(
    lm_studio: SimulatorProcess, tmp_path: Path
) -> None:
    for answer, files in (("2\n", ["my.toml"]), (None, ["my.toml"])):
        path = "my.toml" if answer else "other.toml"
        terminal = Terminal("init", "--url", lm_studio.url, "-c", path, cwd=tmp_path, columns=40)
        try:
            terminal.shows("Which shall stay loaded?")
            if answer:
                terminal.types(answer)
            else:
                terminal.process.send_signal(signal.SIGINT)
            code = terminal.ended()
        finally:
            terminal.kill()

        assert code == (0 if answer else 130)
        assert os.listdir(tmp_path) == files
        assert "Traceback" not in terminal.text
        assert ("keepalive run -c my.toml" if answer else "Nothing was written.") in terminal.text
    assert config.load(tmp_path / "my.toml", {}).models[0].key == "org/long-name-of-a-model"


def test_ctrl_c_while_it_asks_leaves_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        terminal = Terminal("init", "--url", f"127.0.0.1:{silent.getsockname()[1]}", cwd=tmp_path)
        try:
            terminal.shows("is slow to answer")
            terminal.process.send_signal(signal.SIGINT)
            code = terminal.ended()
        finally:
            terminal.kill()

    assert code == 130
    assert os.listdir(tmp_path) == []
    assert "Traceback" not in terminal.text


def test_without_lm_studio_it_is_a_sentence(tmp_path: Path) -> None:
    with reserved_port() as port:
        result = CliRunner().invoke(
            cli.app, ["init", "--url", f"127.0.0.1:{port}", "-c", str(tmp_path / "c.toml")]
        )

    assert result.exit_code == 1
    assert result.stderr.startswith("nothing listens at ")
    assert os.listdir(tmp_path) == []
