"""What is wrong between the config, the daemon and LM Studio, and how to mend it.

Pure: `evidence.py` has asked. What the daemon sees outranks what is seen from here: a token may be for its eyes alone.
"""

import json
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from difflib import get_close_matches
from itertools import islice
from urllib.parse import urlsplit

from keepalive import __version__
from keepalive.admin.words import span
from keepalive.cli.evidence import Evidence, Json, Probe
from keepalive.config import Cluster, Kept, Upstream, overbooked, written
from keepalive.core.callers import Outcome
from keepalive.core.errors import (
    Cut,
    Reason,
    Refused,
    TimedOut,
    Unauthorized,
    Unexpected,
    Unreachable,
)
from keepalive.core.explain import RIVAL
from keepalive.core.facts import Entry, Tier, fold_key
from keepalive.core.primes import USELESS
from keepalive.lmstudio.client import Listing
from keepalive.lmstudio.wire import SDK_ALONE
from keepalive.service.front import is_loopback
from keepalive.service.tokens import TokenError

# Prometheus asks every 15 s to 2 min. A daemon that nobody has asked for this long is not watched.
UNSCRAPED = 300.0
# Two clocks that differ by less are as good as equal for windows and for people.
SKEW_MAX = 60.0
# Comparing a key with each of a hundred thousand listed ones would take seconds.
SUGGESTED_FROM = 1000
# As the alerts have it: who generates a tool call may well say nothing for some minutes.
SILENT_FOR = 300.0
# An answer without a word happens. Not to half of those who ask, nor so often in a quarter of an hour.
EMPTY_LEAST, EMPTY_MANY = 2, 5
# Less than this between two pings would be work for LM Studio rather than a sign of life.
PING_LEAST = 1.0


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: what, why it matters, and what to type or write."""

    what: str
    why: str
    do: str


def findings(seen: Evidence) -> list[Finding]:
    """All that is wrong, what stops everything first."""
    return [
        *_daemon(seen),
        *(finding for upstream in seen.config.upstreams for finding in _upstream(seen, upstream)),
        *(finding for kept in seen.config.kept for finding in _model(seen, kept)),
        *_without_room(seen),
        *_answers(seen),
        *_refused(seen),
        *_cluster(seen),
        *_listeners(seen),
        *_clock(seen),
        *_unit(seen),
        *_scraping(seen),
        *_messages(seen),
    ]


def _daemon(seen: Evidence) -> Iterator[Finding]:
    status = seen.status
    if status is None:
        start = "systemctl start keepalive; journalctl -u keepalive -n 20" if seen.host.unit else _run(seen)
        yield Finding(seen.silence, "no model is kept loaded, and applications get no answer", start)
        return
    for mistake in status["config"]["mistakes"]:
        yield Finding(
            f"the daemon rejected its config: {mistake}",
            "it goes on with the one before, and changes made since have no effect",
            f"keepalive check{_option(seen)}; then {_reload(seen)}",
        )
    if status["version"] != __version__:
        yield Finding(
            f"the daemon is version {status['version']}, and this command {__version__}",
            "an update takes effect only when the daemon is started anew",
            "systemctl restart keepalive" if seen.host.unit else "end keepalive run, and start it again",
        )
    ours = {(kept.upstream, kept.key) for kept in seen.config.kept}
    # What was asked for and no file names is kept there as well, where that is wanted.
    adopts = seen.config.server.unlisted == "auto" and status["config"].get("unlisted") == "auto"
    known = [
        m for m in status["models"] if not adopts or (m["upstream"], m["key"]) in ours or m["keep"] != "auto"
    ]
    theirs = {(model["upstream"], model["key"]) for model in known}
    if ours != theirs and not status["config"]["mistakes"]:
        parts = [
            f"{verb} {', '.join(key for _, key in sorted(models))}"
            for verb, models in (("does not keep", ours - theirs), ("still keeps", theirs - ours))
            if models
        ]
        yield Finding(
            f"the daemon and {seen.path or 'the config'} disagree: it {' and '.join(parts)}",
            "what is written is not what happens",
            f"{_reload(seen)}; if it uses another file: keepalive doctor -c FILE",
        )


def _upstream(seen: Evidence, upstream: Upstream) -> Iterator[Finding]:
    probe, known = seen.probes.get(upstream.name, Probe()), seen.upstream_status(upstream.name)
    works = known is not None and known["state"] == "up" and known["url"] == upstream.url
    place = urlsplit(upstream.url)
    start = f"lms server start --port {place.port or 80}"
    if not is_loopback(place.hostname or ""):
        start = f"on {place.hostname}: {start} --bind 0.0.0.0"
    cold = "none of its models can be kept warm until it answers"
    match probe.error:
        case None:
            pass
        case TokenError() | Unauthorized() if works:
            pass  # the token is the daemon's, and it has it
        case TokenError():
            yield Finding(
                str(probe.error), "the daemon does not start without it", "set it, or mend the name"
            )
        case Unauthorized():
            yield Finding(
                str(probe.error),
                "LM Studio answers nothing without it, and the daemon asks only once a minute",
                "LM Studio: Developer, Server Settings, Manage Tokens; then name it in [[upstreams]] "
                f"{upstream.name!r}: api_token_env, api_token_file or the credential lm_token.{upstream.name}",
            )
        case Unreachable(tls=True):
            yield Finding(
                str(probe.error),
                cold,
                f"mend url in [[upstreams]] {upstream.name!r}; or set SSL_CERT_FILE=/path/of/issuer.pem in the "
                "daemon's environment, and restart it",
            )
        case Unreachable(refused=refused):
            mend = (
                start
                if refused
                else f"mend url in [[upstreams]] {upstream.name!r}, or the way there; else: {start}"
            )
            yield Finding(f"LM Studio cannot be reached: {probe.error}", cold, mend)
        case Cut():
            yield Finding(
                f"LM Studio at {upstream.url} does not list its models: {probe.error}",
                cold,
                "where a tunnel or a port forwarder listens there, start LM Studio's server where that leads; else "
                f"find what uses the port (ss -ltnp), or mend url in [[upstreams]] {upstream.name!r}",
            )
        case TimedOut():
            yield Finding(
                f"LM Studio does not answer: {probe.error}",
                "it is overloaded or hangs, and whether a model is loaded cannot be seen meanwhile",
                f"curl -m 10 {upstream.url}/lmstudio-greeting; if it stays silent, restart LM Studio; if it "
                f"is only late, raise list_timeout in [[upstreams]] {upstream.name!r}",
            )
        case Refused(reason=Reason.LOADING):
            yield Finding(
                f"{upstream.url} says that it is loading: {probe.error}", cold, "wait until it has loaded"
            )
        case Unexpected(status=502 | 503 | 504):
            yield Finding(
                f"what stands in front of LM Studio at {upstream.url} does not reach it: {probe.error}",
                cold,
                "start LM Studio's server where that looks for it, or mend where it looks",
            )
        case Unexpected():
            yield Finding(
                f"what answers at {upstream.url} is not LM Studio: {probe.error}",
                cold,
                f"find what uses the port (ss -ltnp), or mend url in [[upstreams]] {upstream.name!r}",
            )
        case _:
            yield Finding(
                f"LM Studio at {upstream.url} does not list its models: {probe.error}",
                cold,
                f"curl -m 10 {upstream.url}/api/v1/models",
            )
    if probe.listing is not None:
        if probe.listing.odd is not None:
            yield Finding(
                f"LM Studio at {upstream.url} lists what cannot be read: {probe.listing.odd.why}",
                "no model that stands there is loaded, pinged or found out about",
                f"curl -m 10 {upstream.url}/api/v1/models shows it; download that model anew, or delete it",
            )
        yield from _tier(seen, upstream, probe.listing)
        yield from _socket(seen, upstream, probe.listing)
        yield from _room(seen, upstream, probe.listing)


def _tier(seen: Evidence, upstream: Upstream, listing: Listing) -> Iterator[Finding]:
    tier = listing.tier
    if tier is Tier.OPENAI:
        yield Finding(
            f"what answers at {upstream.url} is not LM Studio, but another server of the same protocol",
            "it does not show what is loaded: its models are kept by pings alone, and evictions go unseen",
            f"nothing, if that is meant; else mend url in [[upstreams]] {upstream.name!r}",
        )
    if tier is Tier.LLAMA:
        yield from _router(seen, upstream, listing)
    if tier is not Tier.V0:
        return
    yield Finding(
        f"LM Studio at {upstream.url} is older than 0.4",
        "it has no explicit load: models are loaded on demand, with an idle timer",
        "update LM Studio to 0.4 or later",
    )
    kept = [kept for kept in seen.config.kept if kept.upstream == upstream.name]
    states = [model for one in kept if (model := seen.model_status(one)) is not None]
    together = sum(model["state"] == "warm" for model in states) > 1
    if len(kept) > 1 and upstream.auto_evict is not False and not together:
        yield Finding(
            f"{len(kept)} models share {upstream.url}, where each load on demand may push out the one before",
            f"only {kept[0].key}, the first in the config, can be kept warm for certain",
            'LM Studio: Developer, Server Settings, switch off "Only Keep Last JIT Loaded Model"; then '
            f"auto_evict = false in [[upstreams]] {upstream.name!r}",
        )


def _router(seen: Evidence, upstream: Upstream, listing: Listing) -> Iterator[Finding]:
    """What llama-server's router does otherwise than LM Studio."""
    kept = [kept for kept in seen.config.kept if kept.upstream == upstream.name]
    for one in kept:
        if one.load_fields:
            yield Finding(
                f"{', '.join(sorted(one.load_fields))} of {one.key} has no effect",
                "llama-server's router loads each model as its own presets say",
                f"take it out of [[models]] {one.key!r}, and set it in the file of --models-preset",
            )
    always = [one.key for one in kept if not one.auto and one.window is None]
    if listing.places is not None and len(always) > listing.places:
        yield Finding(
            f"{len(always)} models are always to be kept, and llama-server at {upstream.url} keeps {listing.places} "
            "at a time",
            f"never loaded: {', '.join(always[listing.places :])}",
            "a greater --models-max for llama-server (0: no limit), or fewer models",
        )
    if upstream.memory is None:
        return
    for one in kept:
        entry = listing.entries.get(fold_key(one.key))
        if one.memory is None and entry is not None and entry.size_bytes is None:
            yield Finding(
                f"nothing tells what {one.key} takes",
                "llama-server says it of loaded models alone: until it was loaded once, it gets all there is",
                f"memory in [[models]] {one.key!r}",
            )


