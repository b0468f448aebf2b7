"""Which student each level prunes out of which teacher, and that it is the teacher's own weights."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import UNET_CONFIG, same_tensors
from peft import LoraConfig
from torch import Tensor, nn

import distill_training as dt

LEVELS = ["sd_small", "bk_small", "sd_tiny"]

DOWN_TYPES = ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"]
UP_TYPES = ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]

# unet/config.json as published: Stable Diffusion 1.5's has no mid_block_type, no use_linear_projection and no more
# of the keys that came later, and Stable Diffusion 2.1's lacks most of them.
SD1_CONFIG: dict[str, Any] = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": "0.6.0",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": DOWN_TYPES,
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": UP_TYPES,
}
SD2_CONFIG: dict[str, Any] = {
    **SD1_CONFIG,
    "_diffusers_version": "0.10.0.dev0",
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}

# unet/config.json of the students that were published for Stable Diffusion 1.5, as diffusers 0.15 (nota-ai's) and
# 0.19 (segmind's) wrote them: with the keys of their time spelled out, and none of those that came later.
WRITTEN_BY_0_15: dict[str, Any] = {
    **SD1_CONFIG,
    "_diffusers_version": "0.15.0",
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "layers_per_block": 1,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "upcast_attention": False,
    "use_linear_projection": False,
}
WRITTEN_BY_0_19: dict[str, Any] = {
    **WRITTEN_BY_0_15,
    "_diffusers_version": "0.19.0",
    "addition_embed_type": None,
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": None,
    "encoder_hid_dim_type": None,
    "num_attention_heads": None,
    "time_embedding_dim": None,
    "transformer_layers_per_block": 1,
    "upcast_attention": None,
}
THREE_LEVELS: dict[str, Any] = {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": DOWN_TYPES[:3],
    "mid_block_type": None,
    "up_block_types": UP_TYPES[1:],
}
PUBLISHED_STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "nota-ai/bk-sdm-base": ("sd_small", WRITTEN_BY_0_15),
    "nota-ai/bk-sdm-small": ("bk_small", WRITTEN_BY_0_15 | {"mid_block_type": None}),
    "nota-ai/bk-sdm-tiny": ("sd_tiny", WRITTEN_BY_0_15 | THREE_LEVELS),
    "segmind/small-sd": ("sd_small", WRITTEN_BY_0_19),
    "segmind/tiny-sd": ("sd_tiny", WRITTEN_BY_0_19 | THREE_LEVELS),
}

COUNTS = {
    ("sd1", "teacher"): 859_520_964,
    ("sd1", "sd_small"): 579_384_964,
    ("sd1", "bk_small"): 482_346_884,
    ("sd1", "sd_tiny"): 323_384_964,
    ("sd2", "teacher"): 865_910_724,
    ("sd2", "sd_small"): 583_480_964,
    ("sd2", "bk_small"): 485_787_524,
    ("sd2", "sd_tiny"): 326_825_604,
}

# Toy teachers that between them have everything that may differ from one resolution to the next.
TEACHERS: dict[str, dict[str, Any]] = {
    "sd1": UNET_CONFIG,
    "sd2": UNET_CONFIG
    | {"attention_head_dim": (2, 4, 4, 8), "cross_attention_dim": 24, "use_linear_projection": True},
    "lists": UNET_CONFIG
    | {
        "attention_head_dim": [2, 4, 8, 4],
        "cross_attention_dim": (12, 12, 12, 12),
        "only_cross_attention": [True, False, True, False],
        "transformer_layers_per_block": [1, 2, 1, 1],
    },
    "widths": UNET_CONFIG | {"block_out_channels": (4, 8, 12, 12), "upcast_attention": True},
}


def toy_unet(**config: Any) -> UNet2DConditionModel:
    """A U-Net whose every tensor is random, norms and biases too, so that no two are equal by chance."""
    torch.manual_seed(1)
    unet = UNet2DConditionModel(**(UNET_CONFIG | config)).eval()
    for parameter in unet.parameters():
        nn.init.normal_(parameter, std=0.3)
    return unet


def in_own_memory(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """What a file gave lies wherever it lay in the file, and where that is decides the rounding."""
    return copy.deepcopy(unet)


def run_unet(unet: UNet2DConditionModel, height: int = 8, width: int = 8) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    text_width = unet.config.cross_attention_dim
    text_width = text_width if isinstance(text_width, int) else text_width[0]
    sample = torch.randn(1, 4, height, width, generator=generator)
    text = torch.randn(1, 5, text_width, generator=generator)
    with torch.no_grad():
        return unet(sample, 700, text).sample


def cut_out_blocks(teacher: UNet2DConditionModel, level: str) -> UNet2DConditionModel:
    """The same student made the other way: modules are deleted from a copy of the teacher, its config stays wrong."""
    unet = copy.deepcopy(teacher)
    for blocks, kept in ((unet.down_blocks, [0]), (unet.up_blocks, [0, 2])):
        for block in blocks:
            for name in ("resnets", "attentions"):
                layers = getattr(block, name, None)
                if layers is not None:
                    delattr(block, name)
                    setattr(block, name, nn.ModuleList(layers[i] for i in kept))
    if level in ("bk_small", "sd_tiny"):
        unet.mid_block = None
    if level == "sd_tiny":
        unet.down_blocks = unet.down_blocks[:3]
        unet.down_blocks[2].downsamplers = None
        unet.up_blocks = unet.up_blocks[1:]
    return unet


def source_name(name: str, level: str) -> str:
    """Where in the teacher a student's tensor comes from, spelled out."""
    up_block = {"sd_tiny": {"0": "1", "1": "2", "2": "3"}}.get(level, {"0": "0", "1": "1", "2": "2", "3": "3"})
    parts = name.split(".")
    if parts[0] == "up_blocks":
        parts[1] = up_block[parts[1]]
        if parts[2] != "upsamplers":
            parts[3] = {"0": "0", "1": "2"}[parts[3]]
    return ".".join(parts)


