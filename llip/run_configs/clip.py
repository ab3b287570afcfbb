"""Baselines with one class token: CLIP (softmax loss, as published beside Llip) and SigLIP (sigmoid loss).

    python -m llip.main b16_fullcc --print
    python -m llip.main siglip_b16 --print

Each has the encoder, the data and the schedule of the Llip config of its size.
"""

from llip.configs import Config
from llip.run_configs import llip


def _siglip(config: Config) -> Config:
    return config.replace(mixture_tokens=1, pooling="first")


def _clip(config: Config) -> Config:
    return _siglip(config).replace(loss="softmax", beta2=0.98)


def b32_fullcc() -> Config:
    """CLIP ViT-B/32: one class token, softmax loss."""
    return _clip(llip.llip_b32())


def b16_fullcc() -> Config:
    """CLIP ViT-B/16: one class token, softmax loss."""
    return _clip(llip.llip_b16_k32())


def l14_fullcc() -> Config:
    """CLIP ViT-L/14: one class token, softmax loss."""
    return _clip(llip.llip_l14_k32())


def h14_fullcc() -> Config:
    """CLIP ViT-H/14: one class token, softmax loss."""
    return _clip(llip.llip_h14_k64())


def G14_fullcc() -> Config:
    """CLIP ViT-G/14 (OpenCLIP's bigG): one class token, softmax loss."""
    return _clip(llip.llip_G14_k64())


def siglip_b32() -> Config:
    """SigLIP ViT-B/32: one class token, sigmoid loss."""
    return _siglip(llip.llip_b32())


def siglip_b16() -> Config:
    """SigLIP ViT-B/16: one class token, sigmoid loss."""
    return _siglip(llip.llip_b16_k32())


def siglip_l14() -> Config:
    """SigLIP ViT-L/14: one class token, sigmoid loss."""
    return _siglip(llip.llip_l14_k32())


def siglip_h14() -> Config:
    """SigLIP ViT-H/14: one class token, sigmoid loss."""
    return _siglip(llip.llip_h14_k64())


def siglip_G14() -> Config:
    """SigLIP ViT-G/14 (OpenCLIP's bigG): one class token, sigmoid loss."""
    return _siglip(llip.llip_G14_k64())
