"""What ops copy from monitoring/ works: rules, alerts, runbook and dashboard, against real programs."""

import asyncio
import contextlib
import json
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from keepalive.simulator.models import SimModel
from tests.kit import PROJECT, live
from tests.kit.etcd import etcd, needs_etcd
from tests.kit.live import DaemonProcess, SimulatorProcess, ask, ending, wait_until
from tests.kit.prometheus import PATIENCE, Alertmanager, Json, Prometheus, Receiver, installed, promtool

MONITORING = PROJECT / "monitoring"
RULES = MONITORING / "prometheus"
CLUSTER = (PROJECT / "docs" / "cluster.md").read_text()
RUNBOOK = (PROJECT / "docs" / "runbook.md").read_text()
DASHBOARD: Json = json.loads((MONITORING / "grafana" / "keepalive.json").read_text())

pytestmark = pytest.mark.timeout(900)

# Tests that ask the same Prometheus stay in one process; the others may run anywhere.
reads_rules = pytest.mark.xdist_group("monitoring-rules")
asks_watched = pytest.mark.xdist_group("monitoring-watched")


@pytest.fixture(scope="module")
def rules(tmp_path_factory: pytest.TempPathFactory) -> list[Json]:
    """All rules, as Prometheus reads them."""
    folder = tmp_path_factory.mktemp("rules")
    files = ", ".join(str(RULES / name) for name in ("recording.yml", "alerts.yml"))
    prometheus = Prometheus(folder, f"rule_files: [{files}]")
    with ending(prometheus):
        return prometheus.rules()


@pytest.fixture(scope="module")
def alerts(rules: list[Json]) -> list[Json]:
    return [rule for rule in rules if rule["type"] == "alerting"]


# --- rules and runbook ------------------------------------------------------------------------------


def test_promtool_and_amtool_find_nothing_wrong() -> None:
    checked = [
        promtool("check", "rules", "recording.yml", "alerts.yml", cwd=RULES),
        promtool("check", "config", "prometheus.yml", cwd=RULES),
        promtool("check", "config", "compose.yml", cwd=RULES),
    ]

    amtool = [installed("amtool"), "check-config", str(MONITORING / "alertmanager" / "alertmanager.yml")]
    checked.append(subprocess.run(amtool, capture_output=True, text=True, timeout=PATIENCE, check=False))

    assert [run.returncode for run in checked] == [0] * 4, [run.stderr for run in checked]
    assert re.findall(r"(\d+) rules found", checked[0].stdout) == ["16", "19"]


@pytest.mark.parametrize("name", sorted(path.name for path in RULES.glob("*_test.yml")))
def test_rules_do_what_their_tests_say(name: str) -> None:
    run = promtool("test", "rules", name, cwd=RULES)

    assert run.returncode == 0, run.stdout + run.stderr


@reads_rules
def test_each_alert_is_seen_to_fire_and_not_to_fire(alerts: list[Json]) -> None:
    cases: dict[str, set[bool]] = {}
    for path in RULES.glob("*_test.yml"):
        for name, outcome in re.findall(r"alertname: (\w+)(?:,|\s)\s*exp_alerts:(.*)", path.read_text()):
            cases.setdefault(name, set()).add("[]" not in outcome)

    assert cases == {alert["name"]: {True, False} for alert in alerts}


@reads_rules
def test_each_alert_says_how_urgent_it_is_and_what_to_do(alerts: list[Json]) -> None:
    said = {
        alert["name"]: (
            alert["labels"]["severity"] in ("page", "ticket"),
            sorted(alert["annotations"]),
            alert["annotations"]["runbook_url"],
        )
        for alert in alerts
    }

    assert said == {
        name: (
            True,
            ["description", "runbook_url", "summary"],
            f"docs/runbook.md#{name.lower()}",
        )
        for name in said
    }
    assert len(said) == 19


@reads_rules
def test_the_runbook_has_a_section_for_each_alert_and_no_other(alerts: list[Json]) -> None:
    sections = re.findall(r"^## (.*)\n\n\*(Page|Ticket)\.\*", RUNBOOK, re.MULTILINE)

    assert sorted(sections) == sorted(
        (alert["name"], alert["labels"]["severity"].title()) for alert in alerts
    )
    assert len(sections) == RUNBOOK.count("\n## ")