@pytest.fixture(scope="module", params=list(TEACHERS))
def any_teacher(request: pytest.FixtureRequest) -> UNet2DConditionModel:
    return toy_unet(**TEACHERS[request.param])


@pytest.fixture(scope="module")
def toy_teacher() -> UNet2DConditionModel:
    return toy_unet()


def parameters_of(config: dict[str, Any]) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in UNet2DConditionModel.from_config(config).parameters())


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_parameter_counts_of_published_models(family: str) -> None:
    published = {"sd1": SD1_CONFIG, "sd2": SD2_CONFIG}[family]
    with torch.device("meta"):
        teacher = UNet2DConditionModel.from_config(published)
    assert dt.count_parameters(teacher) == COUNTS[family, "teacher"]
    for level in LEVELS:
        # The file's own keys and what the library makes of them, with the absent keys noted in a hidden one.
        assert parameters_of(dt.student_unet_config(published, level)) == COUNTS[family, level]
        assert parameters_of(dt.student_unet_config(teacher.config, level)) == COUNTS[family, level]


def test_every_level_of_the_table_is_tested() -> None:
    assert sorted(dt.DISTILL_LEVELS) == sorted(LEVELS)


def test_student_config_is_the_teachers_but_for_what_was_pruned() -> None:
    teacher_config = {
        **SD2_CONFIG,
        "only_cross_attention": [True, True, True, False],
        "cross_attention_dim": [1024] * 4,
    }
    before = copy.deepcopy(teacher_config)
    small, none, tiny = (dt.student_unet_config(teacher_config, level) for level in LEVELS)
    assert teacher_config == before
    for config in (small, none, tiny):
        assert config["layers_per_block"] == 1
        for key in ("use_linear_projection", "upcast_attention", "sample_size", "norm_num_groups", "in_channels"):
            assert config[key] == SD2_CONFIG[key], key
        assert not [key for key in config if key.startswith("_")]
    assert [config["mid_block_type"] for config in (small, none, tiny)] == ["UNetMidBlock2DCrossAttn", None, None]
    for config in (small, none):
        for key in ("block_out_channels", "attention_head_dim", "only_cross_attention", "cross_attention_dim"):
            assert list(config[key]) == list(teacher_config[key]), key
        assert list(config["down_block_types"]) == DOWN_TYPES
        assert list(config["up_block_types"]) == UP_TYPES
    assert list(tiny["block_out_channels"]) == [320, 640, 1280]
    assert list(tiny["attention_head_dim"]) == [5, 10, 20]
    assert list(tiny["only_cross_attention"]) == [True, True, True]
    assert list(tiny["cross_attention_dim"]) == [1024, 1024, 1024]
    assert list(tiny["down_block_types"]) == ["CrossAttnDownBlock2D"] * 3
    assert list(tiny["up_block_types"]) == ["CrossAttnUpBlock2D"] * 3


