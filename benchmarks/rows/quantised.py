"""Quality of models that `dseek quantize` wrote: perplexity of source code and of prose, against the same weights wide.

Nothing is measured on what was calibrated with: source code comes from the files that nothing may be trained on, and of
the user's prose every other article calibrates while those between them measure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, standard_library
from benchmarks.contest import Entrant, running
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.paths import work_dir
from benchmarks.peers.client import PeerProcess
from benchmarks.prose import articles, prose_path
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from benchmarks.scoring import agreement, perplexity, score_rows
from dseek import load, plan
from dseek.models.files import open_model
from dseek.ops.tensor import BLOCK_SIZES
from dseek.plan.attention_wish import AttentionWish
from dseek.plan.formats import LayerFormats

MODEL = models.SMOLLM2
W8A8_BAR = 0.005
"""Largest rise of perplexity, on either text."""
FP32_TOLERANCE = 1e-3
"""Largest relative change of perplexity in dseek's own fp32: the check that both measure the same thing."""
LARGEST_CHANGE = 0.5
"""Of perplexity, by 8 bits that work."""
WINDOW = 2048
SEED = 0
"""Of the order of the files."""
OFF_GRID_SEED, OFF_GRID_SPREAD = 0, 1.25
"""Of the factors that move the weights off the 4-bit grid they were stored on."""
CALIBRATION_CHARACTERS = 1_000_000
"""Of each of the two texts."""


def quality_w8a8(settings: Settings) -> Outcome:
    """int8 weights with a scale a channel and int8 activations with a scale a token, rotated as dseek loads a model."""
    texts = measured_texts(settings)
    path = models.own_path(MODEL)
    own = score_formats(settings, path, texts, lambda layer, num_layers: LayerFormats.uniform("i8c"))
    wide = reference(settings, texts, models.hf_folder(MODEL), path)
    return _w8a8_outcome(settings, texts, own, wide)


def quality_w8a8_file(settings: Settings) -> Outcome:
    """The same without rotation, as a file for others has it; integers are chosen by calibration."""
    options = ["--enable_quantization", "int8"]
    folder = _quantised(settings, models.gguf_file(MODEL), "w8a8", options)
    texts = measured_texts(settings)
    own = _score(settings, str(folder), {"precision": "int8", "max_quality_loss": 1e-6}, texts, formats=["i8p"])
    wide = reference(settings, texts, models.hf_folder(MODEL), models.own_path(MODEL))
    return _w8a8_outcome(settings, texts, own, wide)


FormatsOfLayer = Callable[[int, int], LayerFormats]
"""Gives a layer's formats from its index and the number of layers."""


def score_formats(
    settings: Settings, path: str, texts: dict[str, list[int]], formats_of: FormatsOfLayer
) -> dict[str, dict[str, Any]]:
    """Score texts through dseek's engine with projections in given formats, whatever is fastest here.

    Args:
        settings: threads, smoke.
        path: the model.
        texts: token ids by name.
        formats_of: the formats.

    Returns:
        `losses` and `best` of each text.
    """
    window = _window(settings)
    with open_model(path) as files:
        made = plan.make(
            files.shape,
            plan.this_machine(),
            plan.Objective(kind="latency", context_tokens=window + 1, batch=1),
            encodings=files.encodings(),
            model=path,
            num_threads=settings.threads,
            precision="int8",
            attention=AttentionWish(kind="dense"),
        )
    num_layers = len(made.layer_formats)
    chosen = tuple(formats_of(layer, num_layers) for layer in range(num_layers))
    made = dataclasses.replace(made, layer_formats=chosen)
    found: dict[str, dict[str, Any]] = {}
    with load(path, plan=made) as llm:
        for name, ids in texts.items():
            found[name] = {"losses": [], "best": []}
            for window_ids in (ids[start : start + window] for start in range(0, len(ids), window)):
                for start, logits in llm.engine.logits(window_ids[:-1]):
                    targets = np.array(window_ids[start + 1 : start + 1 + len(logits)])
                    losses, best = score_rows(logits, targets)
                    found[name]["losses"] += losses
                    found[name]["best"] += best
    return found


