"""What `llip.export` writes: the folder, its card, the checkpoint for plain OpenCLIP, and exported programs."""
