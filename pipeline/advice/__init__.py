"""What a person asks about a selection: what to expect of it (`forecast`), what is in it (`gallery`). No stage depends on it."""
