"""One short fine-tuning in a process of its own, by dseek's trainer or by transformers', on the very same rows."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from benchmarks.peers.worker import Answer, Worker, serve
from dseek.core.config import from_mapping
from dseek.train.config import TrainConfig
from dseek.train.memory import peak_bytes, reset_peak
from dseek.train.model_source import ModelSource
from dseek.train.preparation import make_rows
from dseek.train.run import ready, train

CPU = torch.device("cpu")


class FinetuneWorker(Worker):
    """Every call is one training; ask once a process, since memory that was held stays in the books."""

    def finetune(self, engine: str, threads: int, config: dict[str, Any]) -> Answer:
        """Train.

        Args:
            engine: dseek or transformers.
            threads: of the process.
            config: dseek's configuration without `output_dir`; transformers gets the same by its own names.

        Returns:
            `losses` and `step_s` of every step, `peak_bytes`, and for dseek `predicted_bytes`.
        """
        torch.set_num_threads(threads)
        with tempfile.TemporaryDirectory() as folder:
            own = from_mapping(TrainConfig, config | {"output_dir": folder, "device": "cpu"})
            return _own(own) if engine == "dseek" else _transformers(own)


def _own(config: TrainConfig) -> Answer:
    steps: list[dict[str, Any]] = []

    def listen(what: str, figures: dict[str, Any]) -> None:
        if what == "step":
            steps.append(figures)

    with ready(config) as training:
        result = train(training, listen)
    return {
        "losses": [step["loss"] for step in steps],
        "step_s": [step["step_s"] for step in steps],
        "peak_bytes": result.peak_bytes,
        "predicted_bytes": training.choice.memory.peak_bytes,
    }


def _transformers(config: TrainConfig) -> Answer:
    """The same training by transformers' Trainer, its rows made by dseek before and learned in their order."""
    import time

    import transformers

    source = ModelSource(config)
    rows = make_rows(config, source, config.data.train, learned=True)
    stream = rows.rows(rows.start(), repeat=True)
    count = config.max_steps * config.per_device_train_batch_size
    data = [{"input_ids": row.token_ids, "labels": row.labels} for row in (next(stream) for _ in range(count))]
    source.close()
    reset_peak(CPU)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    class Clock(transformers.TrainerCallback):
        def __init__(self) -> None:
            self.begun_s, self.step_s = 0.0, []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begun_s = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.step_s.append(time.perf_counter() - self.begun_s)

    clock = Clock()
    arguments = transformers.TrainingArguments(
        output_dir=config.output_dir,
        max_steps=config.max_steps,
        per_device_train_batch_size=config.per_device_train_batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        gradient_checkpointing=config.memory.gradient_checkpointing is True,
        optim=config.optim,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    collator = transformers.default_data_collator
    trainer = InOrder(model=model, args=arguments, train_dataset=data, data_collator=collator, callbacks=[clock])
    trainer.train()
    trainer.save_model(config.output_dir)
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return {"losses": history, "step_s": clock.step_s, "peak_bytes": peak_bytes(CPU)}


if __name__ == "__main__":
    serve(FinetuneWorker())
