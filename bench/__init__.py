"""The judge: the fixed protocol and everything that runs it."""
