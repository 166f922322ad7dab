"""Makes loaders and orders from one flat list of settings, as tests vary them."""

from dataclasses import fields
from typing import Any

from controlbooth.data.loading.loader import Loader
from controlbooth.data.order.settings import DrawSettings, OrderSettings
from controlbooth.data.shards.manifest import Dataset


def _taken(kind: type, settings: dict[str, Any]) -> Any:
    return kind(**{field.name: settings.pop(field.name) for field in fields(kind) if field.name in settings})


def make_loader(dataset: Dataset, **settings: Any) -> Loader:
    """settings: the fields of OrderSettings and DrawSettings, and the other arguments of Loader."""
    return Loader(dataset, _taken(OrderSettings, settings), _taken(DrawSettings, settings), **settings)
