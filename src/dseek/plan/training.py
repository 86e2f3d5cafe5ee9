"""Memory of a training, predicted from shapes, and the least costly way to keep it within a limit. No PyTorch here.

    peak = process + weights + optimiser + the larger of: all activations and the loss, or all gradients

Gradients grow as the backward pass frees activations, so the two never meet but where gradients are added up over
several batches. What a block keeps is counted tensor by tensor, as PyTorch's autograd keeps it for
`dseek.models.decoder`; a test holds the count against what it does keep. What this does not know: what an allocator
wastes, and what else runs in the process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from dseek.core.errors import MemoryLimitError
from dseek.core.shape import ModelShape
from dseek.plan.explain import size_text

RUNTIME_BYTES = 96 << 20
"""What libraries, threads and buffers of products take once a step runs on the processor, beside all tensors.

Not derived, but fitted to small trainings on one machine of two cores with AVX2; the row `plan-train-memory` judges it.
"""
WIDE = 4
"""Bytes of weights, gradients, moments and sums: float32."""
STRATEGIES = ("none", "zero1", "zero2", "zero3")
"""Ways to share the state of a training, in the order in which they cost time."""
LOGITS_CHUNK_TOKENS = 1024
"""Rows of the head at a time where all of them are too many; a chunk this long loses nothing against the whole."""
LOGITS_WHOLE_BYTES = 64 << 20
"""Logits up to so many bytes are made at once."""
OFFLOAD_PART_VALUES = 1 << 20
"""Values whose moments are brought at a time where they lie elsewhere."""
MASK_TOKENS = 256
"""Most tokens that share a mask where documents are apart (see `dseek.ops.attention.apart`)."""
EIGHT_BIT_BYTES = 2 + 2 * 4 / 256
"""Bytes a parameter of two moments with 8-bit codes and a scale for 256 of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingWork:
    """What a rank does in one batch, and what it keeps."""

    shape: ModelShape
    """The model."""
    batch_rows: int
    """Rows of a batch, B."""
    row_tokens: int
    """Tokens of a row, T."""
    num_batches: int = 1
    """Batches whose gradients are added up in a step."""
    world_size: int = 1
    """Ranks."""
    low_precision: bool = False
    """Products in bfloat16."""
    masked: bool = False
    """Documents of a row do not see each other."""
    lora_rank: int = 0
    """Rank of adapters; 0 trains all weights."""
    lora_targets: tuple[str, ...] = ()
    """Projections with an adapter."""
    optimizer: str = "adamw_torch_fused"
    """The optimiser."""
    offload: str = "none"
    """Where its state lies: none, cpu or disk."""
    shard_strategy: str = "none"
    """What ranks share."""
    checkpointed_layers: int = 0
    """Blocks that compute their activations twice."""
    logits_chunk_tokens: int = 0
    """Rows of the head at a time; 0 is all."""
    mlp_chunk_tokens: int = 0
    """Tokens of an MLP at a time; 0 is all."""
    snapshots: bool = False
    """The state is copied aside now and then, to be written while the training goes on."""

    @property
    def num_tokens(self) -> int:
        """Tokens of a batch."""
        return self.batch_rows * self.row_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingMemory:
    """Bytes that a rank is expected to hold, and where."""

    process_bytes: int
    """The process before the model is there, with what its libraries will take."""
    weights_bytes: int
    """Weights, and copies of them that are put together or cast."""
    gradients_bytes: int
    """Gradients at the end of a backward pass."""
    optimizer_bytes: int
    """Moments, where they are in this memory."""
    activations_bytes: int
    """What the forward pass keeps, and the block that is computed again."""
    logits_bytes: int
    """The head's loss while it is computed."""
    snapshots_bytes: int
    """Copies of the state that are being written, where they come quicker than they are written."""
    peak_bytes: int
    """The most at one time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingChoice:
    """What was chosen, and what was not."""

    work: TrainingWork
    """With the strategy, the blocks and the chunks that were chosen."""
    memory: TrainingMemory
    """What is expected of it."""
    rejected: tuple[tuple[str, int], ...]
    """What would have been quicker, and its peak in bytes, above the limit."""


def num_learned(work: TrainingWork) -> int:
    """Count the parameters that are learned.

    Args:
        work: model and adapters.
    """
    shape = work.shape
    if not work.lora_rank:
        return shape.num_parameters()
    return shape.num_layers * sum(work.lora_rank * (rows + columns) for rows, columns in _adapted(work))


def train_flops_per_token(work: TrainingWork) -> float:
    """Count the operations that learning from one token takes: products alone, what is computed twice not counted.

    Args:
        work: model, rows, adapters.

    Returns:
        Operations: 2 a weight forward, 2 for the gradient of inputs and 2 for that of weights that are learned, and
        attention over half of a row on average.

        Source: Kaplan et al. 2020, Scaling Laws for Neural Language Models, section 2.1.
    """
    shape = work.shape
    dense = shape.num_layers * shape.num_block_parameters() + shape.vocab_size * shape.hidden_size
    attention = shape.num_layers * 2 * 2 * shape.query_size * work.row_tokens / 2
    passes = 2 if work.lora_rank else 3
    return 2.0 * passes * dense + 3.0 * attention


def predict_training(work: TrainingWork, process_bytes: int) -> TrainingMemory:
    """Predict the memory of one rank.

    Args:
        work: what it does.
        process_bytes: what the process holds before the model is made; 0 for the memory of a device.
    """
    shape, world = work.shape, work.world_size
    process_bytes += RUNTIME_BYTES if process_bytes else 0  # 0: the memory of a device, where none of that is
    total, learned = shape.num_parameters(), num_learned(work)
    adapters = learned if work.lora_rank else 0
    block = shape.num_block_parameters() + adapters // max(1, shape.num_layers)
    table = shape.vocab_size * shape.hidden_size
    all_weights = total + adapters
    shared = work.shard_strategy != "none" and world > 1

    # 1. Weights: a rank's part, and what is gathered from the others while it computes.
    if not shared:
        weights = all_weights * WIDE
    elif work.shard_strategy == "zero3":
        tables = table * (1 if shape.tie_word_embeddings else 2)
        weights = (all_weights // world + tables + 3 * block) * WIDE
    else:
        weights = (all_weights + all_weights // world + block) * WIDE
    if work.low_precision:
        weights += all_weights * 2  # autocast's copies, which the backward pass needs

    # 2. Gradients and moments, of what is learned.
    if not shared:
        gradients = learned * WIDE
    elif work.shard_strategy == "zero1" and work.num_batches > 1:
        gradients = (learned + learned // world) * WIDE
    else:
        gradients = (learned // world + 2 * block + (0 if work.lora_rank else table)) * WIDE
    a_parameter = EIGHT_BIT_BYTES if work.optimizer == "adamw_8bit" else 2.0 * WIDE
    moments = int(a_parameter * (learned // world if shared else learned))
    if work.offload != "none":
        moments = min(moments, 3 * 2 * WIDE * OFFLOAD_PART_VALUES)

    # 3. Activations and the loss.
    block_bytes = block_activation_bytes(work)
    kept = work.num_tokens * shape.hidden_size * WIDE
    normal = shape.num_layers - work.checkpointed_layers
    activations = normal * block_bytes + work.checkpointed_layers * kept
    activations += 4 * work.num_tokens * shape.hidden_size * WIDE  # the last norm and what enters the head
    if work.masked:
        activations += work.num_tokens * MASK_TOKENS * (2 if work.low_precision else WIDE)
    again = block_bytes if work.checkpointed_layers else 0
    logits = logits_bytes(work)
    temporary = _backward_bytes(work)

    # 4. The most at one time: the loss over all activations; the last block's backward pass; the gradients at the end.
    before = gradients if work.num_batches > 1 else 0
    # A tied table has a gradient from the head and one from the embedding, and autograd adds them up in a third place.
    tied = 2 * table * WIDE if shape.tie_word_embeddings and not work.lora_rank else 0
    after = gradients + again + temporary + tied
    during = max(activations + max(logits, temporary + again) + before, after)
    # 5. Two copies of what this rank writes of the state; in the host's memory, and of moments that lie elsewhere none.
    copied = (
        0 if work.offload != "none" or not process_bytes else 2 * (learned * WIDE // world + moments // _parts(work))
    )
    snapshots = copied if work.snapshots else 0
    return TrainingMemory(
        process_bytes=process_bytes,
        weights_bytes=weights,
        gradients_bytes=gradients,
        optimizer_bytes=moments,
        activations_bytes=activations + again,
        logits_bytes=logits,
        snapshots_bytes=snapshots,
        peak_bytes=process_bytes + weights + moments + snapshots + during,
    )


def block_activation_bytes(work: TrainingWork) -> int:
    """Count what autograd keeps of one block that is not checkpointed.

    Args:
        work: model, batch, precision.

    Returns:
        Bytes for all tokens of a batch. For each token: both norms keep their input, the normed row and (for the
        projections) their result; attention keeps queries, keys, values and its output; the MLP four rows of its width.
    """
    shape = work.shape
    narrow = 2 if work.low_precision else WIDE
    width, queries, keys = shape.hidden_size, shape.query_size, shape.kv_size
    scaled = 1 if work.lora_rank else 2  # a norm that is not learned does not keep the normed row
    inputs = 5 * narrow if work.low_precision else 2 * narrow  # autocast casts for each projection anew
    norms = (2 * scaled * WIDE + inputs) * width + 2 * WIDE
    attention = (2 * queries + 2 * keys) * narrow + shape.num_heads * WIDE
    if work.masked:
        attention += queries * narrow  # what groups of documents answer, and that put together
    if shape.qk_norm:
        attention += scaled * (queries + keys) * WIDE + (shape.num_heads + shape.num_kv_heads) * WIDE
    mlp = 4 * shape.intermediate_size * narrow
    if work.mlp_chunk_tokens:
        mlp = 0
    adapters = len(tuple(_adapted(work))) * work.lora_rank * narrow
    return work.num_tokens * (norms + attention + mlp + adapters)


def logits_bytes(work: TrainingWork) -> int:
    """Count what the head's loss holds at its most.

    Args:
        work: model, batch, chunk.

    Returns:
        Bytes: all logits three times over (their logarithms of probability, and two gradients), or a chunk of them and
        the gradients of the head and of the hidden states, which the forward pass makes.
    """
    shape = work.shape
    chunk = work.logits_chunk_tokens
    if not chunk or work.num_tokens <= chunk:
        return 3 * work.num_tokens * shape.vocab_size * WIDE
    narrow = 2 if work.low_precision else 0
    head = 0 if work.lora_rank else shape.vocab_size * shape.hidden_size * WIDE
    return chunk * shape.vocab_size * (2 * WIDE + narrow) + head + work.num_tokens * shape.hidden_size * WIDE


def choose_training(
    work: TrainingWork,
    *,
    process_bytes: int,
    limit_bytes: int,
    shard_strategy: str = "auto",
    checkpointed_layers: int | None = None,
    logits_chunk_tokens: int | None = None,
) -> TrainingChoice:
    """Choose how memory is saved: as little as is needed, what costs the least time first.

    Chunks of logits cost nothing worth measuring and are taken wherever logits are large. Then sharing goes up stage by
    stage, since it costs messages, and within a stage as few blocks as will do are computed twice, since a block costs
    a third of its time.

    Args:
        work: what is done; its strategy, blocks and chunk are replaced.
        process_bytes: what the process holds before the model is made.
        limit_bytes: what a rank may hold.
        shard_strategy: one of `STRATEGIES`, or auto.
        checkpointed_layers: blocks computed twice; None chooses.
        logits_chunk_tokens: rows of the head at a time; None chooses.

    Returns:
        What was chosen.

    Raises:
        MemoryLimitError: nothing stays below the limit.
    """
    if logits_chunk_tokens is None:
        whole = work.num_tokens * work.shape.vocab_size * WIDE
        logits_chunk_tokens = 0 if whole <= LOGITS_WHOLE_BYTES else _chunk(work.shape)
    work = replace(work, logits_chunk_tokens=logits_chunk_tokens)
    rejected: list[tuple[str, int]] = []
    best: tuple[TrainingWork, TrainingMemory] | None = None
    for candidate in _candidates(work, shard_strategy, checkpointed_layers):
        memory = predict_training(candidate, process_bytes)
        if memory.peak_bytes <= limit_bytes:
            return TrainingChoice(work=candidate, memory=memory, rejected=tuple(rejected))
        what = f"{candidate.shard_strategy}, {candidate.checkpointed_layers} blocks computed twice"
        if candidate.checkpointed_layers in (0, checkpointed_layers, work.shape.num_layers):
            rejected.append((what, memory.peak_bytes))
        if best is None or memory.peak_bytes < best[1].peak_bytes:
            best = candidate, memory
    assert best is not None
    raise MemoryLimitError(
        f"the training is expected to need {size_text(best[1].peak_bytes)} a process even with "
        f"{best[0].shard_strategy} and {best[0].checkpointed_layers} blocks computed twice",
        needed=f"at most {size_text(limit_bytes)}",
        remedy="lower per_device_train_batch_size or data.max_length, set optim or method, "
        "memory.offload_optimizer, or raise memory.limit",
    )


def _candidates(work: TrainingWork, shard_strategy: str, checkpointed_layers: int | None) -> Iterator[TrainingWork]:
    strategies = STRATEGIES if shard_strategy == "auto" else (shard_strategy,)
    if work.world_size == 1:
        strategies = ("none",)
    layers = range(work.shape.num_layers + 1) if checkpointed_layers is None else (checkpointed_layers,)
    for strategy in strategies:
        for count in layers:
            yield replace(work, shard_strategy=strategy, checkpointed_layers=count)


def _chunk(shape: ModelShape) -> int:
    """Rows of logits that fill `LOGITS_WHOLE_BYTES`, a power of two of at least 64."""
    rows = LOGITS_WHOLE_BYTES // (shape.vocab_size * WIDE)
    chunk = 64
    while chunk * 2 <= min(rows, LOGITS_CHUNK_TOKENS):
        chunk *= 2
    return chunk


def _parts(work: TrainingWork) -> int:
    """Ranks among whom moments are shared out that each of them holds whole."""
    return work.world_size if work.shard_strategy == "none" else 1


def _backward_bytes(work: TrainingWork) -> int:
    """Gradients of activations inside one block, at their most in its MLP."""
    tokens = min(work.num_tokens, work.mlp_chunk_tokens) if work.mlp_chunk_tokens else work.num_tokens
    narrow = 2 if work.low_precision else WIDE
    again = 4 if work.mlp_chunk_tokens else 0
    mlp = tokens * (3 + again) * work.shape.intermediate_size * narrow
    return mlp + work.num_tokens * 3 * work.shape.hidden_size * WIDE


def _adapted(work: TrainingWork) -> Iterator[tuple[int, int]]:
    """Outputs and inputs of the projections of a block that have an adapter."""
    shape = work.shape
    sizes = {
        "q_proj": (shape.query_size, shape.hidden_size),
        "k_proj": (shape.kv_size, shape.hidden_size),
        "v_proj": (shape.kv_size, shape.hidden_size),
        "o_proj": (shape.hidden_size, shape.query_size),
        "gate_proj": (shape.intermediate_size, shape.hidden_size),
        "up_proj": (shape.intermediate_size, shape.hidden_size),
        "down_proj": (shape.hidden_size, shape.intermediate_size),
    }
    for name in work.lora_targets if work.lora_rank else ():
        yield sizes[name]
