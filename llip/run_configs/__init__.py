"""Every experiment of the project: one function per run. `python -m llip.main --list` shows them."""
