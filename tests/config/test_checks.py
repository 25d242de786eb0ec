"""Names that contradict each other, and bounds that do: who is meant, and how long silence may last."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keepalive import config
from keepalive.config import ConfigError
from tests.kit.configs import MODEL, mistakes, parse

TWO = (
    '[[upstreams]]\nname = "a"\nurl = "http://10.0.0.1"\n[[upstreams]]\nname = "b"\nurl = "http://10.0.0.2"\n'
)


def model(key: str, *aliases: str, upstream: str = "") -> str:
    on = f'upstream = "{upstream}"\n' if upstream else ""
    return f"[[models]]\nkey = {json.dumps(key)}\naliases = {json.dumps(aliases)}\n{on}"


# --- Aliases ---


def test_an_alias_of_a_model_on_two_upstreams_is_its_alias_on_both() -> None:
    found = parse(TWO + model("gemma", "chat", upstream="a, b"))

    assert [(kept.upstream, kept.aliases) for kept in found.kept] == [("a", ("chat",)), ("b", ("chat",))]


@pytest.mark.parametrize("other", ["gemma", "gemma-mlx"])
def test_an_alias_may_stand_on_each_upstream_as_a_key_may(other: str) -> None:
    found = parse(TWO + model("gemma", "chat", upstream="a") + model(other, "Chat", upstream="b"))

    assert [kept.aliases for kept in found.kept] == [("chat",), ("Chat",)]


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (
            model("gemma", "chat", "Chat"),
            ['3: models[0].aliases[1]: "Chat" stands there twice; leave one of them out'],
        ),
        (
            model("gemma", "GEMMA"),
            ['3: models[0].aliases[0]: "GEMMA" is its key, by which it is found already; leave it out'],
        ),
        (
            model("gemma", "Qwen") + model("qwen"),
            ['3: models[0].aliases[0]: "Qwen" is the key of models[1], which comes first; leave it out'],
        ),
        (
            TWO + model("gemma", "qwen", upstream="a") + model("qwen", upstream="b"),
            ['9: models[0].aliases[0]: "qwen" is the key of models[1], which comes first; leave it out'],
        ),
        (
            model("gemma", "chat") + model("qwen", "big", "CHAT"),
            [
                '6: models[1].aliases[1]: "CHAT" is an alias of models[0] on "local" too; '
                "leave one of them out"
            ],
        ),
        (
            TWO + model("gemma", "chat", upstream="a") + model("qwen", "chat", upstream="b, a"),
            ['13: models[1].aliases[0]: "chat" is an alias of models[0] on "a" too; leave one of them out'],
        ),
        (
            model("gemma", "chat", "") + model("qwen", "chat"),
            [
                '3: models[0].aliases[1]: "" is not one line; write 1 to 256 characters, no space around them',
                '6: models[1].aliases[0]: "chat" is an alias of models[0] on "local" too; leave one of them out',
            ],
        ),
        (
            model("gemma", "a\u0007b"),
            [
                '3: models[0].aliases[0]: "a\\x07b" is not one line; write 1 to 256 characters, '
                "no space around them"
            ],
        ),
        (
            model("gemma", "a" * 257),
            [
                f'3: models[0].aliases[0]: "{"a" * 59}…" is not one line; write 1 to 256 characters, '
                "no space around them"
            ],
        ),
        (
            model("", "qwen/qwen3-4b-2507"),
            ['2: models[0].key: "" is not one line; write 1 to 256 characters, no space around them'],
        ),
        (
            TWO + model("gemma", "chat", upstream="c") + model("qwen", "chat", upstream="c"),
            [
                '10: models[0].upstream: "c" is no upstream; write "a" or "b"',
                '14: models[1].upstream: "c" is no upstream; write "a" or "b"',
            ],
        ),
    ],
)
def test_an_alias_with_a_mistake(text: str, report: list[str]) -> None:
    assert mistakes(text) == report


def test_an_alias_that_is_none_does_not_hide_what_is_wrong_with_the_others() -> None:
    text = MODEL + 'aliases = [1, "y"]\n[[models]]\nkey = "z"\naliases = ["y", " ", "Z"]\n'

    places = [said.partition(": ")[2].partition(": ")[0] for said in mistakes(text)]

    assert places == [f"models[{n}].aliases[{m}]" for n, m in ((0, 0), (1, 1), (1, 0), (1, 2))]


def places(text: str, environ: dict[str, str] | None = None) -> set[str]:
    """Where something is wrong."""
    return {said.split(": ")[1] for said in mistakes(text, environ or {})}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (
            TWO + model("gemma", upstream="a") + '[[models]]\nkey = "Gemma"\nupstream = ["a", "?", "c"]\n',
            {"models[1].upstream[1]", "models[1].key", "models[1].upstream"},
        ),
        (
            TWO.replace('"b"', '"?"') + model("gemma", "x", upstream="a") + model("qwen", "x", upstream="a"),
            {"upstreams[1].name", "models[1].aliases[0]"},
        ),
        (
            TWO.replace('"b"', '"?"') + model("gemma", upstream="a") + model("gemma", upstream="a, b"),
            {"upstreams[1].name", "models[1].key"},
        ),
        (
            MODEL + 'prime = ["x", " ", "x", "learn", "prompts/agent.json"]\n',
            {f"models[0].prime[{n}]" for n in (1, 2)},
        ),
        (
            MODEL + '[notify]\nurls_env = "A"\nurls_file = "/b"\nevents = ["fails"]\n',
            {"notify.events[0]", "notify.urls_file"},
        ),
        (MODEL + '[notify]\nafter = "soon"\n', {"notify.after", "notify.urls_env"}),
        (
            MODEL
            + '[cluster]\netcd = ["https://e:2379", "e"]\nca = "/ca.pem"\ncert = "/c.pem"\nuser = "k"\n',
            {"cluster.etcd[1]", "cluster.cert", "cluster.user"},
        ),
        (MODEL + '[cluster]\netcd = 1\nuser = "k"\n', {"cluster.etcd", "cluster.user"}),
        (MODEL + '[cluster]\nuser = "k"\n', {"cluster", "cluster.user"}),
    ],
)
def test_what_is_wrong_in_a_list_hides_nothing_that_is_wrong_elsewhere(text: str, wrong: set[str]) -> None:
    assert places(text) == wrong


def test_what_is_wrong_in_the_list_of_a_variable_hides_nothing_else_in_it() -> None:
    variable = {"KEEPALIVE_MODELS__0__ALIASES": "chat, , gemma"}

    assert places(MODEL, variable) == {"models[0].aliases[1]", "models[0].aliases[2]"}


def test_what_stands_in_for_a_wrong_alias_is_nobodys_name() -> None:
    text = '[server]\ndefault_model = "gpt-4o-mini"\n' + MODEL + "aliases = [1]\n"
    prompt = '[[prompts]]\nid = 1\ntitle = "t"\nmodel = "gpt-4o-mini"\ncontent = "c"\n'

    assert places(text + prompt) == {"models[0].aliases[0]", "prompts[0].model"}


def test_advice_names_each_choice_once_and_only_where_the_value_could_stand() -> None:
    upstreams = "".join(f'[[upstreams]]\nname = "{n}"\nurl = "http://h:{p}"\n' for n, p in ("a1", "a2", "c3"))
    said = mistakes(upstreams + MODEL + '[history]\nkeep = "90d"\n')

    assert (
        'models[0].upstream: is missing, and there are several; write "a" or "c", or a list of them'
        in "".join(said)
    )
    assert said[-1].endswith("history.keep: is unknown; write path")


def test_an_alias_in_a_variable_is_told_with_its_name() -> None:
    report = mistakes(MODEL, {"KEEPALIVE_MODELS__0__ALIASES": "chat, gemma"})

    assert report == [
        'KEEPALIVE_MODELS__0__ALIASES: models[0].aliases[1]: "gemma" is its key, by which it is found '
        "already; leave it out"
    ]


names = st.sampled_from(["gemma", "Gemma", "qwen", "chat", "CHAT", "gemma@q4"])


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(names, st.lists(names, max_size=3), st.sampled_from(["a", "b", "a, b"])),
        min_size=1,
        max_size=3,
    )
)
def test_where_a_config_is_taken_a_name_means_one_model_on_each_upstream(
    models: list[tuple[str, list[str], str]],
) -> None:
    text = TWO + "".join(model(key, *aliases, upstream=upstream) for key, aliases, upstream in models)
    kept = []
    try:
        kept = list(parse(text).kept)
    except ConfigError:
        keys = {key.lower() for key, _, _ in models}
        said = [
            (name.lower(), home)
            for key, aliases, upstream in models
            for name in (key, *aliases)
            for home in upstream.split(", ")
        ]

        assert len(set(said)) < len(said) or any(a.lower() in keys for _, names, _ in models for a in names)
    called = [(one.upstream, name.lower()) for one in kept for name in (one.key, *one.aliases)]

    assert len(set(called)) == len(called)


# --- The default model ---


@pytest.mark.parametrize("name", ["gemma", "GEMMA", "chat", "Chat", "gemma@q4_k_m", "Gemma@Q4"])
def test_the_default_model_is_one_that_is_kept_by_any_of_its_names(name: str) -> None:
    server = parse(f'[server]\ndefault_model = "{name}"\n' + model("gemma", "chat")).server

    assert server.default_model == name


def test_a_key_may_hold_its_variant_and_be_the_default() -> None:
    server = parse('[server]\ndefault_model = "acme/tiny@q4"\n' + model("acme/tiny@q4")).server

    assert server.default_model == "acme/tiny@q4"


def test_without_a_default_model_lm_studio_decides() -> None:
    assert parse(MODEL).server.default_model is None


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("gema", '"gemma"'),
        ("gema@q4_k_m", '"gemma"'),
        ("gemma@", '"gemma"'),
        ("chats", '"chat"'),
        ("chat@q4_k_m", '"chat"'),
        ("llama-3", 'a key or an alias of one of them, such as "gemma"'),
    ],
)
def test_a_default_model_that_is_not_kept_is_a_mistake_that_names_the_nearest(name: str, advice: str) -> None:
    report = mistakes(f'[server]\ndefault_model = "{name}"\n' + model("gemma", "chat"))

    assert report == [f'2: server.default_model: "{name}" is none of [[models]]; write {advice}']


@pytest.mark.parametrize("wrong", [model("gemma", ""), model("", "x"), "models = ['gemma']\n"])
def test_a_default_model_that_may_be_the_one_that_is_wrong_is_no_second_mistake(wrong: str) -> None:
    text = f'server.default_model = "llama-3"\n{wrong}'

    assert [line.partition(":")[0] for line in mistakes(text)] == [
        str(text[: text.index('""' if '""' in wrong else "models =")].count("\n") + 1)
    ]


# --- Prompts ---


def test_a_prompt_that_names_an_alias_is_told_the_key() -> None:
    report = mistakes(
        model("gemma", "gpt-4o-mini")
        + '[[prompts]]\nid = 1\ntitle = "t"\nmodel = "gpt-4o-mini"\ncontent = "c"\n'
    )

    assert report == ['7: prompts[0].model: "gpt-4o-mini" is no configured model; write "gemma"']


# --- Silence ---


@pytest.mark.parametrize(
    ("defaults", "own", "seconds"),
    [
        ("", "", 900.0),
        ('stall_timeout = "off"', "", None),
        ('stall_timeout = "off"', 'stall_timeout = "5s"', 5.0),
        ('stall_timeout = "1h"', 'stall_timeout = "off"', None),
        ('stall_timeout = "1h"', "", 3600.0),
    ],
)
def test_silence_ends_when_the_model_says_else_when_the_defaults_say(
    defaults: str, own: str, seconds: float | None
) -> None:
    (kept,) = parse(f"[defaults]\n{defaults}\n{MODEL}{own}\n").kept

    assert kept.stall_timeout == seconds


def test_nobody_is_blamed_for_a_bound_that_nobody_wrote() -> None:
    (kept,) = parse(f'[server]\nheartbeat = "1h"\n{MODEL}').kept

    assert kept.stall_timeout == 900.0


@pytest.mark.parametrize(
    ("text", "report"),
    [
        (
            f'[server]\nheartbeat = "30s"\n[defaults]\nstall_timeout = "20s"\n{MODEL}',
            ['4: defaults.stall_timeout: "20s" is below server.heartbeat; write "30s" or more, or "off"'],
        ),
        (
            f'[defaults]\nstall_timeout = "2s"\n{MODEL}stall_timeout = "1s"\n',
            [
                '2: defaults.stall_timeout: "2s" is below server.heartbeat; write "5s" or more, or "off"',
                '5: models[0].stall_timeout: "1s" is below server.heartbeat; write "5s" or more, or "off"',
            ],
        ),
        (
            f'[server]\nheartbeat = 30\n[defaults]\nstall_timeout = "20s"\n{MODEL}',
            ['2: server.heartbeat: 30 has no unit; write "30s" or "30m"'],
        ),
    ],
)
def test_an_answer_is_not_given_up_before_its_silence_is_told(text: str, report: list[str]) -> None:
    assert mistakes(text) == report


def test_a_bound_of_one_heartbeat_is_enough() -> None:
    (kept,) = parse(f'[server]\nheartbeat = "30s"\n{MODEL}stall_timeout = "30s"\n').kept

    assert kept.stall_timeout == config.seconds("30s")


# --- Who is told ---


@pytest.mark.parametrize(
    ("table", "report"),
    [
        (
            'events = ["failing"]',
            '3: notify.urls_env: is missing; write urls_env = "KEEPALIVE_TELL", the variable that holds where to',
        ),
        (
            'urls_env = "A"\nurls_file = "/b"',
            "5: notify.urls_file: stands beside urls_env, and addresses have one place; leave one of them out",
        ),
        ('urls_env = "A"\nafter = "0"', '5: notify.after: "0" has no unit; write "0s"'),
        ('urls = "json://x"', "4: notify.urls: is unknown; write urls_env"),
        ('urls_env = "A"\nevents = ["fails"]', '5: notify.events[0]: "fails" is not known; write "failing"'),
        (
            'urls_env = "slack://token"',
            '4: notify.urls_env: is not the name of a variable; write one such as "LM_API',
        ),
    ],
)
def test_whoever_is_to_be_told_has_one_address_and_known_events(table: str, report: str) -> None:
    [said] = mistakes(MODEL + "[notify]\n" + table + "\n")

    assert said.startswith(report)


def test_events_are_told_in_one_text_as_in_a_list() -> None:
    found = parse(MODEL + '[notify]\nurls_file = "/b"\nevents = "failing, evicted"\nafter = "5m"\n').notify

    assert (found.on, found.events, found.after, found.pause) == (True, ("failing", "evicted"), 300.0, 900.0)
    assert not parse(MODEL).notify.on


ETCD = 'etcd = ["http://10.0.0.1:2379"]'


@pytest.mark.parametrize(
    ("table", "report"),
    [
        (
            'name = "ward"',
            '3: cluster: etcd is missing; write etcd = ["http://10.0.0.1:2379"], where it listens',
        ),
        (
            'etcd = "10.0.0.1:2379"',
            'etcd[0]: "10.0.0.1:2379" is not scheme, host and port; write "http://10.0.0.1:2379"',
        ),
        (
            'etcd = "http://u:p@10.0.0.1:2379"',
            "etcd[0]: holds credentials, which do not stand here; write user and",
        ),
        (ETCD + '\nttl = "1s"', '5: cluster.ttl: "1s" is out of range; write one from "3s" to "5m"'),
        (ETCD + '\ninstance = "a b"', '5: cluster.instance: "a b" is no name; write letters and digits'),
        (
            ETCD + '\nuser = "k"',
            '5: cluster.user: has no password; write password_file = "/etc/keepalive/etcd_',
        ),
        (
            ETCD + '\npassword_env = "P"',
            '3: cluster: user is missing, whose password that is; write user = "keepal',
        ),
        (
            ETCD + '\nuser = "k"\npassword_env = "P"\npassword_file = "/p"',
            "7: cluster.password_file: stands beside",
        ),
        (ETCD + '\nca = "/ca.pem"', '5: cluster.ca: is of no use with "http://10.0.0.1:2379"; write https'),
        (
            'etcd = "https://e:2379"\ncert = "/c.pem"',
            "5: cluster.cert: is of no use without key; write key = ",
        ),
        (ETCD + '\npassword = "secret"', "5: cluster.password: is unknown; write password_"),
    ],
)
def test_what_is_wrong_with_the_cluster_is_said_with_what_to_write(table: str, report: str) -> None:
    [said] = mistakes(MODEL + "[cluster]\n" + table + "\n")

    assert report in said
    assert "secret" not in said


def test_without_the_table_there_is_no_cluster_and_with_it_one_of_these_defaults() -> None:
    found = parse(MODEL + f"[cluster]\n{ETCD}\n").cluster

    assert not parse(MODEL).cluster.on
    assert (found.on, found.name, found.instance, found.ttl) == (True, "keepalive", None, 10.0)
