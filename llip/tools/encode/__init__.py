"""`llip encode`: what the frozen parts of a model give for every image and caption, computed once."""
