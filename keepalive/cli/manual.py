"""The manual page, made from the command itself: `python -m keepalive.cli.manual` prints docs/keepalive.1."""

from collections.abc import Iterator, Sequence
from typing import Any

import typer.main

from keepalive import __version__
from keepalive.cli.app import app

ABOUT = """\
LM Studio drops models: on an idle timer, when another one is loaded, on a crash, on a restart. The next request then \
waits up to minutes in silence.
.B keepalive
keeps the models that its config names loaded, proves that each still answers, says at any moment what is warm, what \
is loading and why, and holds requests for a model that is not ready behind one single load.
.PP
Applications set their base URL to http://127.0.0.1:1235/v1. The status page is at http://127.0.0.1:9235/."""

FILES = (
    ("config.toml", "The config, when there is one here. \\fBkeepalive init\\fR writes it."),
    ("/etc/keepalive/config.toml", "The config, otherwise."),
    (
        "$STATE_DIRECTORY, else $XDG_STATE_HOME/keepalive, else ~/.local/state/keepalive",
        "The loads under way, so that a restart does not repeat them, and history.db, what happened to the models.",
    ),
)

ENVIRONMENT = (
    ("KEEPALIVE_CONFIG", "The config, before those above."),
    ("KEEPALIVE_ADMIN_URL", "The daemon's admin address, for the commands that ask it."),
    ("KEEPALIVE_ADMIN_KEY", "The key that they show, where [auth] demands one."),
    ("KEEPALIVE_SERVER__LISTEN, …", "Any setting: the table, two underscores and the key."),
    ("LM_API_TOKEN", "LM Studio's API token, for \\fBkeepalive init\\fR, where LM Studio wants one."),
    ("NO_COLOR", "No colours."),
)

EXIT = (
    ("0", "Well: all wanted models are warm, the config is good, nothing is wrong."),
    (
        "1",
        "\\fBstatus\\fR and its kin: models are warming up. \\fBdoctor\\fR: there are findings. Else: it failed.",
    ),
    ("2", "\\fBstatus\\fR and its kin: something fails. Else: a mistake on the command line."),
    ("3", "\\fBstatus\\fR and its kin: it cannot be told. \\fBcheck\\fR and \\fBrun\\fR: the config is bad."),
    ("130", "\\fBinit\\fR was ended by Ctrl-C, and has written nothing."),
)

SIGNALS = (
    ("SIGHUP", "\\fBrun\\fR reads its config again; a bad one changes nothing."),
    (
        "SIGTERM, SIGINT",
        "\\fBrun\\fR ends: open streams may finish, models stay loaded. The second time: at once.",
    ),
)


def page() -> str:
    """The whole page, as roff."""
    lines = [
        '.\\" Made by: make man',
        f'.TH KEEPALIVE 1 "" "keepalive {__version__}" "User Commands"',
        ".SH NAME",
        "keepalive \\- keeps LM Studio models loaded, and says what is warm, what is loading and why",
        ".SH SYNOPSIS",
        ".B keepalive",
        "\\fICOMMAND\\fR [\\fIOPTION\\fR]...",
        ".SH DESCRIPTION",
        ABOUT,
        ".SH COMMANDS",
    ]
    for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        lines += _command(name, command)
    for title, rows in (
        ("FILES", FILES),
        ("ENVIRONMENT", ENVIRONMENT),
        ("EXIT STATUS", EXIT),
        ("SIGNALS", SIGNALS),
    ):
        lines += [f".SH {title}", *_rows(rows)]
    return "\n".join(lines) + "\n"


def _command(name: str, command: Any) -> Iterator[str]:
    parameters = [p for p in command.params if "--help" not in p.opts]
    options = [p for p in parameters if p.param_type_name == "option"]
    arguments = [p for p in parameters if p.param_type_name == "argument"]
    words = [f"\\fI{_plain(p.metavar or p.name.upper())}\\fR" for p in arguments]
    yield f".SS keepalive {name} {' '.join([*words, *(['[OPTION]...'] if options else [])])}".rstrip()
    yield _plain(" ".join(command.help.split()))
    yield from _rows([(_option(p), _plain(p.help or "")) for p in options])
    yield from _rows([(word, _plain(p.help)) for word, p in zip(words, arguments, strict=True) if p.help])


def _option(option: Any) -> str:
    names = ", ".join(f"\\fB{_plain(name)}\\fR" for name in option.opts)
    return names if option.is_flag else f"{names} \\fI{_plain(option.metavar or option.name.upper())}\\fR"


def _rows(rows: Sequence[tuple[str, str]]) -> Iterator[str]:
    for name, text in rows:
        yield ".TP"
        yield name
        yield text


def _plain(text: str) -> str:
    """As text and not as roff: a dash stays a dash, and no line begins with a command."""
    text = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{text}" if text.startswith((".", "'")) else text


if __name__ == "__main__":
    typer.echo(page(), nl=False)
