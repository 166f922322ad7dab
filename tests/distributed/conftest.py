import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # worker.py, a program, and these tests share tiny.py


@pytest.fixture(scope="session")
def world_folder(tmp_path_factory) -> Path:
    """A folder with base/, train/ and held/; runs go to runs/."""
    import tiny

    folder = tmp_path_factory.mktemp("world")
    tiny.write_base(folder / "base")
    tiny.write_shards(folder)
    return folder


@pytest.fixture(scope="session")
def studio(world_folder) -> Path:
    """A manifest of six subjects with three pictures each, beside the tiny base."""
    import cv2
    import yaml
    from studios import NAMES

    from controlbooth.data import scenes

    rows = []
    for number, name in enumerate(NAMES):
        folder = world_folder / "pictures" / name
        folder.mkdir(parents=True)
        for shot in range(3):
            picture = scenes.render(scenes.scene(70 + number, shot), 64).image
            cv2.imwrite(str(folder / f"{shot}.png"), picture[..., ::-1])
        rows.append(dict(name=name, images=f"pictures/{name}", class_noun="star"))
    (world_folder / "subjects.yaml").write_text(yaml.safe_dump(rows))
    return world_folder
