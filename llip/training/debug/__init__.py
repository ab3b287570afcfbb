"""Non-finite steps, replay, rehearsal of an interruption."""
