"""What a run minimises: which texts are whose, the losses, and how configs name them."""
