"""The manifests are valid by Kubernetes' own schema and fit the server they start; the image runs without rights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dseek.cli.main import build_parser
from dseek.cli.serve import config_from

FOLDER = Path(__file__).resolve().parents[2] / "deploy"
MANIFESTS = sorted(path for path in (FOLDER / "kubernetes").glob("*.yaml") if path.name != "kustomization.yaml")


def deployment() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "kubernetes/deployment.yaml").read_text()))


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_valid(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_the_schema_would_tell() -> None:
    broken = deployment()
    broken["spec"]["replicas"] = "one"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.31", strict=True)


def test_all_manifests_are_applied_together() -> None:
    listed = yaml.safe_load((FOLDER / "kubernetes/kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in MANIFESTS]


def test_the_server_takes_its_arguments_and_can_drain_in_time(tmp_path: Path) -> None:
    pod = deployment()["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    verb, *arguments = container["args"]
    assert verb == "serve"
    args = build_parser("serve").parse_args(arguments)
    args.api_key_file = None  # a secret of the cluster's
    config = config_from(args)
    pause_s = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pause_s + config.drain_s < pod["terminationGracePeriodSeconds"]
    assert config.port == container["ports"][0]["containerPort"] and not config.loopback
    probes = [container[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")]
    assert probes == ["/health", "/health", "/ready"]


def test_the_pod_has_no_rights_it_does_not_need() -> None:
    pod = deployment()["spec"]["template"]["spec"]
    rights = pod["containers"][0]["securityContext"]
    assert pod["securityContext"]["runAsNonRoot"] and not pod["automountServiceAccountToken"]
    assert rights["readOnlyRootFilesystem"] and not rights["allowPrivilegeEscalation"]
    assert rights["capabilities"] == {"drop": ["ALL"]}


def test_the_image_is_of_the_same_user_and_torch(repo: Path) -> None:
    lines = (FOLDER / "Containerfile").read_text()
    users = re.findall(r"^USER (\d+)", lines, re.MULTILINE)
    assert users == [str(deployment()["spec"]["template"]["spec"]["securityContext"]["runAsUser"])]
    (torch,) = re.findall(r"torch==[\d.]+", lines)
    assert torch in (repo / "Makefile").read_text()
    for source in re.findall(r"^COPY ((?!--)[^\n]*) /source", lines, re.MULTILINE):
        assert all((repo / name).exists() for name in source.split())
