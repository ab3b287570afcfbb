"""What a run reports: log, metrics, figures, speed, profile."""
