"""Conditions that networks make of a picture, each by a model of transformers that lies in a folder.

    depth=FOLDER              a model for depth estimation, such as Depth Anything or DPT
    normals=FOLDER            the same kind of model: the normals of its depth
    segmentation=FOLDER       a model for semantic segmentation, such as SegFormer or Mask2Former
    pose=FOLDER,DETECTOR      VitPose, and a detector of people such as RT-DETR

Nothing is downloaded. Edges of HED and lines of M-LSD are not in transformers: `soft_edges` and `lines` of
`data.conditions.functions` take their place.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from controlbooth.data.errors import UserError

Condition = Callable[..., np.ndarray]
FROM_FILES = dict(local_files_only=True, trust_remote_code=False)
"""How transformers opens a folder: from there alone, and without running code that lies in it."""

LEAST_SCORE = 0.3
"""Of a detected person or key point."""

# Key points of COCO (17) and those of OpenPose's skeleton (18, with the neck in the middle of the shoulders) that
# ControlNets for pose were trained on. Number of OpenPose's point -> number of COCO's.
_OPENPOSE_OF_COCO = (0, None, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip


def open_network(kind: str, where: str, device: str = "cpu") -> Condition:
    """Loads the model of a kind and returns its function: (H, W, 3) RGB uint8 -> (H, W) or (H, W, 3) uint8.

    where: a folder in the format of transformers; for a pose two folders, with a comma between them. Raises ValueError
    where a kind has no network here, or a folder holds no model of the right sort.
    """
    return NETWORKS[kind][0](network_folders(kind, where), device)


def network_folders(kind: str, where: str) -> list[Path]:
    """Returns the folders that `where` names. Raises ValueError where no network makes the kind, where the kind needs
    another number of folders, and for a folder that holds no model (no config.json)."""
    if kind not in NETWORKS:
        raise UserError(f"condition {kind}={where}: no network makes it here; these do: {', '.join(NETWORKS)}")
    folders = [Path(one) for one in where.split(",")]
    needed = NETWORKS[kind][1]
    if len(folders) != len(needed):
        raise UserError(f"condition {kind}={where}: give {kind}={','.join(needed)}")
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UserError(
                f"condition {kind}: {folder} holds no config.json, so it is no model's folder. Give one in the format "
                f"of transformers, as save_pretrained writes it: {kind}={','.join(needed)}"
            )
    return folders


def _load(auto_class: str, folder: Path, device: str) -> tuple[Any, Any]:
    """Loads the processor and the model of a folder; returns both, the model on the device and in evaluation mode.
    Raises ValueError where they cannot be opened, or where tensors that the model uses are missing."""
    import transformers  # takes seconds, and only these kinds need it

    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, **FROM_FILES)
        loader = getattr(transformers, auto_class)
        model, report = loader.from_pretrained(folder, output_loading_info=True, **FROM_FILES)
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        raise UserError(f"{folder} cannot be opened as transformers' {auto_class}: {error}") from error
    missing = sorted(name for name in report["missing_keys"] if not _UNUSED.search(name))
    if missing:  # transformers makes them up, at random
        raise UserError(
            f"{folder} lacks {len(missing)} tensors of its {type(model).__name__}, such as {missing[0]}: what it would "
            "draw is random. Copy the whole folder again"
        )
    return processor, model.to(device).eval()


_UNUSED = re.compile(r"(^|\.)pooler\.|\.fusion_stage\.layers\.0\.residual_layer1\.|\.num_batches_tracked$")
"""Weights that such a model has and does not use here, and that published files leave out."""


def _depth_model(folders: Sequence[Path], device: str) -> Callable[[np.ndarray], np.ndarray]:
    """Loads a model of depth and returns its function: (H, W, 3) uint8 -> (H, W) float32 in [0, 1], 1 nearest."""
    import torch

    processor, model = _load("AutoModelForDepthEstimation", folders[0], device)
    # Models of metric depth give distances, the others inverse ones, where more is nearer.
    metric = getattr(model.config, "depth_estimation_type", "relative") == "metric"

    @torch.no_grad()
    def depth(image: np.ndarray) -> np.ndarray:
        outputs = model(**processor(images=image, return_tensors="pt").to(device))
        made = processor.post_process_depth_estimation(outputs, target_sizes=[image.shape[:2]])
        found = made[0]["predicted_depth"].float().cpu().numpy()
        nearness = 1.0 / np.maximum(found, 1e-6) if metric else found
        low, high = float(nearness.min()), float(nearness.max())
        return ((nearness - low) / max(high - low, 1e-12)).astype(np.float32)

    return depth


def _open_depth(folders: Sequence[Path], device: str) -> Condition:
    model = _depth_model(folders, device)

    def depth(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
        return np.round(model(image) * 255).astype(np.uint8)

    return depth


def _open_normals(folders: Sequence[Path], device: str) -> Condition:
    model = _depth_model(folders, device)

    def normals(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
        return normals_of_depth(model(image))

    return normals


def normals_of_depth(nearness: np.ndarray, relief: float = 2.0) -> np.ndarray:
    """Turns depth into directions of the surface, as colours. -> (H, W, 3) uint8.

    nearness: (H, W) float32 in [0, 1], 1 nearest. The picture is taken as a relief of height `relief` times its shorter
    side, seen from straight above: n ~ (-dz/dx, dz/dy, 1), x to the right, y up, z to the viewer; each of n in [-1, 1]
    becomes 0 .. 255, so a plane that faces the viewer is (128, 128, 255). Depth of a network is known up to scale only,
    and so is this.
    """
    height = cv2.GaussianBlur(nearness, (0, 0), 1.0) * relief * min(nearness.shape)
    across = cv2.Sobel(height, cv2.CV_32F, 1, 0, scale=1 / 8)
    down = cv2.Sobel(height, cv2.CV_32F, 0, 1, scale=1 / 8)
    normal = np.stack([-across, down, np.ones_like(across)], axis=2)
    normal /= np.linalg.norm(normal, axis=2, keepdims=True)
    return np.round((normal + 1.0) * 127.5).astype(np.uint8)


def _open_segmentation(folders: Sequence[Path], device: str) -> Condition:
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(folders[0], **FROM_FILES)
    universal = type(config) in transformers.AutoModelForUniversalSegmentation._model_mapping
    classes = "AutoModelForUniversalSegmentation" if universal else "AutoModelForSemanticSegmentation"
    processor, model = _load(classes, folders[0], device)
    colours = class_colours(model.config.num_labels)

    @torch.no_grad()
    def segmentation(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
        outputs = model(**processor(images=image, return_tensors="pt").to(device))
        found = processor.post_process_semantic_segmentation(outputs, target_sizes=[image.shape[:2]])[0]
        return colours[found.cpu().numpy()]

    return segmentation


def class_colours(count: int) -> np.ndarray:
    """Returns a colour for each class, far from each other and the same on every machine: (count, 3) uint8.

    The bits of the class's number, the lowest first, go to red, green and blue in turn, and in each of them to the
    highest bit that is free. This is the rule of PASCAL VOC's colour map. Class 0 is black.
    """
    colours = np.zeros((count, 3), np.uint8)
    for number in range(count):
        for place in range(24):
            colours[number, place % 3] |= (number >> place & 1) << (7 - place // 3)
    return colours


def _open_pose(folders: Sequence[Path], device: str) -> Condition:
    import torch

    processor, model = _load("VitPoseForPoseEstimation", folders[0], device)
    find, detector = _load("AutoModelForObjectDetection", folders[1], device)
    people = [number for number, name in detector.config.id2label.items() if name.lower() == "person"]
    if not people:
        raise UserError(f"{folders[1]} detects no class `person`: {', '.join(list(detector.config.label2id)[:8])}, ...")

    @torch.no_grad()
    def pose(image: np.ndarray, sample_hash: int = 0) -> np.ndarray:
        outputs = detector(**find(images=image, return_tensors="pt").to(device))
        found = find.post_process_object_detection(outputs, threshold=LEAST_SCORE, target_sizes=[image.shape[:2]])[0]
        boxes = found["boxes"][torch.isin(found["labels"], torch.tensor(people, device=found["labels"].device))]
        drawing = np.zeros_like(image)
        if not len(boxes):
            return drawing
        corners = boxes.cpu().numpy()
        corners[:, 2:] -= corners[:, :2]  # VitPose takes left, top, width, height
        inputs = processor(images=image, boxes=[corners], return_tensors="pt").to(device)
        made = processor.post_process_pose_estimation(model(**inputs), boxes=[corners])[0]
        for person in made:
            points = np.full((17, 3), 0.0)
            labels = person["labels"].cpu().numpy()
            points[labels, :2], points[labels, 2] = person["keypoints"].cpu().numpy(), person["scores"].cpu().numpy()
            draw_skeleton(drawing, points)
        return drawing

    return pose


def draw_skeleton(drawing: np.ndarray, points: np.ndarray) -> None:
    """Draws a person as OpenPose does. drawing: (H, W, 3) uint8, changed. points: (17, 3) COCO's x, y and score."""
    joints: list[tuple[float, float] | None] = []
    for number in _OPENPOSE_OF_COCO:
        ends = points[[5, 6]] if number is None else points[[number]]
        seen = bool((ends[:, 2] >= LEAST_SCORE).all())
        joints.append((float(ends[:, 0].mean()), float(ends[:, 1].mean())) if seen else None)
    width = max(1, round(min(drawing.shape[:2]) / 128))
    limbs = np.zeros_like(drawing)
    for place, (one, other) in enumerate(_LIMBS):
        start, end = joints[one], joints[other]
        if start is None or end is None:
            continue
        centre = (round((start[0] + end[0]) / 2), round((start[1] + end[1]) / 2))
        angle = np.degrees(np.arctan2(end[1] - start[1], end[0] - start[0]))
        axes = (max(1, round(np.hypot(end[0] - start[0], end[1] - start[1]) / 2)), width)
        cv2.ellipse(limbs, centre, axes, float(angle), 0.0, 360.0, rainbow(place), -1)
    np.maximum(drawing, (limbs * 0.6).astype(np.uint8), out=drawing)
    for place, joint in enumerate(joints):
        if joint is not None:
            cv2.circle(drawing, (round(joint[0]), round(joint[1])), width, rainbow(place), -1)


def rainbow(place: int) -> tuple[int, int, int]:
    """Returns one of OpenPose's colours, once around the hues in steps of 20 degrees, from red. RGB, 0 to 255."""
    pixel = np.array([[[place * 10, 255, 255]]], np.uint8)
    red, green, blue = cv2.cvtColor(pixel, cv2.COLOR_HSV2RGB)[0, 0].tolist()
    return red, green, blue


NETWORKS: dict[str, tuple[Callable[[Sequence[Path], str], Condition], tuple[str, ...]]] = {
    "depth": (_open_depth, ("FOLDER",)),
    "normals": (_open_normals, ("FOLDER",)),
    "segmentation": (_open_segmentation, ("FOLDER",)),
    "pose": (_open_pose, ("FOLDER", "DETECTOR")),
}
"""kind -> what opens it, and the folders that it wants."""
