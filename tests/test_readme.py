"""The README's commands, tables and links hold.

`python tests/test_readme.py` prints the README's table of flags as the trainer's rows give it.
"""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
import distill_training as dt  # noqa: E402

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
PARSERS = {"distill_training.py": dt.parse_args, "data.py": data.parse_args}


MAY_CHANGE = {"free": "yes", "same": "with `--allow_changed_settings`", "never": "no"}


def flag_row(flag: data.Flag) -> str:
    """A flag's line of the table."""
    if flag.default is None:
        default = "required" if flag.required else ""
    elif flag.type is bool:
        default = "on" if flag.default else "off"
    else:
        default = f"`{flag.default}`" if flag.type is str else f"{flag.default:g}"
    allowed = ", ".join(f"`{choice}`" for choice in flag.allowed or ())
    if isinstance(flag.allowed, data.Bound):
        allowed = flag.allowed.text
    spellings = ", ".join(f"`{name}`" for name in (f"--{flag.name}", *flag.aliases))
    cells = [spellings, default, allowed, MAY_CHANGE[flag.resume], flag.help]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def flag_table() -> str:
    """The README's table of all flags, as the trainer's rows give it."""
    head = ["| flag | default | allowed | may change on resume | meaning |", "|---|---|---|---|---|"]
    return "\n".join([*head, *map(flag_row, dt.FLAGS.values())])


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
    for folder in ("laion_art", "my-images", "captions"):
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


def test_the_table_of_flags_is_the_trainers() -> None:
    assert flag_table() in README, "put in what `python tests/test_readme.py` prints"


def test_a_row_of_the_table_is_all_there_is_of_a_flag() -> None:
    many = data.Flag("steps", int, 3, data.AT_LEAST_1, "How many | how far.", "free", aliases=("--n",))
    switch = data.Flag("fast", bool, False, None, "Be fast.", "never")
    choice = data.Flag("level", str, "small", ("small", "tiny"), "Which.")
    assert flag_row(many) == "| `--steps`, `--n` | 3 | at least 1 | yes | How many \\| how far. |"
    assert flag_row(switch) == "| `--fast` | off |  | no | Be fast. |"
    resume = "with `--allow_changed_settings`"
    assert flag_row(choice) == f"| `--level` | `small` | `small`, `tiny` | {resume} | Which. |"
    assert flag_row(data.Flag("share", float, 1e-4, None, "", "free")) == "| `--share` | 0.0001 |  | yes |  |"
    assert flag_row(data.Flag("model", str, None, None, "A.", "free", required=True)).startswith(
        "| `--model` | required |"
    )


def test_the_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(__file__, run_name="__main__")
    printed = capsys.readouterr().out
    names = re.findall(r"^\| `--(\w+)`", printed, re.MULTILINE)
    args = vars(dt.parse_args(["--pretrained_model_name_or_path", "a/b", "--dataset_name", "c/d"]))
    assert names == list(dt.FLAGS) and sorted(names) == sorted(args)
    assert {line.replace(r"\|", "").count("|") for line in printed.splitlines()} == {6}


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


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    """What CI_OLDEST=1 installs."""
    names = ("requirements.txt", "tests/requirements.txt", "tests/oldest.txt")
    stated, own, oldest = (
        re.findall(r"^(\S+?)[>=]=([^\s,]+)", (ROOT / name).read_text(), re.MULTILINE) for name in names
    )
    assert len(stated) > 8 and sorted(oldest) == sorted(stated + own)


if __name__ == "__main__":
    print(flag_table())