def _socket(seen: Evidence, upstream: Upstream, listing: Listing) -> Iterator[Finding]:
    """What the socket of LM Studio's SDKs is good for: as the daemon sees it, else as it is seen from here."""
    if listing.tier is Tier.LLAMA:
        return
    known = seen.upstream_status(upstream.name) or {}
    sdk, why = listing.sight.sdk.value, listing.sight.why
    if known.get("url") == upstream.url and known.get("sdk", "off") != "off" and sdk != "up":
        sdk, why = known["sdk"], known["sdk_reason"]
    if listing.tier is Tier.OPENAI or upstream.sdk == "off":
        sdk = "off"
    blind = "how far a load is, what others do with a model and when its timer strikes cannot be seen; all else works"
    if sdk == "refused":
        yield Finding(
            f"LM Studio {upstream.name!r} refuses the socket of its SDKs: {why}",
            blind,
            f'give the token the permission for it, or sdk = "off" in [[upstreams]] {upstream.name!r}',
        )
    if sdk == "absent":
        yield Finding(
            f"LM Studio {upstream.name!r} does not serve the socket of its SDKs: {why}",
            blind,
            "let WebSockets through where a proxy stands in front of it; else "
            f'sdk = "off" in [[upstreams]] {upstream.name!r}',
        )
    for kept in seen.config.kept:
        alone = SDK_ALONE & kept.load_fields.keys() if kept.upstream == upstream.name else ()
        if alone and sdk != "up":
            yield Finding(
                f"{', '.join(sorted(alone))} of {kept.key} has no effect",
                f"only the socket of LM Studio's SDKs takes it, and that is {sdk}",
                "see above" if sdk in ("refused", "absent") else 'sdk = "auto" in [[upstreams]]',
            )


