"""The table of options: defaults, types, the TOML file, and what wins over what."""

from __future__ import annotations

import dataclasses
import math
import sys

import pytest
from helpers import PROPERTY
from hypothesis import given
from hypothesis import strategies as st

from gpu_mlp.options import TrainOptions, merged, to_toml

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FIELDS = {field.name: field for field in dataclasses.fields(TrainOptions)}
KIND = {name: str(field.type).replace(" | None", "") for name, field in FIELDS.items()}


def _toml(tmp_path, text, name="options.toml"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# --- the table ------------------------------------------------------------------------------------------------------


def test_every_option_has_a_group_a_help_text_and_a_known_type():
    for name, field in FIELDS.items():
        assert KIND[name] in ("str", "int", "float", "bool"), name
        assert field.metadata["group"] in ("Data", "Network", "Training", "Run"), name
        assert field.metadata["help"].strip(), name
        if field.default is None:
            assert field.metadata["shown"], f"{name}: the help has to say what None stands for"


def test_a_default_is_of_the_type_that_the_option_declares():
    types = {"str": str, "int": int, "float": float, "bool": bool}
    for name, value in dataclasses.asdict(TrainOptions()).items():
        if value is not None:
            assert type(value) is types[KIND[name]], name


# --- what wins ------------------------------------------------------------------------------------------------------


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path):
    path = _toml(tmp_path, "epochs = 7\nlr = 0.5\nstandardize = false\n")
    chosen = merged(path, {"epochs": 9, "lr": None, "dropout": 0.0})
    assert (chosen.epochs, chosen.lr, chosen.standardize, chosen.dropout) == (9, 0.5, False, 0.0)
    assert chosen.batch_size == TrainOptions().batch_size


@pytest.mark.parametrize(("name", "in_file", "given"), [("plots", True, False), ("standardize", False, True)])
def test_a_switch_on_the_command_line_wins_either_way(tmp_path, name, in_file, given):
    path = _toml(tmp_path, f"{name} = {str(in_file).lower()}\n")
    assert getattr(merged(path, {name: given}), name) is given
    assert getattr(merged(path, {name: None}), name) is in_file


def test_a_zero_on_the_command_line_is_not_taken_for_nothing_given(tmp_path):
    path = _toml(tmp_path, "test = 0.5\nseed = 4\nl2 = 1.0\ndropout = 0.5\n")
    chosen = merged(path, {"test": 0.0, "seed": 0, "l2": 0.0, "dropout": 0.0})
    assert (chosen.test, chosen.seed, chosen.l2, chosen.dropout) == (0.0, 0, 0.0, 0.0)


def test_without_a_file_the_defaults_stand():
    assert merged(None, {}) == TrainOptions()


def test_dashes_in_the_file_mean_underscores(tmp_path):
    chosen = merged(_toml(tmp_path, "batch-size = 32\nlabel-smoothing = 0.25\n"), {})
    assert (chosen.batch_size, chosen.label_smoothing) == (32, 0.25)


def test_an_integer_will_do_for_a_real(tmp_path):
    chosen = merged(_toml(tmp_path, "lr = 1\ndropout = 0\n"), {})
    assert (chosen.lr, chosen.dropout) == (1.0, 0.0)
    assert type(chosen.lr) is float


# --- lists ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ('"64"', [64]),
        ('"64,32"', [64, 32]),
        ('" 64 , 32 "', [64, 32]),
        ('"none"', []),
        ('"None"', []),
        ('"0"', []),
        ('""', []),
        ("[64, 32]", [64, 32]),
        ("[64]", [64]),
        ("[]", []),
    ],
)
def test_hidden_as_a_string_or_as_a_list(tmp_path, text, sizes):
    assert merged(_toml(tmp_path, f"hidden = {text}\n"), {}).hidden_sizes == sizes


@pytest.mark.parametrize("hidden", ["a", "64,", ",64", "64;32", "64 32", "-3", "0,3", "2.5", "1e3", "64,none", "[64]"])
def test_widths_that_are_none_are_refused_with_an_example(hidden):
    with pytest.raises(ValueError, match=r"hidden: expected widths such as 256,128 \(or none\), got"):
        _ = TrainOptions(hidden=hidden).hidden_sizes


