"""Make an index, or update one.

Shapes: B images of a batch, K mixture tokens, D embedding width.
"""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image
from tqdm import tqdm

from llip.clipeval.datasets import ImageSource
from llip.clipeval.loading import image_batches
from llip.clipeval.scorer import Scorer
from llip.data.images import decode_image
from llip.errors import UserError
from llip.open_clip.model import Llip
from llip.tools.search.files import FileState, find_images
from llip.tools.search.store import INDEX, Index, ModelSource, Place, check_model, hash_model, lock, open_index

BATCH = 64
SEGMENT = 2048
"""Images of one segment: at most so many are encoded again after an interruption."""


class FolderImages(ImageSource):
    """Images of a folder by relative path, decoded as in training."""

    def __init__(self, folder: Path, paths: list[str]) -> None:
        self.folder, self.paths = folder, paths

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        return self.paths[index]

    def load(self, index: int) -> tuple[Image.Image, None]:
        return to_pil_image(decode_image((self.folder / self.paths[index]).read_bytes())), None


@dataclasses.dataclass(frozen=True)
class BuildReport:
    """Counts of one run of the indexer. `damaged`: path -> reason, of all damaged images in the folder."""

    new: int
    changed: int
    deleted: int
    indexed: int  # images in the index now
    damaged: dict[str, str]


def _open_or_start(path: Path, folder: Path, source: ModelSource, model: str) -> Index:
    if not (path / INDEX).exists():
        return Index(path, folder, source, model)
    index = open_index(path)
    check_model(index, model, source)
    if index.folder != folder and index.folder.is_dir():
        raise UserError(
            f"index {str(path)!r} is of the folder {str(index.folder)!r}, not of {str(folder)!r}; give another --out"
        )
    index.folder, index.source = folder, source
    return index


@torch.no_grad()
def build_index(
    folder: Path, source: ModelSource, out: Path, scorer: Scorer, workers: int = 0, half: bool = False
) -> BuildReport:
    """Index the images below `folder`; update an index of it.

    Args:
        folder: of images.
        source: of the model, for the queries.
        out: folder of the index.
        scorer: of that model.
        workers: decoding processes; 0: this one.
        half: store mixture tokens in half precision: half the disk, scores within about 1e-3.

    Raises:
        UserError: no such folder, an index of another model or folder, or one that another process is writing.
    """
    folder = folder.resolve()
    states = find_images(folder)
    assert isinstance(scorer.model, Llip), "an index is of one model's weights"
    try:
        with lock(out):
            index = _open_or_start(out, folder, source, hash_model(scorer.model))
            known = index.known
            new, deleted = states.keys() - known.keys(), known.keys() - states.keys()
            changed = {path for path in states.keys() & known.keys() if states[path] != known[path]}
            for path in changed | deleted:
                index.forget(path)
            _encode(index, states, sorted(new | changed), scorer, workers, np.float16 if half else np.float32)
            index.save()
    except OSError as error:
        raise UserError(f"the index {str(out)!r} cannot be written: {error}") from error
    return BuildReport(
        new=len(new),
        changed=len(changed),
        deleted=len(deleted),
        indexed=len(index.images),
        damaged={path: reason for path, (_, reason) in sorted(index.damaged.items())},
    )


def _encode(
    index: Index, states: dict[str, FileState], paths: list[str], scorer: Scorer, workers: int, dtype: type
) -> None:
    """Encode the images `paths`; save the index after each segment."""
    with tqdm(total=len(paths), unit="img", desc="index", disable=not paths) as bar:
        for start in range(0, len(paths), SEGMENT):
            segment = paths[start : start + SEGMENT]
            tokens: list[np.ndarray] = []
            features: list[np.ndarray] = []
            encoded: list[str] = []
            for batch in image_batches(
                FolderImages(index.folder, segment), scorer.preprocess, range(len(segment)), BATCH, workers
            ):
                for bad in batch.unreadable:
                    index.damaged[bad.name] = states[bad.name], bad.reason.removeprefix("BadSample: ")
                if batch.indices:
                    h = scorer.encode_images(batch.images)
                    features.append(scorer.text_free_features(h).cpu().numpy())
                    tokens.append(h.cpu().numpy().astype(dtype))
                    encoded += [segment[i] for i in batch.indices]
                bar.update(len(batch.indices) + len(batch.unreadable))
            if encoded:
                number = index.add_segment(np.concatenate(tokens), np.concatenate(features))
                index.images |= {path: (states[path], Place(number, row)) for row, path in enumerate(encoded)}
            index.save()
