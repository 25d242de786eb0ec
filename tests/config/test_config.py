"""Configs good and bad. Every message is compared as a whole: it is what a person reads."""

import json
import os
import re
import tomllib
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from keepalive import config
from keepalive.config import Address, Config, ConfigError, Kept, Mistake, Ping, lines, reading
from keepalive.config.tables import SECTIONS
from keepalive.core.errors import KeepaliveError
from keepalive.core.window import parse as parse_window
from tests.kit import PROJECT
from tests.kit.configs import MODEL, mistakes, parse

SHIPPED = (PROJECT / "config.toml").read_text(encoding="utf-8")
# A "#" with a setting or a header right behind it is a setting; one with a space is prose.
EVERYTHING = re.sub(r"(?m)^#(?=[a-z\[])", "", SHIPPED)

CANARY = "sk-lm-canary00:abcdefghijklmnopqrst"


# --- A good config ---


def test_one_model_is_a_whole_config() -> None:
    kept = parse(MODEL).kept

    assert kept == (
        Kept(
            upstream="local",
            key="gemma",
            aliases=(),
            kind=None,
            window=None,
            load_fields={},
            ping="auto",
            refresh_interval=15.0,
            ping_interval=300.0,
            ping_timeout=60.0,
            load_timeout=900.0,
            max_wait=600.0,
            lease=86400.0,
            stall_timeout=900.0,
        ),
    )


def test_without_upstreams_there_is_lm_studio_on_this_machine() -> None:
    upstreams = parse(MODEL).upstreams

    assert [(upstream.name, upstream.url) for upstream in upstreams] == [("local", "http://127.0.0.1:1234")]


def test_a_model_overrides_the_defaults_which_override_ours() -> None:
    kept = parse(
        """
        [defaults]
        ping_interval = "200ms"
        max_wait = "0s"
        stall_timeout = "1h"

        [[models]]
        key = "gemma"
        aliases = ["gpt-4o-mini", "local-model"]
        ping = "off"
        stall_timeout = "off"
        context_length = 8192
        flash_attention = false
        window = "Mon-Fri 08:00-19:00"
        kind = "embedding"
        max_wait = "1h30m"
        """
    ).kept

    assert kept == (
        Kept(
            upstream="local",
            key="gemma",
            aliases=("gpt-4o-mini", "local-model"),
            kind="embedding",
            window=parse_window("Mon-Fri 08:00-19:00"),
            load_fields={"context_length": 8192, "flash_attention": False},
            ping="off",
            refresh_interval=15.0,
            ping_interval=0.2,
            ping_timeout=60.0,
            load_timeout=900.0,
            max_wait=5400.0,
            lease=86400.0,
            stall_timeout=None,
        ),
    )


def test_a_model_on_several_upstreams_is_kept_on_each_in_the_order_of_the_file() -> None:
    found = parse(
        """
        [[upstreams]]
        name = "a"
        url = "http://10.0.0.1:1234"
        [[upstreams]]
        name = "b"
        url = "http://10.0.0.2:1234/"
        [[models]]
        key = "gemma"
        upstream = ["b", "a"]
        [[models]]
        key = "qwen"
        upstream = "a"
        """
    )

    assert [(kept.upstream, kept.key) for kept in found.kept] == [
        ("b", "gemma"),
        ("a", "gemma"),
        ("a", "qwen"),
    ]
    assert [upstream.url for upstream in found.upstreams] == ["http://10.0.0.1:1234", "http://10.0.0.2:1234"]


def test_text_is_a_list_too_and_what_stands_twice_counts_once() -> None:
    found = parse(f"""
        [server]
        allowed_hosts = "a.example, B.example."
        {MODEL}
        upstream = ["local", "local"]
    """)

    assert found.server.allowed_hosts == ("a.example", "b.example")
    assert [kept.upstream for kept in found.kept] == ["local"]


def test_what_is_kept_can_be_compared_and_cannot_be_changed() -> None:
    once, twice = parse(MODEL), parse(MODEL)

    assert once.kept == twice.kept
    assert hash(once.kept[0]) == hash(twice.kept[0])
    assert once == twice
    with pytest.raises(TypeError):
        once.kept[0].load_fields["context_length"] = 1  # type: ignore[index]  # what the test is about
    with pytest.raises(ValueError):
        setattr(once.server, "listen", Address("", 1))  # noqa: B010  # mypy knows that it is frozen


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:1235", Address("127.0.0.1", 1235)),
        (":1235", Address("", 1235)),
        ("[::1]:0", Address("::1", 0)),
        ("llm.example.org:80", Address("llm.example.org", 80)),
    ],
)
def test_addresses_are_host_and_port(text: str, address: Address) -> None:
    server = parse(f'[server]\nlisten = "{text}"\n{MODEL}').server

    assert server.listen == address
    assert str(server.listen) == text


def test_two_listeners_on_any_free_port_do_not_collide() -> None:
    server = parse(f'[server]\nlisten = "127.0.0.1:0"\nadmin_listen = "127.0.0.1:0"\n{MODEL}').server

    assert (server.listen, server.admin_listen) == (Address("127.0.0.1", 0), Address("127.0.0.1", 0))


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("15s", 15.0), ("1.5m", 90.0), ("2h", 7200.0), ("1h30m", 5400.0), ("1d", 86400.0)],
)
def test_durations_are_seconds(text: str, seconds: float) -> None:
    assert config.seconds(text) == seconds


@given(st.integers(0, 10**12))
def test_a_duration_written_and_read_again_is_the_same(milliseconds: int) -> None:
    text = config.written(milliseconds / 1000)

    assert config.seconds(text) == pytest.approx(milliseconds / 1000)


@pytest.mark.parametrize(("text", "size"), [("64MiB", 67108864), ("1KiB", 1024), ("10MB", 10000000)])
def test_sizes_are_bytes(text: str, size: int) -> None:
    assert parse(f'[server]\nmax_body = "{text}"\n{MODEL}').server.max_body == size


@pytest.mark.parametrize(
    ("environ", "directory"),
    [
        ({"STATE_DIRECTORY": "/var/lib/keepalive:/var/lib/other", "HOME": "/h"}, "/var/lib/keepalive"),
        ({"XDG_STATE_HOME": "/x", "HOME": "/h"}, "/x/keepalive"),
        ({"HOME": "/h"}, "/h/.local/state/keepalive"),
        ({"STATE_DIRECTORY": "/s", "KEEPALIVE_SERVER__STATE_DIR": "/mine"}, "/mine"),
    ],
)
def test_state_is_kept_where_the_system_says(environ: dict[str, str], directory: str) -> None:
    assert parse(MODEL, environ).server.state_dir == Path(directory)


