"""The README's commands, tables and links hold."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from helpers import ROOT

import data
import distill_training as dt

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
PARSERS = {"distill_training.py": dt.parse_args, "data.py": data.parse_args}


def commands() -> list[tuple[str, list[str]]]:
    """(script, flags) of every call of one of the scripts in the README."""
    found = []
    for block in BLOCKS:
        for name, value in re.findall(r'^export (\w+)="(.*)"$', block, re.MULTILINE):
            block = block.replace(f"${name}", value)
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                for script in PARSERS:
                    if script in words:
                        found.append((script, words[words.index(script) + 1 :]))
    return found


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which the README's relative paths exist."""
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    for folder in ("laion_art", "my-images"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "00000.tar").touch()
    (tmp_path / "my.parquet").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_parses(workplace: Path) -> None:
    assert len(commands()) >= 6
    for script, flags in commands():
        PARSERS[script](flags)


def test_the_mission_flags_are_in_the_table() -> None:
    """Every flag that diffusers' script does not have is described."""
    for flag in (
        "distill_level", "output_weight", "feature_weight", "student_model_name_or_path", "streaming", "ema_decay",
        "proportion_empty_prompts", "logging_steps", "validation_steps", "num_validation_images",
    ):  # fmt: skip
        assert re.search(rf"^\| `--{flag}`", README, re.MULTILINE), flag


@pytest.mark.parametrize(
    ("column", "config"),
    [
        (1, {"cross_attention_dim": 768}),
        (2, {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True}),
    ],
)
def test_parameter_table(column: int, config: dict[str, object]) -> None:
    table = README[README.index("| U-Net |") :].split("\n\n")[0]
    cells = [[cell.strip(" *`") for cell in line.strip("|").split("|")] for line in table.splitlines()]
    rows = {row[0]: row for row in cells}
    with torch.device("meta"):
        teacher = UNet2DConditionModel(**config)
        assert rows["teacher"][column] == f"{dt.count_parameters(teacher):,}"
        for level in dt.DISTILL_LEVELS:
            student = UNet2DConditionModel.from_config(dt.student_unet_config(teacher.config, level))
            assert rows[level][column] == f"{dt.count_parameters(student):,}"


def test_links_into_the_repository_exist() -> None:
    targets = re.findall(r"\]\((?!http|#)([^)]+)\)", README) + re.findall(r'src="(?!http)([^"]+)"', README)
    assert targets and all((ROOT / target).exists() for target in targets)