def _room(seen: Evidence, upstream: Upstream, listing: Listing) -> Iterator[Finding]:
    """What loads will take, by LM Studio's own estimates, before they are made."""
    needs = {
        kept: (entry, entry.need)
        for kept in seen.config.kept
        if kept.upstream == upstream.name
        and not kept.auto  # room is made for it
        and (entry := listing.entries.get(fold_key(kept.key))) is not None
        and entry.need is not None
    }
    for kept, (entry, need) in needs.items():
        if need.passes_guardrails is False and not entry.instances:
            yield Finding(
                f"LM Studio {upstream.name!r} will refuse to load {kept.key}: it would take {size(need.memory_bytes)}",
                "its guardrails find that too much beside what is loaded now",
                f'a smaller context_length in [[models]] "{kept.key}"; or LM Studio: Settings, Hardware, Guardrails',
            )
    room = seen.host.memory_bytes if is_loopback(urlsplit(upstream.url).hostname or "") else None
    always = {kept.key: need.memory_bytes for kept, (_, need) in needs.items() if kept.window is None}
    if room is not None and len(always) > 1 and sum(always.values()) > room:
        parts = ", ".join(f"{key} {size(taken)}" for key, taken in always.items())
        yield Finding(
            f"the models of {upstream.name!r} do not fit together: {parts}, and this machine has {size(room)}",
            "the last of them is refused, or the machine swaps and all of them become slow",
            "a window for one of them, a smaller context_length, or fewer models",
        )