def test_without_a_place_for_state_there_is_none() -> None:
    assert parse(MODEL).server.state_dir is None
    assert parse(MODEL).history.path is None


@pytest.mark.parametrize(
    ("text", "environ", "path"),
    [
        ("", {"STATE_DIRECTORY": "/var/lib/keepalive"}, Path("/var/lib/keepalive/history.db")),
        ('[server]\nstate_dir = "/mine"\n', {"HOME": "/h"}, Path("/mine/history.db")),
        ('[history]\npath = "/data/h.sqlite"\n', {"HOME": "/h"}, Path("/data/h.sqlite")),
        ("[history]\npath = false\n", {"HOME": "/h"}, False),
        ("", {"HOME": "/h", "KEEPALIVE_HISTORY__PATH": "false"}, False),
        ("[history]\npath = false\n", {"KEEPALIVE_HISTORY__PATH": "/data/h.sqlite"}, Path("/data/h.sqlite")),
    ],
)
def test_the_history_is_kept_beside_the_state_or_where_it_is_said_or_nowhere(
    text: str, environ: dict[str, str], path: Path | bool
) -> None:
    assert parse(text + MODEL, environ).history.path == path


@pytest.mark.parametrize("value", ["true", '""', '"history.db"', '"/var/lib/"', "1", '"/a\\u0000b"'])
def test_a_history_that_is_no_file_is_a_mistake(value: str) -> None:
    (said,) = mistakes(f"[history]\npath = {value}\n{MODEL}")

    assert said.startswith("2: history.path: ")
    assert said.endswith(
        ' is no path of a file from "/"; write one such as "/var/lib/keepalive/history.db", or false for none'
    )


def test_the_zone_of_the_windows_is_the_one_that_is_named() -> None:
    zone = parse(f'[server]\ntimezone = "Europe/Lisbon"\n{MODEL}').zone

    assert str(zone) == "Europe/Lisbon"


def test_the_zone_of_the_windows_is_otherwise_the_one_of_this_machine() -> None:
    zone = parse(MODEL).zone
    moment = datetime(2026, 11, 22, tzinfo=UTC)

    assert moment.astimezone(zone).utcoffset() == moment.astimezone().utcoffset()


# --- The report ---


def test_every_mistake_is_reported_at_once_with_its_place() -> None:
    report = mistakes(
        f"""[server]
listen = "127.0.0.1"
heartbeat = 5
log_level = "warn"
timezone = "Lisbon"

[[upstreams]]
name = "gpu"
url = "http://10.0.0.1:1234/v1"
api_token = "{CANARY}"

[[upstreams]]
url = "10.0.0.2:1234"

[[models]]
key = "gemma"
upstream = "gpo"
contxt_length = 8192

[[models]]
upstream = "gpu"
ping_interval = "30"
window = "Mon-Fry 08:00-19:00"

[[prompts]]
id = 28
title = "Simple"
model = "gema"
content = "Explain {{{{topic}}."
"""
    )

    assert report == [
        '2: server.listen: "127.0.0.1" is not host and port; write "127.0.0.1:1235"',
        '3: server.heartbeat: 5 has no unit; write "5s" or "5m"',
        '4: server.log_level: "warn" is not known; write "warning"',
        '5: server.timezone: "Lisbon" is no known time zone; write "Europe/Lisbon"',
        '9: upstreams[0].url: "http://10.0.0.1:1234/v1" ends in a path of LM Studio itself, '
        'which keepalive adds; write "http://10.0.0.1:1234"',
        "10: upstreams[0].api_token: is unknown; write api_token_env",
        '13: upstreams[1].url: "10.0.0.2:1234" is not scheme, host and port; write "http://10.0.0.2:1234"',
        '17: models[0].upstream: "gpo" is no upstream; write "gpu"',
        "18: models[0].contxt_length: is unknown; write context_length",
        '20: models[1].key: is missing; write key = "qwen/qwen3-4b-2507"',
        '22: models[1].ping_interval: "30" has no unit; write "30s" or "30m"',
        '23: models[1].window: "Fry" is no day; write "Fri"',
        '28: prompts[0].model: "gema" is no configured model; write "gemma"',
        '29: prompts[0].content: a variable is not closed; write "{{topic}}"',
    ]


