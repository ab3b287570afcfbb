"""Llip as published (Lavoie et al., ICML 2024): text-conditioned pooling over K mixture tokens, sigmoid loss.

    python -m llip.main llip_b16_k32 --print
    python submitit_openclip.py llip_b16_k32 train_data='/data/{00000..40000}.tar' --partition gpu

Every config is 32 epochs of 400M pairs (12.8B pairs seen) at global batch 32,768. Published averages over 22 zero-shot
tasks: 69.6 (B/16, K 32) and 79.3 (G/14, K 64).
"""

from llip.configs import Config


def llip_b16_k32() -> Config:
    """Llip ViT-B/16, 32 mixture tokens; 16 nodes x 8 GPUs. Published zero-shot average: 69.6."""
    return Config(
        model="ViT-B-16-quickgelu",
        mixture_tokens=32,
        pooling="text",
        pool_heads=8,
        softmax_temperature=5.0,
        loss="sigmoid",
        image_size=224,
        context_length=77,
        train_num_samples=400_000_000,
        epochs=32,
        batch_size=256,
        lr=5e-4,
        beta1=0.9,
        beta2=0.95,
        eps=1e-6,
        wd=0.2,
        warmup=2000,
        precision="amp_bf16",
        workers=8,
        seed=0,
        nodes=16,
        ngpus=8,
        torchcompile=True,
        eval_steps=5000,
        evals=("config_evals/llip_online.yaml",),
    )


def llip_b16() -> Config:
    """Llip ViT-B/16 at the paper's main setting (the same as llip_b16_k32)."""
    return llip_b16_k32()


def llip_b16_k32_12_node() -> Config:
    """llip_b16_k32 on 12 nodes: batch 342 per GPU gives a global batch of 32,832."""
    return llip_b16_k32().replace(nodes=12, batch_size=342, workers=6)


def llip_b16_k32_2_node_debug() -> Config:
    """llip_b16_k32 on 2 nodes over 200k pairs, evaluated every 100 steps: a rehearsal of the cluster."""
    return llip_b16_k32().replace(nodes=2, batch_size=342, train_num_samples=200_000, eval_steps=100)


def llip_b32() -> Config:
    """Llip ViT-B/32, 64 mixture tokens; 16 nodes x 8 GPUs."""
    return llip_b16_k32().replace(model="ViT-B-32-quickgelu", mixture_tokens=64)


def llip_b32_k32() -> Config:
    """Llip ViT-B/32, 32 mixture tokens."""
    return llip_b32().replace(mixture_tokens=32)


def llip_b32_k64() -> Config:
    """Llip ViT-B/32, 64 mixture tokens (the same as llip_b32)."""
    return llip_b32()


def llip_b32_k128() -> Config:
    """Llip ViT-B/32, 128 mixture tokens."""
    return llip_b32().replace(mixture_tokens=128)


def llip_l14_k32() -> Config:
    """Llip ViT-L/14, 32 mixture tokens; 16 nodes x 8 GPUs."""
    return llip_b16_k32().replace(model="ViT-L-14-quickgelu", lr=4e-4, softmax_temperature=1.0)


def llip_l14_k64() -> Config:
    """Llip ViT-L/14, 64 mixture tokens; 16 nodes x 8 GPUs."""
    return llip_l14_k32().replace(mixture_tokens=64)


def llip_h14_k64() -> Config:
    """Llip ViT-H/14, 64 mixture tokens; 32 nodes x 8 GPUs with gradient checkpointing."""
    return llip_b16_k32().replace(
        model="ViT-H-14-quickgelu",
        mixture_tokens=64,
        lr=4e-4,
        batch_size=128,
        nodes=32,
        grad_checkpointing=True,
        torchcompile=False,
    )


def llip_G14_k64() -> Config:
    """Llip ViT-G/14 (OpenCLIP's bigG), 64 mixture tokens; 32 nodes x 8 GPUs. Published zero-shot average: 79.3."""
    return llip_h14_k64().replace(model="ViT-bigG-14-quickgelu")
