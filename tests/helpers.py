"""What several test files need: tiny models, shards made on the spot, and a pool of processes that import once."""

import io
import json
import pickle
import queue
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from llip.configs import Config
from tests.forked import FORKSERVER, start_server

TINY_MODEL = {
    "embed_dim": 16,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}
"""An OpenCLIP architecture that runs in milliseconds."""

BACKBONE_MODEL = {
    **TINY_MODEL,
    "vision_cfg": {"timm_model_name": "resnet10t", "image_size": 64},
    "mixture_head": {"blocks": 1, "width": 16, "heads": 2},
}
"""A mixture head on the smallest backbone of timm; its map is 2 x 2 x 512."""

_DEADLINE = 120  # seconds for one case


def tiny_model_file(folder: Path) -> str:
    """Write TINY_MODEL as a json and return its path."""
    path = folder / "tiny.json"
    path.write_text(json.dumps(TINY_MODEL))
    return str(path)


def write_plain_model(folder: Path, mean: float = 0.5, std: float = 0.5) -> Path:
    """Write a plain OpenCLIP model of random weights as a local folder, with its normalisation constants."""
    import open_clip
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    config = {"model_cfg": TINY_MODEL, "preprocess_cfg": {"mean": [mean] * 3, "std": [std] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(open_clip.CLIP(**TINY_MODEL).state_dict(), folder / "open_clip_model.safetensors")
    return folder


_WORDS = ["picture", "number", "of", "all", "one", "two", "them", *map(str, range(64)), "▁ein", "▁Bild", "▁zwei", "▁"]


def write_hf_encoder(folder: Path, kind: str) -> Path:
    """Write a Hugging Face text encoder of random weights with its tokenizer, as `save_pretrained` does.

    Args:
        folder: new.
        kind: bert (WordPiece), xlm-roberta or mt5 (both unigram; mt5 with its decoder).
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    special = {
        "bert": ["[PAD]", "[UNK]", "[CLS]", "[SEP]"],
        "xlm-roberta": ["<s>", "<pad>", "</s>", "<unk>"],
        "mt5": ["<pad>", "</s>", "<unk>"],
    }[kind]
    words = [*special, *_WORDS]
    pad, unknown = next(x for x in special if "pad" in x.lower()), next(x for x in special if "unk" in x.lower())
    first, last = {"bert": ("[CLS]", "[SEP]"), "xlm-roberta": ("<s>", "</s>"), "mt5": ("", "</s>")}[kind]
    if kind == "bert":
        tokenizer = Tokenizer(models.WordPiece({word: place for place, word in enumerate(words)}, unk_token=unknown))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    else:
        tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=words.index(unknown)))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    ends = [(word, words.index(word)) for word in (first, last) if word]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{first} $A {last}".strip(), special_tokens=ends)
    wrapped = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, unk_token=unknown)
    sizes = {"vocab_size": len(words), "pad_token_id": words.index(pad)}
    if kind == "mt5":
        config = transformers.MT5Config(
            **sizes, d_model=24, d_ff=48, d_kv=12, num_layers=2, num_heads=2, decoder_start_token_id=0
        )
    else:
        of_kind = transformers.BertConfig if kind == "bert" else transformers.XLMRobertaConfig
        config = of_kind(
            **sizes, hidden_size=24, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=20, type_vocab_size=2,
        )  # fmt: skip
    torch.manual_seed(0)
    transformers.AutoModel.from_config(config).save_pretrained(folder)
    wrapped.save_pretrained(folder)
    return folder


def image_bytes(seed: int, size: int = 40, suffix: str = "png") -> bytes:
    """Return an encoded picture: one colour and a differently coloured corner, both by the seed."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((size, size, 3), np.uint8)
    pixels[:] = rng.integers(0, 256, 3)
    pixels[: size // 2, : size // 2] = rng.integers(0, 256, 3)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[suffix])
    return buffer.getvalue()


def write_tar(path: Path, samples: list[dict[str, bytes]], keys: list[str] | None = None) -> Path:
    """Write one webdataset shard; each sample maps suffixes to bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for index, sample in enumerate(samples):
            key = keys[index] if keys else f"{path.stem}_{index:05d}"
            for suffix, data in sample.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def write_pairs(folder: Path, samples: int, per_shard: int = 16) -> str:
    """Write shards of distinct pictures with captions `word<i>` and return the brace pattern."""
    shards = -(-samples // per_shard)
    for shard in range(shards):
        indices = range(shard * per_shard, min(samples, (shard + 1) * per_shard))
        write_tar(
            folder / f"{shard:05d}.tar",
            [{"png": image_bytes(i), "txt": f"picture number {i} of all".encode()} for i in indices],
        )
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def write_captioned(folder: Path, samples: int, per_shard: int = 16) -> str:
    """Write shards whose sample i has 1 + i % 4 captions `picture number <i><j> of all`; return the brace pattern."""
    shards = -(-samples // per_shard)
    for shard in range(shards):
        indices = range(shard * per_shard, min(samples, (shard + 1) * per_shard))
        captions = {i: [f"picture number {i}{j} of all" for j in range(1 + i % 4)] for i in indices}
        write_tar(
            folder / f"{shard:05d}.tar",
            [{"png": image_bytes(i), "json": json.dumps({"captions": captions[i]}).encode()} for i in indices],
        )
    return str(folder / f"{{00000..{shards - 1:05d}}}.tar")


def tiny_run(folder: Path, **changes: Any) -> Config:
    """Return a run of 6 steps over 32 pairs that takes a second on a CPU.

    Args:
        folder: where its shards, its model and its run folder are written.
        changes: other values of fields; the defaults are written only if they are used.
    """
    fields = {
        "name": "run", "logs": str(folder), "train_num_samples": 32, "mixture_tokens": 4, "pool_heads": 4,
        "batch_size": 16, "epochs": 3, "lr": 1e-3, "warmup": 2, "precision": "fp32", "workers": 0, "log_steps": 1,
        "save_frequency": 0, "seed": 3, "report_to": (), "device": "cpu",
    } | changes  # fmt: skip
    if "train_data" not in fields:
        fields["train_data"] = write_pairs(folder / "pairs", 32, 16)
    if "model" not in fields:
        fields["model"] = tiny_model_file(folder)
    return Config(**fields)


def config_file(path: Path, config: Config, before: str = "") -> str:
    """Write a Python file with a function `run` that returns `config`; return what the command line calls it.

    Args:
        path: of the file.
        config: that the function returns.
        before: source that the file runs when it is imported.
    """
    values = ", ".join(f"{name}={value!r}" for name, value in vars(config).items())
    path.write_text(f"from llip.configs import Config\n{before}\n\ndef run():\n    return Config({values})\n")
    return f"{path}:run"


def _child(function: Callable, rank: int, count: int, store: str, results: Any, arguments: tuple) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    try:
        if count > 1:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
        value = pickle.dumps(function(rank, count, *arguments))  # shared tensors would need this process to stay
        results.put((rank, value, None))
    except BaseException as error:  # the parent reports whatever it was
        import traceback

        results.put((rank, None, f"{error!r}\n{traceback.format_exc()}"))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


class ProcessPool:
    """Starts groups of gloo processes from one server process that has imported torch and open_clip once."""

    def __init__(self) -> None:
        start_server()
        self.context = FORKSERVER

    def run(self, function: Callable, count: int, *arguments: Any) -> list[Any]:
        """Return `[function(rank, count, *arguments) for each rank]`, run as a gloo group of `count` processes."""
        with tempfile.TemporaryDirectory() as folder:
            results = self.context.Queue()
            children = [
                self.context.Process(
                    target=_child, args=(function, rank, count, f"{folder}/store", results, arguments), daemon=True
                )
                for rank in range(count)
            ]
            for child in children:
                child.start()
            try:
                answers = sorted((results.get(timeout=_DEADLINE) for _ in children), key=lambda answer: answer[0])
            except queue.Empty:
                raise AssertionError(f"{count} processes did not answer within {_DEADLINE} s") from None
            finally:
                for child in children:
                    child.join(timeout=10)
                    child.kill()
        failures = [f"rank {rank}: {failure}" for rank, _, failure in answers if failure]
        assert not failures, "\n".join(failures)
        return [pickle.loads(value) for _, value, _ in answers]
