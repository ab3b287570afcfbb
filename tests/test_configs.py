"""Configs: published values, overrides by type, and errors that name field, value and fix."""

import subprocess
import sys
import time

import pytest
import yaml

from llip.config_search import list_configs, parse_overrides, search_config
from llip.configs import FIELD_GROUPS, Config, config_fields
from llip.errors import UserError
from llip.main import main

PUBLISHED = {
    # name: (model, K, tau, lr, batch, nodes, grad checkpointing, compile)
    "llip_b32": ("ViT-B-32-quickgelu", 64, 5, 5e-4, 256, 16, False, True),
    "llip_b32_k32": ("ViT-B-32-quickgelu", 32, 5, 5e-4, 256, 16, False, True),
    "llip_b32_k64": ("ViT-B-32-quickgelu", 64, 5, 5e-4, 256, 16, False, True),
    "llip_b32_k128": ("ViT-B-32-quickgelu", 128, 5, 5e-4, 256, 16, False, True),
    "llip_b16": ("ViT-B-16-quickgelu", 32, 5, 5e-4, 256, 16, False, True),
    "llip_b16_k32": ("ViT-B-16-quickgelu", 32, 5, 5e-4, 256, 16, False, True),
    "llip_l14_k32": ("ViT-L-14-quickgelu", 32, 1, 4e-4, 256, 16, False, True),
    "llip_l14_k64": ("ViT-L-14-quickgelu", 64, 1, 4e-4, 256, 16, False, True),
    "llip_h14_k64": ("ViT-H-14-quickgelu", 64, 5, 4e-4, 128, 32, True, False),
    "llip_G14_k64": ("ViT-bigG-14-quickgelu", 64, 5, 4e-4, 128, 32, True, False),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_values(name):
    config = search_config(name)
    values = (
        config.model,
        config.mixture_tokens,
        config.softmax_temperature,
        config.lr,
        config.batch_size,
        config.nodes,
        config.grad_checkpointing,
        config.torchcompile,
    )
    assert values == PUBLISHED[name]
    assert config.global_batch == 32_768
    assert (config.beta1, config.beta2, config.eps, config.wd, config.warmup) == (0.9, 0.95, 1e-6, 0.2, 2000)
    assert (config.epochs, config.train_num_samples, config.ngpus, config.pool_heads) == (32, 400_000_000, 8, 8)
    assert (config.seed, config.eval_steps, config.workers, config.loss) == (0, 5000, 8, "sigmoid")


def test_published_variants():
    twelve, debug = search_config("llip_b16_k32_12_node"), search_config("llip_b16_k32_2_node_debug")
    assert (twelve.nodes, twelve.batch_size, twelve.workers) == (12, 342, 6)
    assert (debug.nodes, debug.batch_size, debug.train_num_samples, debug.eval_steps) == (2, 342, 200_000, 100)
    for name in ("b32_fullcc", "b16_fullcc", "l14_fullcc", "h14_fullcc", "G14_fullcc"):
        clip = search_config(name)
        assert (clip.loss, clip.beta2, clip.pooling, clip.mixture_tokens) == ("softmax", 0.98, "first", 1)
        siglip = search_config(name.replace("_fullcc", "").join(("siglip_", "")))
        assert (siglip.loss, siglip.pooling, siglip.mixture_tokens) == ("sigmoid", "first", 1)
        assert siglip.model == clip.model


def test_ladder_rungs_differ_in_pooling_only():
    base = search_config("llip_quickstart")
    rungs = {name: function() for name, function in list_configs().items() if name.startswith("quickstart_")}
    assert {(c.pooling, c.mixture_tokens > 1) for c in rungs.values()} == {
        ("learned", True),
        ("mean", True),
        ("first", True),
        ("first", False),
        ("flair", False),
    }
    pooling = {name: getattr(base, name) for name in ("pooling", "mixture_tokens", "pair_tokens", "global_loss_weight")}
    for config in rungs.values():
        assert config.replace(**pooling, name=base.name) == base


def test_every_config_has_a_docstring():
    for name, function in list_configs().items():
        assert function.__doc__, name


def test_overrides_are_read_as_the_declared_type():
    words = ["lr=5e-4", "train_num_samples=400_000_000", "torchcompile=true", "image_size=none", "evals=a.yaml,b.yaml"]
    assert parse_overrides(words) == {
        "lr": 5e-4,
        "train_num_samples": 400_000_000,
        "torchcompile": True,
        "image_size": None,
        "evals": ("a.yaml", "b.yaml"),
    }
    assert parse_overrides(["train_num_samples=4e8", "name=llip"]) == {"train_num_samples": 400_000_000, "name": "llip"}


def test_a_field_of_several_types_keeps_the_one_that_was_written():
    for text, value in (("true", True), ("false", False), ("backbone", "backbone"), ("1", 1), ("3", 3)):
        parsed = parse_overrides([f"lock_image={text}"])["lock_image"]
        assert (parsed, type(parsed)) == (value, type(value))
        assert Config(lock_image=value).lock_image is value
    assert parse_overrides(["lock_text=encoder"]) == {"lock_text": "encoder"}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lock_image=head"], ["lock_image", "'head'", "true or false or an integer or 'backbone'"]),
        (["lock_image=0"], ["lock_image = 0", "at least 1"]),
        (["lock_text=3"], ["lock_text", "true or false or 'encoder'"]),
        (["lock_image_unlocked_groups=3"], ["lock_image=N"]),
        (["bach_size=4"], ["bach_size", "batch_size"]),
        (["batch_size=four"], ["batch_size", "'four'", "integer"]),
        (["batch_size=1.5"], ["batch_size", "1.5", "integer"]),
        (["batch_size=0"], ["batch_size", "at least 1"]),
        (["lr=fast"], ["lr", "'fast'", "number"]),
        (["lr=nan"], ["lr", "nan"]),
        (["torchcompile=yes"], ["torchcompile", "'yes'", "true or false"]),
        (["loss=sigmod"], ["loss", "'sigmod'", "'sigmoid'"]),
        (["pooling=max"], ["pooling", "'max'", "'mean'"]),
        (["batch_size"], ["batch_size", "field=value"]),
        (["lr=1", "lr=2"], ["lr", "twice"]),
        (["local_loss=true"], ["local_loss", "Drop it"]),
        (["report_to=wandbb"], ["report_to", "wandbb"]),
        (["captions_per_image=0"], ["captions_per_image", "at least 1"]),
        (["caption_fill=empty"], ["caption_fill", "'repeat', 'mask'"]),
        (["global_loss_weight=0.5", "pooling=mean"], ["global_loss_weight", "'mean' pooling", "pooling=text"]),
    ],
)
def test_bad_overrides(words, expected):
    with pytest.raises(UserError) as error:
        search_config("llip_b16", words)
    for part in expected:
        assert part in str(error.value)


