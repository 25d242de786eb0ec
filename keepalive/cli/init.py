"""`keepalive init`: asks LM Studio what it has, and writes a config with what was found.

It lists, which loads nothing. Nothing is written before everything is known, what is written was read as `check`
reads it, and it is there whole or not at all.
"""

import asyncio
import contextlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from textwrap import wrap
from typing import Any

from keepalive import config
from keepalive.config import ConfigError, Upstream
from keepalive.core.errors import KeepaliveError, TimedOut, Unauthorized, Unreachable
from keepalive.core.facts import Entry, Tier, fold_key
from keepalive.lmstudio.client import Client, Listing
from keepalive.service import tokens

USUAL = "http://127.0.0.1:1234"
# LM Studio answers in a moment, and while it loads a large model after a minute or two.
PATIENCE = 120.0
# After this long whoever sits there is told that it is not us who stand still.
SLOW = 3.0
# The variables in which LM Studio's own programs look for its token.
TOKEN_VARIABLES = ("LM_API_TOKEN", "LMSTUDIO_API_TOKEN")
# As many models as a screen has lines, and as a file has room for beside what is meant.
SHOWN = 30
ALSO_THERE = 20

Say = Callable[[str], None]


class InitError(KeepaliveError):
    """There is nothing to write; `str()` says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Found:
    """A server that answers, and its models: those in memory first."""

    upstream: Upstream
    tier: Tier
    entries: tuple[Entry, ...]
    listing: Mapping[str, Entry]

    @property
    def loaded(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self.entries if entry.instances)


# --- what is there ------------------------------------------------------------------------------------


def usual_urls(home: Path) -> list[str]:
    """Where LM Studio listens on a machine as it comes, and where it noted that it listened last."""
    urls = [USUAL]
    for folder in (_home_of_lm_studio(home), home / ".lmstudio", home / ".cache/lm-studio"):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
            port = json.loads((folder / ".internal/http-server-config.json").read_bytes())["port"]
            if isinstance(port, int) and 0 < port < 2**16:
                urls.append(f"http://127.0.0.1:{port}")
    return list(dict.fromkeys(urls))


def _home_of_lm_studio(home: Path) -> Path:
    try:
        return Path((home / ".lmstudio-home-pointer").read_text().strip())
    except (OSError, ValueError):
        return home / ".lmstudio"


def upstream_at(url: str, token_env: str | None, token_file: str | None) -> Upstream:
    """The server that a person means by `url`. InitError says what to write instead."""
    url = url if "://" in url else f"http://{url}"
    server: dict[str, Any] = {"url": url, "api_token_env": token_env, "api_token_file": token_file}
    lines = [f"{name} = {_text(value)}" for name, value in server.items() if value is not None]
    try:
        probe = config.parse("\n".join(["[[upstreams]]", *lines, "[[models]]", 'key = "x"']), "", {})
    except ConfigError as error:
        options = {"url": "--url", "api_token_env": "--token-env", "api_token_file": "--token-file"}
        said = {options.get(m.key.rpartition(".")[2], m.key): m.message for m in error.mistakes}
        raise InitError("\n".join(f"{option}: {message}" for option, message in said.items())) from error
    return probe.upstreams[0]


async def find(
    candidates: Sequence[Upstream], environ: Mapping[str, str], say: Say, *, patience: float = PATIENCE
) -> Found:
    """The first of them that answers. InitError when none does, or when it is of no use."""
    trouble: list[str] = []
    for candidate in candidates:
        try:
            upstream, listing = await _ask(candidate, environ, say, patience)
        except Unreachable as error:
            trouble.append(str(error))
        except Unauthorized:
            raise InitError(_wants_token(candidate)) from None
        except TimedOut:
            trouble.append(f"{candidate.url} did not answer within {patience:.0f} s; is LM Studio stuck?")
        except KeepaliveError as error:
            trouble.append(str(error))
        else:
            return _found(upstream, listing)
    elsewhere = "Where it listens elsewhere: keepalive init --url http://HOST:PORT"
    start = "Start LM Studio's server (its Developer tab, or: lms server start) and try again."
    raise InitError("\n".join([*trouble, start, elsewhere]))


async def _ask(
    upstream: Upstream, environ: Mapping[str, str], say: Say, patience: float
) -> tuple[Upstream, Listing]:
    """Its listing, and with which token it was had."""
    token = tokens.of_upstream(upstream, environ)
    try:
        return upstream, await _list(upstream, token, say, patience)
    except Unauthorized:
        variable = next((name for name in TOKEN_VARIABLES if environ.get(name)), None)
        if token is not None or variable is None:
            raise
    upstream = upstream.model_copy(update={"api_token_env": variable})
    return upstream, await _list(upstream, tokens.of_upstream(upstream, environ), say, patience)


async def _list(upstream: Upstream, token: str | None, say: Say, patience: float) -> Listing:
    async with Client(upstream.name, upstream.url, token=token, list_timeout=patience) as client:
        asking = asyncio.ensure_future(client.listing())
        try:
            if not (await asyncio.wait((asking,), timeout=SLOW))[0]:
                say(f"{upstream.url} is slow to answer; waiting for it, Ctrl-C ends that.")
            return await asking
        finally:
            asking.cancel()


def _wants_token(upstream: Upstream) -> str:
    if upstream.api_token_env or upstream.api_token_file:
        place = upstream.api_token_env or upstream.api_token_file
        return f"LM Studio at {upstream.url} does not accept the API token in {place}."
    return (
        f"LM Studio at {upstream.url} wants an API token, made in its Developer tab, Server Settings.\n"
        f"Put it into the variable {TOKEN_VARIABLES[0]} and try again. Another variable: --token-env NAME; a file: "
        "--token-file FILE."
    )


def _found(upstream: Upstream, listing: Listing) -> Found:
    # A name that cannot stand in a config is nothing to offer.
    every = {entry.key: entry for entry in listing.entries.values() if _is_key(entry.key)}
    if not every:
        raise InitError(
            f"{_sentence(_server(listing.tier))} at {upstream.url} has no models yet. Download one there (or: lms get "
            "qwen/qwen3-4b-2507) and try again."
        )
    entries = sorted(every.values(), key=lambda e: (not e.instances, e.kind != "llm", e.key.lower()))
    return Found(upstream, listing.tier, tuple(entries), listing.entries)


def _is_key(key: str) -> bool:
    return key.isprintable() and key == key.strip() and len(key) <= 256


# --- which of it is meant -----------------------------------------------------------------------------


def named(found: Found, names: Iterable[str]) -> tuple[str, ...]:
    """The keys that somebody named, as LM Studio writes them; a variant (`key@q4_k_m`) stays one."""
    keys = []
    for name in names:
        entry = found.listing.get(fold_key(name))
        if entry is None:
            known = [entry.key for entry in found.entries[:1000]]
            near = get_close_matches(name, known, n=3, cutoff=0.4) or known[:3]
            raise InitError(f"--model: {found.upstream.url} lists no {name}; it lists {', '.join(near)}")
        keys.append(name if fold_key(entry.key) != fold_key(name) else entry.key)
    return tuple(dict.fromkeys(keys))


def unasked(found: Found) -> tuple[str, ...]:
    """What is meant where nobody can be asked: what is in memory now."""
    if not found.loaded:
        known = ", ".join(entry.key for entry in found.entries[:SHOWN])
        why = "it does not show what is loaded" if found.tier is Tier.OPENAI else "no model is loaded now"
        raise InitError(f"{why}; name those to keep by --model KEY, among: {known}")
    return tuple(entry.key for entry in found.loaded)


def asked(found: Found, ask: Callable[[str], str], say: Say, width: int) -> tuple[str, ...]:
    """What a person at a terminal chooses."""
    shown = found.entries
    say("\n".join(_rows(found, shown, width)))
    loaded = ", Enter for those loaded now" if found.loaded else ""
    question = f"Which shall stay loaded? Numbers (1,3-4), part of a name{loaded}: "
    while True:
        answer = ask(question).strip()
        if not answer and found.loaded:
            return unasked(found)
        numbers = _numbers(answer, len(found.entries))
        if numbers:
            return tuple(found.entries[number - 1].key for number in numbers)
        wanted = fold_key(answer)
        matching = tuple(e for e in found.entries if wanted and wanted in fold_key(e.key))
        exact = [e.key for e in matching if fold_key(e.key) == wanted]
        if exact or len(matching) == 1:
            return tuple(exact or [matching[0].key])
        if matching:
            say("\n".join(_rows(found, matching, width)))
        else:
            say(f"There is no {answer!r} among them." if answer else "Nothing is loaded now: name one.")


def _numbers(answer: str, most: int) -> tuple[int, ...]:
    """1,3-4 as numbers; none where it is anything else."""
    numbers: list[int] = []
    for part in re.split(r"[\s,]+", answer.strip(", ")):
        span = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part, re.ASCII)
        first, last = (int(span[1]), int(span[2] or span[1])) if span else (0, 0)
        if not 1 <= first <= last <= most:
            return ()
        numbers += range(first, last + 1)
    return tuple(dict.fromkeys(numbers))


def _rows(found: Found, entries: Sequence[Entry], width: int) -> list[str]:
    """A line for each, or two where both do not fit beside each other."""
    count = f"{len(found.entries)} model{'s' if len(found.entries) != 1 else ''}"
    head = f"{_sentence(_server(found.tier))} at {found.upstream.url} has {count}:"
    if len(entries) < len(found.entries):
        head = f"Of these {count} {len(entries)} have that in their name:"
    rows = [*wrap(head, max(20, width)), ""]
    places = {entry.key: number for number, entry in enumerate(found.entries, 1)}
    margin = len(str(len(found.entries)))
    for entry in entries[:SHOWN]:
        name, about = f"{places[entry.key]:>{margin}}  {entry.key}", about_model(entry)
        rows += (
            [f"{name}  {about}"] if len(name) + len(about) + 2 <= width else [name, f"{'':{margin}}  {about}"]
        )
    if len(entries) > SHOWN:
        rows += wrap(f"… and {len(entries) - SHOWN} more: a part of a name shows fewer", max(20, width))
    return [*rows, ""]


def about_model(entry: Entry) -> str:
    """What a listing says of a model, in a few words."""
    context = entry.instances[0].context_length if entry.instances else None
    parts = [
        size(entry.size_bytes) if entry.size_bytes else "",
        "embedding" if entry.kind == "embedding" else "",
        "loaded" if entry.instances else "",
        f"context {context} of {entry.context_max}" if context and entry.context_max else "",
        f"context up to {entry.context_max}" if entry.context_max and not context else "",
    ]
    return ", ".join(part for part in parts if part)


def size(count: float) -> str:
    """As LM Studio and the makers of disks count."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{max(1, round(count / 1e6))} MB"


