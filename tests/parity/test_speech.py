"""wav2vec 2.0, log-mel frames, the CTC loss and error rates equal transformers', PyTorch's and jiwer's."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxmodels
from jaxmodels import config as configs
from jaxmodels.cli import main
from jaxmodels.models.spectrogram import log_mel
from jaxmodels.tasks import ctc
from jaxmodels.tasks.transcription import errors
from tests.data.test_sounds import wav

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch", reason="needs the parity extra: torch")
transformers = pytest.importorskip("transformers", reason="needs the parity extra: transformers")
jiwer = pytest.importorskip("jiwer", reason="needs the parity extra: jiwer")

SMALL = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 3, "vocab_size": 11,
    "conv_dim": (8, 12, 12), "conv_kernel": (10, 3, 2), "conv_stride": (5, 2, 2), "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4,
}  # fmt: skip
LAYOUTS = {
    "base": {},
    "large": {"feat_extract_norm": "layer", "conv_bias": True, "do_stable_layer_norm": True},
}
LENGTHS = (403, 250, 331)


@pytest.fixture(scope="module", params=LAYOUTS)
def pair(request, tmp_path_factory):
    """A random model of transformers, and ours with its weights."""
    torch.manual_seed(0)
    theirs = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**SMALL, **LAYOUTS[request.param])).eval()
    for name, x in theirs.named_parameters():
        norm = x.ndim == 1 and name.endswith("weight")
        x.data = torch.randn_like(x) * (0.2 if x.ndim < 2 else x[0].numel() ** -0.5) + float(norm)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    return theirs, *jaxmodels.load_pretrained(folder)


def test_logits_are_those_of_each_sound_alone_whatever_pads_it(pair):
    """Of transformers each sound alone: its base layout would see padding in the statistics of its first layer."""
    theirs, model, params = pair
    rng = np.random.default_rng(0)
    sounds = [0.3 * rng.normal(size=n).astype(np.float32) + 0.1 for n in LENGTHS]
    extract = transformers.Wav2Vec2FeatureExtractor()
    padded = np.stack([np.pad(x, (0, max(LENGTHS) - len(x)), constant_values=0.7) for x in sounds])
    logits = jax.jit(model.apply)(params, padded, lengths=jnp.array(LENGTHS))
    for row, x in zip(np.asarray(logits), sounds, strict=True):
        with torch.no_grad():
            wanted = theirs(extract(x, sampling_rate=16000, return_tensors="pt").input_values).logits[0].numpy()
        assert len(wanted) == model.config.frames(len(x)) and np.abs(wanted).max() > 0.5
        np.testing.assert_allclose(row[: len(wanted)], wanted, rtol=0, atol=1e-4)


def test_an_imported_recognizer_writes_what_transformers_reads(pair, tmp_path, capsys):
    """With the characters of vocab.json, the blank at 0 and | between words; and is exported with them."""
    theirs, _, _ = pair
    letters = ["<pad>", "<s>", "</s>", "<unk>", "|", *"ABCDEF"]
    (tmp_path / "hf").mkdir()
    theirs.save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(letters)}))
    reads = transformers.Wav2Vec2CTCTokenizer(str(tmp_path / "hf" / "vocab.json"))
    sound = np.random.default_rng(0).integers(-9000, 9000, 900).astype(np.int16)
    (tmp_path / "x.wav").write_bytes(wav(sound / 32768, 16000))
    seen = transformers.Wav2Vec2FeatureExtractor()(sound / 32768, sampling_rate=16000, return_tensors="pt").input_values
    with torch.no_grad():
        wanted = reads.batch_decode(theirs(seen).logits.argmax(-1))[0]
    assert len(wanted) > 3
    run, out = str(tmp_path / "run"), tmp_path / "out"
    assert main(["import", str(tmp_path / "hf"), "--out", run]) == 0
    task = configs.read(run)[0].task
    assert (task.blank, task.space) == (0, 4)
    # which has 16,000 frames in 20 seconds
    saved = tmp_path / "run" / "config.json"
    saved.write_text(saved.read_text().replace('"seconds": 20.0', '"seconds": 0.06'))
    capsys.readouterr()
    assert main(["predict", run, str(tmp_path / "x.wav")]) == 0
    said = json.loads(capsys.readouterr().out)["transcript"]
    assert " ".join(said.split()) == " ".join(wanted.split())
    assert main(["export", run, str(out)]) == 0
    assert (out / "vocab.json").read_bytes() == (tmp_path / "hf" / "vocab.json").read_bytes()
    assert (out / "model.safetensors").read_bytes() == (tmp_path / "hf" / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "name, published, more",
    [
        ("wav2vec2-base", 95e6, {}),
        ("wav2vec2-large-lv60", 315e6, LAYOUTS["large"]),
    ],
)
def test_published_sizes_have_their_parameters(name, published, more):
    large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
    with torch.device("meta"):
        sizes = {} if published < 1e8 else large
        theirs = transformers.Wav2Vec2ForCTC(transformers.Wav2Vec2Config(**sizes, **more))
    count = jaxmodels.create(name).count()
    assert count == sum(p.numel() for p in theirs.parameters())
    assert count == pytest.approx(published, rel=0.01)


def test_log_mel_frames_are_whispers():
    rng = np.random.default_rng(0)
    x = (0.1 * rng.normal(size=(2, 8000)) * np.sin(np.arange(8000) / 700)).astype(np.float32)
    x[1, 5000:] = 0
    theirs = transformers.WhisperFeatureExtractor(feature_size=80, chunk_length=1, n_samples=8000)
    theirs.n_samples = 8000
    wanted = theirs(list(x), sampling_rate=16000, return_tensors="np", max_length=8000)["input_features"]
    np.testing.assert_allclose(log_mel(jnp.asarray(x), 16000, 80), wanted.swapaxes(1, 2), rtol=0, atol=1e-4)


def texts(rng, rows, length, below):
    """Texts of every length up to this one."""
    ids = rng.integers(0, below, (rows, length))
    return np.where(np.arange(length) < rng.integers(0, length + 1, rows)[:, None], ids, -1)


def test_ctc_loss_and_its_gradient_are_those_of_pytorch():
    rng = np.random.default_rng(0)
    B, T, V, U = 12, 20, 5, 8
    logits, targets = 3 * rng.normal(size=(B, T, V)).astype(np.float32), texts(rng, B, U, V - 1)
    frames = rng.integers(1, T + 1, B)
    targets[0], frames[0] = [1, 1, -1, -1, -1, -1, -1, -1], 2  # which lacks a frame for the blank
    targets[1] = -1
    counts = torch.tensor((targets >= 0).sum(1))
    given = torch.tensor(logits, requires_grad=True)
    wanted = torch.nn.CTCLoss(blank=V - 1, reduction="none")(
        torch.log_softmax(given, -1).transpose(0, 1), torch.tensor(np.maximum(targets, 0)), torch.tensor(frames), counts
    )
    torch.where(torch.isfinite(wanted), wanted, 0.0).sum().backward()

    def total(logits):
        each = ctc.ctc_loss(logits, jnp.asarray(frames), jnp.asarray(targets), V - 1)
        return jnp.where(jnp.isfinite(each), each, 0.0).sum(), each

    (_, each), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(logits)
    assert np.isinf(each[0]) and np.isinf(each).sum() < B / 2
    np.testing.assert_allclose(each, wanted.detach(), rtol=1e-5)
    rows = np.isfinite(np.asarray(each))  # PyTorch's gradient of the others is no number
    np.testing.assert_allclose(np.asarray(slope)[rows], given.grad.numpy()[rows], atol=3e-5)
    assert not np.asarray(slope)[~rows].any()


def test_error_rates_are_those_of_jiwer():
    rng = np.random.default_rng(0)
    found, wanted = texts(rng, 80, 13, 4), texts(rng, 80, 9, 4)
    spelled = [["".join(" abc"[i] for i in row if i >= 0) for row in ids] for ids in (found, wanted)]
    told = [i for i, text in enumerate(spelled[1]) if text.strip()]  # jiwer refuses a reference without words
    hypotheses, references = ([each[i] for i in told] for each in spelled)
    sums = errors(jnp.asarray(found), jnp.asarray(wanted), 0)
    rates = {name: float(total) / float(count) for name, (total, count) in sums.items()}
    assert rates["wer"] == pytest.approx(jiwer.wer(references, hypotheses), rel=1e-6)
    assert rates["cer"] == pytest.approx(jiwer.cer(references, hypotheses), rel=1e-6)
