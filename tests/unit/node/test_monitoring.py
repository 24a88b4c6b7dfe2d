"""The dashboard and the alert rules of docs/monitoring name metrics, labels and values that a node has."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from ctflow.node.journal.journal import Journal
from ctflow.node.journal.records import STATES
from ctflow.node.metrics import Metrics

FOLDER = Path(__file__).parents[3] / "docs" / "monitoring"
PANELS = json.loads((FOLDER / "grafana.json").read_text())["panels"]
RULES = [rule for group in yaml.safe_load((FOLDER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]
EXPRESSIONS = [target["expr"] for panel in PANELS for target in panel["targets"]] + [rule["expr"] for rule in RULES]
SCRAPED = {"job", "instance"}  # labels that Prometheus adds


@pytest.fixture
def known(tmp_path):
    """Sample -> its labels, of a node at which everything happened once."""
    journal = Journal(tmp_path / "journal.sqlite3")
    metrics = Metrics(journal, tmp_path)
    metrics.refused("conflict")
    metrics.sent("pacs", "sent")
    metrics.stage("turnaround", 1.0)
    metrics.same_uid("replaced")
    metrics.expiries(lambda: [("tls.certificate", 1e9)])
    text = metrics.exposition()[0].decode()
    journal.close()
    found = {"ctflow_deliveries": {"destination", "state"}}  # there is none to deliver
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_names_what_there_is(known, expression):
    named = re.findall(r"\b(ctflow_\w+)(?:\{([^}]*)\})?", expression)
    assert named or expression.startswith("up{")
    for name, matchers in named:
        assert name in known
        assert set(re.findall(r"(\w+)\s*[=!]", re.sub('"[^"]*"', "", matchers))) <= known[name] | SCRAPED
        for states in re.findall(r'state[=!]~?"([^"]+)"', matchers):
            allowed = STATES if name == "ctflow_series" else ("waiting", "sent", "dead", "withdrawn")
            assert set(states.split("|")) <= set(allowed)


def test_every_alert_says_what_to_do():
    assert all(rule["annotations"]["summary"] and rule["annotations"]["action"] for rule in RULES)


def test_reasons_of_refusals_are_those_that_the_node_counts():
    source = "".join(path.read_text() for path in (Path(__file__).parents[3] / "src/ctflow/node/receive").glob("*.py"))
    named = {
        word for rule in RULES for words in re.findall(r'reason=~"([^"]+)"', rule["expr"]) for word in words.split("|")
    }
    assert named
    assert all(f'"{word}"' in source for word in named)
