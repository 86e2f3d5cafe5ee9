"""The whole experiment: twins and seeds one after another, each result kept in a file, so that it can be resumed."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.errors import BenchmarkError
from benchmarks.experiments.pyramid_f1.reader import Reader
from benchmarks.experiments.pyramid_f1.squad import Corpus, Part, read
from benchmarks.experiments.pyramid_f1.training import PATTERNS, Log, Stage, score, train
from dseek.core.attention_pattern import BLOCK_TOKENS, DENSE

TWINS = ("pyramid", "window", "dense")
SHARED = Stage(length=320, batch=16, steps=800)
OWN = (Stage(length=1024, batch=4, steps=30), Stage(length=4096, batch=2, steps=30))


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """What is trained, for how long, and how it is scored."""

    seeds: tuple[int, ...] = (0, 1, 2)
    twins: tuple[str, ...] = TWINS
    """Names in `PATTERNS`."""
    shared: Stage = SHARED
    """What all twins of a seed have in common; so short that every pattern reaches every word."""
    shared_rate: float = 2e-3
    own: tuple[Stage, ...] = OWN
    """What each twin goes on with."""
    rates: tuple[float, ...] = (3e-4, 1e-3)
    """Learning rates that each twin is tried with on the first seed; it keeps the one with the lower loss in tuning."""
    tune_questions: int = 100
    test_questions: int = 300
    max_paragraphs: int | None = None
    """Of each file; None reads all."""

    @property
    def length(self) -> int:
        """Words of the documents that are scored."""
        return self.own[-1].length

    def check(self) -> None:
        """Refuse a shared stage in which a pattern would hide a word.

        Raises:
            BenchmarkError: its documents are too long, or a twin is unknown.
        """
        for name in self.twins:
            if name not in PATTERNS:
                raise BenchmarkError(f"there is no twin {name!r}; there are " + ", ".join(PATTERNS))
        # The first block, the window, and the query's own block.
        reached = min(BLOCK_TOKENS * 2 + sum(PATTERNS[name].window_tokens[:1]) for name in PATTERNS if name != "dense")
        if self.shared.length > reached:
            raise BenchmarkError(f"shared training on {self.shared.length} words, of which a window reaches {reached}")


@dataclass(kw_only=True)
class Experiment:
    """Runs a recipe on some files into a folder."""

    recipe: Recipe
    files: Sequence[Path]
    folder: Path
    log: Log
    _parts: dict[Part, Corpus] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Run what is not in the folder yet.

        Returns:
            The summary (see `summarise`).

        Raises:
            BenchmarkError: the files are no data, or the folder holds results of another recipe or other files.
        """
        self.recipe.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._claim_folder()
        rates: dict[str, float] = {}
        results: list[dict[str, Any]] = []
        for seed, twin in itertools.product(self.recipe.seeds, self.recipe.twins):
            if twin not in rates:
                tried = [(self._tuning(seed, twin, rate)["loss"], rate) for rate in self.recipe.rates]
                rates[twin] = min(tried)[1]
            results.append(self._result(seed, twin, rates[twin]))
        summary = summarise(results)
        write_json(self.folder / "summary.json", summary)
        return summary

    @property
    def parts(self) -> dict[Part, Corpus]:
        """The data, read when it is first needed."""
        if not self._parts:
            self._parts.update(read(self.files, self.recipe.max_paragraphs))
            for part, corpus in self._parts.items():
                self.log(f"{part}: {len(corpus.paragraphs)} paragraphs, {len(corpus.questions)} questions")
        return self._parts

    def _claim_folder(self) -> None:
        """Results of different settings must not meet in one summary."""
        digest = hashlib.sha256()
        for path in self.files:
            try:
                digest.update(path.read_bytes())
            except OSError as error:
                raise BenchmarkError(f"cannot read {path}: {error.strerror}") from error
        # More seeds or twins may be asked for later; nothing else may change.
        settings = {**json.loads(json.dumps(dataclasses.asdict(self.recipe))), "data_sha256": digest.hexdigest()}
        del settings["seeds"], settings["twins"]
        path = self.folder / "settings.json"
        if path.exists() and json.loads(path.read_text()) != settings:
            raise BenchmarkError(f"{self.folder} holds results of other settings or data: take another folder")
        write_json(path, settings)

    def _shared_reader(self, seed: int) -> Reader:
        path = self.folder / f"shared-seed{seed}.pt"
        torch.manual_seed(seed)
        reader = Reader()
        if not path.exists():
            self.log(f"seed {seed}: shared training")
            stage, rate = self.recipe.shared, self.recipe.shared_rate
            train(reader, DENSE, self.parts["train"], stage, rate=rate, seed=seed, log=self.log)
            part = path.with_suffix(".part")
            torch.save(reader.state_dict(), part)
            part.rename(path)
        reader.load_state_dict(torch.load(path, weights_only=True))
        return reader

    def _trained(self, seed: int, twin: str, rate: float) -> Reader:
        path = self.folder / f"{twin}-seed{seed}-rate{rate:g}.pt"
        reader = self._shared_reader(seed)
        if path.exists():
            reader.load_state_dict(torch.load(path, weights_only=True))
            return reader
        self.log(f"seed {seed}: {twin}, learning rate {rate:g}")
        for number, stage in enumerate(self.recipe.own):
            # Another seed a stage, so that none repeats the order of an earlier one; the same for all twins.
            order = 1000 * (number + 1) + seed
            train(reader, PATTERNS[twin], self.parts["train"], stage, rate=rate, seed=order, log=self.log)
        part = path.with_suffix(".part")
        torch.save(reader.state_dict(), part)
        part.rename(path)
        return reader

    def _tuning(self, seed: int, twin: str, rate: float) -> dict[str, Any]:
        path = self.folder / f"{twin}-seed{seed}-rate{rate:g}-tune.json"
        if not path.exists():
            reader = self._trained(seed, twin, rate)
            held = score(reader, PATTERNS[twin], self.parts["tune"], self.recipe.length, self.recipe.tune_questions)
            write_json(path, {"loss": held.loss, "mean_f1": held.mean_f1, "questions": len(held.f1)})
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    def _result(self, seed: int, twin: str, rate: float) -> dict[str, Any]:
        path = self.folder / f"{twin}-seed{seed}.json"
        if not path.exists():
            reader = self._trained(seed, twin, rate)
            held = score(reader, PATTERNS[twin], self.parts["test"], self.recipe.length, self.recipe.test_questions)
            record = {"twin": twin, "seed": seed, "rate": rate, "mean_f1": held.mean_f1, **dataclasses.asdict(held)}
            write_json(path, record)
            self.log(f"seed {seed}: {twin}: F1 {100 * held.mean_f1:.2f}")
        found: dict[str, Any] = json.loads(path.read_text())
        return found


