"""One file per family of dataset types; each registers its types with `llip.clipeval.datasets.dataset_type`."""
