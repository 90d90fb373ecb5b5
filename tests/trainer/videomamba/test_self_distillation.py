"""Self-distillation: its loss beside a closed form, its teacher left alone, its head left out."""

import pytest
import torch
from torch.nn import functional as F

from video_ma2mba.modeling_video_ma2mba.configuration_videomamba import VideoMambaConfig
from video_ma2mba.modeling_video_ma2mba.modeling_videomamba import VideoMambaForVideoClassification, VideoMambaModel
from video_ma2mba.trainer.recipe_files import recipe_content
from video_ma2mba.trainer.videomamba.recipe_run import build_recipe
from video_ma2mba.trainer.videomamba.self_distillation import Distillation, DistilledClassifier
from video_ma2mba.trainer.videomamba.starting_model import frozen
from video_ma2mba.trainer.videomamba.training_settings import VideoMambaTrainingConfig

TINY = {"num_hidden_layers": 2, "state_size": 4, "image_size": 16, "patch_size": 8, "num_frames": 2}


def parts(tmp_path, **settings):
    torch.manual_seed(0)
    config = VideoMambaConfig(hidden_size=16, num_labels=3, **TINY)
    student = VideoMambaForVideoClassification(config)
    teacher = frozen(VideoMambaModel(VideoMambaConfig(hidden_size=8, **TINY)))
    args = VideoMambaTrainingConfig(str(tmp_path), report_to="none", **settings)
    model = DistilledClassifier(student, teacher.config)
    batch = {"pixel_values": torch.randint(256, (6, 2, 3, 16, 16), dtype=torch.uint8)}
    return model, Distillation(args, config, teacher), batch | {"labels": torch.tensor([0, 1, 2, 0, 1, 2])}


def test_the_loss_is_cross_entropy_and_the_distance_of_all_tokens(tmp_path):
    model, objective, batch = parts(tmp_path, distillation_weight=0.5)
    loss, told = objective.loss(model, batch, 0.0)
    encoded = model.student.videomamba(batch["pixel_values"])
    tokens = encoded.last_hidden_state
    normed = tokens * torch.rsqrt(tokens.pow(2).mean(-1, keepdim=True) + 1e-5)
    mapped = F.linear(normed, model.distill_head.weight, model.distill_head.bias)
    wanted = objective.teacher(batch["pixel_values"]).last_hidden_state
    assert mapped.shape == wanted.shape == (6, 1 + 2 * 4, 8)
    distance = (F.normalize(mapped, dim=-1) - F.normalize(wanted, dim=-1)).pow(2).sum(-1).mean()
    entropy = F.cross_entropy(model.student.head(encoded.pooler_output), batch["labels"])
    torch.testing.assert_close(loss, entropy + 0.5 * distance)
    assert told["alignment_loss"] == pytest.approx(distance.item())


def test_one_batch_is_learnt_and_the_teacher_stays(tmp_path):
    model, objective, batch = parts(tmp_path)
    kept = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    first = None
    for _ in range(40):
        loss, told = objective.loss(model, batch, 0.0)
        first = first or told["alignment_loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert told["alignment_loss"] < 0.5 * first
    assert (model(**batch).logits.argmax(-1) == batch["labels"]).all(), "in evaluation it is the student"
    assert all(torch.equal(kept[name], value) for name, value in objective.teacher.state_dict().items())
    model.student.save_pretrained(tmp_path / "saved")
    again = VideoMambaForVideoClassification.from_pretrained(tmp_path / "saved")
    assert not [name for name in again.state_dict() if "distill" in name]
    torch.testing.assert_close(again(batch["pixel_values"]).logits, model(batch["pixel_values"]).logits)


def test_the_teacher_can_stop_early_and_must_see_the_same_tokens(tmp_path):
    model, objective, batch = parts(tmp_path, distillation_until=0.5)
    early, told = objective.loss(model, batch, 0.49)
    late, left_out = objective.loss(model, batch, 0.5)
    torch.testing.assert_close(early - late, torch.tensor(told["alignment_loss"]))
    assert left_out == {"alignment_loss": 0.0}
    late.backward()
    assert all(parameter.grad is not None for parameter in model.parameters()), "as DDP wants it"
    with pytest.raises(ValueError, match=r"the teacher has \(4, 4\) tokens \(frames, patches\), the student \(2, 4\)"):
        DistilledClassifier(model.student, VideoMambaConfig(**{**TINY, "num_frames": 4}))


def test_the_recipe_is_the_papers():
    content = recipe_content("videomamba/imagenet_distilled", ["data=x", "use_cpu=true", "report_to=none"])
    recipe, args = build_recipe(content)
    assert (recipe.task, recipe.model_size, recipe.tubelet_size) == ("distillation", "m", None)
    assert (args.num_train_epochs, args.warmup_epochs, args.drop_path_rate, args.weight_decay) == (300, 30, 0.5, 0.05)
    assert (args.learning_rate, args.distillation_weight, args.distillation_until) == (1e-3, 1.0, 1.0)