def test_a_mistake_tells_its_parts() -> None:
    with pytest.raises(ConfigError) as raised:
        parse(f'{MODEL}ping_interval = "30"\n')

    assert raised.value.mistakes == (
        Mistake(
            file="config.toml",
            line=3,
            key="models[0].ping_interval",
            message='"30" has no unit; write "30s" or "30m"',
        ),
    )
    assert isinstance(raised.value, KeepaliveError)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('ping_interval = "5 minutes"', '"5 minutes" is no duration; write "5m"'),
        ('ping_interval = "1H 30Min"', '"1H 30Min" is no duration; write "1h30m"'),
        (
            'ping_interval = "soon"',
            '"soon" is no duration; write one such as "500ms", "30s", "5m" or "1h30m"',
        ),
        ('ping_interval = "-5m"', '"-5m" is no duration; write one such as "500ms", "30s", "5m" or "1h30m"'),
        ('ping_interval = "0s"', '"0s" is out of range; write one from "10ms" to "7d"'),
        ('ping_interval = "8d"', '"8d" is out of range; write one from "10ms" to "7d"'),
        ("ping_interval = 1.5", '1.5 has no unit; write "1.5s" or "1.5m"'),
        ("ping_interval = true", 'true is no duration; write one such as "500ms", "30s", "5m" or "1h30m"'),
        ("ping_interval = [1]", 'a list is no duration; write one such as "500ms", "30s", "5m" or "1h30m"'),
        ('refresh_interval = "50ms"', '"50ms" is out of range; write one from "100ms" to "1h"'),
        ('context_length = "8192"', '"8192" is no whole number; write one such as 8192, without quotes'),
        ("context_length = 8192.5", "8192.5 is no whole number; write one such as 8192, without quotes"),
        ("context_length = 0", "0 is too small; write 1 or more"),
        ("context_length = 99999999999", "99999999999 is too large; write 2147483647 or less"),
        ("flash_attention = 1", "1 is neither true nor false; write one of them, without quotes"),
        ('flash_attention = "True"', '"True" is neither true nor false; write one of them, without quotes'),
        ('kind = "LLM"', '"LLM" is not known; write "llm"'),
        ('kind = "vision"', '"vision" is not known; write "llm" or "embedding" or "reranker"'),
        ('window = "Mon-Fri"', '"Mon-Fri" has no times; write "Mon-Fri 00:00-24:00"'),
        ("window = 08:00:00", "08:00:00 is no text; write it in quotes"),
        ('upstream = "lokal"', '"lokal" is no upstream; write "local"'),
        ("upstream = 1", '1 is no list; write one such as ["local"]'),
        ('ttl = "1h"', "is unknown; write lease"),
        ('url = "http://x"', "is unknown here; write it below [[upstreams]]"),
        (
            'stall_timeout = "never"',
            '"never" is no duration; write one such as "500ms", "30s", "5m" or "1h30m", or "off"',
        ),
        ('stall_timeout = "90"', '"90" has no unit; write "90s" or "90m", or "off"'),
        ('stall_timeout = "2d"', '"2d" is out of range; write one from "10ms" to "1d", or "off"'),
        ("aliases = 1", '1 is no list; write one such as ["gpt-4o-mini"]'),
        (
            'lease = "6m"',
            'a lease of 6m ends within ping_interval and ping_timeout; write lease = "12m"',
        ),
    ],
)
def test_a_model_with_a_mistake(line: str, message: str) -> None:
    key = line.partition(" = ")[0]

    assert mistakes(f"{MODEL}{line}\n") == [f"3: models[0].{key}: {message}"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            'listen = "1235"',
            '"1235" is not host and port; write "127.0.0.1:1235", or ":1235" for every interface',
        ),
        (
            'listen = "http://[::1]:80/v1"',
            '"http://[::1]:80/v1" is not host and port; write one such as "127.0.0.1:1235", '
            '"[::1]:1235", or ":1235" for every interface',
        ),
        (
            'listen = "::1:80"',
            '"::1:80" is not host and port; write one such as "127.0.0.1:1235", "[::1]:1235", '
            'or ":1235" for every interface',
        ),
        (
            'listen = "*:80"',
            '"*:80" is not host and port; write one such as "127.0.0.1:1235", "[::1]:1235", or '
            '":1235" for every interface',
        ),
        (
            'listen = "[fe80::1%eth0]:80"',
            '"[fe80::1%eth0]:80" is not host and port; write one such as "127.0.0.1:1235", '
            '"[::1]:1235", or ":1235" for every interface',
        ),
        (
            'listen = "127.0.0.1:99999"',
            '"127.0.0.1:99999" is not host and port; write one such as "127.0.0.1:1235", '
            '"[::1]:1235", or ":1235" for every interface',
        ),
        (
            'listen = "127.0.0.300:80"',
            '"127.0.0.300:80" is not host and port; write one such as "127.0.0.1:1235", '
            '"[::1]:1235", or ":1235" for every interface',
        ),
        ('listen = "127.0.0.1:9235"', '"127.0.0.1:9235" is taken by server.admin_listen; write another port'),
        ('listen = ":9235"', '":9235" is taken by server.admin_listen; write another port'),
        ('admin_listen = ":1235"', '":1235" is taken by server.listen; write another port'),
        ("max_body = 64", '64 is no size; write a number and a unit, such as "64MiB"'),
        ('max_body = "32GiB"', '"32GiB" is out of range; write a size from "1KiB" to "16GiB"'),
        ('max_body = "64 mb"', '"64 mb" is no size; write "64MB"'),
        ('max_body = "64m"', '"64m" is no size; write "64MiB"'),
        ('max_body = "1.5 GB"', '"1.5 GB" is no size; write a number and a unit, such as "64MiB"'),
        ('max_body = "6 miles"', '"6 miles" is no size; write a number and a unit, such as "64MiB"'),
        ('timezone = "europe/lisbonn"', '"europe/lisbonn" is no known time zone; write "Europe/Lisbon"'),
        ('timezone = "New York"', '"New York" is no known time zone; write "America/New_York"'),
        *(
            (
                f'timezone = "{short}"',
                f'"{short}" is no known time zone; write an IANA name such as "Europe/Lisbon"',
            )
            for short in ("CEST", "PST", "GMT+2", "W. Europe Standard Time")
        ),
        (
            'timezone = "../etc/passwd"',
            '"../etc/passwd" is no known time zone; write an IANA name such as "Europe/Lisbon"',
        ),
        (
            'state_dir = "state"',
            '"state" is no path from "/"; write one such as "/var/lib/keepalive"',
        ),
        (
            'allowed_hosts = ["http://box:80/"]',
            '"http://box:80/" is no host name; write "box"',
        ),
        (
            'allowed_hosts = ["*.example.org"]',
            '"*.example.org" is no host name; write each name by itself, such as "llm.example.org"',
        ),
        ('allowed_hosts = ["Müller.local"]', '"Müller.local" is no host name; write "xn--mller-kva.local"'),
        ('allowed_hosts = ["*"]', '"*" is no host name; write one such as "llm.example.org"'),
        (
            'allowed_origins = ["chat.example.org"]',
            '"chat.example.org" is not scheme, host and port; write "https://chat.example.org"',
        ),
        (
            'allowed_origins = ["*"]',
            '"*" would let every web page load models; name each origin by itself',
        ),
        ('unlisted = "keep"', '"keep" is not known; write "pass" or "auto"'),
        ('loads = "refuse"', '"refuse" is not known; write "join" or "pass"'),
        ("default_model = 1", "1 is no text; write it in quotes"),
        (
            'default_model = " a"',
            '" a" is not one line; write 1 to 256 characters, no space around them',
        ),
        ("log_format = 1", '1 is not known; write "auto" or "json" or "console"'),
        ('ping_interval = "5m"', "is unknown here; write it below [defaults] or [[models]]"),
    ],
)
def test_a_server_with_a_mistake(line: str, message: str) -> None:
    key = line.partition(" = ")[0] + ("[0]" if "= [" in line else "")

    assert mistakes(f"[server]\n{line}\n{MODEL}") == [f"2: server.{key}: {message}"]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (
            "localhost:1234/v1",
            '"localhost:1234/v1" is not scheme, host and port; write "http://localhost:1234"',
        ),
        ("ftp://box:1234", '"ftp://box:1234" is not scheme, host and port; write "http://127.0.0.1:1234"'),
        (
            "http://box:1234/v1",
            '"http://box:1234/v1" ends in a path of LM Studio itself, which keepalive adds; '
            'write "http://box:1234"',
        ),
        (
            "http://box?x=1",
            '"http://box?x=1" has a query; write "http://box"',
        ),
        (
            "http://me:hunter2@box:1234",
            "holds credentials, which do not stand here; write api_token_env or api_token_file",
        ),
        (
            "http://box:99999",
            '"http://box:99999" is not scheme, host and port; write "http://127.0.0.1:1234"',
        ),
        (
            "http://bo x",
            '"http://bo x" is not scheme, host and port; write "http://bo"',
        ),
        (
            "http://localhost:1235",
            '"http://localhost:1235" is server.listen, so keepalive would ask itself; '
            "write where LM Studio listens",
        ),
    ],
)
def test_an_upstream_that_cannot_be_reached_that_way(url: str, message: str) -> None:
    assert mistakes(f'[[upstreams]]\nurl = "{url}"\n{MODEL}') == [f"2: upstreams[0].url: {message}"]


