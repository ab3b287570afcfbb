"""State of a run on disk: checkpoints, train state, run folder, records, provenance."""
