"""`dseek bench-serve --trace FILE`: replays a trace of arrivals against a server and shows what its clients saw."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.cli.options import add_json, positive_int
from dseek.cli.serve import seconds
from dseek.core.errors import ConfigError

if TYPE_CHECKING:
    from dseek.serve.replay import Report, Seen

HELP = "replay a trace of arrivals against a server: time to first token, between tokens, goodput"


def rate(text: str) -> float:
    """Read a factor above 0 (an argparse type).

    Args:
        text: what the user wrote.

    Returns:
        The factor.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    value = seconds(text)
    if value <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="start `dseek serve MODEL` for the time, instead of --url"
    )
    parser.add_argument("--url", metavar="URL", help="a server that runs already, such as http://127.0.0.1:8000")
    parser.add_argument(
        "--trace", required=True, metavar="FILE", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens"
    )
    parser.add_argument(
        "--scale", type=rate, default=1.0, metavar="X", help="times the trace's arrivals a second (default: 1)"
    )
    parser.add_argument(
        "--requests", type=positive_int, default=100, metavar="N", help="first so many requests (default: %(default)s)"
    )
    parser.add_argument("--max-context", type=positive_int, metavar="N", help="cut requests to N tokens (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts' tokens (default: 0)")
    parser.add_argument(
        "--ttft-s", type=seconds, default=2.0, metavar="S", help="target for the first token (default: %(default)s)"
    )
    parser.add_argument(
        "--tbt-s", type=seconds, default=0.2, metavar="S", help="target between tokens (default: %(default)s)"
    )
    parser.add_argument("--plot", metavar="FILE", help="PNG file of the distributions (needs matplotlib)")
    parser.add_argument("--api-key-env", metavar="NAME", help="environment variable that holds the server's key")
    parser.add_argument("--serve-option", action="append", default=[], metavar="OPT", help="passed on to `dseek serve`")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Replay and report.

    Args:
        args: parsed arguments.

    Returns:
        The exit status: 1 where a request failed.

    Raises:
        DseekError: the trace, the server or an option is unusable.
    """
    from dseek.serve.requirements import ROUTER, require

    require(ROUTER, purpose="dseek bench-serve")
    if (args.model is None) == (args.url is None):
        raise ConfigError("needed: either a MODEL to start or the --url of a server", remedy="give one of them")
    if args.plot is not None:
        from dseek.cli.attention_picture import require_matplotlib

        require_matplotlib()
    from dseek.serve.replay import Targets, fitted, replay, summed_up
    from dseek.serve.trace import read_trace, scaled

    trace = scaled(read_trace(args.trace, args.requests), args.scale)
    key = None if args.api_key_env is None else os.environ.get(args.api_key_env)
    with _server(args) as url:
        vocab_size, context = _describe(url, key)
        trace = fitted(trace, min(context, args.max_context or context))
        with _progress(len(trace)) as on_end:
            results = asyncio.run(replay(url, trace, vocab_size=vocab_size, seed=args.seed, api_key=key, on_end=on_end))
    report = summed_up(results, Targets(first_token_s=args.ttft_s, between_tokens_s=args.tbt_s))
    if args.plot is not None:
        from dseek.cli.replay_picture import draw

        draw(results, report, Path(args.plot))
    if args.json:
        print(json.dumps({**report.as_json(), "trace": args.trace, "scale": args.scale}))
    else:
        _print(report)
    for seen in [seen for seen in results if seen.error is not None][:3]:
        print(f"dseek: a request failed: {seen.error}", file=sys.stderr)
    return 1 if report.failed else 0


def _describe(url: str, key: str | None) -> tuple[int, int]:
    """Ask a server for the size of its vocabulary and its context."""
    import httpx

    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        response = httpx.get(f"{url}/v1/models", headers=headers, timeout=30)
        response.raise_for_status()
        card = response.json()["data"][0]
        return int(card.get("vocab_size") or 256), int(card.get("max_model_len") or 2048)
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigError(
            f"{url} does not answer as an OpenAI-compatible server does ({error})", remedy="check --url and the key"
        ) from None


@contextmanager
def _server(args: argparse.Namespace) -> Iterator[str]:
    """The server's address; started and stopped here where a model was named."""
    if args.url is not None:
        yield args.url.rstrip("/")
        return
    command = [sys.executable, "-m", "dseek.cli.main", "serve", args.model, "--port", "0", *args.serve_option]
    command += ["--max-concurrent", "100000", "--no-log-requests"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r"is served at (\S+)", process.stdout.readline())
        if found is None:
            raise ConfigError(f"`dseek serve {args.model}` did not start (status {process.wait()}); it said why above")
        yield found[1]
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _progress(count: int) -> Iterator[Any]:
    """A bar on stderr."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("requests"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(file=sys.stderr), transient=True) as bar:
        task = bar.add_task("requests", total=count)

        def on_end(seen: Seen) -> None:
            bar.advance(task)

        yield on_end


def _print(report: Report) -> None:
    """Print the table for people."""
    from rich.console import Console
    from rich.table import Table

    table = Table("", "p50", "p95", "p99", title=f"{report.requests} requests, {report.failed} failed")
    for name, found in (
        ("time to first token", report.first_token_s),
        ("between tokens", report.between_tokens_s),
        ("end to end", report.whole_s),
    ):
        table.add_row(name, *(f"{1000 * value:,.0f} ms" for value in found.values()))
    console = Console(highlight=False)
    console.print(table)
    targets = report.targets
    console.print(
        f"{report.offered_s:.2f} requests/s offered, {report.goodput_s:.2f} served well ({report.good_share:.0%}: "
        f"first token within {targets.first_token_s:g} s, {targets.between_tokens_s:g} s between tokens); "
        f"{report.tokens_s:,.0f} tokens/s in {report.seconds:.1f} s"
    )
