"""Secrets are read from where the config says, and no message shows them."""

from pathlib import Path

import pytest

from keepalive.config import AccessKey, Notify, Upstream
from keepalive.service.tokens import TokenError, of_callers, of_notify, of_upstream

SECRET = "sk-canary-4711"


def upstream(**where: str) -> Upstream:
    return Upstream(name="gpu", url="http://127.0.0.1:1234", **where)  # type: ignore[arg-type]


def message_of(*arguments: object) -> str:
    with pytest.raises(TokenError) as caught:
        of_upstream(*arguments)  # type: ignore[arg-type]
    return str(caught.value)


def test_an_upstream_that_names_no_token_has_none() -> None:
    assert of_upstream(upstream(), {"LM_API_TOKEN": SECRET}) is None


def test_a_token_comes_from_a_variable_without_the_white_space_around_it() -> None:
    assert of_upstream(upstream(api_token_env="LM_API_TOKEN"), {"LM_API_TOKEN": f" {SECRET}\n"}) == SECRET


@pytest.mark.parametrize("quote", ["'", '"'])
def test_quotes_around_what_a_variable_holds_do_not_belong_to_it(quote: str) -> None:
    environ = {"LM_API_TOKEN": f"{quote}{SECRET}{quote}", "TELL": f"{quote}json://a json://b{quote}"}

    assert of_upstream(upstream(api_token_env="LM_API_TOKEN"), environ) == SECRET
    assert of_notify(Notify(urls_env="TELL"), environ) == ("json://a", "json://b")


@pytest.mark.parametrize(
    "environ", [{}, {"LM_API_TOKEN": ""}, {"LM_API_TOKEN": " \n"}, {"LM_API_TOKEN": '""'}]
)
def test_a_variable_that_is_not_set_is_said(environ: dict[str, str]) -> None:
    assert message_of(upstream(api_token_env="LM_API_TOKEN"), environ) == (
        "upstreams 'gpu'.api_token_env: the environment variable LM_API_TOKEN is not set"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_token_comes_from_a_file(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "token").write_text(f"{SECRET}\n", encoding=encoding)

    token = of_upstream(upstream(api_token_file=str(tmp_path / "token")), {})

    assert token == SECRET


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        (b"", "is empty"),
        (b" \n\t\n", "is empty"),
        (b"\xff\xfe" + SECRET.encode(), "holds something that is not text; save it as UTF-8"),
        (f"{SECRET}\nsecond".encode(), "holds more than one word of plain characters"),
        (f"{SECRET} more".encode(), "holds more than one word of plain characters"),
        (f"{SECRET}\r\nX-Injected: 1".encode(), "holds more than one word of plain characters"),
        (f"{SECRET}\x00".encode(), "holds more than one word of plain characters"),
        (f"{SECRET}é".encode(), "holds more than one word of plain characters"),
    ],
)
def test_a_file_that_holds_no_token_is_said_without_its_content(
    tmp_path: Path, content: bytes, trouble: str
) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)

    message = message_of(upstream(api_token_file=str(path)), {})

    assert message == f"upstreams 'gpu'.api_token_file: {path} {trouble}"
    assert SECRET not in message


def test_a_file_that_is_missing_or_a_directory_is_said(tmp_path: Path) -> None:
    missing = message_of(upstream(api_token_file=str(tmp_path / "no")), {})
    folder = message_of(upstream(api_token_file=str(tmp_path)), {})

    assert missing.endswith("no cannot be read: No such file or directory")
    assert folder.endswith("cannot be read: Is a directory")


def test_a_token_comes_from_the_systemd_credential_of_its_upstream(tmp_path: Path) -> None:
    (tmp_path / "lm_token.gpu").write_text(SECRET)

    token = of_upstream(upstream(), {"CREDENTIALS_DIRECTORY": str(tmp_path)})

    assert token == SECRET


def test_a_credential_that_was_not_passed_means_no_token(tmp_path: Path) -> None:
    assert of_upstream(upstream(), {"CREDENTIALS_DIRECTORY": str(tmp_path)}) is None


def test_what_the_config_names_comes_before_a_credential(tmp_path: Path) -> None:
    (tmp_path / "lm_token.gpu").write_text("other")

    token = of_upstream(upstream(api_token_env="T"), {"T": SECRET, "CREDENTIALS_DIRECTORY": str(tmp_path)})

    assert token == SECRET


def test_callers_keys_come_by_name_from_each_of_the_three_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("one")
    (tmp_path / "ward").write_text("three")
    keys = [
        AccessKey(name="a", file=str(tmp_path / "file")),
        AccessKey(name="b", env="KEY_B"),
        AccessKey(name="c", credential="ward"),
    ]

    secrets = of_callers(keys, {"KEY_B": "two", "CREDENTIALS_DIRECTORY": str(tmp_path)}, "auth.admin_keys")

    assert secrets == {"a": "one", "b": "two", "c": "three"}


def test_a_callers_credential_without_systemd_says_what_to_add_to_the_unit() -> None:
    with pytest.raises(TokenError) as caught:
        of_callers([AccessKey(name="c", credential="ward")], {}, "auth.admin_keys")

    assert str(caught.value) == (
        "auth.admin_keys 'c': systemd passed no credentials; add LoadCredential= to the unit"
    )


def test_a_callers_credential_that_is_missing_is_an_error_and_not_an_open_door(tmp_path: Path) -> None:
    with pytest.raises(TokenError):
        of_callers([AccessKey(name="c", credential="ward")], {"CREDENTIALS_DIRECTORY": str(tmp_path)}, "auth")


def test_addresses_of_messages_are_words_and_no_mistake_shows_one(tmp_path: Path) -> None:
    by_name = Notify(urls_env="TELL")
    (tmp_path / "tell").write_text(f"json://a/{SECRET}\n\nmailto://b\n")

    assert of_notify(Notify(), {"TELL": "json://a"}) == ()
    assert of_notify(by_name, {"TELL": " json://a \n tgram://b/c "}) == ("json://a", "tgram://b/c")
    folder = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert of_notify(Notify(urls_credential="tell"), folder) == (f"json://a/{SECRET}", "mailto://b")
    with pytest.raises(TokenError, match="LoadCredential"):
        of_notify(Notify(urls_credential="tell"), {})
    assert of_notify(Notify(urls_file=str(tmp_path / "tell")), {}) == (f"json://a/{SECRET}", "mailto://b")
    for text, trouble in (("", "TELL is not set"), (SECRET, "TELL holds what is no address")):
        with pytest.raises(TokenError, match=trouble) as caught:
            of_notify(by_name, {"TELL": text})
        assert SECRET not in str(caught.value)