@pytest.mark.parametrize(
    ("text", "report"),
    [
        ("", [' nothing to keep warm; add [[models]] and key = "…", a key that LM Studio lists']),
        ("models = []", [' nothing to keep warm; add [[models]] and key = "…", a key that LM Studio lists']),
        ('[models]\nkey = "gemma"', ["1: models: a table is no list; write [[models]] above each table"]),
        ('[[model]]\nkey = "gemma"', ["1: model: is unknown; write [[models]]"]),
        ('models = ["gemma"]', ['1: models[0]: "gemma" is no table; write [[models]] and the keys below it']),
        ("[[server]]\n" + MODEL, ["1: server: a list is no table; write [server] and the keys below it"]),
        (
            'listen = ":80"\n' + MODEL,
            ["1: listen: is unknown here; write it below [server]"],
        ),
        (
            f"{MODEL}[[models]]\nkey = 'GEMMA'",
            ['4: models[1].key: "GEMMA" is already kept on "local" by models[0]; leave one of them out'],
        ),
        (
            "[[upstreams]]\nurl='http://localhost:1234'\n[[upstreams]]\nname='b'\nurl='http://127.0.0.1:1234'\n"
            + MODEL,
            [
                '5: upstreams[1].url: "http://127.0.0.1:1234" is the url of upstreams[0] too; '
                "write another one",
                '6: models[0].upstream: is missing, and there are several; write "local" or "b", '
                "or a list of them",
            ],
        ),
        (
            "[[upstreams]]\nurl='http://a'\n[[upstreams]]\nurl='http://b'\n" + MODEL + "upstream = 'local'",
            ['3: upstreams[1].name: "local" is the name of upstreams[0] too; write another one'],
        ),
        (
            "[[upstreams]]\nurl='http://a'\napi_token_env='A'\napi_token_file='/b'\n" + MODEL,
            [
                "4: upstreams[0].api_token_file: stands beside api_token_env, and a token has one place; "
                "leave one of them out"
            ],
        ),
        (
            "[[upstreams]]\nname='my box'\nurl='http://a'\n" + MODEL,
            ['2: upstreams[0].name: "my box" is no name; write letters and digits, ".", "-" and "_" between'],
        ),
        (
            MODEL + "[[prompts]]\nid=28\ntitle='a'\nmodel='gemma'\ncontent='b'\n"
            "[[prompts]]\nid='28'\ntitle='a'\nmodel='gemma'\ncontent='b'",
            ['9: prompts[1].id: "28" is the id of prompts[0] too; write another one'],
        ),
        (
            MODEL + "[auth]\nclient_keys = [{name='a'}, {name='a', env='A', file='/b'}]",
            [
                '4: auth.client_keys[1].name: "a" is the name of auth.client_keys[0] too; write another one',
                "4: auth.client_keys[0]: does not say where the key is; write one of file, env or credential",
                "4: auth.client_keys[1]: has file and env; write one of file, env or credential",
            ],
        ),
        (
            MODEL + "[auth]\nadmin_keys = {name='a', env='A'}",
            ["4: auth.admin_keys: this is no list; write [[auth.admin_keys]] above each table"],
        ),
        (
            "[defaults]\nping_interval = '2d'\n" + MODEL,
            [
                "2: defaults.ping_interval: a lease of 1d ends within ping_interval and "
                'ping_timeout; write lease = "4d2m"'
            ],
        ),
    ],
)
def test_what_contradicts_itself_is_one_clear_sentence(text: str, report: list[str]) -> None:
    assert mistakes(text) == report


def test_a_value_that_is_wrong_is_not_compared_with_others() -> None:
    report = mistakes(f'[server]\nlisten = "x"\nadmin_listen = "127.0.0.1:1235"\n{MODEL}')

    assert report == ['2: server.listen: "x" is not host and port; write "x:1235"']


# --- TOML ---


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (
            "[[models]]\nkey = gemma\n",
            "2:7: not TOML: Invalid value; text and durations stand in quotes",
        ),
        (
            "[server]\nlisten = 127.0.0.1:1235\n",
            "2:15: not TOML: Expected newline or end of document after a statement; text and "
            "durations stand in quotes",
        ),
        ("[[models]]\nkey\n", "2:4: not TOML: Expected '=' after a key in a key/value pair"),
        ('a = "b\n', "1:7: not TOML: Illegal character '\\n'; text and durations stand in quotes"),
        (
            'a = "C:\\models"\n',
            "1:10: not TOML: Unescaped '\\' in a string; in 'single quotes' a backslash is one, as in "
            "'C:\\keepalive'",
        ),
        (
            'a = "C:\\Users"\n',
            "1:10: not TOML: Invalid hex value; in 'single quotes' a backslash is one, as in 'C:\\keepalive'",
        ),
        (
            "a = 1\na = 2\n",
            "2:6: not TOML: Cannot overwrite a value; it stands above already, so take one of the two away",
        ),
        (
            "[server]\n[server]\n",
            "2:8: not TOML: Cannot declare ('server',) twice; it stands above already, so write its keys there",
        ),
        (
            "[models]\n[models]\n",
            "2:8: not TOML: Cannot declare ('models',) twice; write [[models]] above each table",
        ),
        ("a = “b”\n", '1:5: not TOML: Invalid value; quotes are straight ones, as in "text"'),
        ("a = `b`\n", '1:5: not TOML: Invalid value; quotes are straight ones, as in "text"'),
        (
            'a\N{NO-BREAK SPACE}= "b"\n',
            "1:2: not TOML: Expected '=' after a key in a key/value pair; there is a blank or a mark here that "
            "cannot be seen, so type this line anew",
        ),
        (
            'a\N{ZERO WIDTH SPACE} = "b"\n',
            "1:2: not TOML: Expected '=' after a key in a key/value pair; there is a blank or a mark here that "
            "cannot be seen, so type this line anew",
        ),
        ("a: 1\n", '1:2: not TOML: Expected \'=\' after a key in a key/value pair; write "=" for ":"'),
        (
            'a = "b",\n',
            '1:8: not TOML: Expected newline or end of document after a statement; take the "," away',
        ),
        (
            "a = 8,192\n",
            '1:6: not TOML: Expected newline or end of document after a statement; take the "," away',
        ),
        (
            "a = 1;\n",
            '1:6: not TOML: Expected newline or end of document after a statement; take the ";" away',
        ),
        ("a = True\n", "1:5: not TOML: Invalid value; write true"),
        (
            "a = no # not now\n",
            '1:5: not TOML: Invalid value; write false, or "off" where that is among the choices',
        ),
        ("a = None\n", "1:5: not TOML: Invalid value; take the line away, so that the default holds"),
        ("a = [1,\n", "1: not TOML: Invalid value; text and durations stand in quotes"),
        (
            "a = " + "[" * 5000,
            " not TOML that can be read: lists too deep in each other, or a number too long",
        ),
        (
            "a = " + "1" * 5000,
            " not TOML that can be read: lists too deep in each other, or a number too long",
        ),
    ],
)
def test_what_is_not_toml_is_told_with_line_and_column(text: str, report: str) -> None:
    assert mistakes(text) == [report]


