"""CLIP rewards on a tiny model built offline, against transformers' own scores; sums and smoothing against closed forms."""

import pytest
import torch

pytest.importorskip("transformers")

import tiny_pipelines as tiny
import transformers
from safetensors.torch import save_file

from tiltflow.core.errors import TiltflowError
from tiltflow.rewards.classifier import image_classifier
from tiltflow.rewards.clip import aesthetic, clip_score, hps_v2, image_reward, load_clip, pick_score
from tiltflow.rewards.combine import Smoothed, WeightedSum

SIZE = 8
TEXTS = ["a cat", "blue", "a"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    text = tiny.clip_config().to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": SIZE, "patch_size": 4, "projection_dim": 16}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = transformers.CLIPModel(config).float()  # whatever the test before left as the default
    path = tmp_path_factory.mktemp("clip")
    model.save_pretrained(path)
    tiny.clip_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def single_precision():
    torch.set_default_dtype(torch.float32)


def images(n=3, height=SIZE, width=SIZE, seed=0):
    return torch.rand(n, 3, height, width, generator=torch.Generator().manual_seed(seed))


def test_scores_are_those_of_transformers(folder):
    """Its logits are e^τ cos, of pixels that are normalised alike; a text is compared with its own image."""
    reward = pick_score(folder)
    x = images()
    tokens = reward.tokenizer(TEXTS, padding=True, return_tensors="pt")
    logits = reward.model(pixel_values=reward.pixels(x), **tokens).logits_per_image
    assert torch.allclose(reward(x, TEXTS), logits.diagonal(), atol=1e-4)
    cos = logits.diagonal() / reward.model.logit_scale.exp()
    assert torch.allclose(hps_v2(folder)(x, TEXTS), cos, atol=1e-5)
    assert torch.allclose(clip_score(folder)(x, TEXTS), 100 * cos.clamp_min(0), atol=1e-3)
    assert not torch.allclose(reward(x, TEXTS[::-1]), logits.diagonal(), atol=1e-3)


def test_pixels_are_those_of_the_processor(folder):
    """Resized, cropped and normalised as by transformers' own processor of PIL images, up to its 8-bit rounding."""
    x = (images(2, 24, 32) * 255).round() / 255
    from PIL import Image

    pictures = [Image.fromarray((v * 255).byte().permute(1, 2, 0).numpy()) for v in x]
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    wanted = processor(pictures, return_tensors="pt")["pixel_values"]
    assert (pick_score(folder).pixels(x) - wanted).abs().max() < 0.05


def test_the_gradient_reaches_the_image(folder):
    """Against central differences, from an image of another size."""
    reward = pick_score(folder)
    x = images(1, 12, 10).requires_grad_(True)
    (gradient,) = torch.autograd.grad(reward(x, ["a cat"]).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        up, down = (reward(x + s * 0.01 * direction, ["a cat"]) for s in (1, -1))
    assert float((up - down) / 0.02) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_the_aesthetic_head_sees_the_image_alone(folder, tmp_path):
    generator = torch.Generator().manual_seed(1)
    weights = {"layers.0.weight": torch.randn(4, 16, generator=generator), "layers.0.bias": torch.zeros(4),
               "layers.2.weight": torch.randn(1, 4, generator=generator), "layers.2.bias": torch.ones(1)}  # fmt: skip
    save_file(weights, tmp_path / "head.safetensors")
    reward = aesthetic(folder, tmp_path / "head.safetensors")
    found = reward(images(), TEXTS)
    embedding = reward.model.visual_projection(reward.model.vision_model(reward.pixels(images())).pooler_output)
    unit = embedding / embedding.norm(dim=1, keepdim=True)
    wanted = (unit @ weights["layers.0.weight"].T) @ weights["layers.2.weight"].T + 1
    assert torch.allclose(found, wanted[:, 0], atol=1e-5) and torch.equal(found, reward(images(), TEXTS[::-1]))


def test_misuse(folder, tmp_path):
    with pytest.raises(TiltflowError, match="2 texts need as many images"):
        pick_score(folder)(images(), TEXTS[:2])
    with pytest.raises(TiltflowError, match="holds no CLIP model"):
        load_clip(tmp_path, lambda image, text, scale: image[:, 0])
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(TiltflowError, match=r"no layers\.0\.weight; it holds weight"):
        aesthetic(folder, tmp_path / "other.safetensors")
    save_file({"layers.0.weight": torch.zeros(1, 3), "layers.0.bias": torch.zeros(1)}, tmp_path / "narrow.safetensors")
    with pytest.raises(TiltflowError, match="takes embeddings of 3"):
        aesthetic(folder, tmp_path / "narrow.safetensors")
    with pytest.raises(TiltflowError, match="pip install image-reward"):
        image_reward()


def test_a_weighted_sum_keeps_its_parts():
    length = lambda x, texts: x[:, 0] * len(texts[0])  # noqa: E731
    total = WeightedSum({"mean": (lambda x, texts: x.mean(1), 2.0), "length": (length, -1.0)})
    x = torch.tensor([[1.0, 3.0], [0.0, 1.0]])
    assert total.parts(x, ["ab", "c"])["mean"].tolist() == [2.0, 0.5]
    assert total(x, ["ab", "c"]).tolist() == [2.0, 1.0]
    with pytest.raises(TiltflowError, match="weight of mean"):
        WeightedSum({"mean": (lambda x, texts: x.mean(1), 0.0)})
    with pytest.raises(TiltflowError, match="at least one"):
        WeightedSum({})


def test_smoothing_gives_a_step_a_gradient():
    """E[1{x + sε > 0}] = Φ(x/s); the quadratic rises by the variance of the draws."""
    step = Smoothed(lambda x, texts: (x[:, 0] > 0).float(), std=1.0, draws=20_000)
    assert float(step(torch.tensor([[0.5]]), [""])) == pytest.approx(0.6915, abs=0.01)
    square = Smoothed(lambda x, texts: x.square().sum(1), std=0.5, draws=20_000)
    x = torch.tensor([[1.0]], requires_grad=True)
    value = square(x, [""])
    assert float(value.detach()) == pytest.approx(1.25, abs=0.03)
    assert float(torch.autograd.grad(value.sum(), x)[0]) == pytest.approx(2.0, abs=0.03)
    with pytest.raises(TiltflowError, match="std > 0"):
        Smoothed(lambda x, texts: x, 0.0)


# ------------------------------------------------------------------------------------------------------------- classifiers


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    torch.manual_seed(1)
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIZE, patch_size=4,
        id2label={0: "cat", 1: "dog", 2: "bus"}, label2id={"cat": 0, "dog": 1, "bus": 2},
    )  # fmt: skip
    path = tmp_path_factory.mktemp("vit")
    transformers.ViTForImageClassification(config).float().save_pretrained(path)
    (path / "preprocessor_config.json").write_text('{"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}')
    return path


def test_a_class_has_the_probability_that_transformers_says(classifier):
    """Of the class that is named, or of one for all; probabilities sum to one; the gradient against differences."""
    x, named = images(), image_classifier(classifier)
    pixels = (x - torch.tensor([0.5, 0.4, 0.3])[:, None, None]) / torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    log_p = named.model(pixel_values=pixels).logits.log_softmax(1)
    assert torch.allclose(named(x, ["bus", "cat", "dog"]), log_p[[0, 1, 2], [2, 0, 1]], atol=1e-5)
    each = [image_classifier(classifier, label)(x, ["", "", ""]) for label in ("cat", "dog", "bus")]
    assert torch.allclose(torch.stack(each).exp().sum(0), torch.ones(3), atol=1e-5)
    x = x.requires_grad_(True)
    (gradient,) = torch.autograd.grad(named(x, ["bus"] * 3).sum(), x)
    step = 1e-2 * gradient / gradient.norm()
    with torch.no_grad():
        up, down = (float(named(x + s * step, ["bus"] * 3).sum()) for s in (1, -1))
    assert (up - down) / 2e-2 == pytest.approx(float(gradient.norm()), rel=0.05)


def test_classes_that_are_not_there(classifier, tmp_path):
    with pytest.raises(TiltflowError, match="no class 'cow'; it has bus"):
        image_classifier(classifier, "cow")
    with pytest.raises(TiltflowError, match="unknown: \\['cow'\\]"):
        image_classifier(classifier)(images(), ["cow", "cat", "dog"])
    with pytest.raises(TiltflowError, match="holds no image classifier"):
        image_classifier(tmp_path)
