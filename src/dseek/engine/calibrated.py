"""What a model's calibration file tells the planner: measured losses, and how large inputs of projections were."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dseek.models.calibration_file import find_calibration

if TYPE_CHECKING:
    from dseek.models.files import ModelFiles


def calibrated(files: ModelFiles, path: str | Path | None) -> dict[str, Any]:
    """Find what a plan of a model can be made from beside its shape.

    Args:
        files: the opened model.
        path: a calibration file; None takes the one beside the model, if there is one.

    Returns:
        Keyword arguments of `dseek.plan.make`; none where there is no calibration.

    Raises:
        ConfigError: the file that is named cannot be read.
        FileFormatError: it is damaged, or of another model.
    """
    calibration = find_calibration(files, path)
    if calibration is None:
        return {}
    from dseek.plan.activation_limits import CalibratedInputs
    from dseek.plan.quality import MeasuredLosses

    losses = MeasuredLosses(
        projections=calibration.loss_table(), caches=calibration.losses.caches, tables=calibration.losses.tables
    )
    inputs = CalibratedInputs(plain=calibration.limits.plain, rotated=calibration.limits.rotated)
    return {"losses": losses, "calibrated_inputs": inputs}
