"""The board's own attacks: those of AutoAttack's standard version as they are described, keyed and compacted."""
