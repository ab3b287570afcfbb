"""The laptop size: Llip and every rung of the pooling ladder on the embedded scenes, minutes on two CPU cores.

    python -m llip.main llip_quickstart
    python -m evals.main_mc --fname config_evals/llip_quickstart.yaml
    python -m benchmarks.quickstart          # the whole ladder, over seeds

The rungs (the paper's figure 3) share encoder, data, steps and loss; only the way from K tokens to the feature differs.
"""

from llip.configs import Config


def llip_quickstart() -> Config:
    """Llip on the scenes: 8 mixture tokens, text-conditioned pooling; the top of the ladder."""
    return Config(
        train_data="scenes:${LLIP_SCENES:-data/scenes}",
        train_num_samples=12_000,
        caption_keys="json.captions",
        model="ViT-Ti-8-scenes",
        mixture_tokens=8,
        pooling="text",
        pool_heads=4,
        softmax_temperature=5.0,
        batch_size=32,
        epochs=2,
        lr=5e-4,
        beta2=0.98,
        wd=0.1,
        warmup=50,
        precision="fp32",
        workers=1,
        eval_steps=375,
        evals=("config_evals/scenes_online.yaml",),
    )


def quickstart_flair() -> Config:
    """Ladder: FLAIR, whose captions attend to patches; half of the loss is that of its class token."""
    return llip_quickstart().replace(pooling="flair", mixture_tokens=1, pair_tokens="patches", global_loss_weight=0.5)


def quickstart_learned() -> Config:
    """Ladder: 8 mixture tokens, one learned weighting of them for all captions."""
    return llip_quickstart().replace(pooling="learned")


def quickstart_mean() -> Config:
    """Ladder: 8 mixture tokens, averaged."""
    return llip_quickstart().replace(pooling="mean")


def quickstart_registers() -> Config:
    """Ladder: 8 tokens of which the first is the feature and the others serve as registers."""
    return llip_quickstart().replace(pooling="first")


def quickstart_siglip() -> Config:
    """Ladder: SigLIP, one class token; the bottom of the ladder."""
    return llip_quickstart().replace(pooling="first", mixture_tokens=1)
