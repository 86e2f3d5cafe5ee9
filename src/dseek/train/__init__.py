"""Training: for now the gate of dynamic attention, on a frozen model."""
