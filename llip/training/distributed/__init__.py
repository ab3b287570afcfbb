"""The processes of a run: launch, environment, watchdog, signals."""