def _server(tier: Tier) -> str:
    names = {Tier.V1: "LM Studio (0.4 or newer)", Tier.V0: "LM Studio (0.3)", Tier.LLAMA: "llama-server"}
    return names.get(tier, "a server that does not show what is loaded")


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


# --- the file -----------------------------------------------------------------------------------------


def document(found: Found, keys: Sequence[str]) -> str:
    """The config, with what was found in its comments. It is read before anybody sees it."""
    upstream = found.upstream
    lines = [
        f"# Written by `keepalive init` for {_server(found.tier)} at {upstream.url}.",
        "# `keepalive check` finds every mistake in this file, `keepalive run` starts with it. A running daemon reads",
        "# it again at SIGHUP. Where not all models fit into memory, the first one here is the most important one.",
        *_of_tier(found.tier),
        "",
        "[[upstreams]]",
        f"name = {_text(upstream.name)}",
        f"url = {_text(upstream.url)}",
    ]
    if upstream.api_token_env:
        lines.append(
            f"api_token_env = {_text(upstream.api_token_env)}  # where its token is; never the token itself"
        )
    elif upstream.api_token_file:
        lines.append(f"api_token_file = {_text(upstream.api_token_file)}")
    else:
        lines.append('#api_token_env = "LM_API_TOKEN"  # where it wants a token: the variable that holds it')
    for key in keys:
        lines += ["", *_table(key, found.listing[fold_key(key)], found.tier)]
    others = [entry for entry in found.entries if entry.key not in keys]
    if others:
        lines += ["", "# Also there. Take away the # in front of a model's two lines to keep it loaded, too."]
    for entry in others[:ALSO_THERE]:
        lines += [f"#[[models]]  # {about_model(entry)}".rstrip("# "), f"#key = {_text(entry.key)}"]
    if len(others) > ALSO_THERE:
        lines.append(f"# … and {len(others) - ALSO_THERE} more: `lms ls` shows them all.")
    lines += [
        "",
        "# The defaults of what is changed most; docs/config.schema.json and config.toml have all there is.",
        "#[server]",
        '#listen = "127.0.0.1:1235"        # applications set their base URL to http://this/v1',
        '#admin_listen = "127.0.0.1:9235"  # the status page, metrics and probes',
    ]
    text = "\n".join(lines) + "\n"
    config.parse(text, "what was to be written", {})
    return text


