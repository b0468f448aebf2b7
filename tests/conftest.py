"""Settings of the test process, and the fixtures that several test modules share."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from accelerate.state import AcceleratorState, GradientState  # noqa: E402

pytest.register_assert_rewrite("helpers")  # so that a failed assertion in there shows its values as well

from helpers import make_pipeline, toy_images, write_shards  # noqa: E402
from launcher import Launcher  # noqa: E402
from servers import data_folder, hub_server, image_server  # noqa: E402, F401  (fixtures)

import distill_training as dt  # noqa: E402

torch.set_num_threads(1)
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1  # seconds; a shuffled stream sleeps 5 after every epoch


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """accelerate keeps the precision of a process's first accelerator for good."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fewer_sampling_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images and the teacher's path in 12 steps instead of 25, as in the launcher's runs."""
    monkeypatch.setattr(dt, "PATH_STEPS", 12)


@pytest.fixture(scope="session")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pipeline(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shards(tmp_path_factory.mktemp("shards"), toy_images(20))


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """One for all tests of this process."""
    launcher = Launcher()
    yield launcher
    launcher.close()