@pytest.mark.parametrize("level", LEVELS)
def test_every_tensor_is_bit_equal_to_its_source(any_teacher: UNet2DConditionModel, level: str) -> None:
    student = dt.build_student(any_teacher, level)
    source, found = any_teacher.state_dict(), student.state_dict()
    names = [source_name(name, level) for name in found]
    assert len(set(names)) == len(names)
    for name, origin in zip(found, names, strict=True):
        assert dt.teacher_key(name, level) == origin
        assert torch.equal(found[name], source[origin]), name
    assert same_tensors(student, cut_out_blocks(any_teacher, level))
    dt.check_student(student.config, any_teacher.config, level)  # raises nothing


@pytest.mark.parametrize("level", LEVELS)
def test_forward_equals_a_teacher_with_blocks_cut_out(any_teacher: UNet2DConditionModel, level: str) -> None:
    student, cut = dt.build_student(any_teacher, level).eval(), cut_out_blocks(any_teacher, level)
    for size in ((9, 7), (12, 8)):  # odd, and a multiple of the student's factor but not of the teacher's
        expected = run_unet(cut, *size)
        assert expected.isfinite().all() and expected.std() > 0
        assert torch.equal(run_unet(student, *size), expected), size


def test_student_is_a_float32_copy(toy_teacher: UNet2DConditionModel) -> None:
    half = copy.deepcopy(toy_teacher).half()
    student = dt.build_student(half, "sd_small")
    assert {tensor.dtype for tensor in student.state_dict().values()} == {torch.float32}
    assert torch.equal(student.conv_in.weight, half.conv_in.weight.float())
    before = half.conv_in.weight.clone()
    with torch.no_grad():
        student.conv_in.weight.zero_()
    assert torch.equal(half.conv_in.weight, before)


def test_weights_are_loaded_strictly(toy_teacher: UNet2DConditionModel) -> None:
    lacking = copy.deepcopy(toy_teacher)
    lacking.conv_out.bias = None
    with pytest.raises(KeyError, match="conv_out.bias"):
        dt.build_student(lacking, "sd_small")
    other = copy.deepcopy(toy_teacher)
    other.conv_out = nn.Conv2d(8, 5, 3, padding=1)
    with pytest.raises(RuntimeError, match="conv_out"):
        dt.build_student(other, "sd_small")


@pytest.mark.parametrize(("level", "kept"), [*((level, "published") for level in LEVELS), ("sd_tiny", "least")])
def test_teacher_folder_that_leaves_keys_out(tmp_path: Path, toy_teacher: Any, level: str, kept: str) -> None:
    """A student saved and loaded is what the level says even where the teacher's file is silent on it."""
    toy_teacher.save_pretrained(tmp_path / "teacher")
    path = tmp_path / "teacher" / "config.json"
    keys = set(SD1_CONFIG)
    if kept == "least":  # whatever is at its default may be left out as well
        keys -= {"down_block_types", "up_block_types", "layers_per_block", "in_channels", "norm_eps", "act_fn"}
    config = {key: value for key, value in json.loads(path.read_text()).items() if key in keys}
    path.write_text(json.dumps(config))
    teacher = UNet2DConditionModel.from_pretrained(tmp_path / "teacher")
    assert "mid_block_type" in teacher.config["_use_default_values"]

    dt.build_student(teacher, level).save_pretrained(tmp_path / "student")
    student, info = UNet2DConditionModel.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    levels = 3 if level == "sd_tiny" else 4
    assert len(student.down_blocks) == len(student.up_blocks) == levels
    assert (student.mid_block is None) == (level != "sd_small")
    assert all(len(block.resnets) == 1 for block in student.down_blocks)
    saved = json.loads((tmp_path / "student" / "config.json").read_text())
    assert saved["mid_block_type"] == (None if level != "sd_small" else "UNetMidBlock2DCrossAttn")
    assert torch.equal(run_unet(in_own_memory(student)), run_unet(cut_out_blocks(toy_teacher, level)))
    dt.check_student(student.config, teacher.config, level)


