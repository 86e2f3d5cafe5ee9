"""The question-answering experiment: F1, parts without leaks, offsets in documents, twins, resuming."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.errors import BenchmarkError
from benchmarks.experiments.pyramid_f1 import experiment, squad
from benchmarks.experiments.pyramid_f1.documents import (
    LEAD,
    LEAD_WORDS,
    QUESTION,
    TEXT,
    batches,
    best_span,
    build,
    features_of,
    usable,
)
from benchmarks.experiments.pyramid_f1.experiment import Experiment, Recipe, summarise
from benchmarks.experiments.pyramid_f1.reader import Reader
from benchmarks.experiments.pyramid_f1.squad import Corpus, Part, f1, split_words
from benchmarks.experiments.pyramid_f1.training import PATTERNS, Stage, loss_of, train
from benchmarks.rows import ROWS, Settings
from dseek.core.attention_pattern import DENSE

NAMES = ("Ada", "Bob", "Cleo", "Dan", "Eve", "Fay", "Gus", "Hal", "Ida", "Jon")


def _record(number: int) -> dict[str, object]:
    name, place = f"{NAMES[number % 10]}-{number}", f"The Hill No. {number}"
    context = f"In year {number}, {name} went to ({place}), “as was told”. " + f"Filler {number} follows it. " * 8
    return {
        "context": context + "\n",
        "qas": [
            {"q": f"Where did {name} go?", "a": [[place, context.index(place)], [place[4:], context.index(place) + 4]]},
            {"q": f"Who went to hill {number}?", "a": [[name, context.index(name)], ["nobody", 3]]},
            {"q": "What is it all about?", "a": [["told", context.index("told")]]},
        ],
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A file of 120 paragraphs; one question is asked of all of them."""
    path = tmp_path / "questions.jsonl.gz"
    with gzip.open(path, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps(_record(number)) + "\n" for number in range(120))
    return path


@pytest.fixture
def parts(data: Path) -> dict[Part, Corpus]:
    """The data in parts."""
    return squad.read([data])


@pytest.mark.parametrize(
    ("given", "accepted", "wanted"),
    [
        ("The Denver Broncos", ["denver broncos!"], 1.0),
        ("Broncos", ["Denver Broncos"], 2 / 3),
        ("a b b", ["b b b b"], 2 / 3),
        ("x", ["y", "x z"], 2 / 3),
        ("Carolina", ["Denver Broncos"], 0.0),
        ("", ["Denver"], 0.0),
    ],
)
def test_f1(given: str, accepted: list[str], wanted: float) -> None:
    assert f1(given, accepted) == pytest.approx(wanted)


def test_parts_share_no_paragraph_and_no_question(parts: dict[Part, Corpus]) -> None:
    seen_paragraphs: set[str] = set()
    seen_questions: set[str] = set()
    for corpus in parts.values():
        paragraphs = {words.text for words in corpus.paragraphs}
        questions = {question.words.text for question in corpus.questions}
        assert paragraphs and questions
        assert not paragraphs & seen_paragraphs and not questions & seen_questions
        seen_paragraphs |= paragraphs
        seen_questions |= questions
    assert len(seen_paragraphs) == 120
    assert "What is it all about?" in seen_questions


