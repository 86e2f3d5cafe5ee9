"""What int8 costs a translation model in BLEU, and how much faster its greedy decoding is than PyTorch's in float32.

All models descend from one: float32 as it was trained, the same weights rounded afterwards (PTQ), and the same weights
trained on with rounding (QAT), once a seed. Everything that is scored was decoded greedily by the engine it belongs to.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import multi30k
from benchmarks.contest import alternate, spread_of
from benchmarks.errors import BenchmarkError, IncorrectError
from benchmarks.paths import work_dir
from benchmarks.prepare import translation as training
from benchmarks.result import Outcome, ratio_to_bar
from benchmarks.rows import Settings
from dseek.compress import qat
from dseek.engine.marian_native import NativeMarian
from dseek.engine.marian_torch import TorchMarian
from dseek.engine.translation import Seq2SeqRunner, Translator, answer_limit
from dseek.models.marian import Marian
from dseek.models.marian_files import open_marian, open_tokenizer
from dseek.models.marian_shape import MarianShape
from dseek.train.translation import TranslationTraining

DATA = "BENCHMARKS_MULTI30K"
"""Environment variable: folder of Multi30k."""
FOLDER = "BENCHMARKS_TRANSLATION_DIR"
"""Environment variable: folder with the models `fp32`, `qat-0`, `qat-1` ..."""

SPEED_BAR = 4.2
"""Times that int8 is to be faster, at batch 1 and at batch 32."""
LOSS_BAR = 0.7
"""Most points of BLEU that int8 after QAT may lose."""
LEAST_SEEDS = 2
BATCHES = (1, 32)
SETTLE_S = 0.1
"""Rest before a timed call, in which the other engine's threads stop spinning."""
MAX_MEDIAN_GAP = 1e-4
"""Median difference of a sentence's int8 logits from their reference's, where no input lies on the boundary of two
integers. Where one does, a last digit sends it either way, and the reference in float32 differs as much from itself in
float64 (some 0.01): by so much, twice over, the kernels may differ too."""
LEAST_COSINE = 0.9995
"""Least cosine of all int8 logits of a sentence with their reference's."""
LEAST_AGREEMENT = 0.98
"""Least share of sentences that two float32 engines translate alike: the order of a sum decides between near equals."""


@dataclass(slots=True)
class _Entrants:
    """The engines, and the sentences in their order of length."""

    eager: TorchMarian
    own_wide: NativeMarian
    ptq: NativeMarian
    qat: list[NativeMarian]
    modules: list[tuple[NativeMarian, Marian]]
    translator: Translator
    sources: list[list[int]]
    references: list[str]


def bleu_int8(settings: Settings) -> Outcome:
    """Decode the test set with every engine, compare, score and time.

    Args:
        settings: threads, rounds, smoke.

    Returns:
        BLEU that int8 after QAT loses, a point a hundredth; the ratio is the least of what each bar leaves: speed over
        4.2 at batch 1 and 32, 0.7 over the loss, and one plus the points that QAT loses less than PTQ.

    Raises:
        BenchmarkError: no data or models are given.
        IncorrectError: an engine does not compute what its reference does.
    """
    data = _given(DATA, "the folder of Multi30k")
    folder = _smoke_models(data) if settings.smoke else _given(FOLDER, "a folder with the models fp32, qat-0, qat-1")
    torch.set_num_threads(settings.threads)
    entrants = _load(folder, data, settings)
    checks = _check(entrants, settings.pick(64, 8))
    answers = {
        "fp32": _decode(entrants.eager, entrants.sources, 32),
        "ptq": _decode(entrants.ptq, entrants.sources, 32),
    }
    answers |= {f"qat-{seed}": _decode(run, entrants.sources, 32) for seed, run in enumerate(entrants.qat)}
    alone = _decode(entrants.qat[0], entrants.sources, 1)
    if alone != answers["qat-0"]:
        raise IncorrectError("int8 translates a sentence alone otherwise than in a batch")
    agreement = _agreement(_decode(entrants.own_wide, entrants.sources, 32), answers["fp32"])
    if agreement < LEAST_AGREEMENT:
        raise IncorrectError(f"only {agreement:.3f} of the sentences are alike in both float32 engines")
    scores = _scores(entrants, answers, settings.pick(1000, 10))
    losses = [scores["bleu"]["fp32"] - scores["bleu"][f"qat-{seed}"] for seed in range(len(entrants.qat))]
    loss, ptq_loss = statistics.mean(losses), scores["bleu"]["fp32"] - scores["bleu"]["ptq"]
    speeds = {size: _race(entrants, size, settings) for size in BATCHES}
    ratios = [speeds[size]["ratio"] / SPEED_BAR for size in BATCHES]
    # Below one unless it really loses less.
    beside_ptq = 1.0 + ptq_loss - loss if loss < ptq_loss else min(0.99, 1.0 + ptq_loss - loss)
    ratios += [ratio_to_bar(LOSS_BAR, loss), beside_ptq]
    details = {"loss": loss, "losses": losses, "ptq_loss": ptq_loss, "speeds": speeds, "checks": checks, **scores}
    details |= {"agreement_of_fp32": agreement, "shape": str(entrants.eager.shape)}
    print(f"benchmarks: bleu-int8: {details}", file=sys.stderr, flush=True)
    return Outcome(
        value=loss / 100, unit="fraction", ratio=min(ratios), peer="PyTorch fp32, eager, with caches", details=details
    )


