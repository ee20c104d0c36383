"""Vision-language models whose language part is compressed: the same as with the dense twin, in float32."""

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("vllm", reason="needs vLLM")
try:
    import torchvision  # noqa: F401
except (ImportError, RuntimeError) as error:  # RuntimeError: a build for another torch
    pytest.skip(f"vLLM needs torchvision for vision-language models: {error}", allow_module_level=True)

from tests.helpers import GATED, compress_randomly, edit_tensors
from tests.plugin.models import TOKENS, write_tokenizer
from tests.plugin.test_engine import PROMPTS, engines

pytestmark = pytest.mark.slow

PROJECTOR = "multi_modal_projector.linear_1"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"


def save(model, folder):
    """Write a model with other random values, biases and norms too: left at 0 and 1 they would hide mistakes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.1
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    model.save_pretrained(folder)


def tokenizer_with(folder, *names):
    """A tokenizer of bytes that has more special tokens, and their numbers."""
    from transformers import AutoTokenizer

    write_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"additional_special_tokens": list(names)})
    return tokenizer, tokenizer.convert_tokens_to_ids(list(names))


def make_llava(folder):
    """CLIP with four patches and a class token, a projector, and Llama."""
    import transformers as hf

    tokenizer, (image,) = tokenizer_with(folder, "<image>")
    tower = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    config = hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **tower},
        text_config={"model_type": "llama", **GATED, "vocab_size": TOKENS},
        image_token_index=image,
        image_seq_length=4,
        tie_word_embeddings=False,
    )
    save(hf.LlavaForConditionalGeneration(config).float(), folder)
    # As in published files. transformers 5.19 leaves a part of the name out, and vLLM 0.32 does not know that.
    path = folder / "model.safetensors"
    whole, short = "vision_tower.vision_model.", "vision_tower."
    tensors = load_file(path).items()
    save_file({n if whole in n else n.replace(short, whole): t for n, t in tensors}, path, {"format": "pt"})
    images = hf.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28)
    options = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    hf.LlavaProcessor(images, tokenizer, **options).save_pretrained(folder)
    return folder


def make_qwen2_vl(folder):
    """Patches of four pixels, and Qwen2 with positions in three dimensions."""
    import transformers as hf

    names = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer, (image, video, start, end) = tokenizer_with(folder, *names)
    rope = {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 10000.0}
    text = {**GATED, "vocab_size": TOKENS, "rope_parameters": rope}
    del text["head_dim"]
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 128, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    config = hf.Qwen2VLConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=False,
    )
    save(hf.Qwen2VLForConditionalGeneration(config).float(), folder)
    size = {"shortest_edge": 64, "longest_edge": 1024}
    images, videos = (each(patch_size=4, size=size) for each in (hf.Qwen2VLImageProcessor, hf.Qwen2VLVideoProcessor))
    hf.Qwen2VLProcessor(images, tokenizer, videos, chat_template=tokenizer.chat_template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """LLaVA, whose names are those of vLLM; Qwen2-VL, whose names vLLM changes, with a compressed head."""
    folder = tmp_path_factory.mktemp("vision")
    projector = (PROJECTOR, "multi_modal_projector.linear_2")
    llava = compress_randomly(
        make_llava(folder / "llava" / "dense"),
        folder / "llava",
        ignore=("language_model.lm_head", *projector, r"re:vision_tower\."),
    )
    qwen = compress_randomly(
        make_qwen2_vl(folder / "qwen" / "dense"), folder / "qwen", ignore=(r"re:visual\.",), head=True
    )
    return {"llava": llava, "qwen": qwen}


@pytest.fixture(scope="module")
def served(made, tmp_path_factory):
    """What each engine gives, by name."""
    folder = tmp_path_factory.mktemp("served")
    broken = shutil.copytree(made["llava"].checkpoint, folder / "broken")
    edit_tensors(broken, remove=(f"{PROJECTOR}.weight",))
    options = {"skip_tokenizer_init": False, "limit_mm_per_prompt": {"image": 1, "video": 0}}
    common = {"prompts": PROMPTS, "features": ["images"], "options": options}
    jobs = {"broken": {"model": str(broken), "text": "<image>", **common}}
    for name, text in (("llava", "ab<image>cd"), ("qwen", f"ab{IMAGE}cd")):
        for kind in ("twin", "checkpoint"):
            jobs[f"{name} {kind}"] = {"model": str(getattr(made[name], kind)), "text": text, **common}
    return dict(zip(jobs, engines(folder, list(jobs.values()), timeout=1200), strict=True))


@pytest.mark.parametrize("name", ["llava", "qwen"])
def test_text_and_images_equal_the_twin(made, served, name):
    twin, compressed = served[f"{name} twin"], served[f"{name} checkpoint"]
    assert "tokens" in twin, twin
    assert compressed.get("tokens") == twin["tokens"], compressed
    assert compressed["images"] == twin["images"]
    # What is seen decides what is said.
    assert twin["images"][0] != twin["images"][1]
    assert len(made[name].matrices) == 2 * 7 + (name == "qwen")


def test_a_missing_dense_weight_is_named(served):
    expected = f"tensor model.{PROJECTOR}.weight (as transformers calls it), which the model needs, is missing"
    assert expected in served["broken"].get("error", "no error")
