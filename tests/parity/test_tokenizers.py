"""Texts become the tokens of transformers, also where tokenizer_config.json says what tokenizer.json does not."""

import json

import pytest

from jaxmodels.data import load_tokenizer
from jaxmodels.errors import UserError

pytestmark = pytest.mark.parity
tf = pytest.importorskip("transformers", reason="needs the parity extra: transformers")

TEXTS = ["one two", " one  two", "One TWO É", "one<extra>two", "one <extra>  [MASK] two", "日本 one"]
EXTRA = {"content": "<extra>", "lstrip": True, "rstrip": False, "single_word": False, "normalized": False}
BERT = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}


def pieces(folder, lowercase=True):
    """A BERT's tokenizer.json."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    rust = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore
    rust.normalizer = normalizers.BertNormalizer(lowercase=lowercase)  # type: ignore
    rust.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore
    trainer = trainers.WordPieceTrainer(vocab_size=60, special_tokens=[*BERT.values()])
    rust.train_from_iterator(["one two extra e 日 本"] * 9, trainer)
    around = [(token, rust.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    rust.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=around)  # type: ignore
    rust.save(str(folder / "tokenizer.json"))
    return BERT


def bytewise(folder, space=False):
    """A GPT-2's tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    rust = Tokenizer(models.BPE())
    rust.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=space)  # type: ignore
    rust.decoder = decoders.ByteLevel()  # type: ignore
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<s>", "</s>"], initial_alphabet=letters)
    rust.train_from_iterator([" one two extra"] * 9, trainer)
    rust.save(str(folder / "tokenizer.json"))
    return {"bos_token": "<s>", "eos_token": "</s>"}


def agree(folder, settings):
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    theirs, ours = tf.AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)
    expected = [theirs(text)["input_ids"] for text in TEXTS]
    assert [ids.tolist() for ids in ours.encode_many(TEXTS, special=True)] == expected
    (folder / "saved").mkdir()
    ours.save(folder / "saved")
    again = load_tokenizer(folder / "saved").encode_many(TEXTS, special=True)
    assert [ids.tolist() for ids in again] == expected, "a run's own file says all of it"


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_lower_case": False},
        {"do_lower_case": True},
        {"strip_accents": False},
        {"tokenize_chinese_chars": False},
    ],
    ids=str,
)
def test_the_letters_of_a_bert_are_those_of_its_settings(settings, lowercase, tmp_path):
    agree(tmp_path, {**pieces(tmp_path, lowercase), "tokenizer_class": "BertTokenizer", **settings})


def test_a_bert_without_a_tokenizer_class_has_that_of_its_model(tmp_path):
    named = pieces(tmp_path, lowercase=False)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    agree(tmp_path, named)


@pytest.mark.parametrize("file", [True, False])
@pytest.mark.parametrize("setting", [True, False])
def test_a_space_before_a_text_is_that_of_the_settings(setting, file, tmp_path):
    agree(tmp_path, {**bytewise(tmp_path, file), "tokenizer_class": "GPT2Tokenizer", "add_prefix_space": setting})


@pytest.mark.parametrize(
    "settings",
    [
        {"additional_special_tokens": ["<extra>"]},
        {"extra_special_tokens": {"image_token": "<extra>"}},
        {"added_tokens_decoder": {"999": {**EXTRA, "special": True}}},
        {"added_tokens_decoder": {"999": {**EXTRA, "special": False}}, "additional_special_tokens": ["[MASK]"]},
        {"pad_token": "<pad>", "additional_special_tokens": ["<extra>"]},
        {"mask_token": "o"},
    ],
    ids=str,
)
@pytest.mark.parametrize("made", [bytewise, pieces])
def test_tokens_that_the_settings_alone_name_are_added(made, settings, tmp_path):
    agree(tmp_path, {**made(tmp_path), "tokenizer_class": "PreTrainedTokenizerFast", **settings})


def test_a_token_to_pad_with_that_no_model_knows_leaves_the_vocabulary_as_it_is(tmp_path):
    named = bytewise(tmp_path)
    size = load_tokenizer(tmp_path).vocab_size
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**named, "pad_token": "<pad>"}))
    assert load_tokenizer(tmp_path).vocab_size == size


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"split_special_tokens": True}, "got split_special_tokens True"),
        ({"additional_special_tokens": [3]}, "got the token '3'"),
        ({"added_tokens_decoder": {"1": {"special": True}}}, "expected its text"),
    ],
)
def test_settings_that_are_not_followed_or_wrong_are_refused(settings, said, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**bytewise(tmp_path), **settings}))
    with pytest.raises(UserError, match=said) as error:
        load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
