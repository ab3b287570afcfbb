"""`llip pack`: images and captions into webdataset shards."""
