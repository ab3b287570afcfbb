"""Programs over `llip.clipeval`: `python -m evals.main_mc --fname config_evals/X.yaml`."""
