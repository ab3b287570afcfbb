"""One optimizer step: task, accumulation, engines (DDP, FSDP), optimizer."""