def test_lines_are_found_in_every_way_to_write_toml() -> None:
    text = '''# a comment with [[models]] and key = "x"
"quoted.key" = 1 # [server]
dotted . "two words".'three' = """
[[models]]
key = \\"""x\\"""
"""""
list = [ # ]
  "a]", [ '#' ], { b = 1 },
]
inline = { c = "}", d = [1, 2] }
[ table . sub ]
literal = \'\'\'
[[models]]\'\'\'
e = 1
[[models]]
  key = "a"
[[models]]
[models.sub]
f = 1
[[models.deep]]
g = 1
[[models.deep]]
g = 2
'''
    tomllib.loads(text)

    assert lines.find(text) == {
        ("quoted.key",): 2,
        ("dotted",): 3,
        ("dotted", "two words"): 3,
        ("dotted", "two words", "three"): 3,
        ("list",): 7,
        ("inline",): 10,
        ("inline", "c"): 10,
        ("inline", "d"): 10,
        ("table", "sub"): 11,
        ("table", "sub", "literal"): 12,
        ("table", "sub", "e"): 14,
        ("models",): 15,
        ("models", 0): 15,
        ("models", 0, "key"): 16,
        ("models", 1): 17,
        ("models", 1, "sub"): 18,
        ("models", 1, "sub", "f"): 19,
        ("models", 1, "deep"): 20,
        ("models", 1, "deep", 0): 20,
        ("models", 1, "deep", 0, "g"): 21,
        ("models", 1, "deep", 1): 22,
        ("models", 1, "deep", 1, "g"): 23,
    }


def test_keys_may_lie_as_deep_in_each_other_as_they_like() -> None:
    (said,) = mistakes(f"{MODEL}{'a.' * 1500}a = 1\n")

    assert said == "3: models[0].a: is unknown; write one of " + ", ".join(config.Model.model_fields)


def test_windows_line_ends_do_not_move_lines() -> None:
    assert mistakes('[[models]]\r\nkey = "a"\r\n\r\nx = 1\r\n') == [
        "4: models[0].x: is unknown; write one of " + ", ".join(config.Model.model_fields)
    ]


# --- The environment ---


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_a_list_in_a_variable_do_not_belong_to_it(quote: str) -> None:
    inner = "'" if quote == '"' else '"'
    aliases = f"{quote}[{inner}a{inner}, {inner}b{inner}]{quote}"

    found = config.load(
        None,
        {
            "KEEPALIVE_SERVER__LISTEN": f"{quote}[::1]:80{quote}",
            "KEEPALIVE_MODELS__0__KEY": f"{quote}[k]{quote}",
            "KEEPALIVE_MODELS__0__ALIASES": aliases,
        },
    )

    assert str(found.server.listen) == "[::1]:80"
    assert (found.models[0].key, found.models[0].aliases) == ("[k]", ("a", "b"))


def test_every_setting_can_come_from_the_environment() -> None:
    found = config.load(
        None,
        {
            "KEEPALIVE_SERVER__LISTEN": ":80",
            "KEEPALIVE_SERVER__ALLOWED_HOSTS": "a.example, b.example",
            "KEEPALIVE_SERVER__ALLOWED_ORIGINS": '["https://a.example"]',
            "KEEPALIVE_SERVER__DEFAULT_MODEL": "c@q4_k_m",
            "KEEPALIVE_SERVER__UNLISTED": "pass",
            "KEEPALIVE_SERVER__LOADS": "pass",
            "KEEPALIVE_UPSTREAMS__0__URL": "http://10.0.0.1:1234",
            "KEEPALIVE_UPSTREAMS__0__AUTO_EVICT": "true",
            "KEEPALIVE_DEFAULTS__PING_INTERVAL": "200ms",
            "KEEPALIVE_DEFAULTS__STALL_TIMEOUT": "off",
            "KEEPALIVE_MODELS__0__KEY": '"1234"',
            "KEEPALIVE_MODELS__0__CONTEXT_LENGTH": "8192",
            "KEEPALIVE_MODELS__1__KEY": "b",
            "KEEPALIVE_MODELS__1__UPSTREAM": "local",
            "KEEPALIVE_MODELS__1__ALIASES": "gpt-4o-mini, local-model",
            "KEEPALIVE_MODELS__2__KEY": "c",
            "KEEPALIVE_MODELS__2__KIND": "reranker",
            "KEEPALIVE_MODELS__2__STALL_TIMEOUT": "1m",
            "KEEPALIVE_MODELS__2__PING__PATH": "/v1/rerank",
            "KEEPALIVE_MODELS__2__PING__BODY": '{"query": "q", "top_n": null}',
            "KEEPALIVE_PROMPTS__0__ID": "28",
            "KEEPALIVE_PROMPTS__0__TITLE": "a",
            "KEEPALIVE_PROMPTS__0__MODEL": "b",
            "KEEPALIVE_PROMPTS__0__CONTENT": "c",
            "KEEPALIVE_AUTH__CLIENT_KEYS__0__NAME": "ward",
            "KEEPALIVE_AUTH__CLIENT_KEYS__0__ENV": "KEEPALIVE_WARD",
            "KEEPALIVE_WARD": "the key itself",
            "PATH": "/bin",
        },
    )

    assert found.server.listen == Address("", 80)
    assert found.server.allowed_hosts == ("a.example", "b.example")
    assert found.server.allowed_origins == ("https://a.example",)
    assert [(upstream.url, upstream.auto_evict) for upstream in found.upstreams] == [
        ("http://10.0.0.1:1234", True)
    ]
    assert [(kept.key, kept.ping_interval, dict(kept.load_fields)) for kept in found.kept] == [
        ("1234", 0.2, {"context_length": 8192}),
        ("b", 0.2, {}),
        ("c", 0.2, {}),
    ]
    assert (found.server.default_model, found.server.loads) == ("c@q4_k_m", "pass")
    assert [kept.aliases for kept in found.kept] == [(), ("gpt-4o-mini", "local-model"), ()]
    assert [kept.stall_timeout for kept in found.kept] == [None, None, 60.0]
    assert found.kept[2].ping == Ping(path="/v1/rerank", body={"query": "q", "top_n": None})
    assert [prompt.id for prompt in found.prompts] == [28]
    assert [access.env for access in found.auth.client_keys] == ["KEEPALIVE_WARD"]