def summarise(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Put the results of all twins and seeds together.

    Args:
        results: one of each twin and seed.

    Returns:
        F1 by twin and seed, mean and standard deviation over the seeds; of pyramid less window, mean over the seeds,
        its standard error over the questions (of each question's mean difference over the seeds), and each seed's;
        all fractions.
    """
    twins: dict[str, Any] = {}
    for name in dict.fromkeys(result["twin"] for result in results):
        own = [result for result in results if result["twin"] == name]
        scores = [result["mean_f1"] for result in own]
        twins[name] = {
            "f1": {str(result["seed"]): result["mean_f1"] for result in own},
            "mean_f1": statistics.mean(scores),
            "spread": statistics.stdev(scores) if len(scores) > 1 else None,
            "right_paragraph": statistics.mean(result["right_paragraph"] for result in own),
            "rate": own[0]["rate"],
        }
    summary: dict[str, Any] = {
        "twins": twins,
        "questions": len(results[0]["f1"]),
        "best_f1": results[0]["best_f1"],
    }
    if "pyramid" in twins and "window" in twins:
        pairs = [
            [a - b for a, b in zip(pyramid["f1"], window["f1"], strict=True)]
            for pyramid in results
            for window in results
            if pyramid["twin"] == "pyramid" and window["twin"] == "window" and pyramid["seed"] == window["seed"]
        ]
        gains = [statistics.mean(question) for question in zip(*pairs, strict=True)]
        summary["gain"] = {
            "mean": statistics.mean(gains),
            "standard_error": statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
            "by_seed": [statistics.mean(pair) for pair in pairs],
        }
    return summary


def write_json(path: Path, content: Any) -> None:
    """Write a file at once or not at all.

    Args:
        path: the file.
        content: what JSON can hold.
    """
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.rename(path)
