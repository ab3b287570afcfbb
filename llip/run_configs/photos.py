"""Photographs with pretrained towers: on a laptop, on one GPU, and by fine-tuning.

    python -m benchmarks.photos --train-data 'DATA/train-*.tar' --dev-data 'DATA/dev-*.tar'

The photos_* rungs train a small mixture head over frozen EfficientNet-lite0 features and a projection of frozen MiniLM
features, minutes on one CPU core. The benchmark writes their model and caches their features; docs/when-it-helps.md has
what it measured. The other two configs want weights and data of yours: docs/weights.md.
"""

from llip.configs import Config


def photos_llip() -> Config:
    """Llip on photographs: 8 mixture tokens over frozen features, text-conditioned pooling."""
    return Config(
        train_data="${LLIP_PHOTOS:-data/photos}/train-*.tar",
        train_num_samples=6_000,
        caption_keys="json.captions",
        image_crop="center",
        model="${LLIP_PHOTOS_MODEL:-logs/photos/model}/photos.json",
        mixture_tokens=8,
        pooling="text",
        pool_heads=8,
        softmax_temperature=5.0,
        lock_image="backbone",
        lock_text="encoder",
        batch_size=250,
        epochs=12,
        lr=1e-3,
        wd=0.2,
        warmup=50,
        precision="fp32",
        workers=1,
    )


def photos_mean() -> Config:
    """Photographs: 8 mixture tokens, averaged."""
    return photos_llip().replace(pooling="mean")


def photos_siglip() -> Config:
    """Photographs: SigLIP, one token; the bottom of the ladder."""
    return photos_llip().replace(pooling="first", mixture_tokens=1)


def finetune_siglip_coco() -> Config:
    """Fine-tune SigLIP 2 B/16 on COCO-like shards with five captions an image: 16 mixture tokens, one GPU."""
    return Config(
        train_data="${COCO:-data/coco}/train-*.tar",
        train_num_samples=113_287,
        caption_keys="json.captions",
        captions_per_image=5,
        model="ViT-B-16-SigLIP2",
        pretrained="${SIGLIP2:-weights/siglip2}",
        tokenizer="${SIGLIP2:-weights/siglip2}",
        mixture_tokens=16,
        pooling="text",
        batch_size=128,
        accum_freq=4,
        epochs=5,
        lr=1e-5,
        layer_decay=0.8,
        wd=0.01,
        warmup=100,
        grad_checkpointing=True,
    )


def dinov2_cc3m() -> Config:
    """Frozen DINOv2 and a frozen text encoder on CC3M-like shards: a mixture head of 32 tokens, one GPU."""
    return Config(
        train_data="${CC3M:-data/cc3m}/train-*.tar",
        train_num_samples=2_800_000,
        image_crop="center",
        model="${DINOV2:-weights/dinov2}/model.json",
        mixture_tokens=32,
        pooling="text",
        lock_image="backbone",
        lock_text="encoder",
        batch_size=4096,
        epochs=10,
        lr=1e-3,
        wd=0.1,
        warmup=500,
    )