def size(count: int) -> str:
    """Bytes as short as people say it."""
    return f"{count / 1e9:.1f} GB"


def _model(seen: Evidence, kept: Kept) -> Iterator[Finding]:
    probe, status = seen.probes.get(kept.upstream, Probe()), seen.model_status(kept)
    if probe.listing is not None and probe.listing.tier is not Tier.OPENAI:
        entry = probe.listing.entries.get(fold_key(kept.key))
        if probe.listing.odd is not None and fold_key(kept.key) in probe.listing.odd.keys:
            return  # it is said above
        if entry is None:
            yield _unlisted(seen, kept, probe.listing.entries)
        else:
            yield from _copies(kept, entry, status)
    if status is None:
        return
    if status["state"] == "backoff":
        yield Finding(
            f"{kept.key} on {kept.upstream} cannot be had: {status['reason']}",
            "it is tried again, more and more rarely, and requests for it are refused meanwhile",
            f"{_log(seen, kept)}; then: keepalive warm {kept.key}",
        )
    ping = status.get("last_ping")
    if ping and ping["outcome"] == "refused":
        yield Finding(
            f"{kept.key} on {kept.upstream} is not proved by pings: {status['reason']}",
            "it counts as warm because it is listed; that it no longer answers is seen by its users alone",
            f'ping = {{ path = "/v1/…", body = {{ … }} }} in [[models]] "{kept.key}", kind = "reranker" where it is '
            'one, or ping = "off"',
        )
    yield from _primed(kept, status.get("primed") or {})
    eviction = status.get("last_eviction")
    idle = eviction and eviction.get("idle_seconds")
    # It was missed by the next listing, and may have been gone that much longer.
    late = kept.ping_interval + kept.refresh_interval
    if eviction and eviction["cause"] == "timer" and idle is not None and late >= idle:
        better = written(float(max(PING_LEAST, idle // 2)))
        yield Finding(
            f"{kept.key} was dropped after {span(idle)} without a request, and is pinged every "
            f"{written(kept.ping_interval)}",
            "LM Studio lets it go before the ping that should hold it",
            f'ping_interval = "{better}" in [[models]] "{kept.key}"',
        )
    if eviction and eviction["cause"] == "displaced":
        yield Finding(
            f"{kept.key} was pushed out by another model, last at {eviction['at']}",
            "it is loaded again, which takes its whole load time, and may push out the other one in turn",
            'LM Studio: Developer, Server Settings, switch off "Only Keep Last JIT Loaded Model", or keep '
            "both models here",
        )


def _primed(kept: Kept, primed: Json) -> Iterator[Finding]:
    reason = primed.get("reason")
    if not reason:
        return
    useless = reason.startswith(USELESS)
    yield Finding(
        f"{kept.key} on {kept.upstream}: {reason}"
        if useless
        else f"{kept.key} on {kept.upstream} has not read all that it is to have read: {reason}",
        "this server has no prompt cache, or others use it up: reading ahead is work for nothing, and has stopped"
        if useless
        else "whoever asks first waits for it",
        f'prime = [] in [[models]] "{kept.key}"; or a larger cache over there, and then a reload'
        if useless
        else "keepalive check; mend the file, and reload",
    )


def _unlisted(seen: Evidence, kept: Kept, entries: Mapping[str, Entry]) -> Finding:
    keys = list({entry.key: None for entry in islice(entries.values(), SUGGESTED_FROM)})
    near = get_close_matches(kept.key, keys, n=3, cutoff=0.4)
    there = f"; nearest are {', '.join(near)}" if near else f"; it lists {len(keys)} others"
    write = f'key = "{near[0]}" in [[models]] of {seen.path or "the config"}, or: ' if near else ""
    return Finding(
        f"LM Studio {kept.upstream!r} does not list {kept.key}{there}",
        "a model that is not there cannot be loaded, and requests for it are refused",
        f"{write}lms get {kept.key}",
    )


def _answers(seen: Evidence) -> Iterator[Finding]:
    """Answers that began and say nothing more, and those that never said a word."""
    for model in (seen.status or {}).get("models", ()):
        name = f"{model['key']} on {model['upstream']}"
        silent = model.get("silent_seconds") or 0.0
        if silent >= SILENT_FOR:
            yield Finding(
                f"an answer of {name} has been silent for {span(silent)}",
                "a long tool call is generated in silence; else the model hangs, and its caller waits until "
                "stall_timeout ends it",
                f"lms ps; where it does nothing: lms unload {model.get('instance_id') or model['key']}, and keepalive "
                "loads it again",
            )
        asked = [r for r in seen.requests if (r["upstream"], r["model"]) == (model["upstream"], model["key"])]
        ends = Counter(request["outcome"] for request in asked)
        empty, answers = ends[Outcome.EMPTY], ends[Outcome.EMPTY] + ends[Outcome.OK]
        if empty >= EMPTY_MANY or (empty >= EMPTY_LEAST and 2 * empty >= answers):
            yield Finding(
                f"{empty} of the last {answers} answers of {name} were empty",
                "they were whole and well formed, and said nothing: often a chat template that does not fit the "
                "model, or a stop word of the callers",
                "ask it in LM Studio's own chat window: silent there, too, load another build of it; else look at "
                "what the callers send",
            )


_REFUSED = {
    "origin": (
        "came from web pages of other origins",
        "a page may ask only where the config names it; browsers call that a CORS error",
        "where a page is yours, add its origin, which the browser's console names, to allowed_origins under [server]",
    ),
    "host": (
        "came by a name that is not known here",
        "whoever answers to every name can be reached by web pages under names of their own",
        "add the name that callers use, which the refusal repeats, to allowed_hosts under [server]",
    ),
    "invalid_api_key": (
        "showed no valid key",
        "with client_keys under [auth] nobody is served without one",
        "give the callers a key of client_keys; it is sent as Authorization: Bearer KEY",
    ),
}


def _refused(seen: Evidence) -> Iterator[Finding]:
    """Callers who were turned away, which they often hear nothing of: a browser tells its page no reason."""
    counts = Counter(request.get("error") for request in seen.requests)
    for code, (what, why, do) in _REFUSED.items():
        match counts[code]:
            case 0:
                continue
            case 1:
                many, were = "1 request", "was"
            case count:
                many, were = f"{count} requests", "were"
        yield Finding(f"{many} of the last minutes {what}, and {were} refused", why, do)


def _without_room(seen: Evidence) -> Iterator[Finding]:
    """Models for which there is no room: by what the file says, and by what the daemon says now."""
    models = (seen.status or {}).get("models", ())
    takes = {(m["upstream"], m["key"]): taken for m in models if (taken := m.get("memory_bytes"))}
    never = overbooked(seen.config, takes)
    for kept, why in never:
        yield Finding(
            why,
            "the models that come first are kept; this one is not loaded, and requests for it are refused",
            f'more memory in [[upstreams]] {kept.upstream!r}, keep = "auto" for models that need not always be '
            "there, or a smaller context_length",
        )
    told = {(kept.upstream, kept.key) for kept, _ in never}
    for upstream in (seen.status or {}).get("upstreams", ()):
        memory = upstream.get("memory") or {}
        strangers = [one["key"] for one in memory.get("strangers", ())]
        short = [
            model
            for model in models
            if model["upstream"] == upstream["name"]
            and (model["upstream"], model["key"]) not in told
            and (model["reason"] or "").startswith(("waits for room", "there is no room"))
        ]
        were = "was" if len(strangers) == 1 else "were"
        if short and strangers:
            yield Finding(
                f"{short[0]['key']} on {upstream['name']} {short[0]['reason']}",
                f"{', '.join(strangers)} {were} loaded by somebody else, and keepalive never unloads that",
                "; ".join(_unload(upstream, key) for key in strangers),
            )
        if memory.get("source") == "refusal":
            yield Finding(
                f"LM Studio {upstream['name']!r} refuses loads beyond {memory['budget_bytes'] / 1e9:.1f} GB",
                "something else takes memory there, or models take more than is thought: fewer fit than was meant",
                "what runs on that machine; memory of the models and of the upstream in the config; LM Studio: "
                "its model loading guardrails",
            )


def _unload(upstream: Json, key: str) -> str:
    if upstream.get("tier") != Tier.LLAMA:
        return f"lms unload {key}"
    return f"curl {upstream['url']}/models/unload -d '{json.dumps({'model': key})}'"


def _log(seen: Evidence, kept: Kept) -> str:
    upstream = seen.upstream_status(kept.upstream) or {}
    return "the log of llama-server" if upstream.get("tier") == Tier.LLAMA else "lms log stream"


def _cluster(seen: Evidence) -> Iterator[Finding]:
    cluster = (seen.status or {}).get("cluster")
    if cluster is None:
        return
    if not cluster["engine"]["up"]:
        yield Finding(
            f"this daemon of cluster {cluster['name']!r} has no etcd: {cluster['engine']['error']}",
            "it serves what is warm, and loads and unloads nothing; where all of them say so, nobody does",
            f"etcdctl {_as_we_do(seen.config.cluster)} endpoint health",
        )
    for difference in cluster["differences"]:
        yield Finding(
            f"the daemons of cluster {cluster['name']!r} differ: {difference}",
            "whichever of them acts decides: with the next one all may be loaded otherwise, or another server be meant",
            "the same [[upstreams]] and [[models]] for each of them, and an instance name of its own in [cluster]; "
            "then restart the one that was mended",
        )


def _as_we_do(cluster: Cluster) -> str:
    """How etcdctl is to ask etcd, so that it finds what we find."""
    known = {"cacert": cluster.ca, "cert": cluster.cert, "key": cluster.key, "user": cluster.user}
    options = {"endpoints": ",".join(cluster.etcd)} | {name: value for name, value in known.items() if value}
    return " ".join(f"--{name}={shlex.quote(value)}" for name, value in options.items())


def _copies(kept: Kept, entry: Entry, status: Json | None) -> Iterator[Finding]:
    ids = [instance.id for instance in entry.instances]
    if len(ids) > 1:
        used = status["instance_id"] if status and status["instance_id"] in ids else ids[0]
        spare = [instance for instance in ids if instance != used]
        yield Finding(
            f"{len(ids)} copies of {kept.key} are in memory: {', '.join(ids)}",
            "each takes the memory of a whole model; keepalive never unloads what it did not load",
            "; ".join(f"lms unload {instance}" for instance in spare),
        )
        if status and RIVAL in (status["reason"] or ""):
            yield Finding(
                f"somebody else loads {kept.key}, too: a copy came while keepalive was loading it",
                "each of two daemons in front of one LM Studio loads its own copy, as does who asks past keepalive",
                "let one daemon alone keep it, and send everybody through its address",
            )
    wanted = kept.load_fields.get("context_length")
    for instance in entry.instances[:1]:
        if wanted is not None and instance.context_length not in (None, wanted):
            yield Finding(
                f"{kept.key} is loaded with a context of {instance.context_length} tokens, not {wanted}",
                "somebody else loaded it: long prompts fail, or memory is wasted",
                f"lms unload {instance.id}; keepalive loads it again as configured",
            )


def _listeners(seen: Evidence) -> Iterator[Finding]:
    server, auth = seen.config.server, seen.config.auth
    sides = (("listen", "client_keys", auth.client_keys), ("admin_listen", "admin_keys", auth.admin_keys))
    for name, table, keys in sides:
        address = getattr(server, name)
        if keys or is_loopback(address.host):
            continue
        who = "use the models" if name == "listen" else "read the status, and warm and release models"
        yield Finding(
            f"server.{name} = {address} can be reached from the network, and asks for no key",
            f"everybody who reaches this machine can {who}",
            f'{table} = [{{ name = "ops", file = "/etc/keepalive/ops.key" }}] under [auth], '
            f'or {name} = "127.0.0.1:{address.port}"',
        )


def _clock(seen: Evidence) -> Iterator[Finding]:
    host = seen.host
    windows = any(kept.window for kept in seen.config.kept)
    if isinstance(host.zone, str):
        yield Finding(
            f"the time zone of this machine cannot be read: {host.zone}",
            "windows would open and close at other hours than meant",
            'timezone = "Europe/Lisbon" under [server], or: timedatectl set-timezone Europe/Lisbon',
        )
    elif windows and seen.config.server.timezone is None and str(host.zone) in ("UTC", "Etc/UTC"):
        yield Finding(
            "windows are read in UTC, because that is the zone of this machine",
            "where people keep another time, models are loaded hours too late or too early",
            'timezone = "Europe/Lisbon" under [server]; "UTC" if that is meant',
        )
    if host.synchronized is False:
        yield Finding(
            "the clock of this machine is set by nobody",
            "windows, logs and graphs drift away from the real time",
            "timedatectl set-ntp true",
        )
    if seen.status is None:
        return
    ahead = (datetime.fromisoformat(seen.status["started_at"]) - host.now).total_seconds()
    if ahead > SKEW_MAX:
        yield Finding(
            f"the daemon says that it started {span(ahead)} from now",
            "a clock is wrong, or was set back since: times in the status and in the history do not fit",
            "timedatectl; then: systemctl restart keepalive",
        )


def _unit(seen: Evidence) -> Iterator[Finding]:
    units = "keepalive.service keepalive.socket keepalive-admin.socket"
    mend = {"disabled": f"systemctl enable {units}", "masked": f"systemctl unmask {units}, then enable them"}
    unit = (seen.host.unit or "").removesuffix("-runtime")
    if unit in mend:
        yield Finding(
            f"keepalive.service is {unit}", "after the next boot nothing keeps the models loaded", mend[unit]
        )


def _scraping(seen: Evidence) -> Iterator[Finding]:
    if seen.status is None or "scraped_at" not in seen.status or seen.config.notify.on:
        return
    last = seen.status["scraped_at"]
    hosts = (seen.config.server.admin_listen.host, urlsplit(seen.address).hostname or "")
    if last is None and seen.host.unit is None and all(map(is_loopback, hosts)):
        return  # somebody's own machine, on which nobody has meant to have a Prometheus
    quiet = (seen.host.now - datetime.fromisoformat(last or seen.status["started_at"])).total_seconds()
    if quiet > UNSCRAPED:
        when = f"for {span(quiet)}" if last else "since the daemon was started"
        yield Finding(
            f"Prometheus has not read /metrics {when}",
            "no alert can tell you of what goes wrong here",
            f"add the target {urlsplit(seen.address).netloc} to scrape_configs "
            "(monitoring/README.md), or have [notify] tell you",
        )


def _messages(seen: Evidence) -> Iterator[Finding]:
    if seen.config.notify.on and not seen.host.messages:
        yield Finding(
            "[notify] is configured, and apprise, which sends the messages, is not installed",
            "nobody is told of anything",
            "pip install 'keepalive[notify]' in its environment; by pipx: pipx inject keepalive apprise; as a "
            "service: systemd/install --upgrade --with notify",
        )


# --- in words -------------------------------------------------------------------------------------------


def _option(seen: Evidence) -> str:
    return f" -c {seen.path}" if seen.path else ""


def _run(seen: Evidence) -> str:
    return f"keepalive run{_option(seen)}"


def _reload(seen: Evidence) -> str:
    return "systemctl reload keepalive" if seen.host.unit else "kill -HUP its process"


def health(seen: Evidence) -> str:
    """What was looked at, for when nothing is wrong with it."""
    models, servers = len(seen.config.kept), len(seen.config.upstreams)
    return (
        f"healthy: the config, the daemon at {seen.address}, "
        f"{servers} {'upstream' if servers == 1 else 'upstreams'} and "
        f"{models} {'model' if models == 1 else 'models'}"
    )
