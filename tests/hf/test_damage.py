"""Files of Hugging Face's format that are damaged, or made up to do harm: one line each, before any work."""

import json
import os
import random

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxmodels
from jaxmodels import cli
from jaxmodels.errors import UserError
from jaxmodels.hf import files, save
from jaxmodels.models.resnet import ResNetConfig
from tests.hf.small import GPT2, LLAMA, change, saved

WEIGHTS, NAME = "model.safetensors", "transformer.wpe.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "gpt2"
    saved(GPT2, folder)
    return folder


@pytest.fixture
def folder(whole, tmp_path):
    (tmp_path / "in").mkdir()
    for path in whole.iterdir():
        (tmp_path / "in" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "in"


def refused(folder, *words):
    with pytest.raises(UserError) as error:
        jaxmodels.load_pretrained(folder)
    message = str(error.value)
    assert "\n" not in message and len(message) < 1500
    for word in words:
        assert word in message
    return message


def rewrite(path, edit):
    """A file with another header over the same bytes."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header = edit(header) or header
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


# ---- safetensors


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data_offsets": [-64, 448]}, "data_offsets [-64, 448]"),
        ({"data_offsets": [0.0, 512.0]}, "data_offsets [0.0, 512.0]"),
        ({"data_offsets": []}, "data_offsets []"),
        ({"data_offsets": "all"}, "data_offsets all"),
        ({"data_offsets": [512, 0]}, "data_offsets [512, 0]"),
        ({"data_offsets": None}, "data_offsets null"),
        ({"data_offsets": [True, 512]}, "data_offsets [true, 512]"),
        ({"data_offsets": [10**30, 10**30 + 512]}, "is cut short"),
        ({"shape": "8, 16"}, "shape 8, 16"),
        ({"shape": [8.0, 16]}, "shape [8.0, 16]"),
        ({"shape": [-8, -16]}, "shape [-8, -16]"),
        ({"shape": [10**40, 16]}, "expected whole numbers"),
        ({"shape": None}, "shape null"),
        ({"dtype": ["F32"]}, 'dtype ["F32"]'),
        ({"dtype": None}, "dtype null"),
        ({"dtype": "F64"}, "which are not those of its shape"),
    ],
)
def test_a_tensor_that_cannot_lie_so_is_named(folder, change, words):
    rewrite(folder / WEIGHTS, lambda header: header[NAME].update(change))
    name = "" if "cut short" in words else NAME
    refused(folder, words, name, "damaged files: model.safetensors")


def test_tensors_that_share_bytes_or_leave_a_gap_are_refused(folder):
    def move(by):
        def edit(header):
            start, stop = header[NAME]["data_offsets"]
            header[NAME]["data_offsets"] = [start + by, stop + by]

        return edit

    rewrite(folder / WEIGHTS, move(-64))
    refused(folder, NAME, "where the one before it ends")
    rewrite(folder / WEIGHTS, move(64))
    with (folder / WEIGHTS).open("ab") as file:
        file.write(b"\0" * 64)
    refused(folder, "64 bytes behind its last tensor")


@pytest.mark.parametrize("header", [b"[]", b"null", b"55", b"{}x", b'{"a":1,"a":2}', b"[" * 90000, b"\xff\xfe{}"])
def test_a_header_that_is_no_object_is_refused(folder, header):
    rewrite(folder / WEIGHTS, lambda _: header)
    refused(folder, "has a header that cannot be read")


def test_any_damage_to_a_header_is_one_line_or_does_no_harm(folder):
    """A few hundred random changes of one value each, from a seed."""
    pick, good = random.Random(0), (folder / WEIGHTS).read_bytes()
    expected = load_file(folder / WEIGHTS)
    odd = [None, True, -1, 0, 1.5, 2**63, 10**50, float("nan"), "", "F32", "x" * 99]
    odd += [[], [0], [0, 1], [[0], 0], {}, {"a": {}}]
    for _ in range(300):
        (folder / WEIGHTS).write_bytes(good)

        def edit(header):
            name = pick.choice(list(header))
            place = pick.choice(["entry", "dtype", "shape", "data_offsets"])
            if place == "entry" or name == "__metadata__":
                header[name] = pick.choice(odd)
            elif place == "dtype" or pick.random() < 0.5:
                header[name][place] = pick.choice(odd)
            else:
                header[name][place][0] = pick.choice(odd)

        rewrite(folder / WEIGHTS, edit)
        found, problems = files.scan(folder)
        for name, tensor in [] if problems else found:
            if name in expected and tensor.dtype == "F32" and tensor.shape == expected[name].shape:
                np.testing.assert_array_equal(tensor.read(), expected[name])


@pytest.mark.parametrize("file", [5, None, [], {}, "", "model", "../secret.safetensors", "/etc/x.safetensors"])
def test_an_index_that_names_no_file_beside_it_is_refused(folder, file):
    (folder / WEIGHTS).rename(folder / "a.safetensors")
    names = load_file(folder / "a.safetensors")
    (folder / files.INDEX).write_text(json.dumps({"weight_map": {name: file for name in names}}))
    refused(folder, "has no weight_map that names a file")


def test_numbers_that_are_none_are_named(folder):
    tensors = load_file(folder / WEIGHTS)
    for name, value in (("transformer.h.1.attn.c_attn.weight", np.nan), ("transformer.ln_f.bias", np.inf)):
        damaged = {key: x.copy() for key, x in tensors.items()}
        damaged[name].reshape(-1)[5] = value
        save_file(damaged, folder / WEIGHTS)
        refused(folder, f"got {value} in {name} (number 5 of ", "expected weights that are finite")


# ---- config.json


@pytest.mark.parametrize(
    "text", ["", "null", "[]", "5", '"gpt2"', "{", "[" * 100_000, '{"model_type": ["gpt2"]}', "\0\1", '{"a":' * 9999]
)
def test_a_config_that_is_none_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config.json")
    (folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(folder, "config.json")


@pytest.mark.parametrize("config", [GPT2, LLAMA], ids=["gpt2", "llama"])
def test_a_setting_of_another_type_is_named(config, tmp_path):
    saved(config, tmp_path)
    good = json.loads((tmp_path / "config.json").read_text())
    for name, value in good.items():
        if name in ("architectures", "n_ctx", "torch_dtype", "rope_scaling"):
            continue  # not read, or read beside another
        for odd in ("many", -1, 0.5, True, [1], {"a": 1}, 10**30, float("nan")):
            (tmp_path / "config.json").write_text(json.dumps({**good, name: odd}))
            try:
                jaxmodels.load_pretrained(tmp_path)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                right = type(odd) in (int, float) if isinstance(value, float) else type(odd) is type(value)
                assert right, (name, odd)
    change(tmp_path, quantization_config={"bits": 4})
    refused(tmp_path, "a quantization_config")


@pytest.mark.parametrize("name", ["n_layer", "n_embd", "n_positions", "vocab_size", "n_inner", "n_head"])
def test_sizes_are_those_of_the_files_before_room_is_made_for_them(folder, name, monkeypatch):
    monkeypatch.setattr("jaxmodels.hf.load.Parts", None)  # where room is made
    for size in (10**9, 2**31 - 1, 2**31, 10**18):
        change(folder, **{name: size})
        assert len(said := refused(folder)) < 1500
        assert "try --" not in said, "no option changes what the files say"


def test_more_stages_than_the_files_hold_are_refused(tmp_path):
    config = ResNetConfig(input_shape=(16, 16, 3), classes=3, depths=(1, 1), widths=(8, 16), stem_width=8)
    saved(config, tmp_path)
    change(tmp_path, depths=[5000, 1])
    refused(tmp_path, "depths 5,001")


def test_a_config_that_trains_otherwise_is_remarked(folder, caplog):
    saved(LLAMA, folder)
    change(folder, attention_dropout=0.25)
    jaxmodels.load_pretrained(folder)
    assert "attention_dropout 0.25 (computed here, in training alone: 0)" in caplog.text


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        ("wav2vec2", {"do_normalize": False}, "do_normalize false (computed here: true)"),
        ("wav2vec2", {"sampling_rate": 8000}, "sampling_rate 8000 (computed here: 16000)"),
        ("whisper", {"hop_length": 80, "n_fft": 512, "feature_size": 6}, "hop_length 80 (computed here: 160)"),
        ("qwen2_audio", {"dither": 0.1, "feature_size": 6}, "dither 0.1 (computed here: 0.0)"),
    ],
)
def test_sounds_that_are_prepared_otherwise_than_here_are_refused(kind, settings, said, root, tmp_path):
    for path in (root / "tests" / "golden" / kind).glob("[cm]*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    alone = tmp_path / "preprocessor_config.json"
    alone.write_text(json.dumps(settings))
    refused(tmp_path, str(alone), said)
    whole = tmp_path / "processor_config.json"
    whole.write_text(json.dumps({"feature_extractor": {"padding_value": 0.0}}))  # which counts first
    jaxmodels.load_pretrained(tmp_path)
    whole.write_text(json.dumps({"feature_extractor": settings}))
    alone.unlink()
    refused(tmp_path, str(whole), said)


def test_dropouts_of_gpt2_are_three(folder):
    change(folder, embd_pdrop=0.3, attn_pdrop=0.1, resid_pdrop=0.2)
    model, params = jaxmodels.load_pretrained(folder)
    c = model.config
    assert (c.dropout, c.embed_dropout, c.attention_dropout) == (0.2, 0.3, 0.1)
    save.save_pretrained(folder, model, params)
    values = json.loads((folder / "config.json").read_text())
    assert [values[f"{place}_pdrop"] for place in ("resid", "embd", "attn")] == [0.2, 0.3, 0.1]


# ---- folders


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", ""), ("tokenizer.json", "null"), ("tokenizer.json", "[" * 99_999),
        ("tokenizer.json", '{"model": {"type": "BPE", "vocab": 5}}'), ("tokenizer.json", '{"kind": "chars"}'),
        ("tokenizer_config.json", "[]"), ("tokenizer_config.json", '{"eos_token": 5}'),
        ("tokenizer_config.json", '{"eos_token": "<nowhere>"}'), ("generation_config.json", "{"),
        ("generation_config.json", '{"eos_token_id": "2"}'), ("generation_config.json", '{"eos_token_id": [[2]]}'),
        ("special_tokens.json", "null"),
    ],
)  # fmt: skip
def test_a_damaged_file_beside_the_weights_is_named_and_nothing_is_left(folder, file, text, tmp_path, capsys):
    jaxmodels.data.train_bpe(["abc abd"], 300, folder / "tokenizer.json") if file != "tokenizer.json" else None
    (folder / file).write_text(text)
    out = tmp_path / "new" / "run"
    assert cli.main(["import", str(folder), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and str(folder) in said
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_link_out_of_the_folder_is_refused_and_one_of_the_hub_s_cache_is_followed(folder, tmp_path, capsys):
    (tmp_path / "secret").write_text("#version: 0.2\nmine\n")
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "merges.txt, a link to" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.part").exists()
    (folder / "merges.txt").unlink()
    (folder / "vocab.json").write_text("{}")
    (folder / "merges.txt").symlink_to("vocab.json")  # inside
    os.mkfifo(folder / "vocab.txt")
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    assert not (tmp_path / "run" / "pretrained" / "vocab.txt").exists()
    hub = tmp_path / "hub" / "models--openai--gpt2"
    (hub / "blobs").mkdir(parents=True)
    (hub / "snapshots" / "1a2b").mkdir(parents=True)
    for i, name in enumerate(("config.json", WEIGHTS, "vocab.json")):
        (folder / name).rename(hub / "blobs" / str(i))
        (hub / "snapshots" / "1a2b" / name).symlink_to(f"../../blobs/{i}")
    assert cli.main(["import", str(hub / "snapshots" / "1a2b"), "--out", str(tmp_path / "cached")]) == 0
    assert (tmp_path / "cached" / "pretrained" / "vocab.json").read_text() == "{}"
    (hub / "snapshots" / "1a2b" / "merges.txt").symlink_to(tmp_path / "secret")
    assert cli.main(["import", str(hub / "snapshots" / "1a2b"), "--out", str(tmp_path / "other")]) == 2


def test_a_part_of_the_user_s_own_is_left_alone(folder, tmp_path, capsys):
    (tmp_path / "run.part").mkdir()
    (tmp_path / "run.part" / "thesis.txt").write_text("years")
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 2
    assert "run.part, which is there already" in capsys.readouterr().err
    assert (tmp_path / "run.part" / "thesis.txt").read_text() == "years"
    (tmp_path / "file.part").write_text("mine")
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "file")]) == 2
    assert (tmp_path / "file.part").read_text() == "mine"
