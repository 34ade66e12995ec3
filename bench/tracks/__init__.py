"""The released tracks, one frozen TOML each, and the standard protocol that completes them."""