@pytest.mark.parametrize("level", LEVELS)
def test_save_and_load_round_trip(tmp_path: Path, level: str) -> None:
    student = dt.build_student(toy_unet(**TEACHERS["sd2"]), level).eval()
    student.save_pretrained(tmp_path)
    loaded, info = UNet2DConditionModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert same_tensors(loaded, student)
    assert torch.equal(run_unet(in_own_memory(loaded)), run_unet(student))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            {
                "block_out_channels": [320, 640, 1280],
                "down_block_types": DOWN_TYPES[1:],
                "up_block_types": UP_TYPES[:3],
            },
            "down_block_types",
        ),
        ({"layers_per_block": 1}, "layers_per_block=1 .*already pruned.*--student_model_name_or_path"),
        ({"layers_per_block": [2, 2, 1, 2]}, "layers_per_block"),
        ({"addition_embed_type": "text_time"}, "Stable Diffusion XL"),
        ({"mid_block_type": None}, "mid_block_type=None"),
        ({"up_block_types": UP_TYPES[::-1]}, "up_block_types"),
        ({"class_embed_type": "projection"}, "only Stable Diffusion 1.x and 2.x"),
    ],
    ids=["three-levels", "pruned", "pruned-in-part", "sdxl", "no-mid-block", "up-blocks", "unclip"],
)
def test_teacher_that_cannot_be_pruned_is_refused(level: str, change: dict[str, Any], sentence: str) -> None:
    config = SD1_CONFIG | change
    for refuse in (lambda: dt.check_prunable(config), lambda: dt.student_unet_config(config, level)):
        with pytest.raises(dt.UserError, match=sentence) as caught:
            refuse()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_inner_levels_of_two_widths_cannot_be_joined() -> None:
    """Without the innermost level the next one's output goes where the innermost's went, so both must be as wide."""
    config = SD1_CONFIG | {"block_out_channels": [320, 640, 960, 1280]}
    with pytest.raises(dt.UserError, match="block_out_channels.*960.*1280"):
        dt.student_unet_config(config, "sd_tiny")
    for level in ("sd_small", "bk_small"):
        assert dt.student_unet_config(config, level)["block_out_channels"] == [320, 640, 960, 1280]


def test_student_cannot_be_pruned_again(toy_teacher: UNet2DConditionModel) -> None:
    for level in LEVELS:
        with pytest.raises(dt.UserError):
            dt.build_student(dt.build_student(toy_teacher, level), "sd_tiny")


