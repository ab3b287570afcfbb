"""What Llip adds to OpenCLIP: mixture tokens, text-conditioned pooling, exact pairwise scores, objectives."""
