"""Quantisation-aware training of modules made of linear and convolution layers: prepare, train, convert.

    prepared = qat.prepare(module, qat.QatConfig(estimator="lsq", activations="static"))
    qat.calibrate(prepared, batches)
    ...your loop, with an optimiser over qat.parameter_groups(prepared, learning_rate=1e-4)...
    converted = qat.convert(prepared)

Rounding while training is the rounding of the kernels, so that what converts computes what was trained. The parts:
`qat_config` says what can be chosen, `qat_rounding` has the gradients with their sources, `qat_prepare` the layers that
can round and those that stay wide, `qat_training` what a loop needs, `convert` the integer modules and their files.
"""

from __future__ import annotations

from dseek.compress.convert import convert, load, save
from dseek.compress.qat_config import QatConfig
from dseek.compress.qat_curvature import update_deltas
from dseek.compress.qat_layers import FoldedBatchNorm, QatConv1d, QatConv2d, QatLayer, QatLinear
from dseek.compress.qat_prepare import LayerChoice, inspect, prepare, restore
from dseek.compress.qat_torchao import from_torchao
from dseek.compress.qat_training import (
    calibrate,
    distillation_loss,
    freeze_batch_norm,
    freeze_ranges,
    parameter_groups,
    plain_state_dict,
    rounding,
)

__all__ = [
    "FoldedBatchNorm",
    "LayerChoice",
    "QatConfig",
    "QatConv1d",
    "QatConv2d",
    "QatLayer",
    "QatLinear",
    "calibrate",
    "convert",
    "distillation_loss",
    "freeze_batch_norm",
    "freeze_ranges",
    "from_torchao",
    "inspect",
    "load",
    "parameter_groups",
    "plain_state_dict",
    "prepare",
    "restore",
    "rounding",
    "save",
    "update_deltas",
]
