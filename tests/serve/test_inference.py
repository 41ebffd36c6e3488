"""The Open Inference Protocol: classes by name for tensors and for files, in JSON and in bytes."""

from __future__ import annotations

import base64
import concurrent.futures
import dataclasses
import io
import json
import struct

import jax
import numpy as np
import pytest
from PIL import Image

import jaxmodels
from jaxmodels.config import Classification, Config, Synthetic
from jaxmodels.generate.predict import predictor
from jaxmodels.generate.prepare import Options
from jaxmodels.models.mlp import MLPConfig
from jaxmodels.serve.classes import Classes
from jaxmodels.serve.metrics import compilations
from jaxmodels.serve.opened import Opened
from jaxmodels.serve.service import Limits
from jaxmodels.train.saved import Kept, Run, write_kept
from tests.serve.serving import live

NAMES = ("cat", "dög", "owl")
PATH = "/v2/models/tiny/infer"


def made(folder, task=Classification()):  # noqa: B008
    config = Config(model=MLPConfig(input_shape=(4, 4, 1), hidden=(8,), classes=3), task=task, data=Synthetic())
    write_kept(folder, Kept(kind="image", classes=NAMES))
    model = jaxmodels.create(config.model)
    params = jax.tree.map(lambda leaf: 3 * leaf, model.init(jax.random.key(0)))
    return Run(folder, config, {"model": model}, {"model": params}, {}, 0)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return made(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def running(run):
    with live(Opened("tiny", classes=Classes.of_run(run)), Limits(body=100_000, queue=300)) as server:
        yield server


def images(count, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 4, 4, 1), np.uint8)


def png(image):
    file = io.BytesIO()
    Image.fromarray(image[..., 0]).save(file, "png")
    return file.getvalue()


def predicted(run, pixels):
    """What `jaxmodels predict` says of images."""
    ready, answers = predictor(run, Options(1, 1))
    return answers([ready(png(image)) for image in pixels])


def asked(pixels, **more):
    tensor = {"name": "inputs", "shape": list(pixels.shape), "datatype": "UINT8", "data": pixels.tolist()}
    return {"inputs": [tensor], **more}


def outputs(told):
    return {each["name"]: np.array(each["data"]).reshape(each["shape"]) for each in told["outputs"]}


def check(run, pixels, found):
    expected = predicted(run, pixels)
    assert found["label"].tolist() == [each["label"] for each in expected]
    shares = [[each["probabilities"][name] for name in NAMES] for each in expected]
    np.testing.assert_allclose(found["probabilities"], shares, atol=2e-6)


def test_tensors_and_files_get_what_predict_says(running, run):
    pixels = images(5)
    status, told, _ = running.ask("POST", PATH, asked(pixels, id="a1"))
    assert status == 200 and (told["model_name"], told["model_version"], told["id"]) == ("tiny", "1", "a1")
    check(run, pixels, outputs(told))
    flat = asked(pixels)
    flat["inputs"][0]["data"] = pixels.ravel().tolist()
    check(run, pixels, outputs(running.ask("POST", "/v2/models/tiny/versions/1/infer", flat)[1]))


def test_bytes_behind_the_json(running, run):
    """The binary form, as Triton's clients send it: files of images, and an answer in bytes."""
    pixels = images(3, 1)
    raw = b"".join(struct.pack("<I", len(file)) + file for file in map(png, pixels))
    tensor = {"name": "inputs", "shape": [3], "datatype": "BYTES", "parameters": {"binary_data_size": len(raw)}}
    wanted = [{"name": name, "parameters": {"binary_data": True}} for name in ("label", "probabilities")]
    head = json.dumps({"inputs": [tensor], "outputs": wanted}).encode()
    length = {"Inference-Header-Content-Length": str(len(head))}
    status, body, headers = running.ask("POST", PATH, head + raw, **length)
    assert status == 200
    size = int(headers["inference-header-content-length"])
    told, rest, found = json.loads(body[:size]), body[size:], {}
    for each in told["outputs"]:
        part, rest = np.split(np.frombuffer(rest, np.uint8), [each["parameters"]["binary_data_size"]])
        part, rest = part.tobytes(), rest.tobytes()
        if each["datatype"] == "FP32":
            found[each["name"]] = np.frombuffer(part, np.float32).reshape(each["shape"])
        else:
            names = []
            while part:
                (n,) = struct.unpack_from("<I", part)
                names.append(part[4 : 4 + n].decode())
                part = part[4 + n :]
            found[each["name"]] = np.array(names)
    assert not rest
    check(run, pixels, found)


