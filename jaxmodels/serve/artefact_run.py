"""Run the artefact in this folder with jax and numpy alone.

    python run.py                    check the files, and compute the probe again
    python run.py TEXT [TOKENS]      continue, translate or classify a text
    python run.py INPUTS.npy         classify images (N, H, W, C) of bytes, or arrays of numbers
    python run.py IMAGES.npy COUNT [SEED]    write that many generated images

In Python: `model = run.load()`, then `model("classify", inputs=images)`; manifest.json lists functions and inputs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import core, export

DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
DTYPES |= {"I4": "int4", "I8": "int8", "I32": "int32", "U8": "uint8", "U32": "uint32", "BOOL": "bool"}
HERE = Path(__file__).resolve().parent


class Refused(ValueError):
    """What is wrong with an artefact or an input, in one line."""


def tensors(path):
    """The arrays of a safetensors file by name, mapped into memory."""
    start = 8 + int.from_bytes(path.open("rb").read(8), "little")
    header = json.loads(path.read_bytes()[8:start] if start < 1 << 20 else path.open("rb").read(start)[8:])
    data, found = np.memmap(path, np.uint8, "r"), {}
    for name, entry in header.items():
        if name != "__metadata__":
            first, last = (start + offset for offset in entry["data_offsets"])
            found[name] = data[first:last].view(jnp.dtype(DTYPES[entry["dtype"]])).reshape(entry["shape"])
    return found


def load(folder=HERE, probe=True):
    """The artefact in a folder, once its files are whole, this jax is in its window, and its probe gives the same."""
    return Artefact(Path(folder), probe)


class Artefact:
    def __init__(self, folder, probe=True):
        self.folder = folder
        self.manifest = told = manifest_of(folder)
        window, version = told["jax"], jax.__version_info__
        if not numbers(window["from"]) <= version < numbers(window["below"]):
            raise Refused(
                f"got jax {jax.__version__}, expected from {window['from']} up to below {window['below']}, in which "
                f"{folder} runs, try pip install 'jax>={window['from']},<{window['below']}'"
            )
        for name, entry in told["files"].items():
            check_file(folder / name, entry)
        self.weights = {name: jax.device_put(x) for name, x in tensors(folder / "weights.safetensors").items()}
        self.calls = {}
        for name, entry in told["functions"].items():
            self.calls[name] = jax.jit(exported(told, entry, (folder / entry["file"]).read_bytes()).call)
        if probe:
            self.check_probe()

    def __call__(self, name, **inputs):
        """The outputs of a function by name, for inputs by name."""
        if name not in self.calls:
            raise Refused(f"got function {name!r}, expected one of {', '.join(self.calls)}")
        self.check(name, inputs)
        own = {key: self.weights[key] for key in self.manifest["functions"][name]["weights"]}
        return self.calls[name](own, inputs)

    def check(self, name, inputs):
        """Refuse inputs that the function does not take, before anything is computed."""
        told, sizes = self.manifest["functions"][name]["inputs"], {}
        if inputs.keys() != told.keys():
            raise Refused(f"got inputs {', '.join(inputs)} for {name}, expected {', '.join(told)}")
        for key, want in told.items():
            x = inputs[key]
            shape, dtype = getattr(x, "shape", None), str(getattr(x, "dtype", type(x).__name__))
            wanted = f"{want['dtype']} of the shape ({', '.join(map(str, want['shape']))})"
            if shape is None or dtype != want["dtype"] or len(shape) != len(want["shape"]):
                raise Refused(f"got {key} of {dtype} {shape}, expected {wanted}")
            for size, dim in zip(shape, want["shape"], strict=True):
                if size < 1 or size != (sizes.setdefault(dim, size) if isinstance(dim, str) else dim):
                    raise Refused(f"got {key} of the shape {shape}, expected {wanted}, with {sizes}")
                if isinstance(dim, str) and size > self.manifest["most"].get(dim, size):
                    most = self.manifest["most"][dim]
                    raise Refused(f"got {key} with a {dim} of {size}, expected at most {most}, try a shorter one")
        for key, want in told.items():
            least, below = want.get("least"), want.get("below")
            if isinstance(below, list):
                below = None if below[0] not in sizes else sizes[below[0]] + below[1]
            x = np.asarray(inputs[key]) if least is not None or below is not None else None
            if x is not None and (x.min() < (least or 0) or (below is not None and x.max() >= below)):
                raise Refused(f"got {key} from {x.min()} to {x.max()}, expected {least or 0} to {below}, exclusive")

    def check_probe(self):
        """Compute every function on the inputs that were kept, and compare with the outputs that were kept."""
        kept, platform = tensors(self.folder / "probe.safetensors"), jax.default_backend()
        tolerance = self.manifest["tolerance"]["same" if platform == self.manifest["platform"] else "other"]
        for name in self.calls:
            given = {key.split("/", 2)[2]: x for key, x in kept.items() if key.startswith(f"{name}/inputs/")}
            found = self(name, **given)
            for key, x in found.items():
                old, new = (np.asarray(each, np.float64) for each in (kept[f"{name}/outputs/{key}"], x))
                apart = np.abs(new - old).max(initial=0) / max(np.abs(old).max(initial=0), 1e-6)
                whole = not jnp.issubdtype(x.dtype, jnp.floating)
                if not (apart <= tolerance or (whole and platform != self.manifest["platform"])):
                    raise Refused(f"got {key} of {name} that differs by {apart:.1e} from the probe of {self.folder}, "
                                  f"expected at most {tolerance:.0e}, try export again")  # fmt: skip

    def encode(self, text):
        """The token ids of a text, without what comes before and after a whole one."""
        return self.tokenizer()[0](text)

    def decode(self, ids):
        return self.tokenizer()[1](ids)

    def tokenizer(self):
        path = self.folder / "tokenizer.json"
        told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        if told.get("kind") == "bytes":
            return lambda text: list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace")
        if told.get("kind") == "chars":
            known = told["characters"]
            return lambda text: [known.index(c) for c in text], lambda ids: "".join(known[i] for i in ids)
        try:
            from tokenizers import Tokenizer

            own = Tokenizer.from_file(str(path))
        except Exception as error:
            raise Refused(f"got a text ({error}), expected the package tokenizers, try token ids: [1, 2]") from None
        return lambda text: own.encode(text, add_special_tokens=False).ids, lambda ids: own.decode(ids, False)

    def ids_of(self, text):
        try:
            return json.loads(text) if text.startswith("[") and text.endswith("]") else self.encode(text)
        except ValueError as error:
            raise Refused(f"got {text[:40]!r}, expected text of the tokenizer's characters ({error})") from None

    def generate(self, ids, tokens=None):
        """The tokens that follow these greedily, up to an end, as with `jaxmodels sample --temperature 0`."""
        how, most = self.manifest["text"], self.manifest["most"].get("length")
        row, made = [*how["before"], *ids], []
        tokens = tokens or max(1, min(200, (most or len(row) + 200) - len(row)))
        room = -(-(len(row) + tokens) // 64) * 64
        if most is not None and len(row) + tokens > most:
            raise Refused(f"got {len(row)} tokens and {tokens} to add, expected at most {most} in all")
        padded = np.zeros((1, room if most is None else min(room, most)), np.int32)
        padded[0, : len(row)] = row
        out = self("start", tokens=padded, lengths=np.array([len(row)], np.int32))
        while True:
            logits = np.array(out["logits"][0])
            had = np.unique([*row, *made])
            penalty = np.float32(how["repetition_penalty"])
            logits[had] = np.where(logits[had] > 0, logits[had] / penalty, logits[had] * penalty)
            token = int(logits.argmax())
            if token in how["ends"]:
                return made
            made.append(token)
            if len(made) == tokens:
                return made
            cache = {name: x for name, x in out.items() if name.startswith("cache/")}
            out = self("step", tokens=np.array([token], np.int32), **cache)

    def translate(self, ids):
        """Translate token ids by beam search, as `jaxmodels sample` does."""
        how = self.manifest["text"]
        ids = [*how["before"], *ids, how["end"]]
        inputs, segment_ids = np.zeros((2, 1, -(-len(ids) // 8) * 8), np.int32)
        inputs[0, : len(ids)], segment_ids[0, : len(ids)] = ids, 1
        limits = np.array([min(max(2 * len(ids), 16), how["most"])], np.int32)
        found = np.asarray(self("translate", inputs=inputs, segment_ids=segment_ids, limits=limits)["tokens"][0])
        return found[: np.append(np.isin(found, how["ends"]), True).argmax()].tolist()

    def classify(self, inputs):
        """The likeliest class of each example, of a text or of an array."""
        given = {"inputs": inputs}
        if isinstance(inputs, str):
            how = self.manifest["text"]
            room = how["length"] - len(how["before"]) - len(how["after"])
            given["inputs"] = np.array([[*how["before"], *self.ids_of(inputs)[:room], *how["after"]]], np.int32)
            given["segment_ids"] = np.ones_like(given["inputs"])
        rows, names = np.asarray(self("classify", **given)["probabilities"]), self.manifest["classes"]
        if self.manifest["answers"] == "classes":
            return [{"labels": [names[i] for i in np.flatnonzero(row > 0.5)]} for row in rows]
        return [{"label": names[row.argmax()], "probability": round(float(row.max()), 6)} for row in rows]


def array(path):
    """The array in a .npy file."""
    try:
        found = np.load(path)
    except (OSError, ValueError, EOFError) as error:
        raise Refused(f"got {path}, expected a .npy file of numbers ({error})") from None
    if not isinstance(found, np.ndarray):
        raise Refused(f"got {path} with several arrays, expected a .npy file of one")
    return found


def numbers(version):
    return tuple(map(int, version.split(".")))


def exported(told, entry, module):
    """A function as `jax.export` has it, made of its StableHLO: `deserialize` would need the package flatbuffers."""
    scope, convention = export.SymbolicScope(), entry["convention"]

    def avals(arrays):
        dims = {key: ", ".join(map(str, x["shape"])) for key, x in arrays.items()}
        shapes = {key: export.symbolic_shape(dim, scope=scope) if dim else () for key, dim in dims.items()}
        return {key: core.ShapedArray(shapes[key], jnp.dtype(x["dtype"])) for key, x in arrays.items()}

    weights = avals({name: told["weights"][name] for name in entry["weights"]})
    given, out = ((weights, avals(entry["inputs"])), {}), avals(entry["outputs"])
    ins, outs = jax.tree.leaves(given), jax.tree.leaves(out)
    known: dict = dict.fromkeys(("ordered_effects", "unordered_effects", "disabled_safety_checks"), ())
    for side, arrays in (("in", ins), ("out", outs)):
        none = (None,) * len(arrays)  # where arrays lie is the caller's affair
        known |= {f"{side}_avals": tuple(arrays), f"_{side}_named_shardings": none, f"{side}_shardings_hlo": none}
    known |= {"fun_name": "call", "in_tree": jax.tree.structure(given), "out_tree": jax.tree.structure(out)}
    known |= {"platforms": tuple(told["platforms"]), "nr_devices": 1, "mlir_module_serialized": module}
    known |= {"calling_convention_version": convention["version"], "uses_global_constants": convention["constants"]}
    known |= {"module_kept_var_idx": tuple(convention["kept"]), "_get_vjp": None, "_has_named_shardings": True}
    fields = [field.name for field in dataclasses.fields(export.Exported)]  # they differ between versions of jax
    return export.Exported(**{name: known[name] for name in fields})


def manifest_of(folder):
    """The manifest, once it is what was written."""
    try:
        told = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        own = told.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Refused(f"got {folder}, expected an artefact with a manifest.json ({error})") from None
    if told.get("format") != "jaxmodels-artefact" or told.get("version") != 1:
        raise Refused(f"got {folder} of version {told.get('version')}, expected a jaxmodels-artefact of version 1")
    if hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest() != own:
        raise Refused(f"got {folder / 'manifest.json'}, which is damaged, expected it as written, try another copy")
    return told


def check_file(path, entry):
    """Refuse a file that is not the one that was written."""
    try:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise Refused(f"got no {path} ({error.strerror}), expected the file as written, try another copy") from None
    if found != entry["sha256"]:
        raise Refused(f"got {path}, which is damaged, expected sha256 {entry['sha256'][:12]}…, try another copy")


def main(words):
    model = load()
    has, told = model.manifest["functions"], model.manifest
    if not words:
        print(
            f"{told['model']} of step {told['step']}: {', '.join(has)} give what the probe says, jax {jax.__version__}"
        )
        return
    first, rest = words[0], [int(word) for word in words[1:]]
    asked = has.get("generate", {}).get("inputs", {})
    if rest and ("images" in asked or "labels" in asked):
        given: dict[str, np.ndarray] = {"seed": np.array([*rest, 0][1], np.int32)}
        if "labels" in asked:  # of the class that comes third, or of all in turn
            each = np.arange(rest[0]) % max(asked["labels"]["below"] - 1, 1) if len(rest) < 3 else rest[2]
            given["labels"] = np.full(rest[0], each, np.int32)
        else:
            given["images"] = np.zeros(rest[0], np.uint8)
        np.save(first, np.asarray(model("generate", **given)["images"]))
    elif "start" in has:
        ids = model.ids_of(first)
        found = [*ids, *model.generate(ids, *rest)]
        print(found if first.startswith("[") else model.decode(found))
    elif "translate" in has:
        found = model.translate(model.ids_of(first))
        print(found if first.startswith("[") else model.decode(found))
    elif "classify" in has:
        for answer in model.classify(first if "text" in told else array(first)):
            print(json.dumps(answer, ensure_ascii=False))
    else:
        raise Refused(f"got {first!r}, expected none for {', '.join(has)}, try it from Python: run.load()")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (Refused, OSError) as error:
        print(error, file=sys.stderr)
        sys.exit(2)