def test_the_environment_comes_before_the_file_and_empty_is_not_set() -> None:
    environ = {"KEEPALIVE_DEFAULTS__PING_INTERVAL": "1m", "KEEPALIVE_DEFAULTS__MAX_WAIT": ""}
    found = parse(f'[defaults]\nping_interval = "2m"\nmax_wait = "3m"\n{MODEL}', environ)

    assert (found.defaults.ping_interval, found.defaults.max_wait) == (60.0, 180.0)


def test_many_models_from_the_environment_are_in_the_order_of_their_numbers() -> None:
    environ = {f"KEEPALIVE_MODELS__{number}__KEY": f"m{number}" for number in range(12)}

    assert [kept.key for kept in parse("", environ).kept] == [f"m{number}" for number in range(12)]


def test_variables_that_are_read_elsewhere_or_describe_a_service_are_left_alone() -> None:
    environ = {
        "KEEPALIVE_ADMIN_URL": "http://x",
        "KEEPALIVE_CONFIG": "x",
        "KEEPALIVE_SERVICE_HOST": "10.0.0.1",
        "KEEPALIVE_SERVICE_PORT_HTTP": "80",
        "KEEPALIVE_PORT": "tcp://10.0.0.1:80",
        "KEEPALIVE_PORT_80_TCP_ADDR": "10.0.0.1",
    }

    assert parse(MODEL, environ) == parse(MODEL)


def test_a_mistake_in_the_environment_is_placed_by_the_name_of_the_variable() -> None:
    report = mistakes(
        MODEL,
        {
            "KEEPALIVE_SERVER_LISTEN": CANARY,
            "KEEPALIVE_MODELS__0__CONTEX_LENGTH": "1",
            "KEEPALIVE_MODELS__0__CONTEXT_LENGTH": "much",
            "KEEPALIVE_MODELS__3__KEY": "x",
            "KEEPALIVE_DEFAULTS__PING_INTERVAL": "30",
            "KEEPALIVE_MODELS": "[]",
            "KEEPALIVE_UPSTREAMS__0__API_TOKEN": CANARY,
            "KEEPALIVE_UPSTREAMS__0__URL": "http://box",
            "KEEPALIVE_PROMPTS__0__ID": "28",
        },
    )

    no_setting = (
        "is no setting; write one such as KEEPALIVE_SERVER__LISTEN, or KEEPALIVE_MODELS__0__KEY and so on"
    )
    assert sorted(report) == [
        'KEEPALIVE_DEFAULTS__PING_INTERVAL: defaults.ping_interval: 30 has no unit; write "30s" or "30m"',
        f"KEEPALIVE_MODELS: {no_setting}",
        "KEEPALIVE_MODELS__0__CONTEXT_LENGTH: models[0].context_length: "
        '"much" is no whole number; write one such as 8192, without quotes',
        "KEEPALIVE_MODELS__0__CONTEX_LENGTH: models[0].contex_length: is unknown; "
        "write KEEPALIVE_MODELS__0__CONTEXT_LENGTH",
        f"KEEPALIVE_MODELS__3__KEY: {no_setting}",
        "KEEPALIVE_PROMPTS__0__ID: prompts[0].content: is missing; "
        'write content = "Explain {{topic}} to a nurse."',
        'KEEPALIVE_PROMPTS__0__ID: prompts[0].model: is missing; write model = "qwen/qwen3-4b-2507"',
        'KEEPALIVE_PROMPTS__0__ID: prompts[0].title: is missing; write title = "Simple test"',
        f"KEEPALIVE_SERVER_LISTEN: {no_setting}",
        "KEEPALIVE_UPSTREAMS__0__API_TOKEN: upstreams[0].api_token: is unknown; "
        "write KEEPALIVE_UPSTREAMS__0__API_TOKEN_ENV",
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("KEEPALIVE_UPSTREAM__0__URL", "upstream: is unknown; write KEEPALIVE_UPSTREAMS__0__URL"),
        ("KEEPALIVE_SERVER__LISTN", "server.listn: is unknown; write KEEPALIVE_SERVER__LISTEN"),
        ("KEEPALIVE_DEFAULTS__URL", "defaults.url: is unknown here; write it below [[upstreams]]"),
        ("KEEPALIVE_HISTORY__Q", "history.q: is unknown; write path"),
    ],
)
def test_a_misspelt_variable_is_told_as_it_is_spelt(name: str, said: str) -> None:
    assert mistakes(MODEL, {name: "http://box"}) == [f"{name}: {said}"]


# --- The file ---


def unreadable(path: Path) -> str:
    with pytest.raises(ConfigError) as raised:
        config.load(path, {})
    return str(raised.value).replace(str(path), "FILE")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    # As Notepad writes it: with a byte order mark.
    path.write_bytes(b"\xef\xbb\xbf" + MODEL.encode())

    assert config.load(path, {}).kept == parse(MODEL).kept


@pytest.mark.parametrize(
    ("content", "report"),
    [
        (b"a = 1\n\0\n", "FILE:2:1: not TOML: Invalid statement"),
        (b"a = 1\n\xff\n", "FILE:2: is not UTF-8 text; save it as UTF-8, or name another file by -c FILE"),
        (b"#" * (2**20 + 1), "FILE: is larger than 1 MiB, so it is no config; name another file by -c FILE"),
        (b"", 'FILE: nothing to keep warm; add [[models]] and key = "…", a key that LM Studio lists'),
    ],
)
def test_a_file_that_is_no_config_is_told_in_one_sentence(
    tmp_path: Path, content: bytes, report: str
) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)

    assert unreadable(path) == report


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x.toml", "No such file or directory"), (".", "Is a directory"), ("x" * 300, "File name too long")],
)
def test_a_file_that_cannot_be_read_is_told_in_one_sentence(tmp_path: Path, name: str, reason: str) -> None:
    report = unreadable(tmp_path / name)

    assert report.endswith(f": cannot be read: {reason}; name another file by -c FILE")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_told_in_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(MODEL)
    path.chmod(0)

    assert unreadable(path) == "FILE: cannot be read: Permission denied; name another file by -c FILE"


