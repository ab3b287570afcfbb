"""The dataset catalog: entries, opening, and `llip catalog --check`."""