def test_head_count_may_be_spelled_either_way(toy_teacher: UNet2DConditionModel) -> None:
    config = dt.student_unet_config(toy_teacher.config, "sd_tiny") | {"attention_head_dim": [4, 4, 4]}
    dt.check_student(UNet2DConditionModel.from_config(config).config, toy_teacher.config, "sd_tiny")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"block_out_channels": (8, 16, 24, 24)}, "block_out_channels"),
        ({"cross_attention_dim": 12}, "cross_attention_dim=12 instead of 16"),
        ({"use_linear_projection": True}, "use_linear_projection=True instead of False"),
        ({"attention_head_dim": 2}, "attention_head_dim"),
        ({"attention_head_dim": (4, 4, 2, 4)}, "attention_head_dim"),
        ({"norm_num_groups": 2}, "norm_num_groups"),
    ],
    ids=["width", "text-width", "projection", "heads", "heads-of-one-level", "norm-groups"],
)
def test_student_of_another_teacher_is_refused(
    toy_teacher: UNet2DConditionModel, change: dict[str, Any], named: str
) -> None:
    level = "sd_tiny"
    student = dt.build_student(toy_unet(**change), level)
    with pytest.raises(dt.UserError, match=f"^--student_model_name_or_path .*{named}") as caught:
        dt.check_student(student.config, toy_teacher.config, level)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"center_input_sample": True}, "center_input_sample=True instead of False"),
        ({"downsample_padding": 0}, "downsample_padding=.* instead of 1"),
        ({"dropout": 0.5}, "dropout=0.5 instead of"),
        ({"act_fn": "gelu"}, "act_fn=gelu instead of silu"),
        ({"flip_sin_to_cos": False}, "flip_sin_to_cos=False instead of True"),
        ({"freq_shift": 1}, "freq_shift=1 instead of"),
        ({"norm_eps": 1e-6}, "norm_eps=1e-06 instead of 1e-05"),
        ({"mid_block_scale_factor": 2}, "mid_block_scale_factor=2 instead of 1"),
        ({"resnet_time_scale_shift": "scale_shift"}, "resnet_time_scale_shift=scale_shift instead of default"),
        ({"resnet_out_scale_factor": 2.0}, "resnet_out_scale_factor=2.0 instead of 1.0"),
        ({"cross_attention_norm": "layer_norm"}, "cross_attention_norm=layer_norm instead of"),
        ({"attention_type": "gated"}, "attention_type=gated instead of default"),
        ({"only_cross_attention": [False, True, False, False]}, "only_cross_attention="),
        ({"act_fn": "gelu", "norm_eps": 1e-6}, "act_fn=gelu instead of silu, norm_eps=1e-06 instead of 1e-05"),
    ],
    ids=lambda change: "-".join(change) if isinstance(change, dict) else "",
)
def test_whole_configs_are_compared(level: str, change: dict[str, Any], named: str) -> None:
    """Most of these would load the same tensors, and put out something else."""
    config = dt.student_unet_config(SD1_CONFIG, level)
    dt.check_student(config, SD1_CONFIG, level)
    with pytest.raises(
        dt.UserError, match=f"^--student_model_name_or_path holds no {level} student of this teacher: it has {named}"
    ) as caught:
        dt.check_student(config | change, SD1_CONFIG, level)
    assert "\n" not in str(caught.value) and str(caught.value).count(" instead of ") == len(change)


@pytest.mark.parametrize("level", LEVELS)
def test_what_says_the_same_is_the_same(level: str) -> None:
    """None, False and an absent key; a value and a list of it; and what is no part of the architecture."""
    config = dt.student_unet_config(SD1_CONFIG, level)
    unset = [key for key, value in config.items() if value is None or value is False]
    assert len(unset) > 15 and {"upcast_attention", "only_cross_attention", "class_embed_type"} <= set(unset)
    for value in (None, False):
        changed = [key for key in unset if key != "mid_block_type" or level != "sd_small"]
        dt.check_student(config | dict.fromkeys(changed, value), SD1_CONFIG, level)
    absent = {key: value for key, value in config.items() if key not in unset or key == "mid_block_type"}
    dt.check_student(absent, SD1_CONFIG, level)
    dt.check_student(config, SD1_CONFIG | dict.fromkeys(("only_cross_attention", "upcast_attention")), level)
    of_an_average = {"decay": 0.999, "optimization_step": 7, "_class_name": "UNet", "_name_or_path": "a"}
    dt.check_student(config | of_an_average, SD1_CONFIG, level)  # what the library does not know, it ignores
    levels = len(config["block_out_channels"])
    lists = {"attention_head_dim": [8] * levels, "cross_attention_dim": (768,) * levels}
    lists |= {"only_cross_attention": [False] * levels, "transformer_layers_per_block": [1] * levels}
    dt.check_student(config | lists, SD1_CONFIG, level)
    dt.check_student(config | {"sample_size": 96, "upcast_attention": True}, SD1_CONFIG, level)