def _given(variable: str, what: str) -> Path:
    if not os.environ.get(variable):
        raise BenchmarkError(
            f"bleu-int8 needs {what}, and {variable} is not set; models are made by "
            "`python -m benchmarks.prepare.translation` (its --help says how)"
        )
    return Path(os.environ[variable]).expanduser()


def _smoke_models(data: Path) -> Path:
    """Train models of a few pairs, anew each time."""
    import shutil

    folder = work_dir() / "bleu-int8-smoke"
    shutil.rmtree(folder, ignore_errors=True)
    shape = MarianShape(
        vocab_size=300, hidden_size=64, intermediate_size=96, num_encoder_layers=1, num_decoder_layers=1
    )
    config = TranslationTraining(num_passes=1, warm_up_steps=2)
    training.train(data, folder / "fp32", shape, config, 200)
    for seed in range(LEAST_SEEDS):
        rounded = replace(training.QAT_TRAINING, num_passes=1, seed=seed)
        training.train_rounded(data, folder / "fp32", folder / f"qat-{seed}", rounded, 100)
    return folder


def _load(folder: Path, data: Path, settings: Settings) -> _Entrants:
    seeds = sorted(path for path in folder.glob("qat-*") if (path / "model.safetensors").is_file())
    if not (folder / "fp32" / "model.safetensors").is_file() or len(seeds) < LEAST_SEEDS:
        raise BenchmarkError(f"{folder} needs trained models fp32 and qat-0, qat-1: there are {len(seeds)} after QAT")
    wide = open_marian(folder / "fp32")
    modules = [wide, *(open_marian(path) for path in seeds)]
    runners = [NativeMarian(module, "int8", threads=settings.threads) for module in modules]
    english, german = multi30k.read_part(data, "test")
    english, german = english[: settings.pick(1000, 24)], german[: settings.pick(1000, 24)]
    eager = TorchMarian(wide)
    translator = Translator(eager, open_tokenizer(folder / "fp32"))
    sources = translator.encode(english)
    order = sorted(range(len(sources)), key=lambda index: len(sources[index]))
    return _Entrants(
        eager=eager,
        own_wide=NativeMarian(wide, "fp32", threads=settings.threads),
        ptq=runners[0],
        qat=runners[1:],
        modules=list(zip(runners, modules, strict=True)),
        translator=translator,
        sources=[sources[index] for index in order],
        references=[german[index] for index in order],
    )


def _decode(runner: Seq2SeqRunner, sources: Sequence[Sequence[int]], batch: int) -> list[list[int]]:
    """Answers to all sources, in their order."""
    answers: list[list[int]] = []
    for first in range(0, len(sources), batch):
        part = sources[first : first + batch]
        answers += runner.translate(part, [answer_limit(len(source), runner.shape) for source in part])
    return answers


