"""`dseek` with a model made of arithmetic: the real command line in a real process, ready in a fraction of a second.

Run as `python -m tests.cli.fake_dseek VERB ...`. The model answers any prompt with what FAKE_SCRIPT holds (after the
number of prompt tokens that the template or tokenizer makes), one token in FAKE_STEP_S seconds.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

import numpy as np

from dseek.cli import chat, generate, main
from dseek.cli import eval as eval_verb
from dseek.engine.batch import Batch
from dseek.engine.llm import LLM
from dseek.models import files as files_module
from tests.engine.fakes import FakeRunner, make_files, make_plan


class ScriptedRunner(FakeRunner):
    """Starts its script anew whenever a prompt begins."""

    def forward(self, batch: Batch) -> np.ndarray:
        time.sleep(float(os.environ.get("FAKE_STEP_S", "0")))
        if batch.positions[0] == 0 or batch.num_rows > 1:
            self.prompt_tokens = int(batch.positions[-1]) + 1
        return super().forward(batch)


def load(args: Any, files: Any = None, **overrides: Any) -> LLM:
    """Stand in for `dseek.cli.options.load_from`."""
    runner = ScriptedRunner(num_pages=int(os.environ.get("FAKE_PAGES", "64")))
    script = os.environ.get("FAKE_SCRIPT")
    runner.script = None if script is None else script.encode()
    return LLM(files or make_files(), make_plan(runner), runner)


if __name__ == "__main__":
    for verb in (chat, generate, eval_verb):
        verb.load_from = load
    files_module.open_model = lambda name: make_files(name=name)
    sys.exit(main.main())
