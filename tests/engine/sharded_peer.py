"""One rank of a run in which another dies, falls silent or goes its own way: `python -m tests.engine.sharded_peer`.

Prints the error that the engine raises, or what came out.
"""

from __future__ import annotations

import os
import sys
import time
from datetime import timedelta

import torch.distributed as dist

from dseek.core.errors import DseekError
from dseek.engine.llm import load
from dseek.parallel import ranks as ranks_module
from tests.models import tiny


def main(folder: str, plan: str, trouble: str) -> None:
    """Run a long prompt; rank 1 makes the trouble."""
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", timeout=timedelta(seconds=3))
    llm = load(folder, plan=plan, shard_strategy="zigzag")
    ids = tiny.token_ids(600)
    if rank == 1 and trouble in ("dies", "is silent"):
        gather, calls = ranks_module.Ranks.all_gather, 0

        def failing(self, x, into=None):  # type: ignore[no-untyped-def]
            nonlocal calls
            calls += 1
            if calls == 3:  # the digest and a layer went well
                if trouble == "dies":
                    os._exit(9)
                time.sleep(30)
            return gather(self, x, into)

        ranks_module.Ranks.all_gather = failing  # type: ignore[method-assign]
    if rank == 1 and trouble == "disagrees":
        ids[5] += 1
    try:
        print(llm.generate([ids], max_new_tokens=2)[0].token_ids)
    except DseekError as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(error.exit_status)


if __name__ == "__main__":
    main(*sys.argv[1:])