def test_a_paragraph_in_two_files_stays_in_one_part(data: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.jsonl.gz"
    with gzip.open(again, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({**_record(number), "title": "other"}) + "\n" for number in range(120))
    both = squad.read([data, again])
    assert sum(len(corpus.paragraphs) for corpus in both.values()) == 120


def test_answers_that_are_not_at_their_offset_are_dropped(parts: dict[Part, Corpus]) -> None:
    for corpus in parts.values():
        assert all("nobody" not in question.answers for question in corpus.questions)


@pytest.mark.parametrize("length", [320, 1024])
def test_documents_hold_the_answer_where_they_say(parts: dict[Part, Corpus], length: int) -> None:
    corpus = parts["train"]
    random = np.random.default_rng(0)
    for question in usable(corpus, length, trained=True):
        document = build(corpus, question, length, random)
        assert document.features.shape == (length, 4) and document.paragraph.shape == (length,)
        tags = document.features[:, 3]
        words = len(question.words)
        assert tags.tolist() == [LEAD] * LEAD_WORDS + [QUESTION] * words + [TEXT] * (length - LEAD_WORDS - words)
        assert document.features[LEAD_WORDS : LEAD_WORDS + words, :3].tolist() == question.words.features.tolist()
        texts = {document.text(corpus, *span) for span in document.spans()}
        for answer in question.answers:
            assert max(f1(text, [answer]) for text in texts) == 1.0
        for first, last in document.spans():
            assert document.paragraph[first] == document.paragraph[last] >= 0
            within = squad.split_words(document.text(corpus, first, last)).features
            assert document.features[first : last + 1, :3].tolist() == within.tolist()
        # The paragraph stands in the document once.
        answering = document.places[:, 0] == question.paragraph_idx
        assert answering.sum() == len(corpus.paragraphs[question.paragraph_idx])


def test_the_answer_may_stand_anywhere(parts: dict[Part, Corpus]) -> None:
    question = parts["train"].questions[0]
    random = np.random.default_rng(0)
    places = {build(parts["train"], question, 1024, random).paragraph[-1] for _ in range(2)}
    starts = [build(parts["train"], question, 1024, random).answer_start for _ in range(40)]
    assert places and min(starts) < 300 and max(starts) > 700


def test_batches_are_decided_by_their_seed(parts: dict[Part, Corpus]) -> None:
    one, same, other = (next(batches(parts["train"], 320, 4, seed)) for seed in (3, 3, 4))
    assert torch.equal(features_of(one), features_of(same)) and not torch.equal(features_of(one), features_of(other))


def test_best_span_stays_within_a_paragraph(parts: dict[Part, Corpus]) -> None:
    document = next(batches(parts["train"], 320, 1, 0))[0]
    edge = int((document.paragraph == 0).nonzero()[0][-1])
    scores = torch.zeros(320, 2)
    scores[0] = 99.0  # the lead-in is no answer
    scores[edge, 0] = scores[edge + 1, 1] = 5.0
    scores[edge - 2, 0], scores[edge - 1, 1] = 4.0, 4.0
    assert best_span(scores, document) == (edge - 2, edge - 1)


def test_loss_is_that_of_the_right_words(parts: dict[Part, Corpus]) -> None:
    document = next(batches(parts["train"], 320, 1, 0))[0]
    scores = torch.zeros(1, 320, 2)
    words = int((document.paragraph >= 0).sum())
    starts, ends = ({span[side] for span in document.spans()} for side in (0, 1))
    even = np.log(words / len(starts)) + np.log(words / len(ends))
    assert float(loss_of(scores, [document])) == pytest.approx(even, rel=1e-5)
    for side, places in enumerate((starts, ends)):
        scores[0, list(places), side] = 50.0
    assert float(loss_of(scores, [document])) == pytest.approx(0.0, abs=1e-5)


def test_twins_are_one_computation_where_the_window_reaches_all(parts: dict[Part, Corpus]) -> None:
    torch.manual_seed(0)
    reader = Reader()
    features = features_of(next(batches(parts["train"], Recipe().shared.length, 2, 0)))
    with torch.no_grad():
        dense = reader(features, DENSE)
        for pattern in PATTERNS.values():
            torch.testing.assert_close(reader(features, pattern), dense, rtol=1e-4, atol=1e-4)


def test_the_window_hides_the_question_from_what_is_far(parts: dict[Part, Corpus]) -> None:
    """Three layers of a window carry a question no further than three windows and a block each."""
    torch.manual_seed(0)
    reader = Reader()
    features = features_of(next(batches(parts["train"], 2048, 1, 0)))
    other = features.clone()
    other[:, LEAD_WORDS : LEAD_WORDS + 4, :2] += 1
    reach = LEAD_WORDS + 4 + 3 * (256 + 64)
    changed = {}
    with torch.no_grad():
        for name in ("pyramid", "window", "dense"):
            gap = (reader(features, PATTERNS[name]) - reader(other, PATTERNS[name])).abs().amax((0, 2))
            changed[name] = bool((gap[reach:] > 1e-4).any())
    assert changed == {"pyramid": True, "window": False, "dense": True}


def test_training_learns_and_is_the_same_each_time(parts: dict[Part, Corpus]) -> None:
    lines: list[list[str]] = []
    ends = []
    for _ in range(2):
        torch.manual_seed(1)
        reader = Reader()
        lines.append([])
        stage = Stage(length=320, batch=8, steps=10)
        train(reader, DENSE, parts["train"], stage, rate=2e-3, seed=0, log=lines[-1].append)
        ends.append(reader.head[-1].weight.detach().clone())
    losses = [float(line.rsplit(" ", 1)[1]) for line in lines[0]]
    assert losses[-1] < losses[0] - 0.5
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-5)


