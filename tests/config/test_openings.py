"""The files that `prime` names: what is taken, and one clear sentence for each that is not."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from keepalive.config import ConfigError, Mistake, Opening, read_openings, with_openings
from keepalive.config.openings import LARGEST
from tests.kit.configs import MODEL, mistakes, parse

SYSTEM = {"role": "system", "content": "You are a nurse."}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"maxLength": 10}}}]


def found(
    folder: Path, name: str, content: Any = None, more: str = ""
) -> tuple[Opening, tuple[Mistake, ...]]:
    """What comes of one file, given as bytes or as what is to be JSON."""
    if content is not None:
        written = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / name).write_bytes(written)
    config = folder / "config.toml"
    config.write_text(f"{MODEL}{more}prime = [{json.dumps(name)}]\n")
    openings, wrong = read_openings(parse(config.read_text()), config)
    (opening,) = openings["local", "gemma"]
    return opening, wrong


@pytest.mark.parametrize(
    "body",
    [
        {"messages": [SYSTEM], "tools": TOOLS},
        {
            "model": "gemma",
            "messages": [SYSTEM, {"role": "user", "content": "hi"}],
            "stream": True,
            "max_tokens": 9,
        },
        {"model": "GEMMA", "system": "You are a nurse.", "messages": [{"role": "user", "content": "hi"}]},
        {"system": "You are a nurse.", "tools": TOOLS},
        {"instructions": "You are a nurse.", "input": "hi"},
    ],
)
def test_the_body_of_a_chat_is_taken_as_it_is(body: dict[str, Any], tmp_path: Path) -> None:
    assert found(tmp_path, "agent.json", body) == (Opening("agent.json", body), ())


@pytest.mark.parametrize("name", ["agent.txt", "agent.md", "agent"])
def test_plain_text_is_a_system_message(name: str, tmp_path: Path) -> None:
    opening, wrong = found(tmp_path, name, "\ufeffYou are a nurse: é.".encode())

    assert opening.body == {"messages": [{"role": "system", "content": "You are a nurse: é."}]}
    assert wrong == ()


def test_a_body_that_is_called_otherwise_is_known_by_its_brace(tmp_path: Path) -> None:
    assert found(tmp_path, "agent.txt", {"messages": [SYSTEM]})[0].body == {"messages": [SYSTEM]}


def test_one_that_names_the_model_by_an_alias_means_it(tmp_path: Path) -> None:
    body = {"model": "Chat", "messages": [SYSTEM]}

    assert found(tmp_path, "agent.json", body, 'aliases = "chat"\n')[1] == ()


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("gone.json", None, "cannot be read: there is no such file"),
        (".", None, "is no file"),
        (
            "a.json",
            b'{"messages": [}',
            "is no JSON: Expecting value at line 1, column 15; mend it, or name plain text .txt",
        ),
        ("a.json", b"", "is no JSON: Expecting value at line 1, column 1; mend it, or name plain text .txt"),
        ("a.txt", b" \n", "is empty; write what the model is to have read"),
        ("a.txt", b"\xff\xfe", "is not UTF-8 text; save it as UTF-8"),
        (
            "a.json",
            b"[" * 100_000,
            "is no JSON that can be read: a number too long, or lists too deep in each other",
        ),
        ("a.json", [SYSTEM], 'is no request of a chat; write { "messages": [ … ], "tools": [ … ] }'),
        ("a.json", {"messages": []}, 'is no request of a chat; write { "messages": [ … ], "tools": [ … ] }'),
        (
            "a.json",
            {"messages": ["hi"]},
            'is no request of a chat; write { "messages": [ … ], "tools": [ … ] }',
        ),
        ("a.json", {"prompt": "hi"}, 'is no request of a chat; write { "messages": [ … ], "tools": [ … ] }'),
        (
            "a.json",
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "what is this"}, IMAGE]}]},
            "holds an image, and an opening is of words alone; leave it out",
        ),
        (
            "a.json",
            {"model": "qwen", "messages": [SYSTEM]},
            'asks for "qwen", and stands at "gemma"; leave model out',
        ),
        ("a.json", {"model": 7, "messages": [SYSTEM]}, 'asks for 7, and stands at "gemma"; leave model out'),
        (
            "a.json",
            b'{"messages": [{"role": "system", "content": "\\ud83d"}]}',
            "cannot be sent: messages[0].content holds half of a character, which cannot be sent; write it anew",
        ),
        ("a.json", b'{"messages": [{"role": "system", "content": NaN}]}', None),
    ],
)
def test_what_cannot_be_replayed_is_said_in_one_sentence_at_its_place(
    name: str, content: Any, sentence: str | None, tmp_path: Path
) -> None:
    opening, (wrong,) = found(tmp_path, name, content)

    assert str(wrong).startswith(f'{tmp_path}/config.toml:3: models[0].prime[0]: "{name}" {opening.wrong}')
    assert opening.body == {}
    if sentence is not None:
        assert opening.wrong == sentence


def test_a_file_of_50_megabytes_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(50_000_000)

    assert found(tmp_path, "large.json")[0].wrong == (
        f"is larger than {LARGEST >> 20} MiB, which is no opening; name a smaller file"
    )


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")

    assert found(tmp_path, "pipe.json")[0].wrong == "is no file"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read_is_said(tmp_path: Path) -> None:
    (tmp_path / "a.json").touch(mode=0)

    assert found(tmp_path, "a.json")[0].wrong == "cannot be read: Permission denied"


def test_a_tool_about_images_is_no_image(tmp_path: Path) -> None:
    source = {"type": "image", "source": {"type": "object"}}
    tools = [{"type": "function", "function": {"name": "draw", "parameters": {"properties": source}}}]

    assert found(tmp_path, "a.json", {"messages": [SYSTEM], "tools": tools})[1] == ()


def test_nothing_that_a_file_says_is_repeated(tmp_path: Path) -> None:
    opening, wrong = found(tmp_path, "a.json", b'{"messages": "CANARY", CANARY')

    assert "CANARY" not in f"{wrong}{opening}"
    assert "CANARY" not in repr(
        found(tmp_path, "b.json", {"messages": [{"role": "system", "content": "CANARY"}]})
    )


def test_openings_lie_beside_the_config_in_the_order_of_their_names_on_every_upstream(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt"):
        (tmp_path / name).write_text(name)
    servers = "".join(f'[[upstreams]]\nname = "{n}"\nurl = "http://10.0.0.{n}"\n' for n in (1, 2))
    config = parse(f'{servers}{MODEL}upstream = "1, 2"\nprime = ["two.txt", "learn", "{tmp_path}/one.txt"]\n')

    openings, wrong = read_openings(config, tmp_path / "config.toml")

    assert wrong == ()
    assert set(openings) == {("1", "gemma"), ("2", "gemma")}
    assert [one.file for one in openings["2", "gemma"]] == ["two.txt", f"{tmp_path}/one.txt"]
    assert [kept.prime for kept in config.kept] == [("two.txt", "learn", f"{tmp_path}/one.txt")] * 2


def test_one_name_needs_no_list() -> None:
    assert parse(f'{MODEL}prime = "learn"\n').kept[0].prime == ("learn",)


@pytest.mark.parametrize(
    ("line", "report"),
    [
        (
            'prime = ["a.txt", "a.txt"]',
            '3: models[0].prime[1]: "a.txt" stands there twice; leave one of them out',
        ),
        (
            'kind = "embedding"\nprime = "a.txt"',
            '4: models[0].prime: is for models that chat, and kind is "embedding"; leave it out',
        ),
        (
            'prime = ["""You are a nurse.\nCANARY"""]',
            '3: models[0].prime[0]: is no name of a file; write one such as "prompts/agent.json", or "learn"',
        ),
        ("prime = [7]", "3: models[0].prime[0]: 7 is no text; write it in quotes"),
        ("prime = true", '3: models[0].prime: true is no list; write one such as ["prompts/agent.json"]'),
    ],
)
def test_what_is_no_name_of_a_file_is_a_mistake_of_the_config(line: str, report: str) -> None:
    assert mistakes(f"{MODEL}{line}\n") == [report]


def test_a_config_that_has_changed_since_is_pointed_at_as_a_whole(tmp_path: Path) -> None:
    settings = parse(f'{MODEL}prime = "gone.txt"\n')

    (mistake,) = read_openings(settings, tmp_path / "gone.toml")[1]

    assert str(mistake).startswith(f"{tmp_path}/gone.toml: models[0].prime[0]: ")


def test_without_a_file_the_environment_is_to_blame() -> None:
    (mistake,) = read_openings(
        parse("", {"KEEPALIVE_MODELS__0__KEY": "g", "KEEPALIVE_MODELS__0__PRIME": "gone"}), None
    )[1]

    assert str(mistake) == ('environment: models[0].prime[0]: "gone" cannot be read: there is no such file')
    with pytest.raises(ConfigError, match="gone"):
        raise ConfigError([mistake])


def test_a_name_that_is_none_hides_no_other_file_and_is_told_once(tmp_path: Path) -> None:
    text = MODEL + 'prime = ["gone.json", " ", "learn"]\n'
    with pytest.raises(ConfigError) as wrong:
        parse(text)

    assert [mistake.key for mistake in with_openings(wrong.value, tmp_path / "config.toml").mistakes] == [
        "models[0].prime[1]",
        "models[0].prime[0]",
    ]
