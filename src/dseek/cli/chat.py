"""`dseek chat MODEL`: a conversation in the terminal, streamed, with its history.

Ctrl-C while the model answers stops the answer and keeps what was said; at the prompt it discards the line. Ctrl-D or
/exit leaves. When the conversation outgrows the context its oldest turns are forgotten, with a note. Without a terminal
the lines of stdin are the messages, so a conversation can be scripted.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from dseek.cli.engine_options import add_prefix_cache_option, add_speculation_option, guesses_line
from dseek.cli.options import (
    add_model,
    add_request_options,
    add_run_options,
    add_sampling,
    load_from,
    sampling_from,
)
from dseek.core.errors import RequestError

if TYPE_CHECKING:
    from dseek.engine.llm import LLM
    from dseek.engine.request import RequestOutput, SamplingParams

HELP = "talk with a model in the terminal"

COMMANDS = """/help   this list
/reset  forget the conversation
/exit   leave (so does Ctrl-D)
Ctrl-C stops an answer."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's arguments.

    Args:
        parser: the verb's parser.
    """
    add_model(parser)
    parser.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    parser.add_argument("--quiet", action="store_true", help="print no speeds on stderr")
    add_sampling(parser, max_tokens=1024, temperature=0.6)
    add_run_options(parser)
    add_speculation_option(parser)
    add_prefix_cache_option(parser)
    add_request_options(parser)


def run(args: argparse.Namespace) -> int:
    """Hold a conversation until the user leaves.

    Args:
        args: parsed arguments.

    Returns:
        The exit status.

    Raises:
        DseekError: the model or an option is unusable, or the model has no chat template.
    """
    params = sampling_from(args)
    request = {"prompt_tokens": args.prompt_tokens, "answer_tokens": args.answer_tokens}
    with load_from(args, batch=1, **request) as llm:
        conversation = Conversation(llm, params, system=args.system)
        conversation.check()
        if sys.stdin.isatty():
            _use_readline()
            print(f"{llm.files.name}: type a message, or /help", file=sys.stderr)
        while (message := _read_message()) is not None:
            if message.startswith("/"):
                if not _command(message, conversation):
                    break
            elif message:
                _answer(conversation, message, quiet=args.quiet)
    return 0


class Conversation:
    """The history of a conversation and how it is answered.

    Args:
        llm: the model.
        params: how to sample.
        system: instructions before the first message, or None.
    """

    def __init__(self, llm: LLM, params: SamplingParams, *, system: str | None = None) -> None:
        self.llm = llm
        self.params = params
        self._start = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = []
        self.num_forgotten = 0
        """Messages dropped from the front so far because the context was full."""

    def check(self) -> None:
        """Make sure that the model can hold a conversation.

        Raises:
            RequestError: it has no chat template.
        """
        self.llm.chat_token_ids([*self._start, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forget all messages but the system's."""
        self.messages.clear()

    def say(self, message: str, stopped: StopFlag) -> Generator[str, None, RequestOutput]:
        """Answer a message and add both to the history.

        Args:
            message: what the user says.
            stopped: looked at before every step; ends the answer once it is set.

        Yields:
            Pieces of the answer.

        Returns:
            The whole answer, as the generator's return value.

        Raises:
            RequestError: the message alone is longer than the context; the history is as before.
        """
        self.messages.append({"role": "user", "content": message})
        try:
            request = self.llm.submit(self._fitting_prompt(), self.params)
        except RequestError:
            self.messages.pop()
            raise
        try:
            while not request.finished and not stopped.is_set:
                self.llm.engine.step()
                piece = request.take_text()
                if piece:
                    yield piece
        finally:
            if not request.finished:
                self.llm.engine.abort(request)
            output = request.output()
            self.messages.append({"role": "assistant", "content": output.text})
        if rest := request.take_text():
            yield rest
        return output

    def _fitting_prompt(self) -> list[int]:
        """Ids of the conversation, without its oldest turns if they leave no room for an answer."""
        context = self.llm.engine.context_tokens
        room = min(self.params.max_new_tokens, context // 4)
        token_ids = self.llm.chat_token_ids([*self._start, *self.messages])
        while len(token_ids) + room > context and len(self.messages) > 1:
            # A turn is a message and its answer: what is left begins with the user again.
            del self.messages[:2]
            self.num_forgotten += 2
            token_ids = self.llm.chat_token_ids([*self._start, *self.messages])
        return token_ids


class StopFlag:
    """Whether the user has asked for the answer to end."""

    def __init__(self) -> None:
        self.is_set = False


@contextmanager
def interruptible() -> Iterator[StopFlag]:
    """Let Ctrl-C set a flag instead of raising, so that an answer ends between two steps and never inside one.

    Yields:
        The flag. A second Ctrl-C raises as usual.
    """
    flag = StopFlag()

    def note(number: int, frame: FrameType | None) -> None:
        if flag.is_set:
            raise KeyboardInterrupt
        flag.is_set = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield flag
    finally:
        signal.signal(signal.SIGINT, previous)


def _answer(conversation: Conversation, message: str, *, quiet: bool) -> None:
    """Print the answer to one message as it comes."""
    forgotten = conversation.num_forgotten
    output = None
    try:
        with interruptible() as stopped:
            output = _print_pieces(conversation.say(message, stopped))
    except RequestError as error:
        print(f"dseek: {error}", file=sys.stderr)
        return
    except KeyboardInterrupt:
        pass
    print(flush=True)
    notes = []
    if conversation.num_forgotten > forgotten:
        notes.append(f"the context is full: forgot the oldest {conversation.num_forgotten - forgotten} messages")
    if output is None or output.finish_reason == "abort":
        notes.append("stopped")
    elif output.finish_reason == "length":
        notes.append("cut at the longest answer allowed")
    if output is not None and not quiet:
        from dseek.cli.report import planned_machine, speed_line

        speeds = speed_line(output, conversation.llm.plan, planned_machine(conversation.llm.plan))
        notes.append(speeds + guesses_line(conversation.llm))
    if notes:
        print(f"[{'; '.join(notes)}]", file=sys.stderr, flush=True)


def _print_pieces(pieces: Generator[str, None, RequestOutput]) -> RequestOutput:
    """Print what a generator yields; give what it returns."""
    while True:
        try:
            piece = next(pieces)
        except StopIteration as end:
            return end.value
        sys.stdout.write(piece)
        sys.stdout.flush()


def _command(line: str, conversation: Conversation) -> bool:
    """Obey a line that begins with a slash; tell whether the conversation goes on."""
    command = line.split()[0]
    if command == "/exit":
        return False
    if command == "/reset":
        conversation.reset()
        print("The conversation is forgotten.", file=sys.stderr)
    elif command == "/help":
        print(COMMANDS, file=sys.stderr)
    else:
        print(f"There is no command {command}:\n{COMMANDS}", file=sys.stderr)
    return True


def _read_message() -> str | None:
    """Read a line; None at the end. Ctrl-C discards what was typed."""
    while True:
        try:
            return input("> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            if sys.stdin.isatty():
                print()
            return None
        except KeyboardInterrupt:
            print("\n(/exit or Ctrl-D leaves)", file=sys.stderr)
        except UnicodeDecodeError as error:
            raise RequestError(f"the message is not text ({error})", needed="UTF-8") from error


def _use_readline() -> None:
    """Give the prompt line editing and the history of this conversation, where Python was built with it."""
    import importlib.util

    if importlib.util.find_spec("readline") is not None:
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")
