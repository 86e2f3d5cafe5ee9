"""What requests may hold, as pydantic models: OpenAI's fields, and the extensions that vLLM made common.

Types are strict (a number in quotes is refused), unknown fields are accepted and ignored, as vLLM does. Fields that
OpenAI has and this server cannot honour are refused where they would change the answer (`unsupported`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_STOPS = 16
MAX_STOP_CHARS = 1024
MAX_LOGPROBS = 20
MAX_SEED = 2**63 - 1
MAX_TOKENS = 2**31 - 1
MAX_MESSAGES = 4096
MAX_TOOLS = 128
MAX_BIASES = 1024

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
BiasKey = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]
Bias = Annotated[float, Field(ge=-100, le=100)]
Stop = StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None
Prompt = str | list[str] | list[TokenId] | list[list[TokenId]]


class Body(BaseModel):
    """The base of all request bodies."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class StreamOptions(Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    """End with a chunk that counts the tokens."""
    continuous_usage_stats: bool = False
    """Count the tokens in every chunk (vLLM's extension)."""


class JsonSchemaFormat(Body):
    """A named JSON schema."""

    name: str = Field(default="answer", max_length=256)
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer has to be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None


class Sampling(Body):
    """Fields that completions and chat completions share."""

    model: str | None = None
    """Name of the model, as `/v1/models` lists it; left out, the one that is served."""
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1, le=MAX_TOKENS)
    """Keep the k likeliest tokens; 0 and -1 keep all (extension)."""
    min_p: float | None = Field(default=None, ge=0, le=1)
    """Drop tokens less likely than this share of the likeliest (extension)."""
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    """Above 1 makes tokens of prompt and answer less likely (extension)."""
    seed: int | None = Field(default=None, ge=-MAX_SEED, le=MAX_SEED)
    n: int | None = Field(default=None, ge=1, le=128)
    stop: Stop = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    """Go on past the end token (extension)."""
    priority: int = Field(default=0, ge=-(2**31), le=2**31 - 1)
    """Smaller goes first (extension)."""
    response_format: ResponseFormat | None = None
    guided_json: dict[str, Any] | None = None
    """A JSON schema for the answer (vLLM's extension)."""
    guided_regex: str | None = Field(default=None, max_length=65536)
    """A regular expression for the whole answer (vLLM's extension)."""
    guided_choice: list[str] | None = Field(default=None, min_length=1, max_length=4096)
    """The answer is one of these (vLLM's extension)."""
    guided_grammar: str | None = Field(default=None, max_length=65536)
    """A Lark grammar for the whole answer (vLLM's extension)."""
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[BiasKey, Bias] | None = Field(default=None, max_length=MAX_BIASES)
    user: str | None = None

    def unsupported(self) -> str | None:
        """Name the field that this server cannot honour and that would change the answer, or None."""
        return None

    def biases(self) -> tuple[tuple[int, float], ...]:
        """Return pairs of a token's id and its bias."""
        return tuple((int(token_id), bias) for token_id, bias in (self.logit_bias or {}).items())

    def stops(self) -> tuple[str, ...]:
        """Return the stop texts."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class CompletionRequest(Sampling):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: int | None = Field(default=16, ge=0, le=MAX_TOKENS)
    echo: bool | None = False
    """Give the prompt back before the answer; with `logprobs`, the prompt's too."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    best_of: int | None = Field(default=None, ge=1, le=128)
    suffix: str | None = None
    add_special_tokens: bool = True
    """Begin a text with the start token where the model has it so (extension)."""

    def unsupported(self) -> str | None:
        """Name the field that this server cannot honour, or None."""
        if self.suffix:
            return "suffix"
        if self.best_of is not None and self.best_of != (self.n or 1):
            return "best_of"
        return super().unsupported()


class FunctionDefinition(Body):
    """A function that the model may call."""

    name: str = Field(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+$")
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Body):
    """A tool: always a function."""

    type: Literal["function"] = "function"
    function: FunctionDefinition


class FunctionName(Body):
    """A function by name."""

    name: str = Field(min_length=1, max_length=128)


class NamedTool(Body):
    """The tool that has to be called."""

    type: Literal["function"] = "function"
    function: FunctionName


class ContentPart(Body):
    """A part of a message."""

    type: str
    text: str | None = None


class FunctionCall(Body):
    """A call in an earlier answer."""

    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    """A tool call in an earlier answer."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a conversation."""

    role: str = Field(min_length=1, max_length=64)
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None


class ChatRequest(Sampling):
    """`POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    add_generation_prompt: bool = True
    """End the prompt where the assistant's answer begins (vLLM's extension)."""
    continue_final_message: bool = False
    """Go on with the last message instead (vLLM's extension)."""
    chat_template_kwargs: dict[str, Any] | None = None
    """Further names for the template (vLLM's extension)."""


class EmbeddingRequest(Body):
    """`POST /v1/embeddings`."""

    model: str | None = None
    input: Prompt
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    """First so many values, normalised anew (for models trained so)."""
    user: str | None = None


class TokenizeRequest(Body):
    """`POST /tokenize`: a text, or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = Field(default=None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = True
    add_generation_prompt: bool = True
    return_token_strs: bool | None = False


class DetokenizeRequest(Body):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: list[TokenId]