def test_requests_of_many_clients_share_batches_and_compile_nothing(running, run):
    sizes = [1, 3, 7, 2, 140, 1, 1, 5]
    before, batches = compilations(), running.service.served["tiny"].batches
    calls, rows = batches.calls, batches.rows
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: running.ask("POST", PATH, asked(images(sizes[i], i))), range(len(sizes))))
    assert compilations() == before and batches.rows - rows == sum(sizes)
    assert batches.calls - calls <= len(sizes) + 1
    for i, (status, told, _) in enumerate(found):
        assert status == 200 and outputs(told)["probabilities"].shape == (sizes[i], 3)
        np.testing.assert_allclose(outputs(told)["probabilities"].sum(1), 1, atol=1e-5)
    for i in (0, 3):
        check(run, images(sizes[i], i), outputs(found[i][1]))


def test_what_the_model_takes_and_gives_is_told(running):
    status, told, _ = running.ask("GET", "/v2/models/tiny")
    assert status == 200 and told["inputs"] == [{"name": "inputs", "datatype": "UINT8", "shape": [-1, 4, 4, 1]}]
    assert [each["name"] for each in told["outputs"]] == ["probabilities", "label"]
    assert running.ask("GET", "/v2/models/tiny/ready")[0] == running.ask("GET", "/v2")[0] == 200
    assert running.ask("GET", "/v2/models/other/ready")[0] == running.ask("GET", "/v2/models/tiny/versions/2")[0] == 404
    status, told, _ = running.ask("POST", "/v1/completions", {"model": "tiny", "prompt": "a"})
    assert status == 400 and "try /v2/models/tiny/infer" in told["error"]["message"]


def tensor(**changed):
    return {"inputs": [{**asked(images(1))["inputs"][0], **changed}]}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"no", "no JSON"),
        ({}, "got inputs None"),
        ({"inputs": [], "output": []}, "got field 'output'"),
        ({"inputs": [{}]}, "got an input None"),
        (tensor(name="x"), "one of the name inputs"),
        (tensor(datatype="INT4"), "got datatype 'INT4'"),
        (tensor(datatype=["FP32"]), "got datatype ['FP32']"),
        (tensor(shape=[1, 16]), "got shape [1, 16], expected [-1, 4, 4, 1]"),
        (tensor(shape=[0, 4, 4, 1]), "expected a list of numbers above 0"),
        (tensor(shape=[2, 4, 4, 1]), "no UINT8 of shape [2, 4, 4, 1]"),
        (tensor(data=[300] * 16), "no UINT8"),
        (tensor(data=[0.5] * 16), "no UINT8"),
        (tensor(data=["a"] * 16), "no UINT8"),
        (tensor(data=[[1], [2, 3]]), "no UINT8"),
        (tensor(data=None), "no UINT8"),
        (tensor(datatype="FP32", data=[0.5] * 16), "got images of float32"),
        (tensor(datatype="BYTES", shape=[1], data=["no image"]), "got record 0"),
        (tensor(parameters={"binary_data_size": 16}), "got binary_data_size 16"),
        (tensor(parameters=[1]), "got an input"),
        ({**asked(images(1)), "outputs": [{"name": "logits"}]}, "each one of the name probabilities or label"),
        ({**asked(images(1)), "outputs": 3}, "got outputs 3"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_a_mistake_is_one_clear_line(running, body, message):
    status, told, _ = running.ask("POST", PATH, body)
    assert status == 400 and message in told["error"] and "\n" not in told["error"]


def test_a_header_that_lies_is_refused(running):
    for length in ("-1", "10", "999999", "x"):
        status, told, _ = running.ask("POST", PATH, b'{"inputs": []}', **{"Inference-Header-Content-Length": length})
        assert status == 400, told


def test_classes_that_do_not_exclude_each_other_are_a_list(tmp_path):
    run = made(tmp_path, Classification(multi_label=True))
    with live(Opened("tiny", classes=Classes.of_run(dataclasses.replace(run))), ready=True) as server:
        pixels = images(4, 2)
        found = outputs(server.ask("POST", PATH, asked(pixels))[1])
        expected = predicted(run, pixels)
        assert [json.loads(each) for each in found["labels"]] == [each["labels"] for each in expected]
        encoded = [base64.b64encode(png(image)).decode() for image in pixels]
        assert server.ask("POST", PATH, tensor(datatype="BYTES", shape=[4], data=encoded))[0] == 400
