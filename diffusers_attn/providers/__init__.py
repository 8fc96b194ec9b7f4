"""One attention call on one device: every kernel by name."""
