"""FLAIR as published (Xiao et al., CVPR 2025): texts attend to patches, eight captions per image, two sigmoid losses.

    python -m llip.main flair_b16_cc3m train_data='/data/cc3m-recap/{0000..0575}.tar' --print

Captions are DreamLIP's recaptions, one to three sentences merged. Losses are exact over all captions of the global
batch. Published R@1, text to image / image to text:

              COCO         Flickr30k
    CC3M      37.7 / 51.6  65.7 / 78.7
    CC12M     47.8 / 64.1  75.4 / 90.8
    YFCC15M   51.2 / 67.3  79.2 / 93.3
    all       53.3 / 68.0  81.1 / 94.7
"""

from llip.configs import Config

_CAPTIONS = ("raw", "shortIB", "longIB", "shortSV", "longSV", "shortLLA", "longLLA")
"""DreamLIP's captions of an image: the web's, then a short and a long one by each of three captioners."""


def flair_b16_cc3m() -> Config:
    """FLAIR ViT-B/16 on CC3M-recap (2.8M images); 1 node x 8 GPUs."""
    return Config(
        model="ViT-B-16",
        mixture_tokens=1,
        pooling="flair",
        pair_tokens="patches",
        pool_heads=8,
        loss="sigmoid",
        global_loss_weight=0.5,
        caption_keys=",".join(["json.raw_caption", *(f"json.{name}_captions" for name in _CAPTIONS[1:])]),
        captions_per_image=8,
        caption_sentences=3,
        image_size=224,
        context_length=77,
        train_num_samples=2_823_019,
        epochs=32,
        batch_size=128,
        lr=5e-4,
        beta1=0.9,
        beta2=0.98,
        eps=1e-8,
        wd=0.5,
        warmup=2000,
        precision="amp_bf16",
        workers=8,
        seed=0,
        ngpus=8,
        torchcompile=True,
    )


def flair_b16_cc12m() -> Config:
    """FLAIR ViT-B/16 on CC12M-recap (10M images); 4 nodes x 8 GPUs."""
    return flair_b16_cc3m().replace(train_num_samples=10_010_225, nodes=4)


def flair_b16_yfcc15m() -> Config:
    """FLAIR ViT-B/16 on YFCC15M-recap (set train_num_samples to the images you have); 4 nodes x 8 GPUs."""
    return flair_b16_cc12m().replace(train_num_samples=15_000_000)


def flair_b16_merged30m() -> Config:
    """FLAIR ViT-B/16 on all three sets, joined by `::` (set train_num_samples to your images); 4 nodes x 8 GPUs."""
    return flair_b16_cc12m().replace(train_num_samples=30_000_000)
