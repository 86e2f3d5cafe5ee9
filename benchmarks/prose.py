"""Long prose of the user's own: the contexts of an article joined, from a file of question-answering data.

Nothing of it belongs to the project. `BENCHMARKS_PROSE` names the file: one JSON object a line with the text in
`context` and, where there are several articles, its name in `title`; packed with gzip where the name ends in `.gz`.
"""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path

from benchmarks.errors import BenchmarkError

PROSE_VARIABLE = "BENCHMARKS_PROSE"
"""Environment variable that names the file."""


def prose_path() -> Path:
    """The file that the user chose.

    Raises:
        BenchmarkError: none was chosen.
    """
    chosen = os.environ.get(PROSE_VARIABLE)
    if not chosen:
        raise BenchmarkError(
            f"this row needs long prose: set {PROSE_VARIABLE} to a file of JSON lines (.jsonl or .jsonl.gz) with the "
            "text in `context` and the article in `title`, as SQuAD-like data has them"
        )
    return Path(chosen).expanduser()


def articles(path: Path) -> dict[str, str]:
    """Read a file and join the contexts of each article.

    Args:
        path: the file.

    Returns:
        Title to text, the longest first; contexts are in the order of the file, a repeated one counts once.

    Raises:
        BenchmarkError: the file cannot be read, or a line is not what it should be.
    """
    contexts: dict[str, dict[str, None]] = {}
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                record = json.loads(line)
                if not isinstance(record, dict) or not isinstance(record.get("context"), str):
                    raise BenchmarkError(f"{path}, line {number}, has no text in `context`")
                contexts.setdefault(str(record.get("title", "")), {})[record["context"]] = None
    except (OSError, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BenchmarkError(f"{path} cannot be read as JSON lines: {error}") from None
    texts = {title: "\n".join(pieces) for title, pieces in contexts.items()}
    return dict(sorted(texts.items(), key=lambda entry: -len(entry[1])))
