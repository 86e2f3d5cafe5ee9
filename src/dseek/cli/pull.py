"""`dseek pull MODEL`: bring a model to the local cache, so that later runs need no network."""

from __future__ import annotations

import argparse
import json
import sys

from dseek.cli.options import add_json, add_model

HELP = "bring a model to the local cache"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Bring the model and print where it is; progress goes to stderr.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        ModelNotFoundError: the name stands for nothing that can be found or reached.
        FileFormatError: what was fetched is not what it should be.
    """
    from dseek.models.locate import pull

    path = pull(args.model, lambda line: print(line, file=sys.stderr, flush=True))
    if args.json:
        num_bytes = sum(
            file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()
        )
        print(json.dumps({"model": args.model, "path": str(path.resolve()), "num_bytes": num_bytes}))
    else:
        print(path)
    return 0
