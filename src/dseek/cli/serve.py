"""`dseek serve MODEL`: an OpenAI-compatible server with a web page, on this machine only unless told otherwise."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from dseek.cli.engine_options import add_prefix_cache_option, add_speculation_option
from dseek.cli.options import add_request_options, add_run_options, load_from, positive_int
from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from dseek.engine.llm import LLM
    from dseek.serve.config import ServeConfig

HELP = "serve a model over HTTP: an OpenAI-compatible API and a web page"


def seconds(text: str) -> float:
    """Read a time of 0 seconds or more (an argparse type).

    Args:
        text: what the user wrote.

    Returns:
        The seconds.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, 0 or more")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a folder in Hugging Face layout, a .gguf file, an alias (smollm2) or a hub id",
    )
    parser.add_argument(
        "--hash-key",
        action="store_true",
        help="read an API key from stdin (an empty line makes one), print its hash for --api-key-file, and end",
    )
    where = parser.add_argument_group("where it listens")
    where.add_argument("--host", default="127.0.0.1", help="address (default: %(default)s, this machine only)")
    where.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0 takes a free one (default: 8000)")
    where.add_argument("--uds", metavar="PATH", help="listen on a Unix socket instead")
    where.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="accept this Host header only (may be repeated; default on loopback: loopback names, else any)",
    )
    where.add_argument(
        "--served-model-name", action="append", default=[], metavar="NAME", help="name in the API (may be repeated)"
    )
    where.add_argument("--no-page", action="store_true", help="serve the API only, without the web page")
    where.add_argument(
        "--workers",
        type=positive_int,
        default=1,
        metavar="N",
        help="processes that share the work, behind a router; each has the weights (default: %(default)s)",
    )
    where.add_argument(
        "--ray",
        action="store_true",
        help="let Ray Serve start the workers and replace them, over all nodes of a cluster (extra `ray`)",
    )
    where.add_argument(
        "--ray-address",
        metavar="ADDR",
        help="join the Ray cluster at HOST:PORT, or auto (default: RAY_ADDRESS, else start one on this machine)",
    )
    where.add_argument(
        "--log-requests",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="write a line of JSON to stderr for each request (default: yes)",
    )
    limits = parser.add_argument_group("who may do what")
    limits.add_argument("--api-key-file", metavar="FILE", help="let in only keys whose hashes are in FILE")
    limits.add_argument(
        "--batch", type=positive_int, default=8, metavar="N", help="answers computed together (default: %(default)s)"
    )
    limits.add_argument(
        "--max-concurrent",
        type=positive_int,
        default=64,
        metavar="N",
        help="requests in work or waiting; more get 429 (default: %(default)s)",
    )
    limits.add_argument(
        "--max-body-bytes", type=positive_int, default=4 << 20, metavar="N", help="longest body (default: %(default)s)"
    )
    limits.add_argument("--max-prompt-tokens", type=positive_int, metavar="N", help="longest prompt (default: context)")
    limits.add_argument(
        "--request-timeout-s", type=seconds, default=600.0, metavar="S", help="for an answer (default: %(default)s)"
    )
    limits.add_argument(
        "--header-timeout-s", type=seconds, default=10.0, metavar="S", help="for headers (default: %(default)s)"
    )
    limits.add_argument(
        "--drain-s",
        type=seconds,
        default=30.0,
        metavar="S",
        help="time for running answers after SIGTERM (default: %(default)s)",
    )
    add_speculation_option(parser)
    add_prefix_cache_option(parser)
    add_run_options(parser)
    add_request_options(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until a signal.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model, an option or the address is unusable, or the extra `serve` is missing.
    """
    if args.hash_key:
        return _hash_key()
    if args.model is None:
        raise ConfigError("no MODEL was named", needed="a model to serve, such as `dseek serve smollm2`")
    if args.ray_address is not None and not args.ray:
        raise ConfigError("--ray-address without --ray", remedy="add --ray to serve on a Ray cluster")
    from dseek.serve.requirements import RAY, require

    require()
    if args.ray:
        require(RAY, purpose="dseek serve --ray", extra="ray")
    from dseek.serve import json_logs
    from dseek.serve.run import bind, serve, url_of

    config = config_from(args)
    bound = bind(config)
    json_logs.configure(requests=args.log_requests)
    if args.ray:
        from dseek.cli.serve_ray import serve_on_ray

        return serve_on_ray(args, config, bound)
    if args.workers > 1:
        from dseek.cli.serve_workers import serve_workers

        return serve_workers(args, config, bound)
    with bound, load_served(args) as llm:
        from dseek.serve.app import create_app
        from dseek.serve.service import Service

        service = Service(llm, config)

        def drain() -> None:
            service.is_draining = True

        def ready() -> None:
            print(f"{service.model_name} is served at {url_of(bound)}", flush=True)

        return serve(create_app(service), config, bound, on_drain=drain, on_ready=ready)


def load_served(args: argparse.Namespace) -> LLM:
    """Load the model to be served.

    Args:
        args: parsed arguments.

    Returns:
        The model, planned for throughput.

    Raises:
        DseekError: the model, the plan or an option is unusable.
    """
    request = {"prompt_tokens": args.prompt_tokens, "answer_tokens": args.answer_tokens}
    return load_from(args, batch=args.batch, objective="throughput", **request)


def config_from(args: argparse.Namespace) -> ServeConfig:
    """Collect the server's settings.

    Args:
        args: parsed arguments.

    Returns:
        Checked settings.

    Raises:
        ConfigError: one is out of range, or the key file is unusable.
    """
    from dseek.serve.auth import read_key_file
    from dseek.serve.config import ServeConfig

    return ServeConfig(
        model_names=tuple(args.served_model_name) or (args.model,),
        host=args.host,
        port=args.port,
        uds=args.uds,
        allowed_hosts=tuple(name.lower() for name in args.allow_host),
        max_body_bytes=args.max_body_bytes,
        max_prompt_tokens=args.max_prompt_tokens,
        max_concurrent=args.max_concurrent,
        request_timeout_s=args.request_timeout_s,
        header_timeout_s=args.header_timeout_s,
        drain_s=args.drain_s,
        api_key_hashes=() if args.api_key_file is None else read_key_file(args.api_key_file),
        page=not args.no_page,
    )


def _hash_key() -> int:
    """Read a key, or make one, and print its hash."""
    import getpass

    from dseek.serve.auth import hash_key, new_key

    if sys.stdin.isatty():
        key = getpass.getpass("API key (empty: make one): ")
    else:
        key = sys.stdin.readline().rstrip("\r\n")
    if not key:
        key = new_key()
        print(f"the key, shown once: {key}", file=sys.stderr)
    print(hash_key(key))
    return 0
