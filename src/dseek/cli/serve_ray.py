"""`dseek serve MODEL --ray`: replicas as a Ray Serve deployment; and the same as an application for Ray's own tools.

With `--ray` this process listens, knows keys and limits, and passes requests on to the replicas. `build_app` makes an
application with an ingress that does the same, for `serve run` and a RayService of KubeRay, where Ray Serve listens.
"""

from __future__ import annotations

import argparse
import functools
import os
import signal
import socket
import threading
from types import FrameType
from typing import TYPE_CHECKING, Any

from dseek.cli.serve_workers import replica_words
from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from ray import serve

    from dseek.serve.config import ServeConfig
    from dseek.serve.service import Service

NOT_FOR_RAY = ("hash_key", "ray", "ray_address", "host", "port", "uds", "header_timeout_s", "log_requests")
"""Arguments of `dseek serve` that mean nothing where Ray Serve listens."""


def serve_on_ray(args: argparse.Namespace, config: ServeConfig, bound: socket.socket) -> int:
    """Serve with replicas on a Ray cluster until a signal.

    Args:
        args: parsed arguments of `dseek serve`.
        config: the server's settings.
        bound: socket to listen on.

    Returns:
        The exit status.

    Raises:
        ConfigError: the cluster cannot be joined, or the replicas do not start.
    """
    from dseek.serve.on_ray import environment

    address = args.ray_address or os.environ.get("RAY_ADDRESS")
    if address is None:
        _check_here(args)
    environment.prepare(own_cluster=address is None)
    import ray

    from dseek.serve.doorman import Doorman
    from dseek.serve.metrics import Metrics
    from dseek.serve.on_ray import cluster
    from dseek.serve.on_ray.fleet import RayFleet
    from dseek.serve.router import Router
    from dseek.serve.run import serve, url_of

    draining = threading.Event()

    def ready() -> None:
        print(f"{config.model_names[0]} is served at {url_of(bound)} by {args.workers} workers on Ray", flush=True)

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with bound:
        cluster.connect(address)
        signal.signal(signal.SIGTERM, end)  # Ray's own handler ends with a trace of C++; the server has its own later
        try:
            name = cluster.application_name(config.model_names[0])
            num_cpus = cluster.replica_share(args.workers)
            if args.threads is not None:
                num_cpus = min(num_cpus, float(args.threads))
            handle, take_away = cluster.deploy(_replicas(args, num_cpus), name)
            fleet = RayFleet(
                handle,
                count=args.workers,
                timeout_s=config.request_timeout_s,
                on_close=take_away if address is not None else lambda: None,
            )
            app = Doorman(Router(fleet, draining.is_set), config, Metrics(config.model_names[0]), draining.is_set)
            return serve(app, config, bound, on_drain=draining.set, on_ready=ready)
        finally:
            ray.shutdown()


def build_app(args: dict[str, Any]) -> serve.Application:
    """Make an application of Ray Serve: `serve run dseek.cli.serve_ray:build_app model=smollm2 workers=2`.

    Args:
        args: arguments of `dseek serve`, by their names with `-` or `_`; `model` is needed. Those that say where the
            server listens are Ray Serve's.

    Returns:
        The application: an ingress that listens to Ray Serve's proxies, and the replicas.

    Raises:
        ConfigError: an argument is unknown or unusable.
    """
    from ray import serve

    from dseek.serve.on_ray import cluster
    from dseek.serve.on_ray.ingress import Ingress

    parsed = arguments_from(args)
    config = functools.partial(ingress_config, dict(args))
    config()  # an error is better told here than by every ingress that does not start
    # A cluster that is being made may not have its nodes yet: who says how many threads is taken at their word.
    num_cpus = cluster.replica_share(parsed.workers) if parsed.threads is None else float(parsed.threads)
    return serve.deployment(
        Ingress,
        name="Ingress",
        max_ongoing_requests=100_000,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_timeout_s=parsed.drain_s,
    ).bind(_replicas(parsed, num_cpus), config, parsed.workers)


def arguments_from(given: dict[str, Any]) -> argparse.Namespace:
    """Read arguments of `dseek serve` that are given by name.

    Args:
        given: names with `-` or `_`; True and False for switches, a list where an option may be repeated.

    Returns:
        Parsed arguments.

    Raises:
        ConfigError: one is unknown, means nothing here, or is unusable.
    """
    from dseek.cli.main import build_parser

    parser = build_parser("serve")
    parser.exit_on_error = False
    actions = {action.dest: action for action in parser._actions if action.dest not in ("help", *NOT_FOR_RAY)}
    left = {name.replace("-", "_"): value for name, value in given.items()}
    model = left.pop("model", None)
    if not isinstance(model, str) or not model:
        raise ConfigError(f"model is {model!r}", needed="the model to serve, such as smollm2")
    words = [model]
    for name, value in left.items():
        action = actions.get(name)
        if action is None:
            raise ConfigError(f"{name} is no argument here", needed=", ".join(sorted(actions)))
        option = action.option_strings[0]
        if isinstance(value, bool):
            if value is False and not isinstance(action, argparse.BooleanOptionalAction):
                continue
            words.append(option if value else action.option_strings[-1])
        else:
            for item in value if isinstance(value, list) else [value]:
                words.append(f"{option}={item}")
    try:
        return parser.parse_args(words)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from None


def ingress_config(given: dict[str, Any]) -> ServeConfig:
    """Make the settings of an ingress; called where it runs, since the key file is there.

    Args:
        given: see `build_app`.

    Returns:
        Settings of a server that is reached from other machines, through Ray Serve's proxies.

    Raises:
        ConfigError: one is unusable.
    """
    from dseek.cli.serve import config_from

    args = arguments_from(given)
    args.host = "0.0.0.0"
    return config_from(args)


def load_service(words: list[str]) -> Service:
    """Load the model; called in each replica, on its node.

    Args:
        words: from `replica_words`.

    Returns:
        The model behind the API.

    Raises:
        DseekError: the model or an option is unusable.
    """
    from dseek.cli.main import build_parser
    from dseek.cli.serve import config_from, load_served
    from dseek.serve.service import Service

    args = build_parser("serve").parse_args(words)
    return Service(load_served(args), config_from(args))


def _check_here(args: argparse.Namespace) -> None:
    """Find an unusable model at once, and measure this machine before replicas disturb each other's measurements."""
    from dseek.cli.measuring import measured_machine
    from dseek.cli.options import open_from

    open_from(args).close()
    if args.plan is None:
        measured_machine()


def _replicas(args: argparse.Namespace, num_cpus: float) -> serve.Application:
    """The deployment of the model, each replica with its share of the cluster."""
    from dseek.serve.on_ray import cluster

    words = replica_words(args, threads=max(1, int(num_cpus)))
    make_service = functools.partial(load_service, words)
    return cluster.replica_deployment(make_service, count=args.workers, num_cpus=num_cpus, drain_s=args.drain_s)
