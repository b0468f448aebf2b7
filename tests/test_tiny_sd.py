"""The world of shapes, its judge, the shards and the committed teacher (what `make_tiny_sd.py` made)."""

import copy
import io
import json
import random
import tarfile
from collections import Counter
from pathlib import Path

import measure_quality
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline
from make_tiny_sd import (
    COLORS,
    SHAPES,
    all_triples,
    build_tokenizer,
    caption,
    caption_accuracy,
    draw,
    evaluation_prompts,
    judge,
    paint,
    parse_args,
    training_triples,
    write_shards,
)
from PIL import Image, ImageDraw
from safetensors import safe_open

TESTS = Path(__file__).parent
TINY_SD = TESTS / "tiny-sd"
TRAIN_SHARDS = sorted((TESTS / "shapes" / "train").glob("*.tar"))
EVAL_SHARDS = sorted((TESTS / "shapes" / "eval").glob("*.tar"))
TRIPLE_OF = {caption(*triple): triple for triple in all_triples()}


@pytest.fixture(scope="module")
def teacher() -> StableDiffusionPipeline:
    return DiffusionPipeline.from_pretrained(TINY_SD)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[tuple[str, str, str], tuple[str | None, str | None, str | None]]]:
    """1,000 fresh images: what was drawn and what the judge reads."""
    rng = random.Random(31)
    triples = [rng.choice(all_triples()) for _ in range(1000)]
    return [(triple, judge(draw(*triple, rng))) for triple in triples]


def read_shard(path: Path) -> list[tuple[str, Image.Image, str]]:
    """Key, image and caption of each sample."""
    with tarfile.open(path) as tar:
        data = {name: tar.extractfile(name).read() for name in tar.getnames()}
    keys = sorted({name.split(".")[0] for name in data})
    assert sorted(data) == sorted(f"{key}.{suffix}" for key in keys for suffix in ("jpg", "txt"))
    return [(key, Image.open(io.BytesIO(data[f"{key}.jpg"])), data[f"{key}.txt"].decode()) for key in keys]


# The world


def test_world_has_the_promised_size() -> None:
    assert len(SHAPES) >= 4 and len(COLORS) >= 8
    assert len(set(all_triples())) == len(SHAPES) * len(COLORS) * (len(COLORS) - 1)
    values = np.array(list(COLORS.values()), dtype=float)
    gaps = np.linalg.norm(values[:, None] - values, axis=-1)
    assert gaps[gaps > 0].min() > 160  # the judge's docstring says so
    assert caption("circle", "red", "blue") == "a red circle on a blue background"


def test_draw_depends_on_the_generator_alone() -> None:
    first, again, other = (draw("star", "red", "cyan", random.Random(seed)).tobytes() for seed in (1, 1, 2))
    assert first == again != other
    assert draw("star", "red", "cyan", random.Random(1)).size == (64, 64)
    with pytest.raises(ValueError, match="no shape 'heart'"):
        draw("heart", "red", "cyan", random.Random(1))


def test_held_out_triples() -> None:
    held_out, training = evaluation_prompts(), training_triples()
    assert held_out == evaluation_prompts()
    assert len(set(held_out)) == len(held_out) >= 96
    assert len(held_out) >= 0.1 * len(all_triples())
    assert set(held_out) | set(training) == set(all_triples()) and not set(held_out) & set(training)
    # Every pair of colours, and every shape in every colour and on every background, is in training.
    pairs = len(COLORS) * (len(COLORS) - 1)
    assert len({(c, b) for _, c, b in training}) == pairs
    assert len({(s, c) for s, c, _ in training}) == len({(s, b) for s, _, b in training}) == len(SHAPES) * len(COLORS)


# The judge


def test_judge_reads_fresh_drawings(drawn: list) -> None:
    assert np.mean([read == triple for triple, read in drawn]) >= 0.995


def test_judge_is_not_fooled_by_shuffled_captions(drawn: list) -> None:
    shuffled = [triple for triple, _ in drawn]
    random.Random(32).shuffle(shuffled)
    assert np.mean([read == triple for triple, (_, read) in zip(shuffled, drawn, strict=True)]) <= 0.05