@pytest.mark.parametrize("name", PUBLISHED_STUDENTS)
def test_published_students_are_accepted(name: str) -> None:
    level, config = PUBLISHED_STUDENTS[name]
    assert parameters_of(config) == COUNTS["sd1", level]
    with torch.device("meta"):
        loaded = UNet2DConditionModel.from_config(SD1_CONFIG).config  # with what the library makes of absent keys
    for teacher_config in (SD1_CONFIG, loaded):
        dt.check_student(config, teacher_config, level)
    for other in LEVELS:
        if other != level:
            with pytest.raises(dt.UserError, match=f"no {other} student of this teacher"):
                dt.check_student(config, SD1_CONFIG, other)
    with pytest.raises(dt.UserError, match="cross_attention_dim=768 instead of 1024"):
        dt.check_student(config, SD2_CONFIG, level)


@pytest.mark.parametrize("level", LEVELS)
def test_student_of_another_level_is_refused(toy_teacher: UNet2DConditionModel, level: str) -> None:
    others = [dt.build_student(toy_teacher, other) for other in LEVELS if other != level]
    for student in [*others, toy_teacher]:
        with pytest.raises(dt.UserError, match=f"no {level} student of this teacher"):
            dt.check_student(student.config, toy_teacher.config, level)


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        ("sd_small", "d0-d0 d1-d1 d2-d2 d3-d3 m-m u0-u0 u1-u1 u2-u2 u3-u3"),
        ("bk_small", "d0-d0 d1-d1 d2-d2 d3-d3 u0-u0 u1-u1 u2-u2 u3-u3"),
        ("sd_tiny", "d0-d0 d1-d1 u0-d2 u1-u0 u2-u1 u3-u2"),
    ],
)
def test_feature_pairs(any_teacher: UNet2DConditionModel, level: str, expected: str) -> None:
    pairs = dt.DISTILL_LEVELS[level].feature_pairs
    short = [
        "-".join(re.sub(r"^(d|u)\w+\.", r"\1", name).replace("mid_block", "m") for name in pair) for pair in pairs
    ]
    assert short == expected.split()

    student = dt.build_student(any_teacher, level).eval()
    shapes: dict[tuple[int, int], torch.Size] = {}
    handles = []
    for index, pair in enumerate(pairs):
        for side, (net, name) in enumerate(zip((any_teacher, student), pair, strict=True)):

            def keep(_module: nn.Module, _inputs: Any, output: Any, key: tuple[int, int] = (index, side)) -> None:
                shapes[key] = (output[0] if isinstance(output, tuple) else output).shape

            handles.append(net.get_submodule(name).register_forward_hook(keep))
    run_unet(any_teacher, 16, 16)
    run_unet(student, 16, 16)
    for handle in handles:
        handle.remove()
    assert len(shapes) == 2 * len(pairs)
    for index in range(len(pairs)):
        assert shapes[index, 0] == shapes[index, 1], pairs[index]


@pytest.mark.parametrize("level", ["sd_small", "sd_tiny"])
def test_attention_lora_trains_on_the_student(toy_teacher: UNet2DConditionModel, level: str) -> None:
    """As diffusers' own LoRA scripts do it: the student frozen, adapters on the attention's projections."""
    student = dt.build_student(toy_teacher, level).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    projections = ["to_q", "to_k", "to_v", "to_out.0"]
    student.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=projections))
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    attentions = [name for name in before if name.endswith("to_q.weight")]
    assert len(trained) == len(attentions) * len(projections) * 2 > 0

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    generator = torch.Generator().manual_seed(3)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 5, 16, generator=generator)
    target = torch.randn(2, 4, 8, 8, generator=generator)
    losses = []
    for _ in range(4):
        prediction = student(sample, torch.tensor([3, 700]), text).sample
        loss = torch.nn.functional.mse_loss(prediction, target)
        loss.backward()
        with_gradient = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
        assert with_gradient == set(trained) and all("lora_" in name for name in with_gradient)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    after = {name.replace(".base_layer.", "."): tensor for name, tensor in student.state_dict().items()}
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