def test_activation_as_a_list(tmp_path):
    assert merged(_toml(tmp_path, 'activation = ["relu", "tanh"]\n'), {}).activation == "relu,tanh"


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ('epochs = "3"', TypeError, r"epochs: expected an integer, got '3' \(str\)"),
        ("epochs = 3.5", TypeError, r"epochs: expected an integer, got 3\.5"),
        ("epochs = true", TypeError, r"epochs: expected an integer, got the bool True"),
        ("epochs = [3]", TypeError, r"epochs: expected an integer"),
        ("epochs = 1979-05-27", TypeError, r"epochs: expected an integer"),
        ('lr = "fast"', TypeError, r"lr: expected a number, got 'fast'"),
        ("lr = true", TypeError, r"lr: expected a number"),
        ("lr = nan", ValueError, r"lr: expected a finite number, got nan"),
        ("lr = inf", ValueError, r"lr: expected a finite number, got inf"),
        ("data = 3", TypeError, r"data: expected a string, got 3 \(int\)"),
        ('plots = "yes"', TypeError, r"plots: expected True or False, got 'yes'"),
        ("plots = 1", TypeError, r"plots: expected True or False, got 1"),
        ("target = ['a', 'b']", TypeError, r"target: expected a string"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_name(tmp_path, text, error, message):
    with pytest.raises(error, match=message):
        merged(_toml(tmp_path, text + "\n"), {})


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("epoch", "epochs"),
        ("hiden", "hidden"),
        ("learning_rate", None),
        ("batchsize", "batch_size"),
        ("Epochs", "epochs"),
    ],
)
def test_an_unknown_key_suggests_the_nearest(tmp_path, key, nearest):
    path = _toml(tmp_path, f"{key} = 3\n")
    with pytest.raises(ValueError, match=f"unknown option '{key}'") as caught:
        merged(path, {})
    assert str(path) in str(caught.value)
    if nearest:
        assert f"did you mean {nearest!r}?" in str(caught.value)


def test_a_section_is_an_unknown_option(tmp_path):
    with pytest.raises(ValueError, match="unknown option 'train'"):
        merged(_toml(tmp_path, "[train]\nepochs = 3\n"), {})


@pytest.mark.parametrize("text", ["epochs = = 3", "epochs", "epochs = 3 lr = 4", b"\xff\xfe", "epochs = 3\nepochs = 4"])
def test_a_file_that_is_not_toml_says_so_and_where(tmp_path, text):
    path = _toml(tmp_path, text)
    with pytest.raises(ValueError, match="is not valid TOML") as caught:
        merged(path, {})
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="config: no file at"):
        merged(tmp_path / "nowhere.toml", {})


# --- out and back in ------------------------------------------------------------------------------------------------

# Any text that a command line can carry: no NUL, no lone surrogates.
TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=30)
VALUES = {
    "str": TEXT,
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": st.floats(allow_nan=False, allow_infinity=False),
    "bool": st.booleans(),
}


@PROPERTY
@given(st.fixed_dictionaries({name: VALUES[KIND[name]] for name in FIELDS}))
def test_what_is_written_reads_back_equal_whatever_the_values(tmp_path_factory, values):
    options = TrainOptions(**values)
    path = tmp_path_factory.mktemp("toml") / "options.toml"
    path.write_bytes(to_toml(options).encode())
    back = merged(path, {})
    for name in FIELDS:
        if name != "out":
            assert getattr(back, name) == getattr(options, name), name
    assert back.out is None  # a repetition gets a folder of its own


def test_control_characters_in_a_file_name_survive(tmp_path):
    name = "".join(map(chr, (*range(1, 33), 0x7F, 0x85, 0x2028))) + "\"'\\"
    back = merged(_toml(tmp_path, to_toml(TrainOptions(data=name))), {})
    assert back.data == name


def test_the_written_file_is_plain_toml_without_the_options_that_are_none(tmp_path):
    found = tomllib.loads(to_toml(TrainOptions(lr=1e-5, out="somewhere", epochs=3)))
    assert found["lr"] == 1e-5
    assert found["epochs"] == 3
    assert "out" not in found
    assert "patience" not in found
    assert set(found) < set(FIELDS)


def test_the_sign_of_zero_and_the_last_bit_of_a_rate_survive(tmp_path):
    rate = math.nextafter(0.1, 1)
    back = merged(_toml(tmp_path, to_toml(TrainOptions(lr=rate, l1=-0.0))), {})
    assert back.lr == rate
    assert math.copysign(1, back.l1) == -1


def test_a_name_that_is_not_utf_8_is_refused_at_once_and_not_after_the_training():
    with pytest.raises(ValueError, match="data: "):
        TrainOptions(data="x\udcff.csv")
