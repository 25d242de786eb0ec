"""Every key of the file with its type, its default and the help that editors show for it."""

import zoneinfo
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import tzinfo
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeVar

import tzlocal
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, WithJsonSchema

from keepalive.config import addresses, ping, values
from keepalive.config.addresses import Address
from keepalive.config.mistakes import nearest, shown
from keepalive.config.values import seconds
from keepalive.core.window import Window


def _text(read: Callable[[str], object]) -> BeforeValidator:
    def validate(value: object) -> object:
        if not isinstance(value, str):
            raise ValueError(f"{shown(value)} is no text; write it in quotes")  # noqa: TRY004  # for pydantic
        return read(value)

    return BeforeValidator(validate)


def _duration(low: str, high: str) -> PlainValidator:
    return PlainValidator(partial(values.read_duration, low=low, high=high))


def _secret_place(what: str, pattern: str, example: str) -> PlainValidator:
    return PlainValidator(partial(values.read_secret_place, what=what, pattern=pattern, example=example))


def one_or_many(value: object) -> object:
    """Text is a list too, with commas between: that is how a variable says it."""
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _written_as(pattern: str) -> WithJsonSchema:
    return WithJsonSchema({"type": "string", "pattern": f"^{pattern}$"})


_TEXT = WithJsonSchema({"type": "string"})
_DURATION = _written_as(values.DURATION_PATTERN)
_DURATION_OR_OFF = _written_as(rf"(off|{values.DURATION_PATTERN})")

