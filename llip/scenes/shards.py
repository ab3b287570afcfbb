"""The files: training shards, evaluation sets in the clip-benchmark layout, and the manifest that names them.

    <out>/scenes.json                                      arguments, generator version, counts
    <out>/train-00000.tar ...                              key.png, key.json (captions, facts, scene), key.txt
    <out>/<task>/test/0.tar ... and test/nshards.txt       key.png, key.cls; for retrieval key.txt and key.json
    <out>/<task>/classnames.txt                            a class per line
    <out>/<task>/zeroshot_classification_templates.txt     a prompt per line, {c} standing for the class

Scene i of a split is drawn from (seed, split, i) alone: more scenes never change the ones before, and the same
arguments give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from llip.errors import UserError
from llip.scenes.facts import Fact, mixed_captions, retrieval_captions
from llip.scenes.render import png_bytes, render
from llip.scenes.tasks import CLASSIFICATION_TASKS, RETRIEVAL_TASK, ClassificationTask
from llip.scenes.world import Scene, sample_scene
from llip.system.files import atomic_folder

VERSION = 2
"""Raised whenever the same arguments would give other files."""

MANIFEST = "scenes.json"
TRAIN_SHARD_SIZE = 1000
TEST_SHARD_SIZE = 200  # several shards even of a small set, so that evaluation workers can share it
CAPTIONS = 6  # the fewest facts of a scene, two things in opposite corners, is seven facts
SPLITS = ("train", *(task.name for task in CLASSIFICATION_TASKS), RETRIEVAL_TASK)  # the order is part of the seeds
LIMITS = {
    "train": (1, 10_000_000), "test": (1, 1_000_000), "seed": (0, 2**63 - 1), "image_size": (32, 512),
    "captions": (1, CAPTIONS),
}  # fmt: skip

Members = dict[str, bytes]
"""A sample: bytes by extension."""


@dataclass(frozen=True)
class ScenesArgs:
    """What decides every byte that is written.

    Attributes:
        train, test: scenes to train on, and of each evaluation set.
        seed: of all scenes.
        image_size: pixels a side.
        captions: of each training scene. Fewer are the first of more, of the same pictures.
    """

    train: int = 12_000
    test: int = 800
    seed: int = 0
    image_size: int = 48
    captions: int = CAPTIONS

    def __post_init__(self) -> None:
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"scenes: {name} must be a whole number from {low} to {high}, got {value!r}.")

    def manifest(self) -> dict:
        """Return what `scenes.json` holds."""
        tasks = {task.name: {"samples": self.test, "classes": len(task.classes)} for task in CLASSIFICATION_TASKS}
        tasks[RETRIEVAL_TASK] = {"samples": self.test}
        shards = -(-self.train // TRAIN_SHARD_SIZE)
        train = {"samples": self.train, "shards": shards, "pattern": f"train-{{00000..{shards - 1:05d}}}.tar"}
        return {"version": VERSION, "arguments": asdict(self), "train": train, "tasks": tasks}


def write_scenes(out: Path, train: int, test: int, seed: int, image_size: int, captions: int = CAPTIONS) -> Path:
    """Write the dataset to `out`, which must not exist or be empty, and return `out`.

    `out` is never half-made: see `atomic_folder`.
    Raises UserError for an argument out of range and for an `out` that is taken or cannot be written.
    """
    return _write(Path(out), ScenesArgs(train, test, seed, image_size, captions))


def _write(out: Path, args: ScenesArgs) -> Path:
    _refuse_if_taken(out)
    try:
        with atomic_folder(out.resolve()) as draft:  # a link to an empty folder is followed
            _write_all(draft, args)
    except OSError as error:
        _refuse_if_taken(out)  # by another process meanwhile
        raise UserError(f"scenes: cannot write {str(out)!r}: {error}. Give a folder on a disk with room") from None
    return out


def ensure_scenes(
    out: Path, train: int = 12_000, test: int = 800, seed: int = 0, image_size: int = 48, captions: int = CAPTIONS
) -> Path:
    """Write the dataset to `out` unless it is there already, and return `out`.

    Several processes may call it at once: the first to finish wins, and its files equal those of the others.
    Raises UserError where `out` holds something else, or scenes of other arguments or another version.
    """
    args = ScenesArgs(train, test, seed, image_size, captions)
    out = Path(out)
    if _holds(out, args):
        return out
    try:
        return _write(out, args)
    except UserError:
        if _holds(out, args):  # another process was faster
            return out
        raise


def _holds(out: Path, args: ScenesArgs) -> bool:
    """Return whether `out` holds the scenes of `args`: False if it is empty, UserError for anything else."""
    if not _is_taken(out):
        return False
    try:
        manifest = json.loads((out / MANIFEST).read_text())
        version, arguments = manifest["version"], {"captions": CAPTIONS} | manifest["arguments"]  # older ones lack it
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"scenes: {str(out)!r} exists and is not a folder of scenes (no readable {MANIFEST} in it). "
            "Give another folder, or move this one away"
        ) from None
    differing = [f"{k}={arguments.get(k)!r}, not {v!r}" for k, v in asdict(args).items() if arguments.get(k) != v]
    if version != VERSION:
        differing.append(f"generator version {version!r}, not {VERSION}")
    if differing:
        raise UserError(
            f"scenes: {str(out)!r} holds scenes made with {'; '.join(differing)}. "
            "Give another folder or the same arguments, or delete this one to render it again"
        )
    return True


def _is_taken(out: Path) -> bool:
    """Return whether `out` is anything but missing or an empty folder."""
    return out.exists() and not (out.is_dir() and next(out.iterdir(), None) is None)


def _refuse_if_taken(out: Path) -> None:
    if _is_taken(out):
        raise UserError(f"scenes: {str(out)!r} exists and is not empty. Give another folder, or delete this one")


def _write_all(root: Path, args: ScenesArgs) -> None:
    """Write every file of the dataset under `root`, the manifest last."""
    total = args.train + args.test * (len(SPLITS) - 1)
    with tqdm(total=total, desc="scenes", unit="scene", mininterval=0.5) as progress:
        _write_shards(partial(_train_sample, args), args.train, root, "train-{:05d}.tar", TRAIN_SHARD_SIZE, progress)
        for task in CLASSIFICATION_TASKS:
            _write_test(partial(_class_sample, args, task), args.test, root / task.name, progress)
            _write_lines(root / task.name / "classnames.txt", task.classes)
            _write_lines(root / task.name / "zeroshot_classification_templates.txt", task.templates)
        _write_test(partial(_retrieval_sample, args), args.test, root / RETRIEVAL_TASK, progress)
        _write_lines(root / RETRIEVAL_TASK / "dataset_type.txt", ["retrieval"])
    (root / MANIFEST).write_text(json.dumps(args.manifest(), indent=2) + "\n")


def _write_test(sample: Callable[[int], Members], count: int, folder: Path, progress: tqdm) -> None:
    """Write one evaluation set's shards and their number."""
    (folder / "test").mkdir(parents=True)
    shards = _write_shards(sample, count, folder / "test", "{}.tar", TEST_SHARD_SIZE, progress)
    _write_lines(folder / "test" / "nshards.txt", [str(shards)])


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def _write_shards(
    sample: Callable[[int], Members], count: int, folder: Path, name: str, shard_size: int, progress: tqdm
) -> int:
    """Write samples 0 .. count - 1 to tars of `shard_size` samples, named by number; return the number of tars."""
    starts = range(0, count, shard_size)
    for shard, start in enumerate(starts):
        with tarfile.open(folder / name.format(shard), "w", format=tarfile.USTAR_FORMAT) as tar:
            for index in range(start, min(start + shard_size, count)):
                for extension, data in sample(index).items():
                    member = tarfile.TarInfo(f"{index:06d}.{extension}")  # its owner, mode and time are constants
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                progress.update()
    return len(starts)


