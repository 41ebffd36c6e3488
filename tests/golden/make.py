"""`python tests/golden/make.py [NAME ...]`: small random models of transformers, with inputs and what they give.

A folder each: config.json and model.safetensors as `save_pretrained` writes them, expected.npz with the inputs (as
jaxmodels takes them) and the outputs in float32. Needs the parity extra; the tests that read the folders do not.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers as tf

V, B, T = 23, 2, 7
SIZES = {"hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 3}
DECODER = {
    **SIZES,
    "num_key_value_heads": 1,
    "vocab_size": V,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
DECODER |= {"attn_implementation": "eager"}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
TEXT = {**SIZES, "vocab_size": V, "max_position_embeddings": 9, "attn_implementation": "eager"}
IMAGE = {**SIZES, "image_size": 8, "patch_size": 4, "attn_implementation": "eager"}
CLASSES = {"id2label": {0: "cat", 1: "dog", 2: "cow"}, "label2id": {"cat": 0, "dog": 1, "cow": 2}}

rng = np.random.default_rng(0)


def tokens(count: int = V, length: int = T) -> np.ndarray:
    return rng.integers(2, count, (B, length)).astype(np.int32)


def causal(model):
    ids = tokens()
    return {"0": ids}, {"logits": model(torch.from_numpy(ids).long()).logits}


def gpt2():
    config = tf.GPT2Config(
        vocab_size=V, n_embd=12, n_layer=2, n_head=3, n_positions=9, n_inner=20, bos_token_id=0, eos_token_id=0
    )
    return tf.GPT2LMHeadModel(config), causal


def llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER, rope_parameters=LLAMA3)), causal


def mistral():
    return tf.MistralForCausalLM(tf.MistralConfig(**DECODER, sliding_window=3, head_dim=6)), causal


def qwen2():
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**DECODER, tie_word_embeddings=True)), causal


def qwen3():
    return tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=6)), causal


def mixtral():
    return tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, num_local_experts=3, num_experts_per_tok=2)), causal


def t5():
    config = tf.T5Config(
        vocab_size=V, d_model=12, d_kv=5, d_ff=20, num_layers=2, num_decoder_layers=1, num_heads=3,
        relative_attention_num_buckets=6, relative_attention_max_distance=9,
    )  # fmt: skip

    def run(model):
        source, target = tokens(length=6), tokens()
        logits = model(
            input_ids=torch.from_numpy(source).long(), decoder_input_ids=torch.from_numpy(target).long()
        ).logits
        return {"0": source, "1": target}, {"logits": logits}

    return tf.T5ForConditionalGeneration(config), run


def bart():
    config = tf.BartConfig(
        vocab_size=V, max_position_embeddings=9, d_model=12, encoder_layers=2, decoder_layers=1,
        encoder_attention_heads=3, decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20,
    )  # fmt: skip

    def run(model):
        source, target, mask = tokens(length=6), tokens(), np.ones((B, 6), np.int32)
        mask[1, -2:] = 0  # padding
        given = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": target}
        logits = model(**{name: torch.from_numpy(x).long() for name, x in given.items()}).logits
        return {"0": source, "1": target, "segment_ids": mask}, {"logits": logits}

    return tf.BartForConditionalGeneration(config), run


def bert(model):
    ids, types = tokens(), rng.integers(0, 2, (B, T)).astype(np.int32)
    mask = np.ones((B, T), np.int32)
    mask[1, -2:] = 0  # padding
    logits = model(
        torch.from_numpy(ids).long(),
        attention_mask=torch.from_numpy(mask),
        token_type_ids=torch.from_numpy(types).long(),
    ).logits
    if logits.ndim == 3:
        logits[mask == 0] = torch.nan  # what padding gives is nobody's business
    return {"0": ids, "types": types, "segment_ids": mask}, {"logits": logits}


def bert_masked_lm():
    return tf.BertForMaskedLM(tf.BertConfig(**TEXT)), bert


def bert_classifier():
    return tf.BertForSequenceClassification(tf.BertConfig(**TEXT, **CLASSES)), bert


def images(size: int) -> np.ndarray:
    return rng.normal(size=(B, size, size, 3)).astype(np.float32)


def classify(model):
    x = images(getattr(model.config, "image_size", 32))
    return {"0": x}, {"logits": model(torch.from_numpy(x).permute(0, 3, 1, 2)).logits}


def vit():
    return tf.ViTForImageClassification(tf.ViTConfig(**IMAGE, **CLASSES)), classify


def resnet():
    config = tf.ResNetConfig(embedding_size=6, hidden_sizes=[8, 12], depths=[1, 2], **CLASSES)
    config.image_size = 32  # ours is made for one size
    return tf.ResNetForImageClassification(config), classify


def clip():
    config = tf.CLIPConfig(
        text_config={**TEXT, "eos_token_id": 1, "bos_token_id": 0}, vision_config={**IMAGE}, projection_dim=10
    )

    def run(model):
        ids, x = tokens(), images(8)
        ids[0, 4], ids[1, 6] = 1, 1  # where the texts end
        out = model(input_ids=torch.from_numpy(ids).long(), pixel_values=torch.from_numpy(x).permute(0, 3, 1, 2))
        scale = {"scale": model.logit_scale.exp()}
        return {"0": x, "1": ids}, {"image": out.image_embeds, "text": out.text_embeds, **scale}

    return tf.CLIPModel(config), run


def wav2vec2():
    config = tf.Wav2Vec2Config(
        **SIZES, vocab_size=V, conv_dim=(6, 8), conv_kernel=(5, 3), conv_stride=(3, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=3, attn_implementation="eager",
    )  # fmt: skip

    def run(model):
        x = rng.normal(size=(B, 60)).astype(np.float32)
        seen = tf.Wav2Vec2FeatureExtractor()(list(x), sampling_rate=16000, return_tensors="pt").input_values
        return {"0": x}, {"logits": model(seen).logits}

    return tf.Wav2Vec2ForCTC(config), run


def whisper():
    config = tf.WhisperConfig(
        vocab_size=V, d_model=12, encoder_layers=1, decoder_layers=2, encoder_attention_heads=3,
        decoder_attention_heads=3, encoder_ffn_dim=20, decoder_ffn_dim=20, max_source_positions=5,
        max_target_positions=9, num_mel_bins=6, bos_token_id=0, eos_token_id=0, pad_token_id=0,
        decoder_start_token_id=1, attn_implementation="eager",
    )  # fmt: skip

    def run(model):
        x, ids = (0.3 * rng.normal(size=(B, 1600))).astype(np.float32), tokens()
        extract = tf.WhisperFeatureExtractor(feature_size=6, chunk_length=1, n_samples=1600)
        extract.n_samples = 1600
        seen = extract(list(x), sampling_rate=16000, return_tensors="pt", max_length=1600).input_features
        logits = model(input_features=seen, decoder_input_ids=torch.from_numpy(ids).long()).logits
        return {"0": x, "1": ids}, {"logits": logits}

    return tf.WhisperForConditionalGeneration(config), run


def segformer():
    config = tf.SegformerConfig(
        hidden_sizes=[4, 6], depths=[2, 1], num_attention_heads=[1, 2], sr_ratios=[2, 1], patch_sizes=[7, 3],
        strides=[4, 2], mlp_ratios=[2, 2], num_encoder_blocks=2, decoder_hidden_size=5, image_size=16, **CLASSES,
    )  # fmt: skip

    def segment(model):
        found, logits = classify(model)
        return found, {"logits": logits["logits"].permute(0, 2, 3, 1)}

    return tf.SegformerForSemanticSegmentation(config), segment


MEDIUM = V - 1
"""The token that stands for an image or a sound."""


def look(model):
    size = model.config.vision_config.image_size
    ids, x = tokens() % MEDIUM, images(size)
    ids[:, 1:5] = MEDIUM
    pixels = torch.from_numpy(x).permute(0, 3, 1, 2)
    pixels = pixels if model.config.model_type == "llava" else pixels[:, None]
    logits = model(input_ids=torch.from_numpy(ids).long(), pixel_values=pixels).logits
    return {"0": ids, "1": x}, {"logits": logits}


def llava():
    seen = {"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **SIZES}
    text = {"model_type": "llama", **DECODER}
    config = tf.LlavaConfig(text_config=text, vision_config=seen, image_token_index=MEDIUM)
    return tf.LlavaForConditionalGeneration(config), look


def idefics3():
    text, seen = {"model_type": "llama", **DECODER}, {"image_size": 16, "patch_size": 4, **SIZES}
    config = tf.Idefics3Config(text_config=text, vision_config=seen, image_token_id=MEDIUM, scale_factor=2)
    return tf.Idefics3ForConditionalGeneration(config), look


def smolvlm():
    text, seen = {"model_type": "llama", **DECODER}, {"image_size": 16, "patch_size": 4, **SIZES}
    config = tf.SmolVLMConfig(text_config=text, vision_config=seen, image_token_id=MEDIUM, scale_factor=2)
    return tf.SmolVLMForConditionalGeneration(config), look


def qwen2_audio():
    heard = dict(model_type="qwen2_audio_encoder", d_model=12, encoder_layers=1, encoder_attention_heads=3,
                 encoder_ffn_dim=20, num_mel_bins=6, max_source_positions=8)  # fmt: skip
    text = {"model_type": "qwen2", **DECODER}

    def listen(model):
        x, ids = (0.3 * rng.normal(size=(B, 2560))).astype(np.float32), tokens() % MEDIUM
        ids[:, 1:5] = MEDIUM
        extract = tf.WhisperFeatureExtractor(feature_size=6, chunk_length=1)
        seen = extract(list(x), sampling_rate=16000, return_tensors="pt", max_length=2560).input_features
        mask, ids_of_theirs = torch.ones(B, 16).long(), torch.from_numpy(ids).long()
        given = {"input_ids": ids_of_theirs, "attention_mask": torch.ones_like(ids_of_theirs)}
        return {"0": ids, "1": x}, {"logits": model(**given, input_features=seen, feature_attention_mask=mask).logits}

    config = tf.Qwen2AudioConfig(text_config=text, audio_config=heard, audio_token_index=MEDIUM)
    return tf.Qwen2AudioForConditionalGeneration(config), listen


def detr():
    config = tf.DetrConfig(
        use_timm_backbone=False,
        backbone_config=tf.ResNetConfig(
            embedding_size=4, hidden_sizes=[4, 6], depths=[1, 2], layer_type="basic", out_features=["stage2"]
        ),
        d_model=8, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=6, decoder_ffn_dim=6, num_queries=3, **CLASSES,
    )  # fmt: skip
    config.image_size = 32  # ours is made for one size

    def detect(model):
        x = images(32)
        out = model(torch.from_numpy(x).permute(0, 3, 1, 2))
        return {"0": x}, {"found": torch.cat([out.pred_boxes, out.logits], -1)}

    return tf.DetrForObjectDetection(config), detect


def rt_detr():
    config = tf.RTDetrConfig(
        backbone_config=tf.RTDetrResNetConfig(
            embedding_size=4, hidden_sizes=[4, 6, 8, 10], depths=[1, 1, 1, 1], layer_type="basic",
            out_features=["stage2", "stage3", "stage4"],
        ),
        encoder_in_channels=[6, 8, 10], decoder_in_channels=[8, 8, 8], encoder_hidden_dim=8, d_model=8,
        decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=6, decoder_ffn_dim=6,
        decoder_n_points=2, hidden_expansion=0.5, num_queries=3, num_denoising=0, **CLASSES,
    )  # fmt: skip
    config.image_size = 32  # ours is made for one size

    def detect(model):
        x = images(32)
        out = model(torch.from_numpy(x).permute(0, 3, 1, 2))
        return {"0": x}, {"found": torch.cat([out.pred_boxes, out.logits], -1)}

    return tf.RTDetrForObjectDetection(config), detect


MODELS = (
    gpt2, llama, mistral, qwen2, qwen3, mixtral, t5, bart, bert_masked_lm, bert_classifier, vit, resnet, segformer,
    clip, wav2vec2, whisper, llava, idefics3, smolvlm, qwen2_audio, detr, rt_detr,
)  # fmt: skip


def fill(model: torch.nn.Module) -> torch.nn.Module:
    """Random numbers in which every parameter matters: no bias of 0, no scale of 1."""
    for name, x in [*model.named_parameters(), *model.named_buffers()]:
        if "running_var" in name:
            x.data = torch.rand_like(x) + 0.5
        elif "running_mean" in name or isinstance(x, torch.nn.Parameter):
            norm = x.ndim == 1 and name.endswith("weight")
            x.data = torch.randn_like(x) * 0.3 + float(norm)
    return model.float().eval()


def main(names: list[str]) -> None:
    global rng
    for make in MODELS:
        if names and make.__name__ not in names:
            continue
        torch.manual_seed(1)
        rng = np.random.default_rng(1)
        model, run = make()
        folder = Path(__file__).parent / make.__name__
        fill(model).save_pretrained(folder)
        with torch.no_grad():
            inputs, outputs = run(model)
        (folder / "generation_config.json").unlink(missing_ok=True)
        found = {f"in/{name}": x for name, x in inputs.items()}
        found |= {f"out/{name}": x.numpy() for name, x in outputs.items()}
        np.savez(folder / "expected.npz", **found)
        print(make.__name__, sum(path.stat().st_size for path in folder.iterdir()), "bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
