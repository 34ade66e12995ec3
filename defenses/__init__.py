"""How each method trains a classifier: the adapter contract, the methods, and the check that third parties can run.

The methods are one a module and are found by name (`robustboard.defenses.registry`); `robustboard.defenses.conformance`
checks an adapter.
"""

from robustboard.defenses.adapter import (
    CheckpointStore,
    Claim,
    Defense,
    DefenseCard,
    NoProgress,
    Progress,
    Split,
    TrainingData,
)

__all__ = [
    "CheckpointStore",
    "Claim",
    "Defense",
    "DefenseCard",
    "NoProgress",
    "Progress",
    "Split",
    "TrainingData",
]
