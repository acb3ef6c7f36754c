"""Damage to a quantized checkpoint: `inspect`, `convert` and `eval` refuse it by name, or give what they gave before.

Each example damages one thing. What a command gives is compared with what it gives for the sound checkpoint: the
summary of every linear, all dense weights bit by bit, the perplexity. What none of them can know, that somebody wanted
another config.json or tokenizer, `inspect --verify` has to name.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from vllm_babai.format import FORMATS

INDEX = "model.safetensors.index.json"
REPORT = "babai_report.json"
KEYS = {key for form in FORMATS.values() for key in form.dtypes}
VALUES = (None, True, -1, 0, 1, 3, 7, 1 << 40, 1e30, "", "x", "hptq", "ssqr", "trellis", [], ["x"], {}, {"x": 1})


def json_paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Ways to every value inside a JSON document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from json_paths(inner, (*path, key))


def edit_json(path: Path, chance: random.Random) -> str:
    """Change or remove one value of a JSON file."""
    document = json.loads(path.read_text())
    *way, last = chance.choice(list(json_paths(document)))
    inside = document
    for key in way:
        inside = inside[key]
    if chance.random() < 0.2:
        del inside[last]
    else:
        inside[last] = chance.choice(VALUES)
    path.write_text(json.dumps(document))
    return f"{path.name} {[*way, last]}"


def flip(path: Path, chance: random.Random) -> str:
    """Change some bytes of a file."""
    content = bytearray(path.read_bytes())
    for _ in range(chance.choice((1, 1, 1, 8))):
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    return path.name


def cut(path: Path, chance: random.Random) -> str:
    """Cut a file off, or let it end in bytes that are not its own."""
    content = path.read_bytes()
    length = chance.randrange(len(content))
    path.write_bytes(content[:length] if chance.random() < 0.7 else content + bytes(length % 64 + 1))
    return path.name


def remove(path: Path, chance: random.Random) -> str:
    """Remove a file."""
    path.unlink()
    return path.name


def alter(path: Path, chance: random.Random) -> str:
    """Drop, rename, reshape, retype, empty or change a tensor of a quantized linear; the index stays in step."""
    tensors = load_file(path)
    names = [name for name in tensors if name.rpartition(".")[2] in KEYS]
    name = chance.choice(names)
    tensor, kind = (
        tensors[name],
        chance.choice(("drop", "rename", "flatten", "retype", "empty", "bit", "zero", "longer")),
    )
    if kind in ("drop", "rename"):
        del tensors[name]
        if kind == "rename":
            tensors[
                chance.choice((f"{name}x", name.replace("layers.0", "layers.7").replace("layers.1", "layers.8")))
            ] = tensor
    elif kind == "flatten":
        tensors[name] = tensor.reshape(-1, 1)
    elif kind == "retype":
        tensors[name] = tensor.to(chance.choice((torch.float32, torch.int64, torch.bool)))
    elif kind == "empty":
        tensors[name] = tensor[:0].clone()
    elif kind == "longer":
        tensors[name] = torch.cat([tensor, tensor[-1:]])
    else:
        raw = tensor.clone().view(torch.uint8)
        if kind == "zero":
            raw.zero_()
        else:
            raw.view(-1)[chance.randrange(raw.numel())] ^= 1 << chance.randrange(8)
        tensors[name] = raw.view(tensor.dtype)
    store(path, tensors)
    return f"{kind} {name}"


def swap(path: Path, chance: random.Random) -> str:
    """Exchange a tensor, or a whole linear, with that of another linear of the same file."""
    tensors = load_file(path)
    linears = sorted({name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in KEYS})
    one, other = chance.sample(linears, 2)
    keys = sorted(name.removeprefix(f"{one}.") for name in tensors if name.startswith(f"{one}."))
    for key in keys if chance.random() < 0.5 else [chance.choice(keys)]:
        tensors[f"{one}.{key}"], tensors[f"{other}.{key}"] = tensors[f"{other}.{key}"], tensors[f"{one}.{key}"]
    store(path, tensors)
    return f"swap {one} {other}"


def store(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a file, and what it holds into the index."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    index = json.loads((path.parent / INDEX).read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != path.name}
    index["weight_map"] = kept | dict.fromkeys(tensors, path.name)
    (path.parent / INDEX).write_text(json.dumps(index))


WEIGHTS = {"flipped bytes": flip, "cut file": cut, "removed file": remove}
JSONS = {"edited field": edit_json, "flipped bytes": flip, "cut file": cut}
LINEARS = {"altered tensor": alter, "swapped": swap}  # in the files of the two blocks
DAMAGES = [
    *((f"{name}, weights", damage, "*.safetensors") for name, damage in WEIGHTS.items()),
    *((f"{name}, linears", damage, "model-0000[12]-of-*.safetensors") for name, damage in LINEARS.items()),
    *((f"{name}, config", damage, "config.json") for name, damage in JSONS.items()),
    *((f"{name}, index", damage, INDEX) for name, damage in JSONS.items()),
    *((f"{name}, report", damage, REPORT) for name, damage in JSONS.items()),
    ("flipped bytes, tokenizer", flip, "tokenizer*.json"),
    ("cut file, tokenizer", cut, "tokenizer*.json"),
]


def results(folder: Path, text: Path, out: Path, babai: Callable[..., Any]) -> dict[str, Any]:
    """What each command gives: its outcome, or where it ends well, its result."""
    found: dict[str, Any] = {"inspect": babai("inspect", folder, "--json")}
    shutil.rmtree(out, ignore_errors=True)
    found["convert"] = babai("convert", folder, out, "--to", "dense")
    found["eval"] = babai("eval", folder, "--data", text, "--window", 32, "--samples", 1, "--json")
    given_back: dict[str, Any] = {}
    for command, outcome in found.items():
        if outcome.status or outcome.traceback:
            given_back[command] = outcome
        elif command == "convert":
            given_back[command] = {
                name: tensor.view(torch.uint8).numpy().tobytes()
                for path in sorted(out.glob("*.safetensors"))
                for name, tensor in load_file(path).items()
            }
        else:
            result = json.loads(outcome.out)
            result.pop("checkpoint_bytes", None)  # of the files, which may be longer
            result.pop("digest", None)
            for linear in result.get("linears", ()):
                linear.pop("relative_error")  # the report's, which is only shown
            given_back[command] = result
    return given_back


def attack(
    number: int,
    kind: str,
    damage: Any,
    files: str,
    sound: Path,
    baseline: dict[str, Any],
    text: Path,
    scratch: Path,
    babai: Any,
) -> tuple[str, str]:
    """Damage a copy once; how it went, and what for. The worst of the three commands counts."""
    chance = random.Random(number)
    folder = scratch / "damaged"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(sound, folder)
    what = damage(chance.choice(sorted(folder.glob(files))), chance)
    verdicts = []
    for command, result in results(folder, text, scratch / "dense", babai).items():
        if isinstance(result, dict):
            verdicts.append(("harmless" if result == baseline[command] else "silent", f"{command}: {what}"))
        elif result.traceback is not None:
            verdicts.append(("traceback", f"{command}: {what}: {result.traceback}"))
        elif result.refused and names_something(result.error, folder):
            verdicts.append(("refused by name", result.error))
        else:
            verdicts.append(("refused without a name", f"{command}: {what}: {result.error}"))
    order = ("traceback", "silent", "refused without a name", "refused by name", "harmless")
    return min(verdicts, key=lambda verdict: order.index(verdict[0]))


def names_something(message: str, folder: Path) -> bool:
    """Whether a message names a file of the folder, a tensor or linear, or the folder itself."""
    return str(folder) in message or "model." in message or "lm_head" in message


@pytest.fixture(scope="module")
def baselines() -> dict[Path, dict[str, Any]]:
    """What the commands give for the sound checkpoints; filled as they are used."""
    return {}


def run(
    numbers: Any,
    kinds: Any,
    examples: int,
    quantized: Path,
    text: Path,
    tmp_path: Path,
    babai: Any,
    figures: Any,
    baselines: Any,
) -> None:
    if quantized not in baselines:
        baselines[quantized] = results(quantized, text, tmp_path / "sound", babai)
        assert all(isinstance(result, dict) for result in baselines[quantized].values()), baselines[quantized]

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # an example is a number, of which a smaller one is no simpler
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(number=numbers, kind=kinds)
    def one(number: int, kind: tuple[str, Any, str]) -> None:
        verdict, why = attack(number, *kind, quantized, baselines[quantized], text, tmp_path, babai)
        excused = verdict == "silent" and seen_by_verify(kind[0], tmp_path / "damaged", babai)
        figures[kind[0], "seen by --verify" if excused else verdict] += 1
        assert excused or verdict in ("refused by name", "harmless"), f"{kind[0]} {number}: {verdict}: {why}"

    one()


def seen_by_verify(kind: str, folder: Path, babai: Any) -> bool:
    """Whether a change may give another model that is as good as the first, and `inspect --verify` names the file.

    That is so of another value in config.json or the tokenizer, which people edit.
    """
    if not kind.endswith((", config", ", tokenizer")):
        return False
    found = babai("inspect", folder, "--verify")
    return found.refused and ("config.json" in found.error or "tokenizer" in found.error)


NUMBERS = st.integers(0, 2**32)


def test_damage_is_refused_by_name_or_harmless(
    quantized: Path, text: Path, tmp_path: Path, babai: Any, figures: Any, baselines: Any
) -> None:
    run(NUMBERS, st.sampled_from(DAMAGES), 12, quantized, text, tmp_path, babai, figures, baselines)


@pytest.mark.long
@pytest.mark.parametrize("kind", DAMAGES, ids=[kind for kind, _, _ in DAMAGES])
def test_damage_of_every_kind(
    kind: Any, quantized: Path, text: Path, tmp_path: Path, babai: Any, figures: Any, baselines: Any
) -> None:
    run(NUMBERS, st.just(kind), 50, quantized, text, tmp_path, babai, figures, baselines)
