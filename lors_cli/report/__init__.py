"""The reports of runs and sweeps, from what the stages left on disk; a run is a sweep of one cell."""
