"""The Ray cluster under a server: started here for one machine, or one that runs already; and the deployment on it."""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Callable
from typing import Any

import ray
from ray import serve

from dseek.core.errors import ConfigError, PeerError
from dseek.core.logs import get_logger
from dseek.serve.on_ray.replica import ModelReplica
from dseek.serve.on_ray.shares import share
from dseek.serve.service import Service

logger = get_logger("dseek.serve")

REPLICA = "Replica"
"""Name of the deployment that has the model."""

HEALTH_PERIOD_S = 1.0
"""Time between two looks of Ray Serve at a replica: a dead one is noticed, and replaced, after about as long."""

HEALTH_TIMEOUT_S = 30.0
"""Time that a replica has to answer: one that computes is slow to."""

MAX_STARTS = 3
"""Failed starts in a row before a deployment is given up."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Ray's shared memory on one machine: requests and answers are small, and weights do not go through it."""

ASK_S = 0.5
REACH_S = 5.0
CONTROLLER = "SERVE_CONTROLLER"


class ReplicasFailedError(ConfigError):
    """The replicas did not start; says what the first of them met."""


def connect(address: str | None) -> None:
    """Join a cluster, or start one on this machine alone.

    Args:
        address: `HOST:PORT`, `auto`, or None to start one. `environment.prepare` was called before Ray was imported.

    Raises:
        ConfigError: the cluster cannot be joined.
        PeerError: none can be started here.
    """
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    if address is None:
        try:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                **quiet,
            )
        except Exception as error:  # Ray raises plain ones where its processes take more than half a minute to start
            raise PeerError(
                f"Ray did not start on this machine: {error}", remedy="try again when it is less busy"
            ) from None
        return
    if address.startswith("ray://"):
        raise ConfigError(
            f"the Ray address is {address}",
            needed="HOST:PORT of the cluster's head, or auto; the server is a part of the cluster, not a Ray client",
            remedy="start it on one of the cluster's nodes",
        )
    _reach(address)
    try:
        ray.init(address=address, **quiet)
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(
            f"the Ray cluster at {address} cannot be joined: {first}",
            needed="a running cluster with this version of Ray and of Python",
            remedy="leave --ray-address out to start one on this machine",
        ) from None


def _reach(address: str) -> None:
    """Refuse an address that nobody listens at, which Ray would try for minutes."""
    host, colon, port = address.rpartition(":")
    if not colon:  # `auto`
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_S):
            pass
    except (OSError, ValueError, OverflowError) as error:
        raise ConfigError(
            f"the Ray cluster at {address} cannot be reached: {error}",
            needed="HOST:PORT of a cluster's head, where `ray start --head` runs",
            remedy="leave --ray-address out to start one on this machine",
        ) from None


def replica_share(count: int) -> float:
    """Find the share of the processors of a cluster's nodes that each replica gets.

    Args:
        count: replicas.

    Returns:
        See `shares.share`.

    Raises:
        ConfigError: no node has a processor to give.
    """
    nodes = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]]
    if not nodes or max(nodes) <= 0:
        raise ConfigError(
            "no node of the Ray cluster has a processor for a replica", needed="a node with CPU resources"
        )
    return share(nodes, count)


def replica_deployment(
    make_service: Callable[[], Service], *, count: int, num_cpus: float, drain_s: float
) -> serve.Application:
    """Describe the deployment of the model.

    Args:
        make_service: loads the model; called in each replica.
        count: replicas.
        num_cpus: processors that Ray reserves for each.
        drain_s: time for answers when a replica is taken away.

    Returns:
        What `serve.run` takes, or binds to an ingress.
    """
    described: serve.Application = serve.deployment(
        ModelReplica,
        name=REPLICA,
        num_replicas=count,
        max_ongoing_requests=100_000,  # the engine has a queue of its own
        ray_actor_options={"num_cpus": num_cpus},
        health_check_period_s=HEALTH_PERIOD_S,
        health_check_timeout_s=HEALTH_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=drain_s,
        max_constructor_retry_count=MAX_STARTS,
        request_router_config={
            "request_router_class": "dseek.serve.on_ray.request_router:AffinityRequestRouter",
        },
    ).bind(make_service)
    return described


def application_name(model_name: str) -> str:
    """Write a model's name as Ray Serve shows it among its applications.

    Args:
        model_name: any name.
    """
    return "dseek-" + re.sub(r"[^A-Za-z0-9._-]+", "-", model_name).strip("-.")[-64:]


def deploy(application: serve.Application, name: str) -> tuple[Any, Callable[[], None]]:
    """Start the replicas, without any of Ray Serve's own HTTP servers, and wait until all are ready.

    Args:
        application: from `replica_deployment`.
        name: of the application.

    Returns:
        The deployment's handle, and what takes the deployment away again.

    Raises:
        ConfigError: an application of this name runs on the cluster.
        ReplicasFailedError: they do not start.
    """
    was_there = any(
        actor["namespace"] == "serve" and actor["name"].startswith(CONTROLLER)
        for actor in ray.util.list_named_actors(all_namespaces=True)
    )
    if was_there and name in serve.status().applications:
        raise ConfigError(
            f"the Ray cluster already serves {name}",
            remedy="end the other server, or give this one another --served-model-name",
        )
    if not was_there:
        serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING"})

    def take_away() -> None:
        serve.delete(name) if was_there else serve.shutdown()

    try:
        serve.run_many(
            [serve.RunTarget(application, name=name, route_prefix=None)], wait_for_applications_running=False
        )
        _wait(name)
    except BaseException:
        take_away()
        raise
    return serve.get_deployment_handle(REPLICA, name), take_away


def _wait(name: str) -> None:
    """Wait until an application runs, and tell what it waits for."""
    told = ""
    while True:
        found = serve.status().applications.get(name)
        if found is not None and found.status == "RUNNING":
            return
        if found is not None and found.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            reason = [deployment.message for deployment in found.deployments.values() if deployment.message]
            met = _last_line(reason[0] if reason else found.message)
            raise ReplicasFailedError(f"the replicas did not start: {met}")
        waits = [] if found is None else [one.message for one in found.deployments.values() if one.message]
        if waits and waits[0] != told:
            told = waits[0]
            logger.warning("%s", told.strip().splitlines()[0])
        time.sleep(ASK_S)


def _last_line(message: str) -> str:
    """The line of an error in a message that ends with a traceback."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[A-Za-z_.]+(Error|Exception): ", line)]
    return (errors or lines or ["no reason is known"])[-1]