def test_no_file_at_all_says_what_was_looked_for() -> None:
    with pytest.raises(ConfigError) as raised:
        config.load(None, {"KEEPALIVE_SERVER__UNLISTED": "pass"})

    assert str(raised.value) == (
        "environment: nothing to keep warm, because there is no config.toml "
        'and no /etc/keepalive/config.toml; "keepalive init" writes one'
    )


def test_where_nobody_has_written_anything_what_is_asked_for_is_kept(tmp_path: Path) -> None:
    url = {"KEEPALIVE_UPSTREAMS__0__URL": "http://127.0.0.1:4321"}
    empty = tmp_path / "config.toml"
    empty.touch()

    assert config.load(None, {}).server.unlisted == "auto"
    assert config.load(None, url).upstreams[0].url == "http://127.0.0.1:4321"
    assert config.load(None, {"KEEPALIVE_MODELS__0__KEY": "a"}).server.unlisted == "pass"
    with pytest.raises(ConfigError):  # whoever writes a file means something
        config.load(empty, {})


def test_the_file_is_looked_for_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reading, "SEARCHED", (Path("config.toml"), tmp_path / "etc.toml"))
    named = {"KEEPALIVE_CONFIG": "named.toml"}

    assert config.find(None, {}) is None
    (tmp_path / "etc.toml").touch()
    assert config.find(None, {}) == tmp_path / "etc.toml"
    # A link to nowhere is a config that cannot be read, and not a reason to take the next one.
    (tmp_path / "config.toml").symlink_to("nowhere")
    assert config.find(None, {}) == Path("config.toml")
    assert config.find(None, named) == Path("named.toml")
    assert config.find(None, {"KEEPALIVE_CONFIG": '"named.toml"'}) == Path("named.toml")
    assert config.find(Path("x.toml"), named) == Path("x.toml")


def test_a_machine_without_a_zone_is_a_mistake_only_where_a_window_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_zone() -> None:
        raise ValueError

    monkeypatch.setattr("tzlocal.get_localzone", no_zone)
    path = tmp_path / "config.toml"
    path.write_text(f'{MODEL}window = "08:00-19:00"\n')

    assert unreadable(path) == (
        'FILE: server.timezone: the zone of this machine cannot be told; write one such as "Europe/Lisbon"'
    )
    assert config.parse(MODEL, "config.toml", {}).kept


# --- Secrets ---


@pytest.mark.parametrize(
    "text",
    [
        f'[[upstreams]]\nurl = "http://a"\napi_token = "{CANARY}"\n',
        f'[[upstreams]]\nurl = "http://a"\napi_token_env = "{CANARY}"\n',
        f'[[upstreams]]\nurl = "http://a"\napi_token_file = "{CANARY}"\nx = 1\n',
        f'[[upstreams]]\nurl = "http://{CANARY}@a"\n',
        f'[[upstreams]]\nurl = "{CANARY}"\n',
        f'[[upstreams]]\nname = "{CANARY}"\nurl = "http://a"\n',
        f'[auth]\nclient_keys = ["{CANARY}"]\n',
        f'[auth]\nclient_keys = "{CANARY}"\n',
        f'[auth]\nclient_keys = [{{ name = "a", key = "{CANARY}" }}]\n',
        f'[auth]\nclient_keys = [{{ name = "a", env = "{CANARY}" }}]\n',
        f'[server]\nlisten = "{CANARY}"\n',
        f'[server]\nheartbeat = "{CANARY}"\n',
        f'[server]\ntimezone = "{CANARY}"\n',
        f'[defaults]\n"{CANARY}" = 1\n',
        f'"{CANARY}" = 1\n',
        f'token = "{CANARY}"\n',
        f'a = "{CANARY}\n',
        f'"{CANARY}" = 1\n"{CANARY}" = 2\n',
        f'[[models]]\nkey = "a"\nwindow = "{CANARY}"\n',
        f'[[models]]\nkey = "a"\nkind = "{CANARY}"\n',
        f'[[models]]\nkey = "a"\nupstream = "{CANARY}"\n',
    ],
)
def test_a_secret_that_looks_like_one_is_not_repeated(text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text + MODEL)

    told = str(raised.value) + repr(raised.value.mistakes)
    assert CANARY not in told
    assert "canary" not in told
    assert "abcdefghij" not in told


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (
            '[[upstreams]]\nurl = "http://me:hunter2@box:1234"\n',
            "2: upstreams[0].url: holds credentials, which do not stand here; write "
            "api_token_env or api_token_file",
        ),
        (
            '[[upstreams]]\nurl = "me:hunter2@box:1234"\n',
            "2: upstreams[0].url: holds credentials, which do not stand here; write "
            "api_token_env or api_token_file",
        ),
        (
            '[[upstreams]]\napi_token_env = "hunter2!"\nurl = "http://box"\n',
            "2: upstreams[0].api_token_env: is not the name of a variable; write one such as "
            '"LM_API_TOKEN", never the secret itself',
        ),
        (
            '[auth]\nadmin_keys = [{ name = "a", credential = "hunter2!" }]\n',
            "2: auth.admin_keys[0].credential: is not the name of a credential; write one such "
            'as "ward-3", never the secret itself',
        ),
        (
            '[auth]\nadmin_keys = ["hunter2"]\n',
            "2: auth.admin_keys[0]: this is no table; write [[auth.admin_keys]] and the keys below it",
        ),
        (
            '[auth]\nadmin_keys = [{ name = "a", value = "hunter2" }]\n',
            "2: auth.admin_keys[0].value: is unknown; write one of name, file, env, credential",
        ),
        (
            '[[upstreams]]\npassword = "hunter2"\nurl = "http://box"\n',
            "2: upstreams[0].password: is unknown; write one of name, url, api_token_env, "
            "api_token_file, max_loading, auto_evict, memory, sdk, connect_timeout, list_timeout",
        ),
        (
            '[server]\nadmin_key = "hunter2"\n',
            "2: server.admin_key: is unknown; write admin_listen",
        ),
    ],
)
def test_a_secret_that_looks_like_nothing_is_not_repeated_either(text: str, report: str) -> None:
    with pytest.raises(ConfigError) as raised:
        parse(text + MODEL)

    assert str(raised.value) == f"config.toml:{report}"
    assert "hunter2" not in repr(raised.value.mistakes)


def test_a_text_that_is_long_is_told_at_once_and_shortly() -> None:
    report = mistakes(f'{MODEL}ping_interval = "{"a" * 200_000}"\nwindow = "{"1:" * 100_000}"\n')

    assert len("".join(report)) < 500


# --- Any config ---

