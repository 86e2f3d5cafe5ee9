"""What Ray reads from the environment as it is imported: set here before that, unless the user has set it.

Apart from everything that imports Ray, so that it can be called first.
"""

from __future__ import annotations

import os
import secrets


def prepare(*, own_cluster: bool) -> None:
    """Send no usage statistics; keep a cluster of our own to this machine, and to whoever knows its token.

    Ray listens on every address of a machine unless it takes the machine for a laptop, and whoever reaches its ports
    runs code; other users of the same machine reach loopback, hence the token, which Ray's processes inherit.

    Args:
        own_cluster: Ray is going to be started by this process.
    """
    settings = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    if own_cluster:
        settings["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
        if "RAY_AUTH_MODE" not in os.environ:
            settings |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    for name, value in settings.items():
        os.environ.setdefault(name, value)
