"""The index of a checkpoint in several files: which tensor is in which."""

INDEX = "model.safetensors.index.json"


def tensors_by_file(weight_map: object) -> dict[str, set[str]] | None:
    """File → names of its tensors, of the index's `weight_map`; None where that is no map from names to files."""
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) and file for file in weight_map.values()):
        return None
    found: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        found.setdefault(file, set()).add(name)
    return found
