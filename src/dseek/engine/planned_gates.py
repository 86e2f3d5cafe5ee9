"""The gates that a plan's patterns follow: found beside the model or with the package, or missed with an error."""

from __future__ import annotations

from collections.abc import Sequence

from dseek.core.attention_pattern import AttentionPattern
from dseek.core.errors import ConfigError
from dseek.models.files import ModelFiles
from dseek.models.gate_file import FILE_NAME, Gates, find_gates


def planned_gates(files: ModelFiles, patterns: Sequence[AttentionPattern]) -> Gates | None:
    """Find the gates that patterns follow, or whose biases their far cells take.

    Args:
        files: the opened model.
        patterns: of the layers that are to run.

    Returns:
        The gates, or None where no pattern needs any, or where far cells alone do and the model has none.

    Raises:
        ConfigError: a pattern follows a gate and the model has none.
        FileFormatError: the file beside the model is damaged or for another model.
    """
    followed = any(pattern.gate for pattern in patterns)
    if not followed and not any(pattern.far for pattern in patterns):
        return None
    gates = find_gates(files)
    if gates is None and followed:
        raise ConfigError(
            f"the plan follows a trained gate, and {files.name} has none",
            needed=f"{FILE_NAME} beside the model",
            remedy="put it back, train one with `dseek train-gate`, or make the plan again",
        )
    return gates