def test_unknown_config_lists_the_nearest():
    with pytest.raises(UserError, match="llip_b16_k32"):
        search_config("llip_b16_k23")


def test_wrong_type_in_python_is_an_error():
    with pytest.raises(UserError, match="batch_size = '256'"):
        Config(batch_size="256")


def test_config_outside_the_repo(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from llip.configs import Config\ndef tuned():\n    '''Mine.'''\n    return Config(lr=0.25)\n")
    config = search_config(f"{file}:tuned", ["batch_size=3"])
    assert (config.name, config.lr, config.batch_size) == ("tuned", 0.25, 3)
    with pytest.raises(UserError, match="'tuned'"):
        search_config(f"{file}:tune")
    with pytest.raises(UserError, match="there is no file"):
        search_config(f"{tmp_path}/none.py:tuned")
    file.write_text("def broken(:\n")
    with pytest.raises(UserError, match="SyntaxError"):
        search_config(f"{file}:broken")
    file.write_text("from llip.configs import Config\ndef typo():\n    return Config(bach_size=1)\n")
    with pytest.raises(UserError, match="bach_size"):
        search_config(f"{file}:typo")


def test_epochs_are_whole_global_batches():
    config = Config(train_num_samples=1000, batch_size=30, ngpus=2, accum_freq=2, epochs=3)
    assert (config.global_batch, config.steps_per_epoch, config.total_steps) == (120, 8, 24)


def test_print_is_the_resolved_config(capsys):
    assert main(["llip_b16_k32", "--print", "lr=1e-3"]) == 0
    text = capsys.readouterr().out
    fields = yaml.safe_load(text)
    assert fields["lr"] == 1e-3
    assert fields["mixture_tokens"] == 32
    assert "# global batch: 32,768" in text
    assert Config(**fields) == search_config("llip_b16_k32", ["lr=1e-3"])


def test_list_shows_every_config(capsys):
    assert main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(list_configs())


@pytest.mark.parametrize("arguments", [["nonsense"], ["llip_b16", "x=1"], []])
def test_mistakes_exit_2_with_one_line(arguments, capsys):
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert "Traceback" not in message


@pytest.mark.parametrize("arguments", [["--list"], ["llip_b16_k32", "--print"], ["--help"]])
def test_answers_without_torch_and_at_once(arguments):
    code = (
        "import sys, runpy; sys.argv = ['llip.main', *sys.argv[1:]]\n"
        "try: runpy.run_module('llip.main', run_name='__main__')\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        "assert 'torch' not in sys.modules and 'open_clip' not in sys.modules"
    )
    started = time.monotonic()
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True, timeout=30)
    assert time.monotonic() - started < 3  # a third of it on a quiet machine


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"warmup": 1_000_000}, "warmup = 1,000,000 steps of 30: the learning rate never reaches its peak"),
        ({"evals": ("a.yaml",)}, "evals without eval_steps"),
        ({"eval_steps": 5}, "eval_steps without evals"),
        ({"context_length": 2}, "context_length = 2 leaves no room"),
        ({"lr": 0}, "lr = 0: nothing is trained"),
        ({"profile_steps": "20-31"}, "profile_steps = 20-31 ends after the last step, 30"),
        ({"profile_steps": "20-30"}, None),
        ({}, None),
    ],
)
def test_settings_that_are_hardly_meant_are_warned_of(changes, message):
    config = Config(train_num_samples=1000, batch_size=100, epochs=3, **{"warmup": 5} | changes)
    assert [warning[: len(message or "")] for warning in config.warnings()] == ([message] if message else [])


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("seed", "99999999999999999999999", "an integer of 64 bits"),
        ("shuffle_buffer", "1e12", "at most 1,000,000"),
        ("shuffle_buffer", "0", "at least 1"),
        ("workers", "100000", "at most 512"),
        ("image_size", "1e6", "at most 16,384"),
        ("softmax_temperature", "1e-30", "at least 0.001"),
        ("timeout_minutes", "1e-9", "at least 0.05"),
        ("epochs", "1e30", "at most 2,147,483,647"),
        ("lr", "inf", "at most"),
        ("lr", "nan", "0 or more"),
        ("beta2", "1", "from 0 to 1"),
        ("grad_clip", "0", "more than 0"),
    ],
)
def test_bounds_stand_beside_the_fields(field, value, expected):
    with pytest.raises(UserError, match=rf"config field {field} = .*: expected .*{expected}"):
        search_config("llip_quickstart", [f"{field}={value}"])