def _rng(args: ScenesArgs, split: str, index: int) -> np.random.Generator:
    return np.random.default_rng([args.seed, SPLITS.index(split), index])


def _train_sample(args: ScenesArgs, index: int) -> Members:
    rng = _rng(args, "train", index)
    scene = sample_scene(rng)
    captions, facts = mixed_captions(scene, CAPTIONS, rng)
    png = png_bytes(render(scene, rng, args.image_size))
    known = slice(args.captions)
    return {"png": png, "json": _json_bytes(scene, captions[known], facts[known]), "txt": captions[0].encode()}


def _class_sample(args: ScenesArgs, task: ClassificationTask, index: int) -> Members:
    rng = _rng(args, task.name, index)
    label = index % len(task.classes)  # balanced, whatever the number of scenes
    scene = sample_scene(rng, task.demands[label])
    return {"png": png_bytes(render(scene, rng, args.image_size)), "cls": str(label).encode()}


def _retrieval_sample(args: ScenesArgs, index: int) -> Members:
    rng = _rng(args, RETRIEVAL_TASK, index)
    scene = sample_scene(rng)
    captions, facts = retrieval_captions(scene, rng)
    png = png_bytes(render(scene, rng, args.image_size))
    return {"png": png, "json": _json_bytes(scene, captions, facts), "txt": "\n".join(captions).encode()}


def _json_bytes(scene: Scene, captions: list[str], facts: list[Fact]) -> bytes:
    """Return a sample's json: its captions, the fact behind each one, and the scene itself."""
    things = [vars(thing) | {"place": thing.place} for thing in scene.things]
    record = {
        "captions": captions,
        "facts": [fact.record() for fact in facts],
        "scene": {"background": scene.background, "things": things},
    }
    return json.dumps(record, separators=(",", ":")).encode()