settings_of_everything = st.sampled_from(sorted(set(re.findall(r"(?m)^[a-z_]+(?= = )", EVERYTHING))))
values = st.one_of(
    st.text(max_size=30).map(lambda text: json.dumps(text)),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(
        ['"30"', "true", "[]", "{}", "[[]]", "2026-11-22", "08:00:00", '["a", 1]', "{ a = 1 }", '"\\u0007"']
    ),
    st.just(json.dumps(CANARY)),
)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(settings_of_everything, values), min_size=1, max_size=3),
    st.sampled_from([MODEL, EVERYTHING]),
)
def test_any_setting_with_any_value_is_a_config_or_a_report(
    changes: list[tuple[str, str]], text: str
) -> None:
    for name, value in changes:
        text = re.sub(rf"(?m)^{name} = .*$", lambda _, new=f"{name} = {value}": new, text)  # type: ignore[misc]

    told(text)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(0, len(EVERYTHING)),
    st.integers(0, 40),
    st.text(max_size=8) | st.sampled_from(["[", "]", '"', "=", "#"]),
)
@example(0, 0, "")
def test_any_damage_is_a_config_or_a_report(start: int, length: int, put: str) -> None:
    told(EVERYTHING[:start] + put + EVERYTHING[start + length :])


variables = st.sampled_from(
    [
        "__".join(["KEEPALIVE_" + header.strip("[]").replace(".", "__"), *["0"] * ("[[" in header), name])
        .upper()
        .replace("MODELS__PING", "MODELS__0__PING")
        for header, table in SECTIONS.items()
        for name in table.model_fields
    ]
) | st.from_regex(r"KEEPALIVE_(SERVER|MODELS|AUTH|X)?(__(0|2|KEY|LISTEN|CLIENT_KEYS|)){0,4}", fullmatch=True)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(variables, st.text(max_size=12) | st.sampled_from(["1", "true", "[]", "[[1]]", "{}"])))
def test_any_environment_is_a_config_or_a_report(environ: dict[str, str]) -> None:
    told(EVERYTHING, environ)


def told(text: str, environ: Mapping[str, str] | None = None) -> None:
    """The text gives a config, or a report that is fit for a terminal and keeps secrets."""
    found: tuple[Mistake, ...] = ()
    try:
        kept = parse(text, environ).kept
    except ConfigError as error:
        found, kept = error.mistakes, ()

    assert kept or found
    assert all(mistake.message and str(mistake).isprintable() for mistake in found)
    assert CANARY not in repr(found)


# --- The shipped file and the schema ---


def test_the_shipped_config_works_as_it_is_and_has_three_lines() -> None:
    lines = [line for line in SHIPPED.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    assert len(lines) == 3
    assert [kept.key for kept in parse(SHIPPED).kept] == ["qwen/qwen3-4b-2507"]


def test_every_commented_out_setting_of_the_shipped_config_works() -> None:
    found = parse(EVERYTHING)

    assert [(kept.upstream, kept.key) for kept in found.kept] == [
        ("local", "qwen/qwen3-4b-2507"),
        ("local", "text-embedding-nomic-embed-text-v1.5"),
        ("gpu", "text-embedding-nomic-embed-text-v1.5"),
        ("local", "qwen3-reranker-0.6b"),
    ]


def test_the_shipped_config_shows_every_setting() -> None:
    shown = tomllib.loads(EVERYTHING)
    tables: dict[type[BaseModel], list[dict[str, Any]]] = {
        config.Server: [shown["server"]],
        config.History: [shown["history"]],
        config.Upstream: shown["upstreams"],
        config.Defaults: [shown["defaults"]],
        config.Model: shown["models"],
        config.Ping: [model["ping"] for model in shown["models"] if isinstance(model.get("ping"), dict)],
        config.Prompt: shown["prompts"],
        config.AccessKey: shown["auth"]["client_keys"] + shown["auth"]["admin_keys"],
        config.Auth: [shown["auth"]],
    }

    missing = {kind.__name__: set(kind.model_fields) - set().union(*found) for kind, found in tables.items()}

    assert missing == {kind.__name__: set() for kind in tables}


def test_the_defaults_in_the_shipped_config_are_those_of_the_code() -> None:
    found = parse(EVERYTHING)
    examples = {
        "timezone",
        "state_dir",
        "path",
        "api_token_env",
        "auto_evict",
        "url",
        "default_model",
        "memory",
    }
    differing = {
        name
        for shown, default in (
            (found.server, config.Server()),
            (found.history, config.History()),
            (found.upstreams[0], Config().upstreams[0]),
            (found.defaults, config.Defaults()),
        )
        for name in type(shown).model_fields
        if getattr(shown, name) != getattr(default, name)
    }
    overrides = {name: getattr(found.models[0], name) for name in config.Defaults.model_fields}

    assert differing == examples - {"url"}
    assert overrides == config.Defaults().model_dump()


def test_the_committed_schema_is_that_of_the_code() -> None:
    committed = json.loads((PROJECT / "docs/config.schema.json").read_text(encoding="utf-8"))

    assert committed == config.schema(), "run: python -m keepalive.config > docs/config.schema.json"


def test_the_schema_accepts_what_the_code_accepts() -> None:
    schema = config.schema()

    jsonschema.Draft7Validator.check_schema(schema)
    for text in (MODEL, SHIPPED, EVERYTHING):
        jsonschema.Draft7Validator(schema).validate(tomllib.loads(text))


@pytest.mark.parametrize(
    "text",
    [
        "[server]\nport = 1",
        "[server]\nheartbeat = 5",
        "[defaults]\nmax_wait = '5'",
        "[[models]]\nkind = 'llm'",
        "[server]\nunlisted = 'keep'",
        "[[models]]\nkey = 'a'\nmemory = '9 GiB'",
        "[[models]]\nkey = 'a'\nkeep = 'never'",
        "[[models]]\nkey = 'a'\nping = 'on'",
        "[[models]]\nkey = 'a'\nping = { path = '/x' }",
        "[[models]]\nkey = 'a'\nping = { path = 'x', body = {} }",
        "[[models]]\nkey = 'a'\nstall_timeout = 'never'",
    ],
)
def test_the_schema_refuses_what_the_code_refuses(text: str) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft7Validator(config.schema()).validate(tomllib.loads(text))


def test_the_schema_explains_every_key() -> None:
    silent = [
        f"{name}.{key}"
        for name, table in config.schema()["$defs"].items()
        for key, found in table["properties"].items()
        if not found.get("description")
    ]

    assert silent == []


def test_editors_find_the_schema() -> None:
    assert SHIPPED.startswith("#:schema docs/config.schema.json\n")