def _agreement(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    return sum(a == b for a, b in zip(ours, theirs, strict=True)) / len(ours)


def _check(entrants: _Entrants, num_sentences: int) -> dict[str, Any]:
    """Compare int8 with the rounding that was trained, and the eager engine with transformers."""
    sources = entrants.sources[:: max(1, len(entrants.sources) // num_sentences)][:num_sentences]
    answers = _decode(entrants.eager, sources, 1)
    gaps, own_gaps, cosines = [], [], []
    for runner, module in entrants.modules:
        reference, exact = (_rounding(module).to(dtype) for dtype in (torch.float32, torch.float64))
        kept = [token for token in range(module.shape.vocab_size) if token not in module.shape.suppressed_ids]
        for source, answer in zip(sources, answers, strict=True):
            target = [*answer, module.shape.eos_id][: module.shape.max_positions]
            inputs = torch.tensor([[module.shape.start_id, *target[:-1]]])
            with torch.no_grad():
                expected, wide = (
                    model(torch.tensor([list(source)]), inputs)[0].double().numpy()[:, kept]
                    for model in (reference, exact)
                )
            found = runner.logits(source, target)[:, kept].astype(np.float64)
            gaps.append(float(np.median(np.abs(found - expected))))
            own_gaps.append(float(np.median(np.abs(wide - expected))))
            norms = np.linalg.norm(found) * np.linalg.norm(expected)
            cosines.append(float((found * expected).sum() / norms))
    allowed = 2 * max(MAX_MEDIAN_GAP, *own_gaps)
    if min(gaps) > MAX_MEDIAN_GAP or max(gaps) > allowed or min(cosines) < LEAST_COSINE:
        raise IncorrectError(
            f"int8 logits are {min(gaps):.2g} to {max(gaps):.2g} (medians of sentences) from their reference, which in "
            f"float64 is up to {max(own_gaps):.2g} from itself; cosine {min(cosines):.5f}"
        )
    agreement = _agreement(answers, _by_transformers(entrants.eager, sources))
    if agreement < LEAST_AGREEMENT:
        raise IncorrectError(f"only {agreement:.3f} of the sentences are those of transformers")
    return {
        "gaps": {"least": min(gaps), "most": max(gaps), "of_reference": max(own_gaps)},
        "least_cosine": min(cosines),
        "as_transformers": agreement,
    }


def _rounding(module: Marian) -> torch.nn.Module:
    """A model that rounds as it was trained to; `prepare` works in place, so it gets a copy."""
    copy = Marian(module.shape)
    copy.load_state_dict(module.state_dict())
    return qat.prepare(copy.eval(), qat.QatConfig(activations="dynamic"))


def _by_transformers(eager: TorchMarian, sources: Sequence[Sequence[int]]) -> list[list[int]]:
    """Greedy answers by `generate`."""
    generate = _transformers(eager)
    return [generate([source])[0] for source in sources]


def _transformers(eager: TorchMarian) -> Callable[[Sequence[Sequence[int]]], list[list[int]]]:
    """Transformers' own greedy decoding of the eager engine's weights."""
    from transformers import GenerationConfig, MarianConfig, MarianMTModel

    shape = eager.shape
    model = MarianMTModel(MarianConfig(**shape.config())).eval()
    model.load_state_dict(eager.state, strict=False)
    model.generation_config = GenerationConfig(**shape.generation_config())

    def generate(sources: Sequence[Sequence[int]]) -> list[list[int]]:
        longest = max(map(len, sources))
        ids = torch.tensor([[*source, *[shape.pad_id] * (longest - len(source))] for source in sources])
        mask = torch.arange(longest) < torch.tensor([len(source) for source in sources])[:, None]
        limit = max(answer_limit(len(source), shape) for source in sources)
        with torch.inference_mode():
            rows = model.generate(input_ids=ids, attention_mask=mask.long(), max_new_tokens=limit, max_length=None)
        answers = []
        for row, source in zip(rows[:, 1:].tolist(), sources, strict=True):
            row = row[: answer_limit(len(source), shape)]
            answers.append(row[: row.index(shape.eos_id)] if shape.eos_id in row else row)
        return answers

    return generate


def _scores(entrants: _Entrants, answers: dict[str, list[list[int]]], num_samples: int) -> dict[str, Any]:
    """BLEU of every system by sacreBLEU, and paired bootstrap tests against float32."""
    from sacrebleu.metrics import BLEU
    from sacrebleu.significance import PairedTest

    decode = entrants.translator.tokenizer.decode
    texts = {name: [decode(answer).strip() for answer in found] for name, found in answers.items()}
    metric, references = BLEU(), [entrants.references]
    bleu = {name: metric.corpus_score(found, references).score for name, found in texts.items()}
    signature = str(metric.get_signature())
    os.environ.setdefault("SACREBLEU_SEED", "12345")
    test = PairedTest(list(texts.items()), {"BLEU": BLEU()}, references, test_type="bs", n_samples=num_samples)
    results = test()[1]["BLEU"]
    p_values = {name: result.p_value for name, result in zip(texts, results, strict=True)}
    return {"bleu": bleu, "signature": signature, "p_values": p_values}


def _race(entrants: _Entrants, batch: int, settings: Settings) -> dict[str, Any]:
    """Seconds of the whole set by each engine, in turn."""
    step = settings.pick(4, 1) if batch == 1 else 1  # a quarter of the sentences is enough where each runs alone
    sources = entrants.sources[::step]
    generate = _transformers(entrants.eager)

    def timed(run: Callable[[], object]) -> dict[str, float]:
        time.sleep(SETTLE_S)
        started = time.perf_counter()
        run()
        return {"s": time.perf_counter() - started}

    runners = {"int8": entrants.qat[0], "eager": entrants.eager, "own fp32": entrants.own_wide}
    calls: dict[str, Callable[[int], dict[str, Any]]] = {
        name: (lambda _, runner=runner: timed(lambda: _decode(runner, sources, batch)))
        for name, runner in runners.items()
    }
    found = alternate(calls, rounds=settings.rounds)
    few = sources[:: max(1, len(sources) // settings.pick(128, 8))]
    batches = [few[first : first + batch] for first in range(0, len(few), batch)]
    theirs = timed(lambda: [generate(part) for part in batches])["s"] / len(few)
    spreads = {name: spread_of(answers, "s") for name, answers in found.items()}
    return {
        "ratio": spreads["eager"]["median"] / spreads["int8"]["median"],
        "sentences": len(sources),
        "seconds": spreads,
        "transformers_s_per_sentence": theirs,
        "int8_s_per_sentence": spreads["int8"]["median"] / len(sources),
    }
