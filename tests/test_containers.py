"""The container's files agree with what the package offers: extras, commands, ports, and names of metrics."""

import json
import re
import shutil
import subprocess
import tomllib

import pytest
import yaml

from jaxmodels.commands.parsing import NoOptions
from jaxmodels.config import Config
from jaxmodels.serve.metrics import Metrics
from jaxmodels.train.trackers import Prometheus

NAME = re.compile(r"\b(?:vllm:|jaxmodels:|jaxmodels_)\w+")


@pytest.fixture(scope="module")
def offered():
    """Every name that a scrape of a server or of a run can give."""
    served = Metrics()
    served.watch(lambda: (), lambda: ())
    served.done("stop", 1.0, 1, 1)
    served.request("/health", 200)
    text = served.text().decode()
    run = Prometheus()
    run.scalars(1, {"train/loss": 1.0})
    return {line.split()[2] for line in text.splitlines() if line.startswith("# TYPE")} | {
        family.name for family in run.collect()
    }


def expressions(root):
    dashboard = json.loads((root / "containers/grafana/jaxmodels.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]
    for group in yaml.safe_load((root / "containers/alarms.yml").read_text())["groups"]:
        for rule in group["rules"]:
            yield rule["alert"], rule["expr"]


def test_dashboard_and_alarms_ask_for_metrics_that_there_are(root, offered):
    asked = [(title, name) for title, expr in expressions(root) for name in NAME.findall(expr)]
    assert len(asked) > 20
    for title, name in asked:
        assert {name, name.removesuffix("_bucket")} & offered, f"{title}: {name}"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs Debian's prometheus")
def test_prometheus_takes_its_configuration_and_each_expression(root, tmp_path):
    subprocess.run(["promtool", "check", "config", root / "containers/prometheus.yml"], check=True, capture_output=True)
    rules = [{"alert": f"panel{k}", "expr": expr} for k, (_, expr) in enumerate(expressions(root))]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    subprocess.run(["promtool", "check", "rules", tmp_path / "rules.yml"], check=True, capture_output=True)


def test_the_image_has_extras_files_and_a_user_that_there_are(root):
    text = (root / "containers/Dockerfile").read_text()
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [*re.findall(r"EXTRA=([\w,]+)", text), "cuda12", "tpu"]
    assert {extra for each in named for extra in each.split(",")} <= set(extras)
    ignored = (root / "containers/Dockerfile.dockerignore").read_text()
    for line in re.findall(r"^COPY (?!--from)(.+) \S+$", text, re.M):
        for source in line.split():
            assert (root / source).exists() and f"!{source}\n" in ignored, source
    assert "\nUSER 1000\n" in text and "/health" in text


def test_the_locked_packages_are_all_that_an_image_needs(root):
    """Each dependency of the package and of the extra serve has one version, which its range allows."""
    from packaging.requirements import Requirement

    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    locked = dict(line.split("==") for line in (root / "containers/lock.txt").read_text().split("\n") if "==" in line)
    for line in (*project["dependencies"], *project["optional-dependencies"]["serve"]):
        wanted = Requirement(line)
        assert locked[re.sub(r"[-_.]+", "-", wanted.name).lower()] in wanted.specifier, line


def test_services_run_commands_and_options_that_there_are(root):
    from jaxmodels.commands import COMMANDS
    from jaxmodels.commands.options import configured

    services = yaml.safe_load((root / "containers/compose.yaml").read_text())["services"]
    serve, train = (services[name]["command"] for name in ("serve", "train"))
    assert {serve[0], train[0]} <= set(COMMANDS.names())
    path = re.sub(r"\$\{CONFIG:-(\w+)\}", r"\1", train[1]).removeprefix("/")
    options = [word for word in train[2:] if word not in ("--run-dir", train[train.index("--run-dir") + 1])]
    cfg: Config = configured([str(root / path), *options], "train", NoOptions)[0]
    scraped = {
        job["job_name"]: job["static_configs"][0]["targets"]
        for job in yaml.safe_load((root / "containers/prometheus.yml").read_text())["scrape_configs"]
    }
    assert scraped == {"serve": [f"serve:{serve[-1]}"], "train": [f"train:{cfg.metrics.prometheus}"]}
