"""docs/node.md and the files beside it say what is so."""

from __future__ import annotations

import io
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from ctflow.core.errors import EXIT_INTERRUPTED
from ctflow.node.log import AuditTrail, set_up_node_log
from ctflow.node.settings.explain import explain_settings
from ctflow.node.settings.groups import Log
from ctflow.node.settings.service import ServiceSettings, read_settings
from ctflow.node.web.views import STATES
from ctflow.settings.schema import documented
from node_support import Ward, loggers_kept

DOCS = Path(__file__).parents[3] / "docs"
NODE = (DOCS / "node.md").read_text(encoding="utf-8")


def test_the_table_has_every_key_its_default_and_its_meaning():
    table = NODE[NODE.index("## The file") : NODE.index("## Connecting")]
    rows = re.findall(r"^\| `([^`]+)` \| (.*?) \| (.*) \|$", table, re.MULTILINE)
    assert rows == [(key.name, key.default, key.meaning) for key in documented(ServiceSettings)]


def test_the_example_is_a_file_that_the_node_takes():
    settings = read_settings(DOCS / "node.yaml", {"HOME": "/none"})
    assert [rule.name for rule in settings.rules] == ["scouts", "thick slices", "chest", "all others"]
    said = explain_settings(settings)
    assert "listens as CTFLOW on 0.0.0.0:11112" in said
    assert "rule 4: ignore every series (all others)" in said


def test_the_example_of_several_models_is_a_file_that_the_node_takes(tmp_path):
    (block,) = re.findall(r"```yaml\n(bundle:.*?)```", NODE, re.DOTALL)
    (tmp_path / "node.yaml").write_text(block)
    settings = read_settings(tmp_path / "node.yaml", {"HOME": "/none"})
    lung, body = settings.models
    emergency, chest, others = settings.rules
    assert settings.models_of(emergency) == (lung, body)
    assert settings.models_of(others) == (lung,)
    assert settings.run_of(lung, chest).seg == "labelmap"


def test_every_reason_of_the_node_is_explained():
    sources = "".join(path.read_text() for path in sorted((DOCS.parent / "src" / "ctflow" / "node").rglob("*.py")))
    own = set(re.findall(r'Why\("([a-z-]+)"|"(rule-ignore|other-models)"', sources))
    named = {first or second for first, second in own} - {"done", "unexpected", "unreadable"}  # errors, and no reason
    rows = re.findall(r"^\| `([a-z-]+)` \| [^|]{10,} \|$", NODE[: NODE.index("## The page")], re.MULTILINE)
    assert sorted(rows) == sorted(named)


def test_every_state_is_explained_by_the_word_that_the_page_has():
    rows = re.findall(r"^\| (\w+) \| ([\w ]+) \|", NODE[: NODE.index("## The page")], re.MULTILINE)
    assert [row for row in rows if row[0] not in ("state", "Reason")] == [
        (name, shown.label) for name, shown in STATES.items()
    ]


def test_orthanc_and_the_node_name_each_other():
    theirs = json.loads((DOCS / "orthanc" / "orthanc.json").read_text())
    ours = ServiceSettings(data=Path())
    assert theirs["DicomModalities"]["ctflow"] == [ours.ae_title, ours.bind, ours.port]
    (block,) = re.findall(r"```yaml\n(destinations:.*?)```", NODE, re.DOTALL)
    (destination,) = yaml.safe_load(block)["destinations"]
    assert (destination["ae_title"], destination["port"]) == (theirs["DicomAet"], theirs["DicomPort"])
    assert all((DOCS / "orthanc" / name).is_file() for name in theirs["LuaScripts"])


@pytest.mark.parametrize("name", ["ctflow.lua", "ctflow.py"])
def test_both_scripts_send_ct_series_as_a_job(name):
    script = (DOCS / "orthanc" / name).read_text()
    for words in ("/modalities/ctflow/store", "Asynchronous", "Modality", "CT"):
        assert words in script
    if name.endswith(".py"):
        compile(script, name, "exec")


def test_the_unit_starts_the_node_and_does_not_start_again_after_a_wrong_file():
    unit = (DOCS / "ctflow.service").read_text()
    start = shlex.split(re.search(r"^ExecStart=\S+ (.*)$", unit, re.MULTILINE)[1])
    assert start[:2] == ["serve", "-c"]
    assert "ExecStartPre=" not in unit  # the node reads the file itself; --check would open the engine a second time
    assert "RestartPreventExitStatus=64" in unit  # SettingsInvalid
    assert f"SuccessExitStatus={EXIT_INTERRUPTED}\n" in unit  # a stop while the command is still imported is no failure


def test_the_line_of_the_log_has_the_keys_that_such_a_line_has(tmp_path):
    (block,) = re.findall(r"```\n(\{.*?)```", NODE, re.DOTALL)
    stream, ward = io.StringIO(), Ward(tmp_path)
    ward.done("1")
    with loggers_kept():
        set_up_node_log(Log(), stream)
        AuditTrail(ward.journal, tmp_path / "told").tell()
    ward.close()
    (line,) = [line for line in map(json.loads, stream.getvalue().splitlines()) if line["event"] == "done"]
    assert list(json.loads(block)) == list(line)


def test_pictures_and_files_that_are_named_are_there():
    for target in re.findall(r"\]\(([^)#]+)", NODE):
        assert target == "conformance.md" or (DOCS / target).exists(), target