def _w8a8_outcome(
    settings: Settings, texts: dict[str, list[int]], own: dict[str, dict[str, Any]], wide: dict[str, dict[str, Any]]
) -> Outcome:
    changes = {name: perplexity(own[name]["losses"]) / perplexity(wide[name]["losses"]) - 1 for name in texts}
    value = max(changes.values())
    if not max(map(abs, changes.values())) < LARGEST_CHANGE:
        raise IncorrectError(f"perplexity changed by {changes}: that is no rounding")
    return Outcome(
        value=value,
        unit="fraction",
        ratio=ratio_to_bar(W8A8_BAR, max(value, 1e-6)),
        details=_details(settings, texts, own, wide) | {"changes": changes},
    )


def quality_int4_peers(settings: Settings) -> Outcome:
    """int4 in groups of 32 by calibration, beside what others make of the weights, off the grid of their 4-bit file."""
    source = models.off_grid_folder(MODEL, OFF_GRID_SEED, OFF_GRID_SPREAD)
    folder = _quantised(settings, source, "int4", ["--enable_quantization", "int4", "--group-size", "32"])
    texts = measured_texts(settings)
    own = _score(settings, str(folder), {"precision": "int4", "max_quality_loss": 1e-6}, texts, formats=["i4g"])
    wide = reference(settings, texts, source, str(source))
    form = f"off-grid-{OFF_GRID_SEED}-{OFF_GRID_SPREAD:g}"
    peers = [
        Entrant("torchao int4", "transformers", str(source), {"torchao_int4_groups": 32}),
        Entrant(
            "llama.cpp Q4_K_M",
            "llamacpp",
            str(models.llamacpp_file(MODEL, source, "Q4_K_M", f"{form}-Q4_K_M")),
        ),
        Entrant(
            "OpenVINO int4",
            "openvino",
            str(models.openvino_int4_folder(MODEL, source, f"{form}-openvino-int4")),
            {"logits": True},
        ),
    ]
    found = {"dseek": own}
    loaded: dict[str, dict[str, Any]] = {}
    for peer in peers:
        with running([peer], threads=settings.threads, context_tokens=_window(settings) + 1) as engines:
            call = engines[0].process.call
            loaded[peer.name] = engines[0].loaded
            found[peer.name] = {
                name: call("nll", token_ids=ids, window=_window(settings)) for name, ids in texts.items()
            }
    changes = {
        who: {name: perplexity(scores[name]["losses"]) / perplexity(wide[name]["losses"]) - 1 for name in texts}
        for who, scores in found.items()
    }
    for who, change in changes.items():
        if not max(map(abs, change.values())) < LARGEST_CHANGE:
            raise IncorrectError(f"the perplexity of {who} changed by {change}: that is no rounding")
    means = {who: sum(change.values()) / len(texts) for who, change in changes.items()}
    ours = means.pop("dseek")
    best = min(means, key=means.__getitem__)
    return Outcome(
        value=ours,
        unit="fraction",
        ratio=ratio_to_bar(means[best], max(ours, 1e-6)),
        peer=best,
        details=_details(settings, texts, own, wide)
        | {
            "changes": changes,
            "versions": {who: answer.get("version") for who, answer in loaded.items()},
            "block_bits": {
                "dseek": 4 + 16 / 32,
                "torchao int4": 4 + 16 / 32,
                "llama.cpp Q4_K_M": _block_bits(Path(peers[1].path)),
                "OpenVINO int4": loaded["OpenVINO int4"]["block_bits"],
            },
        },
    )


def _block_bits(path: Path) -> float:
    """Bits that a GGUF file spends on a weight of the blocks' projections."""
    with open_model(str(path)) as files:
        names = [name for name in files.tensor_names() if ".layers." in name and len(files.tensor_shape(name)) == 2]
        sizes = {name: math.prod(files.tensor_shape(name)) for name in names}
        num_bits = 0.0
        for name, size in sizes.items():
            elements, num_bytes = BLOCK_SIZES[files.tensor_encoding(name)]
            num_bits += 8 * num_bytes * size / elements
    return num_bits / sum(sizes.values())


def _window(settings: Settings) -> int:
    return settings.pick(WINDOW, 200)


def _quantised(settings: Settings, source: Path, form: str, options: list[str]) -> Path:
    """The model that `dseek quantize` makes, kept in the cache under its options and texts."""
    texts = _calibration_files()
    sizes = ["--samples", str(settings.pick(64, 2)), "--tokens", str(settings.pick(1024, 128))]
    origin = f"{source} {options} {sizes} {[path.read_bytes() for path in texts]}"
    digest = hashlib.sha256(origin.encode()).hexdigest()[:12]
    return models.quantised_folder(MODEL, source, f"{form}-{digest}", [*options, *sizes], [[path] for path in texts])


