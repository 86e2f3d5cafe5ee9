"""Peers that several rows share, each in every way of running that may be its best."""

from __future__ import annotations

from benchmarks.contest import Entrant
from benchmarks.models import BenchModel, openvino_folder


def openvino_entrants(model: BenchModel) -> list[Entrant]:
    """OpenVINO GenAI with its paged attention (what it takes by itself) and with its plain attention operator.

    Args:
        model: the model, exported if need be.

    Returns:
        Two entrants; which is faster depends on the length, and the faster one counts.
    """
    path = str(openvino_folder(model))
    return [
        Entrant("OpenVINO GenAI int8, bf16", "openvino", path, {"attention_backend": "PA"}),
        Entrant("OpenVINO GenAI int8, bf16, SDPA", "openvino", path, {"attention_backend": "SDPA"}),
    ]
