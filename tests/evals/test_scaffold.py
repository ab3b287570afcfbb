"""Evaluation files: what is read, what is refused, and that asking for help costs nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from evals import main_mc, scaffold
from llip.clipeval.catalog.catalog import load_catalog
from llip.clipeval.eval_config import load_eval_config
from llip.errors import EXIT_USER, UserError

GOOD = {"mc_config_name": "llip_quickstart", "checkpoint_path": "a.pt", "output_dir": "out"}
ROOT = Path(__file__).parents[2]


def write(path: Path, **keys: object) -> str:
    path.write_text("".join(f"{key}: {value}\n" for key, value in keys.items()))
    return str(path)


def test_reads_every_key(tmp_path: Path) -> None:
    config = scaffold.load(write(tmp_path / "x.yaml", **GOOD, tasks="[a, b]", batch_size=3, workers=0))
    assert (config.mc_config_name, config.checkpoint_path, config.output_dir) == ("llip_quickstart", "a.pt", "out")
    assert (config.tasks, config.batch_size, config.workers) == (("a", "b"), 3, 0)
    assert (config.eval_name, config.catalog_name, config.prompt_ensemble) == ("mc", "dataset_catalog.json", "feature")


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"batchsize": 3}, r"unknown key 'batchsize'.*'batch_size'"),
        ({"batch_size": 0}, r"batch_size = 0; expected an integer, 1 to 65,536"),
        ({"batch_size": "3e1x"}, r"batch_size = '3e1x'"),
        ({"workers": "true"}, r"workers = True"),
        ({"tasks": "cifar10"}, r"tasks = 'cifar10'; expected a list"),
        ({"tasks": "[]"}, r"tasks = \[\]"),
        ({"tasks": "[a, a]"}, r"names 'a' twice"),
        ({"prompt_ensemble": "mean"}, r"'mean'; expected feature or score"),
        ({"shortlist": 9}, r"shortlist = 9; expected an integer, 10 to "),
        ({"compare_with": "a"}, r"compare_with = 'a'; expected a list of results.json"),
        ({"references": "{a: 101}"}, r"references = .*; expected lines of `name: percent`"),
        ({"catalog_name": 3}, r"catalog_name = 3; expected a string"),
        ({"eval_name": "mcc"}, "eval_name = 'mcc'; expected mc"),
        ({"checkpoint_path": ""}, r"'checkpoint_path' is missing"),
        ({"batch_size": 10**20}, r"batch_size = 1000.*; expected an integer, 1 to 65,536"),
        ({"workers": 100_000}, r"workers = 100000; expected an integer, 0 to 1,024"),
        ({"output_dir": '"a\\0"'}, r"output_dir = 'a\\x00'; expected a string"),
        ({"batch_size": 0, "workers": -1, "ema": 3}, r"ema = 3; .*batch_size = 0; .*workers = -1; "),
        ({"model": "[" * 3000}, "is not YAML"),
    ],
)
def test_mistakes(tmp_path: Path, keys: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scaffold.load(write(tmp_path / "x.yaml", **(GOOD | keys)))


def test_a_folder_is_never_named_after_a_variable_that_is_not_set(tmp_path: Path) -> None:
    config = scaffold.load(write(tmp_path / "x.yaml", **GOOD | {"output_dir": "$LLIP_TEST_UNSET/out"}))
    with pytest.raises(UserError, match=r"output_dir = .*the environment variable LLIP_TEST_UNSET is not set"):
        _ = config.output_folder
    config = scaffold.load(write(tmp_path / "x.yaml", **GOOD, cache_dir="${LLIP_TEST_UNSET}"))
    with pytest.raises(UserError, match=r"cache_dir = .*LLIP_TEST_UNSET is not set"):
        _ = config.cache_folder


def test_what_only_programs_need(tmp_path: Path) -> None:
    fname = write(tmp_path / "x.yaml", batch_size=3)
    assert load_eval_config(fname).checkpoint_path is None
    with pytest.raises(UserError, match="'mc_config_name' is missing"):
        scaffold.load(fname)
    (tmp_path / "x.yaml").write_text("just words")
    with pytest.raises(UserError, match="expected lines of"):
        scaffold.load(fname)


def test_shipped_files_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for name in ("llip_quickstart", "llip_b16_k32", "llip_G14_k64"):
        config = scaffold.load(f"config_evals/{name}.yaml")
        assert config.mc_config_name == name
        assert sorted(config.references.values()) == ([] if name == "llip_quickstart" else [69.6, 79.3])
        assert config.checkpoint_path == f"logs/{name}/checkpoints/latest.pt"


def test_tasks_of_shipped_files_are_in_the_catalog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for path in sorted(Path("config_evals").glob("*.yaml")):
        config = load_eval_config(path)
        assert len(load_catalog(config.catalog_name).select(config.tasks)) == len(config.tasks)
    suite = load_eval_config("config_evals/llip_b16_k32.yaml").tasks
    assert suite == load_eval_config("config_evals/llip_G14_k64.yaml").tasks
    assert len(suite) == 26 + 3
    robustness = load_eval_config("config_evals/llip_b16_k32_robustness.yaml")
    assert set(suite) & set(robustness.tasks) == {"imagenet"}


def test_a_file_that_is_not_there(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    assert main_mc.main(["--fname", "configs_evals/llip_b16_k32.yaml"]) == EXIT_USER
    assert "Did you mean config_evals/llip_b16_k32.yaml?" in capsys.readouterr().err


def test_help_imports_no_torch() -> None:
    program = (
        "import sys\nfrom evals import main_mc\n"
        "try: main_mc.main(['--help'])\nexcept SystemExit: pass\n"
        "slow = {'torch', 'open_clip', 'torchvision', 'numpy', 'jsonschema'} & set(sys.modules)\n"
        "sys.exit(f'{slow} imported' if slow else 0)"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--devices" in done.stdout


def test_optional_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLIP_CACHE", raising=False)
    path = write(tmp_path / "x.yaml", **GOOD, shortlist=64, compare_with="[a, b]", references="{paper: 69.6}")
    config = scaffold.load(path)
    assert (config.shortlist, config.compare_with, config.references) == (64, ("a", "b"), {"paper": 69.6})
    assert config.cache_folder == Path.cwd() / "out/cache"
    monkeypatch.setenv("LLIP_CACHE", str(tmp_path))
    assert config.cache_folder == tmp_path
    assert scaffold.load(write(tmp_path / "x.yaml", **GOOD, cache_dir="c")).cache_folder == Path.cwd() / "c"
    empty = scaffold.load(write(tmp_path / "x.yaml", **GOOD, references="", compare_with="", shortlist=""))
    assert (empty.references, empty.compare_with, empty.shortlist) == ({}, (), None)
