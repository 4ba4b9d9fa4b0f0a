"""Parts of models whose whole does not capture: found from the top down, pruned, put back."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from pruna_ir.capture import capture
from pruna_ir.errors import UsageError, VerificationError
from pruna_ir.pipeline import Pipeline
from pruna_ir.program import Program
from pruna_ir.submodules import ProgramModule, capture_submodules, with_programs


class Body(nn.Module):
    """Two feature maps as a dict; input float32[batch, 3, h, w]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8)
        self.down, self.side = nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.Conv2d(8, 6, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = torch.relu(self.norm(self.stem(x)))
        deep = torch.relu(self.down(x))
        return OrderedDict(fine=self.side(x), coarse=deep[:, :6] + deep[:, 6:])


class Head(nn.Module):
    """Scores and boxes of every map, as lists; ``scale`` is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.scores = nn.Conv2d(6, 10, 3, padding=1), nn.Conv2d(10, 2, 1)
        self.boxes = nn.Conv2d(10, 4, 1)

    def forward(
        self, maps: list[torch.Tensor], scale: float, *, names: dict[str, torch.Tensor]
    ) -> tuple[list[torch.Tensor], dict[str, Any]]:
        hidden = [torch.relu(self.hidden(m)) for m in maps]
        boxes = [self.boxes(h) * scale + names["offset"] for h in hidden]
        return [self.scores(h) for h in hidden], {"boxes": boxes, "kind": "xywh", "none": None}


class Detector(nn.Module):
    """Keeps what scores above zero, as detection models do; takes a list of images."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Body(), Head()
        self.classify = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
        self.temperature = nn.Parameter(torch.ones(()))

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        features = self.backbone(torch.stack(images))
        maps = list(features.values())
        offset = torch.zeros(4, 1, 1)
        scores, found = self.head(maps, 0.5, names={"offset": offset})
        flat = torch.cat([s.flatten(2) for s in scores], 2)
        boxes = torch.cat([b.flatten(2) for b in found["boxes"]], 2)
        results = []
        for score, box in zip(flat, boxes, strict=True):
            keep = score[0] > 0
            best = box[:, keep].T
            labels = self.classify(best).argmax(1) if len(best) else best.new_zeros(0).long()
            results.append({"boxes": best * self.temperature, "labels": labels})
        return results


IMAGES = (3, 17, 13)


def detector() -> tuple[Detector, list[torch.Tensor]]:
    torch.manual_seed(0)
    model = Detector().eval()
    nn.init.uniform_(model.backbone.norm.running_var, 0.5, 2)
    return model, [torch.randn(IMAGES) for _ in range(2)]


def pruned(programs: dict[str, Program]) -> dict[str, Program]:
    """Each program without half of its channels, checked against its oracle."""
    pipeline = Pipeline.parse("canonicalize,prune-channels{ratio=0.5}")
    return {path: pipeline.run(program).program for path, program in programs.items()}


def elements(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# -- finding parts -----------------------------------------------------------------------------


def test_the_largest_parts_are_found_and_refusals_are_told() -> None:
    model, images = detector()
    parts = capture_submodules(model, (images,))
    assert set(parts.captured) == {"backbone", "head", "classify"}
    assert set(parts.refused) == {""}
    assert "data-dependent" in parts.refused[""]


def test_a_model_that_captures_is_one_part() -> None:
    torch.manual_seed(0)
    parts = capture_submodules(nn.Linear(3, 2), (torch.ones(2, 3),))
    assert list(parts.captured) == [""]
    assert parts.refused == {}


def test_the_program_of_a_part_computes_the_part() -> None:
    model, images = detector()
    parts = capture_submodules(model, (images,))
    x = torch.randn(5, *IMAGES)
    with torch.no_grad():
        expected = model.backbone(x)
    fine, coarse = parts.captured["backbone"].program(x)
    torch.testing.assert_close([fine, coarse], list(expected.values()))


def test_the_model_and_the_inputs_are_left_as_they_were() -> None:
    model, images = detector()
    model.train()
    model.head.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given = [image.clone() for image in images]
    capture_submodules(model, (images,))
    assert model.training
    assert not model.head.training
    assert all(not child._forward_hooks for child in model.modules())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(given, images, strict=True))


def test_the_search_is_bounded_and_says_what_it_left() -> None:
    model, images = detector()
    parts = capture_submodules(model, (images,), attempts=2)
    assert list(parts.captured) == ["backbone"]
    assert parts.refused["head"] == "not tried: 2 captures were"
    late = capture_submodules(model, (images,), seconds=-1)
    assert late.refused == {"": "not tried: -1 seconds had passed"}


def test_a_part_that_shares_parameters_gives_way_to_its_children() -> None:
    model, images = detector()
    model.head.boxes.bias = model.temperature_bias = nn.Parameter(torch.zeros(4))
    parts = capture_submodules(model, (images,))
    assert parts.refused["head"] == "shares head.boxes.bias with other parts of the model"
    assert "head.hidden" in parts.captured
    assert "shares" in parts.refused["head.boxes"]


def test_modules_that_nobody_calls_give_way_to_their_children() -> None:
    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
            self.idle = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x[x.sum(1) > -100])
            return x if float(x.sum()) > 0 else -x

    parts = capture_submodules(Listed(), (torch.ones(2, 3),))
    assert set(parts.captured) == {"layers.0", "layers.1"}
    assert parts.refused["layers"] == "is not called as a module in the example run"
    assert parts.refused["idle"] == "is not called as a module in the example run"


