"""Shards to batches: sources, index, tar reader, order, position, stream, images, captions, loader."""
