"""`llip doctor`: validate shards before training."""