def test_judge_rejects_noise_and_blanks() -> None:
    generator = np.random.default_rng(33)
    for _ in range(20):
        noise = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        assert judge(Image.fromarray(noise)) == (None, None, None)
    for name, value in COLORS.items():
        assert judge(Image.new("RGB", (64, 64), value)) == (None, None, name)
    assert judge(Image.new("RGB", (64, 64), (128, 128, 128))) == (None, None, None)


NO_SHAPES = {
    "ellipse": lambda pen: pen.ellipse((60, 90, 200, 170), fill=COLORS["red"]),
    "bar": lambda pen: pen.rectangle((60, 90, 200, 150), fill=COLORS["red"]),
    "diamond": lambda pen: pen.polygon([(128, 60), (196, 128), (128, 196), (60, 128)], fill=COLORS["red"]),
    "half": lambda pen: pen.pieslice((60, 60, 200, 200), 0, 180, fill=COLORS["red"]),
    "ring": lambda pen: pen.ellipse((60, 60, 200, 200), outline=COLORS["red"], width=20),
    "upside down": lambda pen: pen.polygon([(60, 80), (196, 80), (128, 196)], fill=COLORS["red"]),
    "two circles": lambda pen: [pen.ellipse((x, 90, x + 70, 160), fill=COLORS["red"]) for x in (50, 130)],
}


@pytest.mark.parametrize("name", NO_SHAPES)
def test_judge_rejects_what_is_none_of_the_shapes(name: str) -> None:
    image = Image.new("RGB", (256, 256), COLORS["blue"])
    NO_SHAPES[name](ImageDraw.Draw(image))
    assert judge(image) == (None, "red", "blue")


def test_judge_rejects_two_colors_and_a_spoilt_image() -> None:
    two = draw("circle", "red", "blue", random.Random(34))
    two.paste(COLORS["yellow"], (32, 8, 56, 56))
    assert judge(two)[1] is None
    spoilt = np.asarray(draw("circle", "red", "blue", random.Random(34))).copy()
    spoilt[40:56, 4:60] = 128
    assert judge(Image.fromarray(spoilt))[0] is None


def test_judge_forgives_a_wobbly_outline() -> None:
    rng, generator = random.Random(35), np.random.default_rng(35)
    right = []
    for triple in random.Random(36).sample(all_triples(), 100):
        image = draw(*triple, rng)
        shift = generator.normal(0, 0.6, (2, 9, 9))  # pixels; smooth over the image
        dy, dx = (np.asarray(Image.fromarray(s.astype(np.float32)).resize((64, 64), 3)) for s in shift)
        rows, columns = np.mgrid[:64, :64]
        wobbly = np.asarray(image)[
            np.clip(np.round(rows + dy), 0, 63).astype(int), np.clip(np.round(columns + dx), 0, 63).astype(int)
        ]
        right.append(judge(Image.fromarray(wobbly)) == triple)
    assert np.mean(right) >= 0.97


# The shards


def test_shards_hold_what_their_captions_say() -> None:
    for shards in (TRAIN_SHARDS, EVAL_SHARDS):
        samples = [sample for path in shards for sample in read_shard(path)]
        assert len({key for key, _, _ in samples}) == len(samples) >= 96
        assert {(image.format, image.mode, image.size) for _, image, _ in samples} == {("JPEG", "RGB", (64, 64))}
        assert np.mean([judge(image) == TRIPLE_OF[text] for _, image, text in samples]) >= 0.99
    assert sum(path.stat().st_size for path in TRAIN_SHARDS + EVAL_SHARDS) < 4e6


def test_train_shards_hold_no_evaluation_prompt() -> None:
    train = {TRIPLE_OF[text] for path in TRAIN_SHARDS for _, _, text in read_shard(path)}
    held_out = {TRIPLE_OF[text] for path in EVAL_SHARDS for _, _, text in read_shard(path)}
    assert train == set(training_triples())
    assert held_out == set(evaluation_prompts())


def test_shards_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    triples = training_triples()[:5]
    for name in ("a", "b"):
        write_shards(tmp_path / name, triples, first_seed=7, per_shard=3)
    assert [path.name for path in sorted((tmp_path / "a").iterdir())] == ["00000.tar", "00001.tar"]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    assert [key for key, _, _ in read_shard(tmp_path / "a" / "00001.tar")] == ["000010000", "000010001"]


