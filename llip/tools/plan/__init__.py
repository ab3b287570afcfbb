"""What a run will take, before it is started: parameters, FLOPs, memory, traffic, storage, hours. No GPU is needed.

    llip plan llip_b16_k32 [field=value ...] [--gpu h100-80g] [--nodes N]

`llip.open_clip.costs.flops.flops_per_image` and `llip.system.gpus.peak_flops` serve the trainer's log as well.
"""