def _of_tier(tier: Tier) -> list[str]:
    if tier is Tier.V1:
        return []
    if tier is Tier.LLAMA:
        return ["# How each model is loaded, its context for one, say the presets of llama-server's router."]
    if tier is Tier.V0:
        return ["# LM Studio 0.3 loads on demand alone, with an idle timer, and may keep a single model so."]
    return ["# It does not show what is loaded, so models are kept warm by pings alone."]


def _table(key: str, entry: Entry, tier: Tier) -> list[str]:
    about = about_model(entry)
    lines = [*([f"# {about}"] if about else []), "[[models]]", f"key = {_text(key)}"]
    if tier is Tier.LLAMA:
        return lines
    context = entry.instances[0].context_length if entry.instances else None
    if entry.kind == "llm" and context:
        lines.append(
            f"context_length = {context}  # as it is loaded now; LM Studio decides without this line"
        )
    elif entry.kind == "llm" and entry.context_max:
        lines.append(
            f"#context_length = {min(8192, entry.context_max)}  # LM Studio decides without this line"
        )
    return lines


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False)


def refuse(path: Path, *, force: bool) -> None:
    """Says before anybody has chosen anything what would fail in the end."""
    if os.path.lexists(path) and not force:
        raise InitError(f"{path} is there already; another file: -c FILE; --force writes over this one")
    if path.is_dir():
        raise InitError(f"{path} is a folder; name a file by -c FILE")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise InitError(f"there is no folder {folder}; make it, or name another file by -c FILE")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise InitError(
            f"{path} cannot be written: {folder} is not yours to write in; name another by -c FILE"
        )


def write(path: Path, text: str, *, force: bool) -> None:
    """The file, whole, or an InitError and nothing. Never over one that came meanwhile, without `force`."""
    path = path.resolve()
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if force:
            with contextlib.suppress(FileNotFoundError):
                shutil.copymode(path, draft)
            draft.replace(path)
        else:
            _put(draft, path)
    except FileExistsError:
        raise InitError(f"{path} is there already, since a moment; --force writes over it") from None
    except OSError as error:
        raise InitError(
            f"{path} cannot be written: {error.strerror}; name another file by -c FILE"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)


def _put(draft: Path, path: Path) -> None:
    """Under its name, if nothing has it."""
    try:
        os.link(draft, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if os.path.lexists(path):
            raise FileExistsError from None
        draft.replace(path)
