"""What Llip adds to the OpenCLIP library: mixture tokens, text-conditioned pooling, exact pairwise scores, objectives."""