RECIPE = Recipe(
    seeds=(0, 1),
    twins=("pyramid", "window"),
    shared=Stage(length=320, batch=2, steps=1),
    own=(Stage(length=512, batch=1, steps=1),),
    rates=(1e-3, 1e-4),
    tune_questions=2,
    test_questions=3,
)


def test_an_interrupted_experiment_goes_on(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "out"
    run = Experiment(recipe=RECIPE, files=[data], folder=folder, log=lambda _: None)
    summary = run.run()
    assert {len(twin["f1"]) for twin in summary["twins"].values()} == {2} and len(summary["gain"]["by_seed"]) == 2
    (folder / "window-seed1.json").unlink()
    trained: list[str] = []
    monkeypatch.setattr(experiment, "train", lambda *_, **__: trained.append("again"))
    again = Experiment(recipe=RECIPE, files=[data], folder=folder, log=lambda _: None)
    assert again.run() == summary and not trained

    other = Experiment(
        recipe=Recipe(shared=RECIPE.shared, own=RECIPE.own, rates=(1.0,)), files=[data], folder=folder, log=print
    )
    with pytest.raises(BenchmarkError, match="other settings"):
        other.run()


def test_summary_pairs_questions() -> None:
    def result(twin: str, seed: int, scores: list[float]) -> dict[str, object]:
        mean = sum(scores) / len(scores)
        common = {"right_paragraph": 0.5, "rate": 1e-3, "best_f1": 1.0}
        return {"twin": twin, "seed": seed, "f1": scores, "mean_f1": mean, **common}

    summary = summarise(
        [
            result("pyramid", 0, [0.5, 1.0]),
            result("window", 0, [0.0, 0.9]),
            result("pyramid", 1, [0.4, 0.0]),
            result("window", 1, [0.1, 0.1]),
        ]
    )
    assert summary["twins"]["pyramid"]["mean_f1"] == pytest.approx(0.475)
    assert summary["gain"]["by_seed"] == pytest.approx([0.3, 0.1])
    assert summary["gain"]["mean"] == pytest.approx(0.2)
    assert summary["gain"]["standard_error"] == pytest.approx(0.2)


def test_bad_data_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl.gz"
    with pytest.raises(BenchmarkError, match="no file of questions"):
        squad.read([path])
    with gzip.open(path, "wt") as lines:
        lines.write('{"context": "words"}\n')
    with pytest.raises(BenchmarkError, match="no file of questions"):
        squad.read([path])
    with gzip.open(path, "wt") as lines:
        lines.write(json.dumps(_record(0)) + "\n")
    with pytest.raises(BenchmarkError, match="give more data"):
        squad.read([path])


def test_both_forms_of_questions_are_read(tmp_path: Path) -> None:
    path = tmp_path / "plain.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for number in range(60):
            answers = [{"text": "word", "answer_start": 2}]
            record = {"context": f"a word {number}", "questions": [{"question": f"what {number}?", "answers": answers}]}
            lines.write(json.dumps(record) + "\n")
    assert squad.read([path])["train"].questions[0].spans == ((1, 1),)


def test_row_needs_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BENCHMARKS_SQUAD_FILES", raising=False)
    with pytest.raises(BenchmarkError, match="BENCHMARKS_SQUAD_FILES is not set"):
        ROWS["pyramid-f1"].measure(Settings(smoke=True))


@pytest.mark.rows
def test_row_runs(monkeypatch: pytest.MonkeyPatch, data: Path, tmp_path: Path) -> None:
    monkeypatch.setenv("BENCHMARKS_SQUAD_FILES", str(data))
    monkeypatch.setenv("BENCHMARKS_PYRAMID_F1_DIR", str(tmp_path / "row"))
    outcome = ROWS["pyramid-f1"].measure(Settings(smoke=True))
    assert outcome.ratio == pytest.approx(outcome.value / 0.023)
    assert set(outcome.details["twins"]) == {"pyramid", "window", "dense"}


def test_words_know_their_places() -> None:
    words = split_words("It's 24/10, NFL!")
    assert [words.text[first:past] for first, past in words.spans] == ["It", "'", "s", "24", "/", "10", ",", "NFL", "!"]
    assert words.features[:, 2].tolist() == [3, 5, 0, 1, 5, 1, 5, 4, 5]
