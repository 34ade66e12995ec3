"""RobustBoard."""