# The teacher


def test_teacher_files_are_small_safetensors_in_the_promised_precision() -> None:
    files = [path for path in TINY_SD.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    weights = {path.parent.name: path for path in files if path.suffix == ".safetensors"}
    assert not [path for path in files if path.suffix in (".bin", ".ckpt", ".pt")]
    dtypes = {}
    for name, path in weights.items():
        with safe_open(path, "pt") as file:
            dtypes[name] = {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    assert dtypes == {"unet": {"F16"}, "vae": {"F16"}, "text_encoder": {"F32"}}


def test_teacher_has_the_files_and_names_of_published_ones() -> None:
    """Made with transformers 4: what is handed on of such a teacher loads there too."""
    names = {path.name for path in (TINY_SD / "tokenizer").iterdir()}
    assert names == {"vocab.json", "merges.txt", "special_tokens_map.json", "tokenizer_config.json"}
    with safe_open(TINY_SD / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118


def test_teacher_has_the_shape_of_stable_diffusion_1(teacher: StableDiffusionPipeline) -> None:
    unet, vae = teacher.unet.config, teacher.vae.config
    assert list(unet.down_block_types) == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
    assert list(unet.up_block_types) == ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    assert unet.mid_block_type == "UNetMidBlock2DCrossAttn"
    assert unet.layers_per_block == 2 and len(unet.block_out_channels) == 4
    assert unet.in_channels == unet.out_channels == vae.latent_channels == 4
    assert unet.cross_attention_dim == teacher.text_encoder.config.hidden_size
    assert teacher.vae_scale_factor == 8
    assert unet.sample_size * 8 == vae.sample_size == 64
    assert teacher.safety_checker is None
    assert {m.dtype for m in (teacher.unet, teacher.vae, teacher.text_encoder)} == {torch.float32}
    scheduler = DDPMScheduler.from_pretrained(TINY_SD, subfolder="scheduler").config
    assert (scheduler.beta_start, scheduler.beta_end, scheduler.beta_schedule) == (0.00085, 0.012, "scaled_linear")
    assert scheduler.prediction_type == "epsilon"


def test_tokenizer_knows_the_world_word_by_word(teacher: StableDiffusionPipeline, tmp_path: Path) -> None:
    tokenizer = teacher.tokenizer
    assert tokenizer.model_max_length == teacher.text_encoder.config.max_position_embeddings == 16
    ids = [tokenizer(caption(*triple)).input_ids for triple in all_triples()]
    assert {len(i) for i in ids} == {9, 12} and len({tuple(i) for i in ids}) == len(all_triples())
    assert {(i[0], i[-1]) for i in ids} == {(tokenizer.bos_token_id, tokenizer.eos_token_id)}
    assert max(max(i) for i in ids) < teacher.text_encoder.config.vocab_size
    built = build_tokenizer(tmp_path)
    assert [built(caption(*triple)).input_ids for triple in all_triples()] == ids


def test_vae_latents_have_unit_scale(teacher: StableDiffusionPipeline) -> None:
    images = [draw(*triple, random.Random(37)) for triple in evaluation_prompts()[:32]]
    with torch.no_grad():
        posterior = teacher.vae.encode(teacher.image_processor.preprocess(images)).latent_dist
    latents = posterior.sample(torch.Generator().manual_seed(0)) * teacher.vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=0.1)


def test_teacher_paints_what_the_caption_says(teacher: StableDiffusionPipeline) -> None:
    scheduler = teacher.scheduler
    fractions = caption_accuracy(teacher, random.Random(38).sample(evaluation_prompts(), 24), seed=5)
    assert set(fractions) == {"shape", "color", "background", "all"}
    assert fractions["all"] >= 0.9
    assert teacher.scheduler is scheduler


def test_accuracy_counts_what_the_captions_say_and_not_what_is_painted(teacher: StableDiffusionPipeline) -> None:
    """The same prompts on a U-Net whose weights are noise: nothing is right."""
    triples = evaluation_prompts()[:8]
    torch.manual_seed(0)
    untrained = type(teacher.unet).from_config(teacher.unet.config)
    pipeline = StableDiffusionPipeline(**teacher.components | {"unet": untrained}, requires_safety_checker=False)
    assert caption_accuracy(pipeline, triples, seed=5)["all"] == 0


def test_images_do_not_depend_on_the_batch_size(teacher: StableDiffusionPipeline) -> None:
    triples = evaluation_prompts()[:3]
    whole, single = (paint(teacher, triples, 6, num_inference_steps=4, batch_size=size) for size in (3, 1))
    for a, b in zip(whole, single, strict=True):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 2
    other = paint(teacher, triples, 7, num_inference_steps=4)
    assert np.abs(np.asarray(whole[0], dtype=int) - np.asarray(other[0], dtype=int)).max() > 20


def test_plain_call_works(teacher: StableDiffusionPipeline) -> None:
    """As a user calls it first: the scheduler of the folder, diffusers' guidance of 7.5 and 50 steps."""
    image = teacher("a red circle on a blue background", generator=torch.Generator().manual_seed(1)).images[0]
    assert judge(image) == ("circle", "red", "blue")
    assert json.loads((TINY_SD / "model_index.json").read_text())["safety_checker"] == [None, None]


@pytest.mark.parametrize(
    "flags, sentence",
    [(["--pictures", "5"], "--pictures must be at least 128, not 5"), (["--unet_steps", "0"], "at least 20, not 0")],
)
def test_make_script_refuses_bad_flags(flags: list[str], sentence: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse_args(flags)
    assert sentence in capsys.readouterr().err


def test_eval_shard_is_balanced() -> None:
    samples = [TRIPLE_OF[text] for path in EVAL_SHARDS for _, _, text in read_shard(path)]
    assert set(Counter(shape for shape, _, _ in samples).values()) == {len(samples) // len(SHAPES)}


def test_nothing_that_is_held_out_of_the_recipes_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither in images nor in the captions that latents are made of; the pool of swapped captions has it all."""
    kinds = measure_quality.triples()
    assert {kind: len(triples) for kind, triples in kinds.items()} == {
        "seen": 46, "unseen pairs": 36, "unseen concepts": 98,
    }  # fmt: skip
    made: list[list[str]] = []
    monkeypatch.setattr(measure_quality, "train", lambda flags, output_dir: made.append(list(flags)))
    (tmp_path / "made" / "0").mkdir(parents=True)
    (tmp_path / "made" / "0" / "manifest.json").touch()
    measure_quality.write_sources(tmp_path)
    images = [TRIPLE_OF[text] for path in (tmp_path / "images").glob("*.tar") for _, _, text in read_shard(path)]
    captions = [TRIPLE_OF[text] for text in (tmp_path / "seen.txt").read_text().splitlines()]
    assert sorted(images) == sorted(captions) and len(images) == 512 and set(images) == set(kinds["seen"])
    for shape, color, background in images:
        assert shape != "star" and "magenta" not in (color, background)
        assert (shape, color) not in {("circle", "green"), ("square", "blue"), ("triangle", "red")}
    assert made[0][made[0].index("--caption_pool") + 1] == "seen.txt" and (tmp_path / "latents").is_dir()
    pool = {TRIPLE_OF[text] for text in (tmp_path / "captions.txt").read_text().splitlines()}
    assert pool == set(all_triples())


def test_errors_of_students_that_are_known(teacher: StableDiffusionPipeline) -> None:
    """The teacher has none; where the last layer is scaled by 0.8, each is 0.04 times mean square over variance."""
    prompts = ["a red circle on a blue background"]
    found = measure_quality.compared(teacher, teacher, prompts, 3)
    assert found["guided error"] == found["prediction error"] == found["drift"] == 0
    unet = copy.deepcopy(teacher.unet)
    with torch.no_grad():
        for parameter in unet.conv_out.parameters():
            parameter.mul_(0.8)
    student = StableDiffusionPipeline(**teacher.components | {"unet": unet}, requires_safety_checker=False)
    found = measure_quality.compared(teacher, student, prompts, 3)
    assert all(0.04 * 0.99 < error < 0.08 for error in found["by state"] + found["by timestep"])
    assert min(found["by timestep"]) < 0.041 and found["drift"] > 0.05