# Bounds keep out what cannot be meant; tests and demos live at the lower ends.
Interval = Annotated[float, _duration("10ms", "7d"), _DURATION]
Delay = Annotated[float, _duration("0s", "7d"), _DURATION]
Timeout = Annotated[float, _duration("10ms", "1d"), _DURATION]
Patience = Annotated[float, _duration("0s", "1d"), _DURATION]
Silence = Annotated[
    float | Literal["off"],
    PlainValidator(partial(values.read_duration_or_off, low="10ms", high="1d")),
    _DURATION_OR_OFF,
]
# A listing is cheap for LM Studio and not free: ten in a second is where looking becomes load.
Refresh = Annotated[float, _duration("100ms", "1h"), _DURATION]
Lease = Annotated[float, _duration("1s", "365d"), _DURATION]
Size = Annotated[int, PlainValidator(values.read_size), _written_as(values.SIZE_PATTERN)]
Listen = Annotated[Address, PlainValidator(addresses.read_address), _written_as(addresses.ADDRESS_PATTERN)]
Url = Annotated[str, _text(addresses.read_url), _written_as(addresses.URL_PATTERN)]
EngineUrl = Annotated[str, _text(addresses.read_engine_url)]
# etcd itself makes no lease shorter than two seconds, and a busy machine may take one to say that it still lives.
Ttl = Annotated[float, _duration("3s", "5m"), _DURATION]
Zone = Annotated[str, _text(values.read_zone_name)]
Span = Annotated[Window, _text(values.read_window), _TEXT]
Directory = Annotated[Path, _text(values.read_directory), _TEXT]
File = Annotated[
    Path | Literal[False],
    PlainValidator(values.read_file),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"const": False}]}),
]
Name = Annotated[str, _text(values.read_name)]
Line = Annotated[str, _text(values.read_line)]
Template = Annotated[str, _text(values.read_template)]
HostName = Annotated[str, _text(addresses.read_host_name)]
WebOrigin = Annotated[str, _text(addresses.read_origin)]
Variable = Annotated[str, _secret_place("variable", r"[A-Za-z_]\w{0,127}", "LM_API_TOKEN"), _TEXT]
SecretFile = Annotated[str, _secret_place("file", r".*\S.*", "/etc/keepalive/lm_token"), _TEXT]
Credential = Annotated[str, _secret_place("credential", r"[A-Za-z0-9][\w.-]{0,62}", "ward-3"), _TEXT]
PromptId = Annotated[
    int | str, PlainValidator(values.read_prompt_id), WithJsonSchema({"type": ["integer", "string"]})
]
Prime = Annotated[str, _text(values.read_prime)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
T = TypeVar("T")
Many = Annotated[
    tuple[T, ...],
    Field(strict=False),
    BeforeValidator(one_or_many),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
Tables = Annotated[tuple[T, ...], Field(strict=False)]
Memory = Annotated[int, PlainValidator(values.read_memory), _written_as(values.MEMORY_PATTERN)]
Route = Annotated[str, _text(ping.read_path), _written_as("/.*")]
Body = Annotated[
    Mapping[str, Any], PlainValidator(ping.read_body, json_schema_input_type=dict[str, Any] | str)
]


class Table(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        hide_input_in_errors=True,
    )


class Server(Table):
    """How keepalive itself listens, waits and writes its log."""

    listen: Listen = Address("127.0.0.1", 1235)
    """Where clients connect: host:port, or :port for every interface. They set base_url to http://this/v1."""
    admin_listen: Listen = Address("127.0.0.1", 9235)
    """Where the status page, metrics and probes are served."""
    heartbeat: Timeout = seconds("5s")
    """How long a streaming caller waits in silence before it is sent a sign of life."""
    heartbeat_mode: Literal["comment", "reasoning", "off"] = "comment"
    """The sign of life: an SSE comment, which parsers skip; visible reasoning text, for chat programs; or
    nothing until LM Studio answers, which keeps its true status."""
    drain_timeout: Patience = seconds("30s")
    """How long open streams may go on after SIGTERM."""
    header_timeout: Timeout = seconds("75s")
    """How long a connection may stay idle or take to send the head of a request."""
    max_body: Size = Field(64 * 2**20, json_schema_extra={"default": "64MiB"})
    """The largest request body that is accepted."""
    timezone: Zone | None = Field(None, examples=["Europe/Lisbon"])
    """The IANA time zone in which windows are read. Default: the one of this machine."""
    allowed_hosts: Many[HostName] = Field((), examples=["llm.example.org"])
    """Names under which callers reach this daemon, besides IP addresses and localhost."""
    allowed_origins: Many[WebOrigin] = Field((), examples=["https://chat.example.org", "app://obsidian.md"])
    """Web pages of other sites, and programs with a browser inside, that may send requests, by origin."""
    default_model: Line | None = Field(None, examples=["qwen/qwen3-4b-2507"])
    """What a request means that names no model, or one that no upstream lists: a key or an alias of
    [[models]], or key@variant. Default: LM Studio decides."""
    unlisted: Literal["pass", "auto"] = "pass"
    """Models that LM Studio lists and this file does not: pass leaves them to LM Studio; auto treats each as if
    it stood here with keep = "auto", once it is asked for."""
    loads: Literal["join", "pass"] = "join"
    """What becomes of a caller's POST /api/v1/models/load for a model that is kept: it joins the one load, or
    is passed on, and LM Studio makes one more copy."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe line that is written to the log."""
    log_format: Literal["auto", "json", "console"] = "auto"
    """How log lines are written; auto is console on a terminal and json elsewhere."""
    state_dir: Directory | None = Field(None, examples=["/var/lib/keepalive"])
    """Where loads under way are noted, so that a restart does not repeat them.
    Default: $STATE_DIRECTORY, else $XDG_STATE_HOME/keepalive."""


class History(Table):
    """What happened to the models, for the status page and for the next start."""

    path: File | None = Field(None, examples=["/var/lib/keepalive/history.db"])
    """The file that keeps it; false: in memory only. Default: history.db in server.state_dir."""


class Upstream(Table):
    """One LM Studio server."""

    name: Name = "local"
    """What models, metrics and logs call this server."""
    url: Url = Field(examples=["http://127.0.0.1:1234"])
    """Where it listens, without "/v1"; with the path in front of that, where it is published under one."""
    api_token_env: Variable | None = Field(None, examples=["LM_API_TOKEN"])
    """The environment variable that holds its API token."""
    api_token_file: SecretFile | None = Field(None, examples=["/etc/keepalive/lm_token"])
    """The file that holds its API token."""
    max_loading: Annotated[int, Field(ge=1, le=64)] = 1
    """How many models may load at the same time."""
    auto_evict: bool | None = Field(None, examples=[True])
    """LM Studio 0.3: whether "Only keep last JIT loaded model" is on. Default: found out by watching."""
    memory: Memory | None = Field(None, examples=["40GiB"])
    """How much of its memory is for models. Default: what LM Studio itself says, else one model at a time of
    those with keep = "auto"."""
    sdk: Literal["auto", "off"] = "auto"
    """Whether the WebSocket of LM Studio's own SDKs is used, where it is there: it shows progress, work and timers."""
    connect_timeout: Timeout = seconds("5s")
    """How long a connection may take to open."""
    list_timeout: Timeout = seconds("10s")
    """How long the list of loaded models may take."""


class Defaults(Table):
    """What holds for every model that does not say otherwise."""

    refresh_interval: Refresh = seconds("15s")
    """How often LM Studio is asked what is loaded."""
    ping_interval: Interval = seconds("5m")
    """How often a quiet model is made to answer one token."""
    ping_timeout: Timeout = seconds("60s")
    """How long that answer may take."""
    load_timeout: Timeout = seconds("15m")
    """After this the outcome of a load is unknown, not failed."""
    max_wait: Patience = seconds("10m")
    """How long a request is held for a model that is not ready."""
    lease: Lease = seconds("24h")
    """LM Studio 0.3: how long a model that we load may idle before LM Studio drops it."""
    stall_timeout: Silence = seconds("15m")
    """How long an answer that has begun may fall silent before it is given up; off: for ever."""
    patience: Patience = seconds("2m")
    """How long callers of one model wait for room while others are used, before one of those is given to nobody
    else, so that it makes room when its answers have ended."""


class Ping(Table):
    """The request that proves that a model answers, where the usual one cannot."""

    path: Route = Field(examples=["/v1/rerank"])
    """Where it is sent, by POST."""
    body: Body = Field(examples=[ping.EXAMPLE])
    """What it says, as a table or as the text of a JSON object; keepalive adds the model."""


def _read_ping(value: object) -> object:
    if value in ("auto", "off"):
        return value
    if isinstance(value, dict):
        return Ping.model_validate(value)
    words = {"auto": "auto", "off": "off", "true": "auto", "false": "off", "none": "off"}
    near = nearest(str(value), words)
    advice = f'"{words[near]}"' if near else '"auto" or "off", or { path = "/v1/rerank", body = { … } }'
    raise ValueError(f"{shown(value)} is not known; write {advice}")


class Model(Table):
    """A model that is kept loaded. The first is the most important one, where not all can be."""

    key: Line = Field(examples=["qwen/qwen3-4b-2507"])
    """The key that LM Studio lists for the model."""
    aliases: Many[Line] = Field((), examples=["gpt-4o-mini"])
    """Further names by which callers may ask for it."""
    upstream: Many[Name] | None = Field(None, examples=["local"])
    """The upstream that keeps it, or a list of them. Default: the only one."""
    keep: Literal["always", "auto"] = "always"
    """always: loaded all the time; auto: loaded when it is asked for, or ahead of that into memory that is free,
    and let go for others."""
    memory: Memory | None = Field(None, examples=["9GiB"])
    """What it takes in memory. Default: what LM Studio estimates, else its size and a fifth."""
    idle: Interval | None = Field(None, examples=["30m"])
    """With keep = "auto": unloaded after this long without use. Default: it stays while nobody needs the room."""
    window: Span | None = Field(None, examples=["Mon-Fri 08:00-19:00"])
    """When it is wanted. Default: always."""
    kind: Literal["llm", "embedding", "reranker"] | None = Field(None, examples=["llm"])
    """What it is. Default: what LM Studio says."""
    ping: Annotated[
        Literal["auto", "off"] | Ping,
        PlainValidator(_read_ping, json_schema_input_type=Literal["auto", "off"] | Ping),
    ] = "auto"
    """How it is made to answer: auto: by what its kind answers; off: never, so that its being listed is all that
    is known; or a request of your own."""
    prime: Many[Prime] = Field((), examples=["prompts/agent.json", "learn"])
    """What it is to have read before anybody asks, so that nobody waits for that: files, beside this one, with a
    request body of a chat or with plain text as its system message; "learn": what most requests begin with."""
    context_length: Count | None = Field(None, examples=[8192])
    """Given to LM Studio when it loads: how many tokens the context holds."""
    eval_batch_size: Count | None = Field(None, examples=[512])
    """Given to LM Studio when it loads: how many tokens are evaluated in one batch."""
    flash_attention: bool | None = Field(None, examples=[True])
    """Given to LM Studio when it loads: whether to use flash attention."""
    num_experts: Count | None = Field(None, examples=[8])
    """Given to LM Studio when it loads: how many experts a mixture uses for a token."""
    num_parallel_sessions: Count | None = Field(None, examples=[8])
    """Given to LM Studio when it loads, where sdk of its upstream is not off: how many requests it works on at
    once."""
    offload_kv_cache_to_gpu: bool | None = Field(None, examples=[True])
    """Given to LM Studio when it loads: whether the KV cache lives in GPU memory."""
    refresh_interval: Refresh | None = Field(None, examples=["15s"])
    """For this model, instead of [defaults]."""
    ping_interval: Interval | None = Field(None, examples=["5m"])
    """For this model, instead of [defaults]."""
    ping_timeout: Timeout | None = Field(None, examples=["60s"])
    """For this model, instead of [defaults]."""
    load_timeout: Timeout | None = Field(None, examples=["15m"])
    """For this model, instead of [defaults]."""
    max_wait: Patience | None = Field(None, examples=["10m"])
    """For this model, instead of [defaults]."""
    lease: Lease | None = Field(None, examples=["24h"])
    """For this model, instead of [defaults]."""
    stall_timeout: Silence | None = Field(None, examples=["15m"])
    """For this model, instead of [defaults]."""
    patience: Patience | None = Field(None, examples=["2m"])
    """For this model, instead of [defaults]."""


class Prompt(Table):
    """A prompt for POST /api/prompts/execute/stream."""

    id: PromptId = Field(examples=[28])
    """What a request names it by: a number or text."""
    title: Line = Field(examples=["Simple test"])
    """What people call it."""
    model: Line = Field(examples=["qwen/qwen3-4b-2507"])
    """The key of the configured model that answers it."""
    content: Template = Field(examples=["Explain {{topic}} to a nurse."])
    """Its text; {{name}} stands for a variable of the request."""
    max_tokens: Count | None = Field(None, examples=[1024])
    """The longest answer. Default: LM Studio decides."""


class AccessKey(Table):
    """A key that a caller must send: who uses it, and where it is read from."""

    name: Name = Field(examples=["ward-3"])
    """Who uses it; this is what logs show."""
    file: SecretFile | None = Field(None, examples=["/etc/keepalive/ward-3.key"])
    """The file that holds it."""
    env: Variable | None = Field(None, examples=["WARD_3_KEY"])
    """The environment variable that holds it."""
    credential: Credential | None = Field(None, examples=["ward-3"])
    """The systemd credential that holds it."""


class Auth(Table):
    """Who may connect. An empty list lets everybody in."""

    client_keys: Tables[AccessKey] = ()
    """Keys for server.listen."""
    admin_keys: Tables[AccessKey] = ()
    """Keys for server.admin_listen."""


class Notify(Table):
    """Who is told of trouble, by messages: e-mail, chat, push; see apprise for all it can reach."""

    urls_env: Variable | None = Field(None, examples=["KEEPALIVE_TELL"])
    """The environment variable that holds the addresses of apprise, with spaces between."""
    urls_file: SecretFile | None = Field(None, examples=["/etc/keepalive/notify"])
    """The file that holds them."""
    urls_credential: Credential | None = Field(None, examples=["notify"])
    """The systemd credential that holds them."""
    events: Many[Literal["failing", "recovered", "evicted", "upstream_down"]] = (
        "failing",
        "recovered",
        "evicted",
        "upstream_down",
    )
    """What is told."""
    after: Delay = seconds("1m")
    """Trouble that is over sooner is not told."""
    pause: Interval = seconds("15m")
    """The same kind of news of the same model comes again after this at the earliest."""

    @property
    def on(self) -> bool:
        return bool(self.urls_env or self.urls_file or self.urls_credential)


class Cluster(Table):
    """Several daemons in front of the same LM Studio servers, as one. They agree by etcd."""

    etcd: Many[EngineUrl] = Field((), examples=["http://10.0.0.1:2379"])
    """Where etcd (3.4 or newer) listens: all of its members, or some."""
    name: Name = "keepalive"
    """What the cluster is called: the same on each of its daemons, and of no other in the same etcd."""
    instance: Name | None = Field(None, examples=["a"])
    """What this daemon is called, and no other. Default: the name of its host."""
    ttl: Ttl = seconds("10s")
    """For how long a daemon that is no longer heard of keeps others from acting for it."""
    user: Line | None = Field(None, examples=["keepalive"])
    """Who it is to etcd, where that wants to know."""
    password_env: Variable | None = Field(None, examples=["ETCD_PASSWORD"])
    """The environment variable that holds the password of that user."""
    password_file: SecretFile | None = Field(None, examples=["/etc/keepalive/etcd_password"])
    """The file that holds it."""
    ca: SecretFile | None = Field(None, examples=["/etc/keepalive/etcd-ca.pem"])
    """The file with the certificate that has signed etcd's. Default: those that this machine trusts."""
    cert: SecretFile | None = Field(None, examples=["/etc/keepalive/etcd.pem"])
    """The file with a certificate of our own, where etcd wants one."""
    key: SecretFile | None = Field(None, examples=["/etc/keepalive/etcd.key"])
    """The file with the key to it."""

    @property
    def on(self) -> bool:
        return bool(self.etcd)


LEARN = "learn"
"""What stands among the files of `prime` for the openings that requests share."""

LOAD_FIELDS = (
    "context_length", "eval_batch_size", "flash_attention", "num_experts", "num_parallel_sessions",
    "offload_kv_cache_to_gpu",
)  # fmt: skip
"""LM Studio refuses a load that carries any other field."""


@dataclass(frozen=True, slots=True)
class Kept:
    """One model on one upstream, with every override applied. Durations are in seconds."""

    upstream: str
    key: str
    aliases: tuple[str, ...]
    kind: str | None
    window: Window | None
    load_fields: Mapping[str, int | bool] = field(hash=False)
    ping: Literal["auto", "off"] | Ping = field(hash=False)
    prime: tuple[str, ...] = field(default=(), kw_only=True)
    refresh_interval: float
    ping_interval: float
    ping_timeout: float
    load_timeout: float
    max_wait: float
    lease: float
    stall_timeout: float | None  # None: silence has no end
    patience: float = 120.0
    auto: bool = False
    idle: float | None = None
    memory: int | None = None  # bytes


class Config(Table):
    """keepalive: which models to keep loaded, where, and how to serve them."""

    server: Server = Server()
    history: History = History()
    upstreams: Tables[Upstream] = (Upstream(url="http://127.0.0.1:1234"),)
    defaults: Defaults = Defaults()
    models: Tables[Model] = ()
    prompts: Tables[Prompt] = ()
    auth: Auth = Auth()
    notify: Notify = Notify()
    cluster: Cluster = Cluster()

    @cached_property
    def kept(self) -> tuple[Kept, ...]:
        """Every model on every upstream that keeps it, in the order of the file."""
        only = (self.upstreams[0].name,)
        pairs = ((model, name) for model in self.models for name in dict.fromkeys(model.upstream or only))
        return tuple(self._kept(model, name) for model, name in pairs)

    def _kept(self, model: Model, upstream: str) -> Kept:
        load_fields = model.model_dump(include=set(LOAD_FIELDS), exclude_none=True)
        time: dict[str, Any] = {
            name: None if value == "off" else value for name, value in timing(self.defaults, model).items()
        }
        return Kept(
            upstream=upstream,
            key=model.key,
            aliases=model.aliases,
            kind=model.kind,
            window=model.window,
            load_fields=MappingProxyType(load_fields),
            ping=model.ping,
            prime=model.prime,
            auto=model.keep == "auto",
            idle=model.idle,
            memory=model.memory,
            **time,
        )

    def unlisted(self, upstream: str, key: str) -> Kept:
        """A model that the file does not name, as `server.unlisted` has it kept."""
        return self._kept(Model(key=key, keep="auto"), upstream)

    @cached_property
    def zone(self) -> tzinfo:
        """The zone in which windows are read: `server.timezone`, else the one of this machine."""
        return zoneinfo.ZoneInfo(self.server.timezone) if self.server.timezone else tzlocal.get_localzone()


def timing(defaults: Defaults, model: Model | None = None) -> dict[str, Any]:
    """The defaults with what the model says instead: seconds, or "off" where that may stand."""
    own = model.model_dump(include=set(Defaults.model_fields), exclude_none=True) if model else {}
    return defaults.model_dump() | own


SECTIONS: Mapping[str, type[Table]] = {
    "[server]": Server,
    "[history]": History,
    "[[upstreams]]": Upstream,
    "[defaults]": Defaults,
    "[[models]]": Model,
    "[models.ping]": Ping,
    "[[prompts]]": Prompt,
    "[auth]": Auth,
    "[[auth.client_keys]]": AccessKey,
    "[[auth.admin_keys]]": AccessKey,
    "[notify]": Notify,
    "[cluster]": Cluster,
}
