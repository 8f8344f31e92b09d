"""Checkpoints to parameters and back: one table a checkpoint family, a streaming reader, an exporter.

Knows configs and parameter names, never forward code.
"""

from weights_conversion.checkpoint import Checkpoint, CheckpointError, one_dtype, open_checkpoint
from weights_conversion.counterparts import Counterpart, Counterparts
from weights_conversion.families import counterparts_of_config, family_of_config, family_of_state
from weights_conversion.family import Family
from weights_conversion.rules import Rules

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Counterpart",
    "Counterparts",
    "Family",
    "Rules",
    "counterparts_of_config",
    "family_of_config",
    "family_of_state",
    "one_dtype",
    "open_checkpoint",
]
