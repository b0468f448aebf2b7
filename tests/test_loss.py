"""The loss terms by hand-computed numbers, where their gradients go, and how block outputs are captured."""

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DConditionModel
from helpers import UNET_CONFIG, components_of
from torch import Tensor, nn

import distill_training as dt

# Two features of different shapes: squared differences 1, 4 | mean 2.5 and 16 | mean 16.
STUDENT_FEATURES = [torch.tensor([1.0, 1.0]).reshape(1, 2, 1, 1), torch.full((1, 1, 3, 3), 2.0)]
TEACHER_FEATURES = [torch.tensor([0.0, 3.0]).reshape(1, 2, 1, 1), torch.full((1, 1, 3, 3), -2.0)]
PREDICTION = torch.tensor([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 2, 2)
TEACHER_PREDICTION = torch.ones(1, 1, 2, 2)  # squared differences 0, 1, 4, 9 | mean 3.5
TARGET = torch.zeros(1, 1, 2, 2)  # squared differences 1, 4, 9, 16 | mean 7.5


def loss_of(**changes: Any) -> dict[str, Tensor]:
    arguments = {
        "student_pred": PREDICTION,
        "teacher_pred": TEACHER_PREDICTION,
        "target": TARGET,
        "student_features": STUDENT_FEATURES,
        "teacher_features": TEACHER_FEATURES,
        "output_weight": 0.5,
        "feature_weight": 0.25,
    }
    return dt.distillation_loss(**(arguments | changes))


def test_terms_and_sum_by_hand() -> None:
    losses = loss_of()
    assert losses["task_loss"].item() == 7.5
    assert losses["output_loss"].item() == 3.5
    assert losses["feature_losses"].tolist() == [2.5, 16.0]
    assert losses["feature_loss"].item() == 18.5
    assert losses["loss"].item() == 7.5 + 0.5 * 3.5 + 0.25 * 18.5
    assert set(losses) == {"loss", "task_loss", "output_loss", "feature_loss", "feature_losses"}


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"output_weight": 0.0}, 7.5 + 0.25 * 18.5),
        ({"feature_weight": 0.0}, 7.5 + 0.5 * 3.5),
        ({"output_weight": 0.0, "feature_weight": 0.0}, 7.5),
    ],
)
def test_zero_weight_removes_a_term(weights: dict[str, float], expected: float) -> None:
    prediction = PREDICTION.clone().requires_grad_()
    features = [feature.clone().requires_grad_() for feature in STUDENT_FEATURES]
    losses = loss_of(student_pred=prediction, student_features=features, **weights)
    assert losses["loss"].item() == expected
    assert losses["output_loss"].item() == 3.5 and losses["feature_loss"].item() == 18.5  # unweighted all the same
    losses["loss"].backward()
    output_weight, feature_weight = weights.get("output_weight", 0.5), weights.get("feature_weight", 0.25)
    # d/dx mean((x - y)^2) over 4 elements is (x - y) / 2.
    expected_gradient = (PREDICTION - TARGET) / 2 + output_weight * (PREDICTION - TEACHER_PREDICTION) / 2
    assert torch.equal(prediction.grad, expected_gradient)
    assert torch.allclose(features[1].grad, torch.full((1, 1, 3, 3), feature_weight * 2 * 4 / 9))


def test_without_teacher_only_the_task_is_left() -> None:
    losses = loss_of(teacher_pred=None, student_features=[], teacher_features=[])
    assert [losses[name].item() for name in ("loss", "task_loss", "output_loss", "feature_loss")] == [7.5, 7.5, 0, 0]
    assert losses["feature_losses"].shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_rounds(dtype: torch.dtype) -> None:
    """300 squared is beyond float16, and 300 squared is not a bfloat16."""
    high, zero = torch.full((2, 3, 4, 4), 300.0, dtype=dtype), torch.zeros(2, 3, 4, 4, dtype=dtype)
    assert torch.nn.functional.mse_loss(high, zero).item() != 90_000
    losses = loss_of(
        student_pred=high, teacher_pred=zero, target=zero, student_features=[high], teacher_features=[zero]
    )
    for name in ("task_loss", "output_loss", "feature_loss"):
        assert losses[name].item() == 90_000, name
    assert losses["loss"].item() == 90_000 * 1.75
    assert {tensor.dtype for tensor in losses.values()} == {torch.float32}


