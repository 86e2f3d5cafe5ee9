"""From an opened model and a plan to the runner that the plan asks for."""

from __future__ import annotations

from dseek.engine.runner import Runner
from dseek.models.files import ModelFiles
from dseek.plan.plan import Plan


def build_runner(files: ModelFiles, plan: Plan) -> Runner:
    """Load a model's weights as a plan says.

    Args:
        files: the opened model.
        plan: made for this model.

    Returns:
        The native runner, or the PyTorch one where the plan's kernels are torch.

    Raises:
        ConfigError: the plan is for another model, or needs kernels that are not there.
    """
    plan.check_model(files.shape)
    if plan.kernels == "native":
        from dseek.engine.native_runner import NativeRunner

        return NativeRunner(files, plan)
    from dseek.engine.torch_runner import TorchRunner

    return TorchRunner.from_files(files, plan)
