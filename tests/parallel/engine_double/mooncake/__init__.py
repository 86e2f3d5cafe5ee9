"""Stands where Mooncake's package would."""