def test_a_part_that_saw_nothing_is_captured_with_values_of_its_own() -> None:
    model, images = detector()
    nn.init.constant_(model.head.scores.bias, 1e-3)
    nn.init.zeros_(model.head.scores.weight)

    class Empty(Detector):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            self.classify(torch.zeros(0, 4))
            return super().forward(images)

    model.__class__ = Empty
    program = capture_submodules(model, (images,)).captured["classify"].program
    assert program.examples[0].shape == (2, 4)
    assert bool(program.examples[0].any())


def test_no_parameters_no_search() -> None:
    with pytest.raises(UsageError, match="ReLU has no parameters"):
        capture_submodules(nn.ReLU(), (torch.ones(2),))


# -- putting programs back ---------------------------------------------------------------------


def test_pruned_parts_keep_their_classes_and_the_model_runs() -> None:
    model, images = detector()
    parts = capture_submodules(model, (images,))
    replaced = with_programs(model, parts, pruned(parts.programs))
    assert set(replaced.kept) == {"backbone", "head", "classify"}
    assert replaced.wrapped == {}
    assert elements(replaced.module) < 0.8 * elements(model)
    assert type(replaced.module.get_submodule("backbone")) is Body
    assert model.backbone.stem.weight.shape[0] == 8
    with torch.no_grad():
        # Other sizes than those of the example, as the class takes them.
        (result,) = replaced.module([torch.randn(3, 21, 30)])
    assert list(result) == ["boxes", "labels"]


def test_a_class_that_cannot_express_the_program_is_wrapped() -> None:
    class Shaped(nn.Module):
        """Writes its width into its code."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 3)

        def forward(self, x: torch.Tensor, *, extra: list[torch.Tensor]) -> dict[str, Any]:
            hidden = torch.relu(self.first(x)).reshape(-1, 16)
            return {"out": [self.last(hidden) + extra[0]], "flag": True}

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shaped = Shaped()

        def forward(self, x: torch.Tensor) -> dict[str, Any]:
            found: dict[str, Any] = self.shaped(x, extra=[x[:, :3]])
            return found if float(x.sum()) > -1e9 else {}

    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 4)
    parts = capture_submodules(model, (x,))
    programs = pruned(parts.programs)
    replaced = with_programs(model, parts, programs)
    assert replaced.kept == ()
    assert "shapes are written into its code" in replaced.wrapped["shaped"]
    wrapper = replaced.module.get_submodule("shaped")
    assert isinstance(wrapper, ProgramModule)
    y = torch.randn(5, 4)
    with torch.no_grad():
        found = replaced.module(y)
    assert found["flag"] is True
    torch.testing.assert_close(found["out"], [programs["shaped"](y, y[:, :3])[0]])
    assert set(wrapper.state_dict()) == {
        f"program.{name}" for name in model.shaped.state_dict()
    }
    with pytest.raises(UsageError, match="captured with"):
        wrapper(y, extra=[])


def test_a_wrapper_is_a_module_of_its_own() -> None:
    model, images = detector()
    part = capture_submodules(model, (images,)).captured["classify"]
    wrapper = ProgramModule(part.program, part.call)
    with torch.no_grad():
        wrapper.get_parameter("program.0.weight").zero_()
    assert bool(part.program.tensor("0.weight").any())
    wrapper(torch.randn(7, 4)).sum().backward()
    assert wrapper.get_parameter("program.2.bias").grad is not None


def test_a_reader_of_pruned_parameters_outside_of_the_parts_is_found() -> None:
    class Peeking(Detector):
        def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            torch.ones(1, 16) @ self.classify[0].weight
            return super().forward(images)

    torch.manual_seed(0)
    model, images = Peeking().eval(), [torch.randn(IMAGES)]
    parts = capture_submodules(model, (images,))
    with pytest.raises(VerificationError, match="something outside of the parts reads their"):
        with_programs(model, parts, pruned(parts.programs))


def test_only_parts_can_be_replaced() -> None:
    model, images = detector()
    parts = capture_submodules(model, (images,))
    other = capture(nn.Linear(3, 2), (torch.ones(2, 3),))
    with pytest.raises(UsageError, match="no part was captured at 'neck'"):
        with_programs(model, parts, {"neck": other})


def test_programs_of_torchvisions_detector() -> None:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    class Backbone(nn.Sequential):
        out_channels = 8

    torch.manual_seed(0)
    model = FasterRCNN(
        Backbone(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), nn.Conv2d(6, 8, 3, 2, 1)),
        num_classes=3,
        rpn_anchor_generator=AnchorGenerator(((8, 16),), ((0.5, 1.0),)),
        box_roi_pool=MultiScaleRoIAlign(["0"], 3, 2),
        min_size=32, max_size=40, rpn_post_nms_top_n_test=9, box_score_thresh=0.0,
    ).eval()  # fmt: skip
    images = [torch.rand(3, 32, 36), torch.rand(3, 30, 33)]
    parts = capture_submodules(model, (images,))
    assert {"backbone", "rpn.head", "roi_heads.box_head"} <= set(parts.captured)
    assert "ImageList" in parts.refused["rpn"]
    replaced = with_programs(model, parts, pruned(parts.programs))
    assert set(replaced.kept) == set(parts.captured)
    assert elements(replaced.module) < 0.6 * elements(model)
    with torch.no_grad():
        found = replaced.module([torch.rand(3, 40, 28)])
    assert set(found[0]) == {"boxes", "labels", "scores"}
