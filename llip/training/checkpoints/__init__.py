"""What a run keeps: checkpoints, train state, run folder, provenance."""