@pytest.mark.parametrize("other", [(2, 1, 3, 3), (1, 1, 1, 1), (1, 9)])
def test_features_of_other_shapes_are_refused(other: tuple[int, ...]) -> None:
    """The first two would broadcast."""
    with pytest.raises(ValueError, match="shapes differ"):
        loss_of(teacher_features=[TEACHER_FEATURES[0], torch.zeros(other)])


def test_feature_lists_of_other_lengths_are_refused() -> None:
    for changes in (
        {"teacher_features": TEACHER_FEATURES[:1]},
        {"student_features": STUDENT_FEATURES[:1]},
        {"student_features": []},
    ):
        with pytest.raises(ValueError):
            loss_of(**changes)


# ----------------------------------------------------------------------------------------------------------------
# Block outputs.


def toy_unet() -> UNet2DConditionModel:
    torch.manual_seed(1)
    return UNet2DConditionModel(**UNET_CONFIG)


def toy_inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    sample = torch.randn(2, 4, 8, 8, generator=generator)
    return sample, torch.tensor([3, 700]), torch.randn(2, 5, 16, generator=generator)


def block_outputs(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Every block's hidden states, by running the blocks one after the other by hand."""
    sample, timesteps, text = toy_inputs()
    embedding = unet.time_embedding(unet.time_proj(timesteps))
    hidden = unet.conv_in(sample)
    skips, outputs = [hidden], {}
    for index, block in enumerate(unet.down_blocks):
        text_input = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        hidden, residuals = block(hidden, embedding, **text_input)
        skips += residuals
        outputs[f"down_blocks.{index}"] = hidden
    if unet.mid_block is not None:
        outputs["mid_block"] = hidden = unet.mid_block(hidden, embedding, encoder_hidden_states=text)
    for index, block in enumerate(unet.up_blocks):
        text_input = {"encoder_hidden_states": text} if hasattr(block, "attentions") else {}
        residuals = [skips.pop() for _ in block.resnets][::-1]
        hidden = block(hidden, tuple(residuals), embedding, **text_input)
        outputs[f"up_blocks.{index}"] = hidden
    assert not skips
    return outputs


@pytest.mark.parametrize("level", ["sd_small", "sd_tiny"])
def test_tap_captures_what_the_blocks_put_out(level: str) -> None:
    """Hidden states for every block: the down blocks' tuples have those first, before their skip connections."""
    teacher = toy_unet()
    student = dt.build_student(teacher, level)
    names = [list(side) for side in zip(*dt.DISTILL_LEVELS[level].feature_pairs, strict=True)]
    for unet, wanted in zip((teacher, student), names, strict=True):
        tap = dt.FeatureTap(unet, wanted[::-1])
        unet(*toy_inputs())
        captured = tap.pop()
        expected = block_outputs(unet)
        assert len(captured) == len(wanted)
        for name, feature in zip(wanted[::-1], captured, strict=True):
            assert torch.equal(feature, expected[name]), name
            assert feature.requires_grad
        assert not torch.equal(captured[0], torch.zeros_like(captured[0]))


def weak_outputs(module: nn.Module) -> list[weakref.ref]:
    """Weak references to all that `module` puts out from now on."""
    references: list[weakref.ref] = []
    module.register_forward_hook(lambda _module, _inputs, output: references.append(weakref.ref(output)))
    return references


def alive(references: list[weakref.ref]) -> list[bool]:
    return [reference() is not None for reference in references]


def test_pop_forgets() -> None:
    unet = toy_unet()
    references = weak_outputs(unet.mid_block)
    tap = dt.FeatureTap(unet, ["mid_block"])
    with torch.no_grad():
        unet(*toy_inputs())
        assert alive(references) == [True]
        features = tap.pop()
        assert features[0] is references[0]()
        del features
        assert alive(references) == [False]
        with pytest.raises(RuntimeError, match="mid_block"):
            tap.pop()
        unet(*toy_inputs())  # and it goes on capturing
        assert len(tap.pop()) == 1


def test_pop_without_forward_names_the_blocks() -> None:
    tap = dt.FeatureTap(toy_unet(), ["mid_block", "up_blocks.1"])
    with pytest.raises(RuntimeError, match="mid_block, up_blocks.1"):
        tap.pop()


def test_tap_of_an_absent_block_is_refused() -> None:
    with pytest.raises(AttributeError):
        dt.FeatureTap(dt.build_student(toy_unet(), "sd_tiny"), ["up_blocks.3"])


def test_close_removes_hooks_and_memory() -> None:
    unet = toy_unet()
    references = weak_outputs(unet.mid_block)
    tap = dt.FeatureTap(unet, ["mid_block", "down_blocks.0"])
    assert len(unet.down_blocks[0]._forward_hooks) == 1
    with torch.no_grad():
        unet(*toy_inputs())
        tap.close()
        assert alive(references) == [False]
        assert len(unet.down_blocks[0]._forward_hooks) == 0
        unet(*toy_inputs())
        assert alive(references) == [False, False]
    with pytest.raises(RuntimeError):
        tap.pop()


def test_disabled_tap_captures_nothing() -> None:
    unet = toy_unet()
    references = weak_outputs(unet.mid_block)
    tap = dt.FeatureTap(unet, ["mid_block"])
    tap.enabled = False
    with torch.no_grad():
        unet(*toy_inputs())
        assert alive(references) == [False]
        with pytest.raises(RuntimeError):
            tap.pop()
        tap.enabled = True
        unet(*toy_inputs())
    assert torch.equal(tap.pop()[0], block_outputs(unet)["mid_block"].detach())


def distil_once(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> dict[str, Tensor]:
    """Loss and backward pass of one batch; returns the student's gradients."""
    teacher_names, student_names = zip(*dt.DISTILL_LEVELS["sd_small"].feature_pairs, strict=True)
    teacher_tap, student_tap = dt.FeatureTap(teacher, teacher_names), dt.FeatureTap(student, student_names)
    student_pred, teacher_pred = student(*toy_inputs()).sample, teacher(*toy_inputs()).sample
    features = student_tap.pop(), teacher_tap.pop()
    losses = dt.distillation_loss(
        student_pred, teacher_pred, torch.zeros(2, 4, 8, 8), *features, output_weight=0.5, feature_weight=0.5
    )
    losses["loss"].backward()
    return {name: parameter.grad for name, parameter in student.named_parameters()}


def test_gradient_reaches_the_student_only() -> None:
    student = dt.build_student(toy_unet(), "sd_small").train()
    teacher = dt.freeze(toy_unet(), torch.device("cpu"), torch.float32)
    assert not teacher.training
    gradients = distil_once(student, teacher)
    assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
    assert sum(bool(gradient.any()) for gradient in gradients.values()) > 0.9 * len(gradients)
    assert all(not parameter.requires_grad and parameter.grad is None for parameter in teacher.parameters())


def test_gradient_checkpointing_changes_no_gradient() -> None:
    teacher = dt.freeze(toy_unet(), torch.device("cpu"), torch.float32)
    gradients = []
    for checkpointing in (False, True):
        student = dt.build_student(toy_unet(), "sd_small").train()
        if checkpointing:
            student.enable_gradient_checkpointing()
        assert student.is_gradient_checkpointing == checkpointing
        gradients.append(distil_once(student, teacher))
    plain, checkpointed = gradients
    assert plain.keys() == checkpointed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


# ----------------------------------------------------------------------------------------------------------------
# Target and noise.


def alphas_cumprod() -> Tensor:
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return torch.cumprod(1 - betas, dim=0)


def sd_scheduler(prediction_type: str, cls: type[DDPMScheduler] = DDPMScheduler) -> DDPMScheduler:
    return cls(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type)


def test_target_by_formula() -> None:
    generator = torch.Generator().manual_seed(4)
    latents, noise = (torch.randn(4, 4, 8, 8, generator=generator) for _ in range(2))
    timesteps = torch.tensor([0, 10, 500, 999])
    assert torch.equal(dt.prediction_target(sd_scheduler("epsilon"), latents, noise, timesteps), noise)
    alpha = alphas_cumprod()[timesteps].reshape(-1, 1, 1, 1)
    velocity = alpha.sqrt() * noise - (1 - alpha).sqrt() * latents
    target = dt.prediction_target(sd_scheduler("v_prediction"), latents, noise, timesteps)
    torch.testing.assert_close(target, velocity, rtol=1e-5, atol=1e-6)


def test_unknown_prediction_type_is_refused() -> None:
    with pytest.raises(dt.UserError, match="'sample'; epsilon and v_prediction"):
        dt.prediction_target(sd_scheduler("sample"), TARGET, TARGET, torch.tensor([3]))


class RecordingScheduler(DDPMScheduler):
    """Notes what it was handed."""

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        self.added = [original_samples, noise, super().add_noise(original_samples, noise, timesteps)]
        return self.added[2]

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        self.velocity_of = [sample, noise]
        return super().get_velocity(sample, noise, timesteps)


@pytest.fixture
def bf16_accelerator() -> Accelerator:
    return Accelerator(mixed_precision="bf16", cpu=True)


def test_training_step_in_bf16(teacher: Path, shards: Path, bf16_accelerator: Accelerator) -> None:
    """Noise, noisy latents and target stay float32, and gradients reach the student alone, frozen or not the rest."""
    line = ["--pretrained_model_name_or_path", str(teacher), "--train_data_dir", str(shards), "--seed", "5"]
    line += ["--output_dir", "unused-output", "--noise_offset", "0.1", "--input_perturbation", "0.1"]
    line += ["--learning_rate", "1e-3"]
    args = dt.parse_args(line)
    args.max_train_steps = 1
    components = components_of(teacher, "sd_small", noise_scheduler=sd_scheduler("v_prediction", RecordingScheduler))
    run = dt.make_run(args, bf16_accelerator, components, dt.RunState())
    others = {"vae": run.vae, "text_encoder": run.text_encoder, "teacher_unet": run.teacher_unet}
    for model in others.values():
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model.requires_grad_(True)
    student = bf16_accelerator.unwrap_model(run.unet)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    batch = {
        "pixel_values": torch.rand(2, 3, 64, 64) * 2 - 1,
        "input_ids": torch.randint(2, 54, (2, 16)),
        "counts": torch.zeros(len(dt.COUNTED), dtype=torch.int64),
    }
    inputs: list[Tensor] = []
    student.register_forward_pre_hook(lambda _module, positional: inputs.append(positional[0]))
    terms, grad_norm = dt.training_step(run, batch, 0)

    latents, noise, noisy = run.noise_scheduler.added
    assert {tensor.dtype for tensor in (latents, noise, noisy)} == {torch.float32}
    assert torch.equal(inputs[0], noisy)
    velocity_latents, velocity_noise = run.noise_scheduler.velocity_of
    assert velocity_latents.dtype == velocity_noise.dtype == torch.float32
    assert torch.equal(velocity_latents, latents)
    assert not torch.equal(velocity_noise, noise)  # the perturbation is the input's alone
    # All 1,000 noise levels stay distinct in the dtype that was handed in.
    zeros, ones = torch.zeros(1000, dtype=noise.dtype), torch.ones(1000, dtype=noise.dtype)
    sigmas = DDPMScheduler.add_noise(run.noise_scheduler, zeros, ones, torch.arange(1000))
    assert len(sigmas.unique()) == 1000 and sigmas.min() > 0.02

    assert terms.dtype == torch.float32 and terms.isfinite().all() and not terms.requires_grad
    assert len(terms) == len(run.metric_names()) == 4 + 9
    values = dict(zip(run.metric_names(), terms.tolist(), strict=True))
    total = values["task_loss"] + 0.5 * values["output_loss"] + 0.5 * values["feature_loss"]
    assert values["loss"] == pytest.approx(total, abs=1e-6)
    assert grad_norm > 0
    assert any(not torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert all(parameter.grad is None for model in others.values() for parameter in model.parameters())
