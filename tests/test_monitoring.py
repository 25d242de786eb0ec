"""What ops copy from monitoring/ works: rules, alerts, runbook and dashboard, against real programs."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.live import PATIENCE, ending
from tests.prometheus import Json, Prometheus, installed, promtool

ROOT = Path(__file__).parents[1]
MONITORING = ROOT / "monitoring"
RULES = MONITORING / "prometheus"
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()

pytestmark = pytest.mark.timeout(300)


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
    ]

    amtool = [installed("amtool"), "check-config", str(MONITORING / "alertmanager" / "alertmanager.yml")]
    checked.append(subprocess.run(amtool, capture_output=True, text=True, timeout=PATIENCE, check=False))

    assert [run.returncode for run in checked] == [0, 0, 0], [run.stderr for run in checked]
    assert "16 rules found" in checked[0].stdout
    assert "13 rules found" in checked[0].stdout


@pytest.mark.parametrize("name", sorted(path.name for path in RULES.glob("*_test.yml")))
def test_rules_do_what_their_tests_say(name: str) -> None:
    run = promtool("test", "rules", name, cwd=RULES)

    assert run.returncode == 0, run.stdout + run.stderr


def test_each_alert_is_seen_to_fire_and_not_to_fire(alerts: list[Json]) -> None:
    cases: dict[str, set[bool]] = {}
    for path in RULES.glob("*_test.yml"):
        for name, outcome in re.findall(r"alertname: (\w+)(?:,|\s)\s*exp_alerts:(.*)", path.read_text()):
            cases.setdefault(name, set()).add("[]" not in outcome)

    assert cases == {alert["name"]: {True, False} for alert in alerts}


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
    assert len(said) == 13


def test_the_runbook_has_a_section_for_each_alert_and_no_other(alerts: list[Json]) -> None:
    sections = re.findall(r"^## (.*)\n\n\*(Page|Ticket)\.\*", RUNBOOK, re.MULTILINE)

    assert sorted(sections) == sorted(
        (alert["name"], alert["labels"]["severity"].title()) for alert in alerts
    )
    assert len(sections) == RUNBOOK.count("\n## ")
