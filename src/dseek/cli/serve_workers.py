"""`dseek serve MODEL --workers N`: starts the replicas with what the command line says of the model, and the router."""

from __future__ import annotations

import argparse
import os
import socket
import sys
import threading
from typing import TYPE_CHECKING

from dseek.serve.requirements import ROUTER, require

if TYPE_CHECKING:
    from dseek.serve.config import ServeConfig

OWN = frozenset(
    {
        "model",
        "workers",
        "ray",
        "ray_address",
        "host",
        "port",
        "uds",
        "api_key_file",
        "allow_host",
        "max_concurrent",
        "hash_key",
        "threads",
    }
)
"""Arguments that are the router's, or are set for each replica."""


def serve_workers(args: argparse.Namespace, config: ServeConfig, bound: socket.socket) -> int:
    """Serve with several processes until a signal.

    Args:
        args: parsed arguments of `dseek serve`.
        config: the server's settings.
        bound: socket to listen on.

    Returns:
        The exit status.

    Raises:
        ConfigError: a part of the extra `serve` is missing.
    """
    require(ROUTER, purpose="dseek serve --workers")
    from dseek.serve.affinity import Affinity
    from dseek.serve.doorman import Doorman
    from dseek.serve.local_fleet import LocalFleet
    from dseek.serve.metrics import Metrics
    from dseek.serve.replicas import Replicas
    from dseek.serve.router import Router
    from dseek.serve.run import serve, url_of

    draining = threading.Event()

    affinity: Affinity[int] = Affinity()
    replicas = Replicas(args.workers, command(args), drain_s=config.drain_s, on_restart=affinity.forget)
    app = Doorman(
        Router(LocalFleet(replicas, affinity), draining.is_set), config, Metrics(config.model_names[0]), draining.is_set
    )

    def ready() -> None:
        print(f"{config.model_names[0]} is served at {url_of(bound)} by {args.workers} workers", flush=True)

    return serve(app, config, bound, on_drain=draining.set, on_ready=ready)


def command(args: argparse.Namespace) -> list[str]:
    """Write the command of one replica.

    Args:
        args: parsed arguments of `dseek serve`.

    Returns:
        The words; every replica gets its share of the processor's threads unless `--threads` or a plan says otherwise.
    """
    share = max(1, len(os.sched_getaffinity(0)) // args.workers)
    return [sys.executable, "-m", "dseek.cli.main", "serve", *replica_words(args, threads=share)]


def replica_words(args: argparse.Namespace, *, threads: int) -> list[str]:
    """Write what `dseek serve` is to be told in a replica: all that is about the model, nothing about who may ask.

    Args:
        args: parsed arguments of `dseek serve`.
        threads: threads of a replica where neither `--threads` nor a plan says how many.

    Returns:
        The words after `dseek serve`.
    """
    from dseek.cli.serve import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    words = [args.model]
    for action in parser._actions:
        value = getattr(args, action.dest, None)
        if action.dest in OWN or action.dest == "help" or value == action.default or value is None:
            continue
        if isinstance(action, argparse.BooleanOptionalAction):
            words.append(action.option_strings[0 if value else 1])
        elif action.nargs == 0:
            words.append(action.option_strings[0])
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [action.option_strings[0], str(item)]
    if args.threads is not None:
        words += ["--threads", str(args.threads)]
    elif args.plan is None:
        words += ["--threads", str(threads)]
    return [*words, "--max-concurrent", "100000"]
