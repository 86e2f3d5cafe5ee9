"""`Ingress`: the doorman and the router as a deployment, where Ray Serve's proxies take the connections."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ray import serve

from dseek.serve.config import ServeConfig
from dseek.serve.doorman import Doorman
from dseek.serve.metrics import Metrics
from dseek.serve.on_ray.fleet import RayFleet
from dseek.serve.router import Router


class _Front:
    """Makes the application when Ray Serve starts the ingress."""

    def __init__(self, replicas: Any, make_config: Callable[[], ServeConfig], count: int) -> None:
        self._replicas = replicas
        self._make_config = make_config
        self._count = count

    def __serve_build_asgi_app__(self) -> Doorman:
        config = self._make_config()
        fleet = RayFleet(self._replicas, count=self._count, timeout_s=config.request_timeout_s)
        return Doorman(Router(fleet, lambda: False), config, Metrics(config.model_names[0]))


Ingress: Any = serve.ingress()(_Front)
"""Ray Serve's deployment class; bound to the replicas' application, a function that makes the settings, and a count."""
