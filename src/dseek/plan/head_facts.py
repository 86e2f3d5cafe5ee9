"""`HeadFacts`: what was found out about a model's key-value heads, as plain data that the planner fits patterns with.

The planner opens no files: `dseek.engine.head_facts` reads these from a model's gate, or measures them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from dseek.core.attention_pattern import AttentionPattern
from dseek.core.errors import ConfigError

AUTO = "auto"
"""The window that stands for each head's own."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadFacts:
    """What is known of key-value heads, layer by layer; nothing, by default."""

    gate: bool = False
    """Whether the model has a trained gate."""
    dense_heads: tuple[tuple[int, ...], ...] = ()
    """Heads of each layer that have to see everything where the gate chooses; empty without a gate."""
    share_factors: tuple[tuple[float, ...], ...] = ()
    """Factor on each head's least share where the gate chooses; empty where there are none."""
    windows: tuple[tuple[int, ...], ...] = ()
    """Window of each head in tokens; empty where they are not known."""

    def fitted(self, pattern: AttentionPattern, num_layers: int, *, own_windows: bool) -> tuple[AttentionPattern, ...]:
        """Give every layer a pattern with what is known of its heads.

        Args:
            pattern: what all layers are to have.
            num_layers: of the model.
            own_windows: whether every head gets its own window instead of the pattern's.

        Returns:
            Layer by layer. A pattern with a least share follows the gate, if there is one.

        Raises:
            ConfigError: own windows are asked for and not known.
        """
        if own_windows and not self.windows:
            raise ConfigError(
                "a window for every head was asked for, and the heads were not measured",
                remedy="take one window for all heads (64, 128, ... 4096)",
            )
        assert not self.windows or len(self.windows) == num_layers, "windows for another number of layers"
        assert not self.gate or len(self.dense_heads) == num_layers, "dense heads for another number of layers"
        follows_gate = self.gate and pattern.min_share > 0
        return tuple(
            dataclasses.replace(
                pattern,
                window_tokens=self.windows[layer] if own_windows else pattern.window_tokens,
                gate=follows_gate,
                dense_heads=self.dense_heads[layer] if follows_gate else (),
                share_factors=self.share_factors[layer] if follows_gate and self.share_factors else (),
            )
            for layer in range(num_layers)
        )


UNKNOWN = HeadFacts()
"""Nothing is known."""
