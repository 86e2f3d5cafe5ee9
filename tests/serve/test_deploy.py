"""The manifests are valid by Kubernetes' own schema and fit the server they start; the image runs without rights."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from dseek.cli import serve_ray
from dseek.cli.main import build_parser
from dseek.cli.serve import config_from

FOLDER = Path(__file__).resolve().parents[2] / "deploy"
CORE = sorted(path for path in FOLDER.glob("*/*.yaml") if path.name not in ("kustomization.yaml", "rayservice.yaml"))
"""Manifests of kinds that Kubernetes itself knows."""


def deployment() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "kubernetes/deployment.yaml").read_text()))


@pytest.mark.parametrize("path", CORE, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_manifest_is_valid(path: Path) -> None:
    for document in yaml.safe_load_all(path.read_text()):
        kubernetes_validate.validate(document, "1.31", strict=True)


def test_the_schema_would_tell() -> None:
    broken = deployment()
    broken["spec"]["replicas"] = "one"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, "1.31", strict=True)


@pytest.mark.parametrize("name", ["kubernetes", "kuberay"])
def test_all_manifests_are_applied_together(name: str) -> None:
    listed = yaml.safe_load((FOLDER / name / "kustomization.yaml").read_text())["resources"]
    assert sorted([*listed, "kustomization.yaml"]) == sorted(path.name for path in (FOLDER / name).glob("*.yaml"))


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


def rayservice() -> dict[str, Any]:
    return dict(yaml.safe_load((FOLDER / "kuberay/rayservice.yaml").read_text())["spec"])


def ray_pods() -> list[dict[str, Any]]:
    cluster = rayservice()["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_ray_service_has_what_kuberay_knows_and_valid_pods() -> None:
    found = yaml.safe_load((FOLDER / "kuberay/rayservice.yaml").read_text())
    assert (found["apiVersion"], found["kind"]) == ("ray.io/v1", "RayService")
    assert set(found["spec"]) == {"serveConfigV2", "rayClusterConfig"}
    assert set(found["spec"]["rayClusterConfig"]) == {"rayVersion", "headGroupSpec", "workerGroupSpecs"}
    worker = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
    assert [set(group) for group in ray_pods()] == [{"rayStartParams", "template"}, worker]
    for group in ray_pods():
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": group["template"]}
        kubernetes_validate.validate(pod, "1.31", strict=True)
        spec = group["template"]["spec"]
        assert spec["securityContext"]["runAsNonRoot"] and not spec["automountServiceAccountToken"]
        assert spec["containers"][0]["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_ray_serve_takes_the_configuration_and_a_replica_fits_its_pod(repo: Path) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(rayservice()["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == f"{serve_ray.__name__}:{serve_ray.build_app.__name__}"
    args = serve_ray.arguments_from(application.args)
    _, workers = ray_pods()
    container = workers["template"]["spec"]["containers"][0]
    assert args.workers == workers["replicas"] and str(args.threads) == container["resources"]["limits"]["cpu"]
    assert args.drain_s < workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert config.http_options.port == container["ports"][0]["containerPort"]
    assert config.http_options.request_timeout_s > args.request_timeout_s
    assert any(args.api_key_file.startswith(mount["mountPath"]) for mount in container["volumeMounts"])
    needed = re.search(r"ray\[serve\]>=([\d.]+)", (repo / "pyproject.toml").read_text())
    assert needed is not None and rayservice()["rayClusterConfig"]["rayVersion"].startswith(needed[1])


def test_the_image_is_of_the_same_user_and_torch(repo: Path) -> None:
    lines = (FOLDER / "Containerfile").read_text()
    users = re.findall(r"^USER (\d+)", lines, re.MULTILINE)
    assert users == [str(deployment()["spec"]["template"]["spec"]["securityContext"]["runAsUser"])]
    (torch,) = re.findall(r"torch==[\d.]+", lines)
    assert torch in (repo / "Makefile").read_text()
    for source in re.findall(r"^COPY ((?!--)[^\n]*) /source", lines, re.MULTILINE):
        assert all((repo / name).exists() for name in source.split())
