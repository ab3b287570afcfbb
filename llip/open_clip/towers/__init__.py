"""Image towers that give K mixture tokens: OpenCLIP's class-token ViT and timm's vision transformers."""
