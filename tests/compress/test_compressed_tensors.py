"""compressed-tensors: our codes in transformers' own decompression, and its files as our codes and numbers."""

import json
import math
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmodels import cli, create, load_pretrained, load_run
from jaxmodels.compress.coding import coding
from jaxmodels.config import Mesh, Quantized
from jaxmodels.errors import UserError
from jaxmodels.hf import files, load
from jaxmodels.hf.save import save_pretrained
from jaxmodels.models.coded import is_coded, pack, plain, unpack
from jaxmodels.parallel.mesh import make_mesh
from tests.zoo import arrays

LLAMA = dict(vocab_size=64, context=32, layers=2, width=48, heads=3, kv_heads=1, mlp_width=96)
SECTIONS = {
    "pack": Quantized(codes="int4", group=16),
    "pack-zeros": Quantized(codes="int4", group=48, symmetric=False),
    "pack-channel": Quantized(codes="int4", kept=("*/mlp/down",)),
    "int": Quantized(codes="int8", symmetric=False),
    "float": Quantized(codes="float8"),
}


def written(folder, section, name="llama", **sizes):
    """A directory of a model's codes; the model and its coded parameters."""
    model = create(name, **(sizes or LLAMA))
    params = coding(section, {"model": model}).encode({"model": arrays(model)})["model"]
    folder.mkdir()
    save_pretrained(folder, model, params, codes=True)
    return model, params