def test_a_config_that_raises_names_file_and_line(tmp_path):
    (tmp_path / "mine.py").write_text("def run():\n    return [][3]\n")
    with pytest.raises(UserError, match=r"failed in .*mine\.py, line 2: IndexError: list index out of range"):
        search_config(f"{tmp_path}/mine.py:run")


def test_all_mistakes_are_listed_at_once():
    with pytest.raises(UserError) as error:
        search_config("llip_b16", ["batch_size=four", "lr=fast", "warmpu=3", "wd"])
    for part in ("batch_size = 'four'", "lr = 'fast'", "'warmup'", "field=value"):
        assert part in str(error.value)
    with pytest.raises(UserError) as error:
        Config(batch_size=0, lr=-1.0, workers="2")
    for part in ("batch_size = 0", "lr = -1.0", "workers = '2'"):
        assert part in str(error.value)


WILD = [
    "", " ", "0", "-1", "1e400", "nan", "-inf", "none", "1e30", "9" * 5000, "1__0", "0x10", "1.5", ",", "a,b", "\0",
    "x\0y", "\ud800", "x" * 5000, "/", "..", "~nobody/x", "$NOPE/x", "${", "file.py:X", "file.py:", "::", "@", "5-",
    "1e-320",
]  # fmt: skip


@pytest.mark.parametrize("field", config_fields())
def test_a_wild_value_is_taken_or_refused_with_a_short_message(field, capsys):
    for value in WILD:
        code = main(["llip_quickstart", "--print", f"{field}={value}"])
        out, err = capsys.readouterr()
        assert code in (0, 2)
        if code:
            assert err.startswith(f"error: config field {field} ")
            assert len(err) < 500
        else:
            assert Config(**yaml.safe_load(out)) == search_config("llip_quickstart", [f"{field}={value}"])


@pytest.mark.parametrize("value", [10**400, -(10**400), True, b"x", [], {}, 1j, object()])
def test_values_of_other_types_in_python_are_refused(value):
    for field in config_fields():
        if not isinstance(value, bool):
            with pytest.raises(UserError, match=f"config field {field} "):
                Config(**{field: value if value != [] or field not in ("evals", "report_to") else 3})


def test_help_lists_every_field_in_its_group(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    fields = [line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in config_fields()]
    assert fields == list(config_fields())
    assert [line for line in lines if line in FIELD_GROUPS.values()] == list(FIELD_GROUPS.values())
    assert all(len(line) <= 110 for line in lines)