def test_the_commands_of_the_readme_install_rules_whose_links_are_whole(tmp_path: Path) -> None:
    block = re.search(r"```sh\n(.*?)```", (MONITORING / "README.md").read_text(), re.DOTALL)
    assert block
    script = block[1].replace("/etc/prometheus", str(tmp_path)).replace("systemctl reload prometheus", "true")
    shutil.copy(RULES / "prometheus.yml", tmp_path)
    installed("promtool")

    run = subprocess.run(
        ["sh", "-euc", script], cwd=MONITORING, capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    links = re.findall(r"runbook_url: (.*)#", (tmp_path / "alerts.yml").read_text())

    assert run.returncode == 0, run.stderr
    assert links == ["https://wiki.example.org/keepalive/runbook"] * 19


# --- names ------------------------------------------------------------------------------------------

TEXTS = (
    "README.md",
    "docs/runbook.md",
    "docs/operations.md",
    "docs/cluster.md",
    "monitoring/README.md",
    "monitoring/prometheus/recording.yml",
    "monitoring/prometheus/alerts.yml",
    "monitoring/prometheus/prometheus.yml",
    "monitoring/grafana/keepalive.json",
)
# Not behind a colon: that is a name which a recording rule makes, `level:name:operation`.
METRIC = re.compile(r"(?<![\w:/.-])(?:keepalive|process)_\w+(?![\w:])")


async def test_every_metric_that_is_named_anywhere_is_on_the_page_of_a_daemon() -> None:
    cluster = '[cluster]\netcd = "http://127.0.0.1:1"\n'
    async with (
        live.simulator() as simulator,
        live.daemon(live.settings(simulator.url, "a") + cluster) as daemon,
    ):
        _, _, page = await live.asked(f"{daemon.admin_url}/metrics")
    known = {
        name + suffix
        for name, kind in re.findall(r"^# TYPE (\S+) (\w+)", page, re.MULTILINE)
        for suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",))
    }

    named = {text: set(METRIC.findall((PROJECT / text).read_text())) for text in TEXTS}

    assert {text: names - known for text, names in named.items()} == {text: set() for text in TEXTS}
    assert len(set().union(*named.values())) > 25


@reads_rules
def test_every_recorded_series_that_is_named_is_recorded(rules: list[Json]) -> None:
    recorded = {rule["name"] for rule in rules if rule["type"] == "recording"}
    texts = [(PROJECT / text).read_text() for text in TEXTS]

    named = {name for text in texts for name in re.findall(r"\b(?:model|keepalive):[a-z_]+(?::\w+)?", text)}

    assert named == recorded


# --- the dashboard ----------------------------------------------------------------------------------

PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_A_CLUSTER = [panel for panel in PANELS if "keepalive_cluster_" in json.dumps(panel)]


def test_panels_have_places_of_their_own() -> None:
    cells: list[tuple[int, int]] = []
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        assert 0 <= place["x"] < place["x"] + place["w"] <= 24
        cells += [(place["x"] + i, place["y"] + j) for i in range(place["w"]) for j in range(place["h"])]

    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_everything_asks_the_chosen_prometheus() -> None:
    asked: list[tuple[str, str]] = []

    def note(thing: Json) -> Json:
        asked.extend(
            (thing["datasource"]["type"], thing["datasource"]["uid"]) for _ in thing.keys() & {"datasource"}
        )
        return thing

    json.loads(json.dumps(DASHBOARD), object_hook=note)

    # Grafana's own is for what people write into the graphs by hand.
    assert set(asked) == {("prometheus", "${datasource}"), ("grafana", "-- Grafana --")}
    assert len(asked) > 2 * len(PANELS)


def test_every_panel_says_what_it_shows() -> None:
    for panel in PANELS:
        references = [target["refId"] for target in panel["targets"]]

        assert panel["title"]
        assert panel["description"].endswith((".", "?"))
        assert "unit" in panel["fieldConfig"]["defaults"] or panel["type"] != "timeseries"
        assert references == sorted(set(references))
        assert references
        assert all(target["expr"] for target in panel["targets"])
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(titles) == len(set(titles))


def test_every_variable_that_is_used_is_defined() -> None:
    defined = {variable["name"] for variable in DASHBOARD["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(DASHBOARD)))

    assert used - defined == {"__rate_interval", "__range", "__all"}
    assert defined <= used


# --- a daemon, watched through load, eviction and failure -------------------------------------------

SMALL, LARGE = "qwen/qwen3-1.7b", "medicine-llm"
CONFIG = """
[server]
listen = "127.0.0.1:0"
admin_listen = "127.0.0.1:{port}"

[[upstreams]]
name = "local"
url = "{local}"
memory = "100GB"

[[upstreams]]
name = "gpu"
url = "{gpu}"

[[upstreams]]
name = "locked"
url = "{locked}"

[defaults]
refresh_interval = "250ms"
ping_interval = "2s"

[[models]]
key = "medicine-llm"
upstream = "local"
prime = "opening.txt"

[[models]]
key = "qwen/qwen3-1.7b"
upstream = "local"

[[models]]
key = "gpu-llm"
upstream = "gpu"

[[models]]
key = "locked-llm"
upstream = "locked"
"""


def shipped(folder: Path, target: str, alertmanagers: str = "[]", objective: str = "0.99") -> str:
    """The config and rules of monitoring/, at the pace of a test."""
    for name in ("recording.yml", "alerts.yml"):
        text = (RULES / name).read_text()
        text = re.sub(r"^( +(?:interval|for)): \d+[sm]$", r"\1: 1s", text, flags=re.MULTILINE)
        # Nobody waits for the next full hour here.
        text = re.sub(r"\[(5m|30m|1h|2h|6h|1d|3d):\w+\]", r"[\1:20s]", text)
        text = text.replace("vector(0.99)", f"vector({objective})")
        (folder / name).write_text(text)
    text = (RULES / "prometheus.yml").read_text()
    for old, new in (
        ("scrape_interval: 15s", "scrape_interval: 1s"),
        ("127.0.0.1:9235", target),
        ('["127.0.0.1:9093"]', alertmanagers),
    ):
        assert old in text
        text = text.replace(old, new)
    return f"global: {{evaluation_interval: 1s}}\n{text}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Watched:
    """Three LM Studios, a daemon in front of them, and Prometheus with what monitoring/ has for it."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.began = time.time()
        self.local = self._simulator("local", f"{LARGE}:3", f"{SMALL}:0.5")
        self.gpu = self._simulator("gpu", "gpu-llm:0.5")
        self.locked = self._simulator("locked", "locked-llm:0.5")
        self._port = free_port()
        urls = {name: getattr(self, name).url for name in ("local", "gpu", "locked")}
        self.config = CONFIG.format(port=self._port, **urls)
        (folder / "opening.txt").write_text("You are the nurse of this ward.")
        # Two minutes of trouble are much only for an objective that allows little.
        text = shipped(folder, f"127.0.0.1:{self._port}", objective="0.9999999")
        self.prometheus = self._running(Prometheus(folder, text))
        self.prometheus.sees("up == 0", "Prometheus looks for the daemon")
        self.starts = 0
        self.start()

    def _running(self, process: Any) -> Any:
        self._stack.enter_context(ending(process))
        return process

    def _simulator(self, name: str, *models: str) -> SimulatorProcess:
        folder = self._folder / name
        folder.mkdir()
        simulator: SimulatorProcess = self._running(SimulatorProcess(folder, *models))
        return simulator

    def start(self) -> None:
        self.starts += 1
        self.daemon: DaemonProcess = self._running(
            DaemonProcess(self._folder, self.config, f"daemon-{self.starts}")
        )
        self.client = self.daemon.events("daemon.started")[0]["listen"]

    def say(self, model: str, *, stream: bool = True, wait: int = 30) -> int:
        """A user's request; its status."""
        body = {"model": model, "stream": stream, "messages": [{"role": "user", "content": "Hello"}]}
        headers = {"Content-Type": "application/json", "Prefer": f"wait={wait}"}
        return ask(f"{self.client}/v1/chat/completions", "POST", body, **headers)[0]

    def evict(self, model: str) -> None:
        """Somebody takes it out of memory; it comes back."""
        before = self.daemon.model(model)["evictions"]
        assert ask(f"{self.local.url}/simulator/evict", "POST", {"model": model})[0] == 200
        wait_until(lambda: self.daemon.model(model)["evictions"] > before, f"{model} is missed")
        # As often as it is lost here, the daemon would begin to hesitate.
        assert ask(f"{self.daemon.url}/api/models/{model}/warm", "POST")[0] == 202
        self.daemon.reaches(model, "warm")

    def fires(self, *names: str) -> None:
        """These do; each has `for` and the pace of the rules before it."""
        for name in names:
            self.prometheus.sees(f'ALERTS{{alertname="{name}",alertstate="firing"}}', f"{name} fires")


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """All that can go wrong has gone wrong, one after the other, and each time its alert has fired."""
    with contextlib.ExitStack() as stack:
        world = Watched(tmp_path_factory.mktemp("watched"), stack)
        _live_well(world)
        _lose_models(world)
        _lose_upstreams(world)
        _mistreat_the_daemon(world)
        world.ended = time.time()
        yield world


def _live_well(world: Watched) -> None:
    with ThreadPoolExecutor() as people:
        cold = people.submit(world.say, LARGE)
        waited = "max_over_time(keepalive_proxy_requests_waiting[1m]) == 1"
        world.prometheus.sees(waited, "somebody is seen waiting")
        assert cold.result() == 200
    for model in ("medicine-llm", "qwen/qwen3-1.7b", "gpu-llm", "locked-llm"):
        world.daemon.reaches(model, "warm")
    assert [world.say(SMALL), world.say(LARGE, stream=False), world.say(LARGE)] == [200, 200, 200]
    seen = "sum(keepalive_proxy_requests_total) == 4 and sum(keepalive:not_warm:sum) == 0"
    world.prometheus.sees(seen, "all is well")
    quiet = f'absent(ALERTS{{alertstate="firing",alertname!~"{"|".join(BURNS)}"}})'
    world.prometheus.sees(quiet, "no alert fires")


BURNS = ("KeepaliveWarmBudgetBurnsFast", "KeepaliveWarmBudgetBurnsSlowly")


def _lose_models(world: Watched) -> None:
    world.evict(LARGE)
    # A ping that is on its way when the model goes is what loads it, now and then.
    while world.daemon.model(SMALL)["loads"] < 5:
        world.evict(SMALL)
    world.local.faults(answer_model={"value": "somebody-else", "model": SMALL, "times": 1})
    world.fires("KeepaliveThrashing", "KeepaliveEvictionStorm", "KeepaliveWrongModel")
    world.local.faults(load_result={"value": "fail", "model": SMALL})
    assert ask(f"{world.local.url}/simulator/evict", "POST", {"model": SMALL})[0] == 200


def _lose_upstreams(world: Watched) -> None:
    world.gpu.kill()
    world.locked.faults(auth_token="another")
    world.daemon.config.write_text(world.config.replace("refresh_interval", "refresh_intervall"))
    world.daemon.signal(signal.SIGHUP)
    world.fires("KeepaliveLoadFailing", "KeepaliveModelCold", "KeepaliveConfigRejected")
    world.fires("KeepaliveUpstreamDown", "KeepaliveTokenRefused")
    assert world.say(SMALL, wait=1, stream=False) == 503


def _mistreat_the_daemon(world: Watched) -> None:
    # The alert asks for ten runs missed, and there is one in each second.
    world.daemon.signal(signal.SIGSTOP)
    time.sleep(12)
    world.daemon.signal(signal.SIGCONT)
    world.fires("KeepaliveSchedulerLate")
    for restarts in (1, 2, 3):
        world.daemon.kill()
        world.start()
        seen = f"changes(process_start_time_seconds{{job='keepalive'}}[1h]) >= {restarts}"
        world.prometheus.sees(seen, f"restart {restarts} is seen")
    world.fires("KeepaliveRestarting")
    world.daemon.kill()
    world.fires("KeepaliveAbsent", *BURNS)


@asks_watched
def test_every_rule_is_evaluated_and_says_something(watched: Watched) -> None:
    rules = watched.prometheus.rules()

    silent = [
        rule["name"]
        for rule in rules
        if rule["health"] != "ok" or not watched.prometheus.over(rule["query"], watched.began, watched.ended)
    ]

    # Minutes of silence or without room, five answers without a word, a socket that is lost alone, or a cluster are not
    # had here: the rules' own tests have them.
    elsewhere = {
        "KeepaliveAnswerSilent",
        "KeepaliveAnswersEmpty",
        "KeepaliveClusterEngineDown",
        "KeepaliveNoHolder",
        "KeepaliveSdkSocketLost",
        "KeepaliveWaitsForRoom",
    }
    assert (len(rules), set(silent) - elsewhere) == (35, set())


def as_grafana(expression: str, seconds: float, **chosen: str) -> str:
    """The query that Grafana would send."""
    values = {
        "__rate_interval": "4s",
        "__range": f"{seconds:.0f}s",
        "upstream": ".*",
        "model": ".*",
        **chosen,
    }
    return re.sub(r"\$\{?(\w+)\}?", lambda found: values[found[1]], expression)


@asks_watched
@pytest.mark.parametrize(
    "chosen",
    [
        pytest.param({}, id="all"),
        # Grafana escapes what was chosen for a regular expression, and that for PromQL.
        pytest.param({"upstream": "local", "model": r"(medicine-llm|qwen/qwen3-1\\.7b)"}, id="two models"),
    ],
)
def test_every_query_of_the_dashboard_has_something_to_show(watched: Watched, chosen: dict[str, str]) -> None:
    span = watched.ended - watched.began
    queries = {
        (panel["title"], target["refId"]): as_grafana(target["expr"], span, **chosen)
        for panel in PANELS
        if panel not in OF_A_CLUSTER
        for target in panel["targets"]
    }
    annotations = {
        (note["name"], "annotation"): note["expr"]
        for note in DASHBOARD["annotations"]["list"]
        if "expr" in note
    }

    silent = [
        name
        for name, query in (queries | annotations).items()
        if not watched.prometheus.over(query, watched.began, watched.ended)
    ]

    assert silent == []
    assert len(queries) > 40


@asks_watched
def test_the_variables_of_the_dashboard_offer_upstreams_and_models(watched: Watched) -> None:
    offered = {}
    for variable in DASHBOARD["templating"]["list"]:
        found = re.fullmatch(r"label_values\((.*), (\w+)\)", variable.get("definition", ""))
        if found:
            series = as_grafana(found[1], 60, upstream="local")
            query = f"group by ({found[2]}) (last_over_time({series}[1h]))"
            offered[variable["name"]] = sorted(
                dict(labels)[found[2]] for labels in watched.prometheus.now(query)
            )

    assert offered == {"upstream": ["gpu", "local", "locked"], "model": [LARGE, SMALL]}


@asks_watched
def test_a_state_timeline_shows_each_state_by_its_number(watched: Watched) -> None:
    shown = {
        panel["title"]: {
            mapping["text"]
            for number, mapping in panel["fieldConfig"]["defaults"]["mappings"][0]["options"].items()
            if float(number) in {value for _, value in points}
        }
        for panel in PANELS
        if panel["type"] == "state-timeline" and panel not in OF_A_CLUSTER
        for points in [
            watched.prometheus.over(
                as_grafana(panel["targets"][0]["expr"], 60), watched.began, watched.ended, 0.5
            )
        ]
    }

    assert shown["What each model did"] >= {"warm", "loading", "backoff", "unknown"}
    assert shown["LM Studio"] >= {"up", "down", "unauthorized"}
    assert shown["Socket of its SDKs"] >= {"up", "absent"}


# --- several daemons as one -------------------------------------------------------------------------


@needs_etcd
async def test_any_daemon_of_a_cluster_tells_where_all_are_and_the_dashboard_shows_who_acts(
    tmp_path: Path,
) -> None:
    installed("prometheus")
    [scrape] = re.findall(r"```yaml\n(.*?)```", CLUSTER, re.DOTALL)
    async with (
        live.simulator(SimModel("a", load_seconds=0.1)) as studio,
        contextlib.AsyncExitStack() as stack,
    ):
        engine = await asyncio.to_thread(stack.enter_context, etcd(tmp_path))
        texts = [
            live.settings(studio.url, "a")
            + f'[cluster]\netcd = "{engine.url}"\ninstance = "{name}"\nttl = "20s"\n'
            for name in ("first", "other")
        ]
        async with live.daemon(texts[0]) as first:
            await live.until(lambda: live.model(first, "a")["state"] == "warm", "the first one acts")
            other = await stack.enter_async_context(live.daemon(texts[1]))
            scrape = scrape.replace("http://10.0.0.1:9235", other.admin_url)
            scrape = f"global: {{scrape_interval: 1s}}\n{scrape}".replace(
                "job_name: keepalive\n", "job_name: keepalive\n    scrape_interval: 1s\n"
            )
            began = time.time()
            prometheus = await asyncio.to_thread(Prometheus, tmp_path, scrape)
            stack.enter_context(ending(prometheus))
            both = "count(keepalive_cluster_member_up == 1) == 4 and max(keepalive_cluster_holds_lease) == 1"
            await asyncio.to_thread(prometheus.sees, both, "each is read, and sees both")
        taken = 'increase(keepalive_cluster_handovers_total{instance="other"}[4s]) > 0'
        await asyncio.to_thread(prometheus.sees, taken, "the other one took over")
        acts = 'keepalive_cluster_holds_lease{instance="other"} == 1'
        await asyncio.to_thread(prometheus.sees, acts, "and acts")
        queries = [
            as_grafana(target["expr"], 60, upstream="local")
            for panel in OF_A_CLUSTER
            for target in panel["targets"]
        ]
        over = partial(prometheus.over, start=began, end=time.time())
        shown = {query: await asyncio.to_thread(over, query) for query in queries}

    assert [query for query, points in shown.items() if not points] == []
    assert {value for _, value in shown[queries[0]]} == {0.0, 1.0}
    assert len(OF_A_CLUSTER) == 4


# --- from the daemon to somebody's pager ------------------------------------------------------------


def test_an_upstream_that_goes_down_reaches_the_pager_and_so_does_its_return(tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        receiver = Receiver()
        stack.callback(receiver.close)
        text = (MONITORING / "alertmanager" / "alertmanager.yml").read_text()
        text = re.sub(r"group_(wait|interval): \d+[sm]", r"group_\1: 1s", text)
        text = text.replace("http://127.0.0.1:8080/page", receiver.url)
        alertmanager = Alertmanager(tmp_path, text)
        stack.enter_context(ending(alertmanager))
        port = free_port()
        daemon = DaemonProcess(tmp_path, live.settings(f"http://127.0.0.1:{port}", "medicine-llm:0.1"))
        stack.enter_context(ending(daemon))
        target, told = (process.url.removeprefix("http://") for process in (daemon, alertmanager))
        prometheus = Prometheus(tmp_path, shipped(tmp_path, target, alertmanagers=f"[{told!r}]"))
        stack.enter_context(ending(prometheus))

        firing = wait_until(lambda: receiver.got("KeepaliveUpstreamDown", "firing"), "the page", PATIENCE)
        studio = SimulatorProcess(tmp_path, "medicine-llm:0.1", port=port)
        stack.enter_context(ending(studio))
        resolved = wait_until(
            lambda: receiver.got("KeepaliveUpstreamDown", "resolved"), "the all-clear", PATIENCE
        )

    assert firing["labels"] == {
        "alertname": "KeepaliveUpstreamDown",
        "severity": "page",
        "job": "keepalive",
        "instance": target,
        "upstream": "local",
        "state": "down",
    }
    assert firing["annotations"] == {
        "summary": 'LM Studio "local" does not answer',
        "description": "keepalive cannot list what local has loaded. Models that should be warm there, and are "
        "out of reach: 1. They come back by themselves when it answers again.",
        "runbook_url": "docs/runbook.md#keepaliveupstreamdown",
    }
    assert resolved["labels"] == firing["labels"]