def _calibration_files() -> list[Path]:
    """Source code and prose to calibrate with, a file of each."""
    names = standard_library.shuffled(standard_library.training_files(), SEED)
    folder = work_dir() / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    prose = "\n".join(list(articles(prose_path()).values())[1::2])
    files = []
    for name, text in (("source.txt", _joined_source(names)), ("prose.txt", prose)):
        path = folder / name
        path.write_text(text[:CALIBRATION_CHARACTERS], encoding="utf-8")
        files.append(path)
    return files


def _joined_source(names: list[str]) -> str:
    pieces: list[str] = []
    total = 0
    for name in names:
        pieces.append(standard_library.read(name))
        total += len(pieces[-1])
        if total > CALIBRATION_CHARACTERS:
            break
    return "\n".join(pieces)


def measured_texts(settings: Settings) -> dict[str, list[int]]:
    """Give token ids of source code and of prose that nothing was calibrated with.

    Args:
        settings: smoke.

    Returns:
        `source` and `prose`.

    Raises:
        BenchmarkError: a text is too short.
    """
    count = settings.pick(8 * WINDOW, 400)
    names = standard_library.shuffled(standard_library.held_out_files(), SEED)
    texts = {
        "source": _joined_source(names)[: 8 * count],
        "prose": "\n".join(list(articles(prose_path()).values())[0::2])[: 8 * count],
    }
    with PeerProcess("dseek") as worker:
        ids = worker.call("encode_all", path=models.own_path(MODEL), texts=list(texts.values()))["token_ids"]
    for name, found in zip(texts, ids, strict=True):
        if len(found) < count:
            raise BenchmarkError(f"the {name} to measure with gave {len(found)} tokens, {count} are needed")
    return {name: found[:count] for name, found in zip(texts, ids, strict=True)}


def _score(
    settings: Settings, path: str, options: dict[str, Any], texts: dict[str, list[int]], *, formats: list[str]
) -> dict[str, dict[str, Any]]:
    """Score texts through dseek's engine, in the formats that hold the file's integers."""
    window = _window(settings)
    entrant = Entrant("dseek", "dseek", path, {"batch": 1, **options})
    with running([entrant], threads=settings.threads, context_tokens=window + 1) as engines:
        found = engines[0].loaded["weight_formats"]
        if found != formats:
            raise IncorrectError(f"the plan runs the weights as {found}, not as the file has them ({formats})")
        call = engines[0].process.call
        return {name: call("nll", token_ids=ids, window=window) for name, ids in texts.items()}


def reference(
    settings: Settings, texts: dict[str, list[int]], folder: Path, own_path: str
) -> dict[str, dict[str, Any]]:
    """Score texts with the wide weights in transformers, once dseek's own fp32 is seen to say the same.

    Args:
        settings: threads, smoke.
        texts: token ids by name.
        folder: the wide weights.
        own_path: the same for dseek.

    Returns:
        `losses` and `best` of each text.

    Raises:
        IncorrectError: dseek's fp32 says something else.
    """
    window = _window(settings)
    with PeerProcess("transformers", threads=settings.threads) as judge:
        judge.call("load", path=str(folder), threads=settings.threads, context_tokens=0)
        wide = {name: judge.call("nll", token_ids=ids, window=window) for name, ids in texts.items()}
    first = {name: ids[:window] for name, ids in texts.items()}
    own = _score(settings, own_path, {"precision": "fp32"}, first, formats=["f32"])
    for name, answer in own.items():
        found, wanted = perplexity(answer["losses"]), perplexity(wide[name]["losses"][: window - 1])
        if not abs(found / wanted - 1) <= FP32_TOLERANCE:
            raise IncorrectError(
                f"dseek's own fp32 has the perplexity {found:.5f} on {name}, transformers {wanted:.5f}"
            )
    return wide


def _details(
    settings: Settings, texts: dict[str, list[int]], own: dict[str, Any], wide: dict[str, Any]
) -> dict[str, Any]:
    return {
        "perplexity": {name: perplexity(own[name]["losses"]) for name in texts},
        "reference_perplexity": {name: perplexity(wide[name]["losses"]) for name in texts},
        "argmax_agreement": {name: agreement(own[name]["best"], wide[name]["best"]) for name in texts},
        "tokens": {name: len(ids) for name, ids in texts.items()},
        "window": _window(settings),
        "prose": prose_path().name,
    }
