"""The features by name, and by kind as the page lists them."""

from ..feature import Feature
from . import caches

KINDS: dict[str, dict[str, Feature]] = {
    "Step caches": caches.FEATURES,
}
FEATURES: dict[str, Feature] = {name: feature for kind in KINDS.values() for name, feature in kind.items()}