def numbers(folder):
    """Read by the format's own words: the numbers of each Linear, from codes that are taken out bit by bit."""
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    bits = config["config_groups"]["group_0"]["weights"]["num_bits"]
    raw, found = (folder / files.WEIGHTS).read_bytes(), {}
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__")
    kinds = {"F32": "<f4", "I8": "<i1", "I32": "<i4", "I64": "<i8", "F8_E4M3": jnp.dtype("float8_e4m3fn")}
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        kind = np.dtype(kinds[entry["dtype"]])
        assert (8 + length + start) % kind.itemsize == 0
        tensors[name] = np.frombuffer(raw[8 + length + start : 8 + length + stop], kind).reshape(entry["shape"])

    def words(packed, count):
        whole = packed.astype(np.int64) & 0xFFFFFFFF
        shifted = [(whole >> bits * i) & ((1 << bits) - 1) for i in range(32 // bits)]
        return np.stack(shifted, -1).reshape(len(packed), -1)[:, :count] - (1 << bits - 1)

    for name, scale in tensors.items():
        if name.endswith(".weight_scale"):
            stem = name.removesuffix("_scale")
            rows, columns = tensors.get(f"{stem}_shape", np.array(tensors.get(stem, np.zeros(0)).shape))
            codes = words(tensors[f"{stem}_packed"], columns) if f"{stem}_packed" in tensors else tensors[stem]
            zeros = tensors.get(f"{stem}_zero_point", np.zeros_like(scale))
            zeros = words(zeros.T, rows).T if zeros.dtype == np.int32 else zeros
            each = columns // scale.shape[1]
            wide = [np.repeat(x.astype(np.float32), each, 1) for x in (scale, zeros)]
            found[stem] = (codes.astype(np.float32) - wide[1]) * wide[0]
    return found


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """Directories by the name of their section, with model and parameters."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp("compressed") / name
            made[name] = (folder, *written(folder, SECTIONS[name]))
        return made[name]

    return of


@pytest.mark.parametrize("name", SECTIONS)
def test_files_hold_the_codes_and_read_as_what_they_stand_for(name, out):
    folder, model, params = out(name)
    whole = plain(params)
    found = numbers(folder)
    assert len(found) == 2 * (6 if SECTIONS[name].kept else 7)
    q = np.asarray(whole["layers"]["attn"]["q"]["w"])[1].reshape(48, 48).T
    np.testing.assert_allclose(found["model.layers.1.self_attn.q_proj.weight"], q, rtol=1e-6)
    o = np.asarray(whole["layers"]["attn"]["o"]["w"])[0].reshape(48, 48).T
    np.testing.assert_allclose(found["model.layers.0.self_attn.o_proj.weight"], o, rtol=1e-6)
    _, back = load_pretrained(folder)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), back, whole)
    _, back = load_pretrained(folder, codes=True)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    size = (folder / files.WEIGHTS).stat().st_size
    assert size < 4 * model.count() * (0.75 if SECTIONS[name].kept else 0.6)


@pytest.mark.parity
@pytest.mark.parametrize("name", SECTIONS)
def test_transformers_computes_the_logits_of_the_dequantized_model(name, out):
    pytest.importorskip("compressed_tensors")
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder, model, _ = out(name)
    # decompressed as it is loaded: later, transformers 5.24 takes packed zero points for some of another shape
    how = {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)} if name == "pack-zeros" else {}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how).eval()
    tokens = np.random.default_rng(0).integers(0, 64, (2, 9))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    found = jax.jit(model.apply)(load_pretrained(folder, codes=True)[1], tokens)
    np.testing.assert_allclose(found, expected, atol=1e-4 * math.sqrt(float(np.square(expected).max())))
    before = jax.jit(model.apply)(arrays(model), tokens)
    assert np.abs(found - before).max() > 1e-3


def test_what_the_format_cannot_hold_is_refused(tmp_path):
    with pytest.raises(UserError, match="got a Llama with codes of nf4, expected some of int4, int8, float8"):
        written(tmp_path / "nf4", Quantized(codes="nf4"))
    sizes = dict(vocab_size=64, context=16, layers=1, width=16, heads=4)
    with pytest.raises(UserError, match="got a GPT2 with no codes in a Linear of transformers"):
        written(tmp_path / "gpt2", Quantized(), "gpt2", **sizes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: c.update(quant_method="gptq"), "a quantization_config of 'gptq'"),
        (lambda c: c.update(format="marlin-24"), "the format 'marlin-24' and 1 groups"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=3), "weights of 3 bits by group"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(actorder="group"), "actorder 'group'"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=32), "do not fit their scales or bits"),
        (lambda c: c["config_groups"]["group_0"]["weights"].update(num_bits=8), "do not fit their scales or bits"),
    ],
)
def test_files_that_are_not_computed_here_are_refused(change, said, out, tmp_path):
    shutil.copytree(out("pack")[0], tmp_path / "out")
    values = json.loads((tmp_path / "out" / "config.json").read_text())
    change(values["quantization_config"])
    (tmp_path / "out" / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError) as refused:
        load_pretrained(tmp_path / "out")
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_codes_that_another_rounding_chose_stay_as_they_are(tmp_path):
    """A group whose codes do not reach the last one would be rounded to another scale, as GPTQ's or an observer's."""
    model = create("llama", **LLAMA)
    params = coding(SECTIONS["pack"], {"model": model}).encode({"model": arrays(model)})["model"]

    def lower(leaf):
        return replace(leaf, codes=pack(jnp.clip(unpack(leaf), -5, 5), leaf.packed)) if is_coded(leaf) else leaf

    params = jax.tree.map(lower, params, is_leaf=is_coded)
    (tmp_path / "out").mkdir()
    save_pretrained(tmp_path / "out", model, params, codes=True)
    where = make_mesh(Mesh(fsdp=3), jax.devices()[:3])
    _, found = load_pretrained(tmp_path / "out", codes=True, mesh=where)
    jax.tree.map(np.testing.assert_array_equal, found, params)
    q = found["layers"]["attn"]["q"]["w"]
    assert q.codes.sharding.spec != jax.P() and q.codes.addressable_shards[0].data.size == q.codes.size // 3
    # as the base of an adapter is read, whose config says which codes it has
    wanted = {path: leaf for path, leaf in load.flatten(params).items() if is_coded(leaf)}
    base = load.read(load.open_source(tmp_path / "out"), coded=jax.eval_shape(lambda: wanted))
    jax.tree.map(np.testing.assert_array_equal, {path: base[path] for path in wanted}, wanted)


@pytest.mark.parametrize("name", ["pack-channel", "int"])
def test_an_imported_run_has_the_codes_of_its_files_and_writes_them_again(name, out, tmp_path):
    folder, _, params = out(name)
    assert cli.main(["import", str(folder), "--out", str(tmp_path / "run")]) == 0
    run = load_run(tmp_path / "run")
    assert run.config.compress.codes == SECTIONS[name].codes
    assert jax.tree.structure(run.params["model"]) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, run.params["model"], params)
    how = ["--format", "compressed-tensors"]
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "again"), *how]) == 0
    assert (tmp_path / "again" / files.WEIGHTS).read_bytes() == (folder / files.WEIGHTS).read_bytes()
    # as numbers, nothing says that there are codes
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "numbers")]) == 0
    assert "quantization_config" not in json.loads((tmp_path / "numbers" / "config.json").read_text())
    _, plainly = load_pretrained(tmp_path / "numbers")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plainly, plain(params))
