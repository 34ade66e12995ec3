"""What the papers claim, measured: one file a method, each claim with its rule; results are committed beside them."""
