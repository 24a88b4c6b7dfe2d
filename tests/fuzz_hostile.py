"""Random hostile bundles: each must be read, or end in one of ctflow's errors, in little time and memory.

`python tests/fuzz_hostile.py [COUNT [SEED]]` puts values that no honest bundle has into sound ones (`random_bundles`),
writes them as JSON or YAML beside plain weights or odd ones, and lets `ctflow inspect-model` look at each, which reads
every part and compares the network with the weights. It prints one line for each that ends otherwise, and one JSON
document at the end; the same seed gives the same bundles.
"""

from __future__ import annotations

import copy
import json
import pickle
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from ctflow.bundle.network import network_from_config
from ctflow.bundle.read import read_config
from ctflow.cli.inspect_model import inspect_model
from ctflow.core.errors import CtflowError
from ctflow.core.model import Model, ModelSpec
from ctflow.networks.build import check_fit
from random_bundles import Json, ensembled, rewritten, sound_bundle

LONGEST_S, MOST_MB = 15.0, 600  # of processor time for a bundle; more memory than after the first ones
VALUES: list[Json] = [
    None, True, False, 0, -1, 1, 0.5, -0.0, 65_536, 65_537, 60_000, 2**31, 2**63, 10**29, 1e308, -1e308, 5e-324, "",
    " ", "image", "pred", "a" * 5000, "\0", "\ud800", "@", "@@", "@image_key", "@preprocessing", "@network_def",
    "@inferer#roi_size", "@##inferer", "@#", "@::", "%inferer", "$", "$@", "#", "::", "+", "../..", "/etc", [], [[]],
    [None], [0] * 3, [60_000] * 3, ["0", 1, 2, 3], [0, 1, 2, 3], [1e9] * 3, [[1, 2, 3]] * 3, {}, {"": 1}, {"a#b": 1},
    {"_target_": "UNet"}, {"_target_": []}, {"_target_": "Compose", "transforms": []}, {"_disabled_": "$1"}, [True] * 3,
]  # fmt: skip
ATOMS = [
    "1", "-8", "0.5", "1e18", "'a'", "'%999d'", "None", "True", "@image_key", "@inferer", "@network_def",
    "@preprocessing", "[1, 2]", "{1: 2}", "{'_target_': 'UNet', 1: 2}", "(1, 2)", "{1, 2}", "range(10**9)",
    "torch.float32", "x",
    "torch.load('models/odd.pt')", "torch.load('models/model.pt')", "torch.load('t.pt')", "torch.tensor([1, 2, 3])",
    "np.array([[1], [2]])", "json.loads('[1, {}]')", "pathlib.Path('configs/metadata.json').read_text()",
    "json.loads(pathlib.Path('configs/metadata.json').read_text())", "[0] * 9999", "'a' * 9999", "lambda x: x",
]  # fmt: skip
FORMS = [
    "{} + {}", "{} * {}", "{} ** {}", "{} % {}", "{} // {}", "{} < {}", "{} == {}", "{} in {}", "{}[{}]", "{}[::{}]",
    "[{} for x in {}]", "{{{}: {}}}", "{} if {} else 1", "not ({} or {})", "({}, *{})", "max({}, {})",
    "dict([({}, {})])",
    "list(zip({}, {}))", "'{{}}{{:>9}}'.format({}, {})", "f'{{{}}}{{{}}}'", "str({}) + str({})", "{}.tolist() + {}",
    "sorted([{}, {}])", "({})({})", "[{}][{}]", "{}.get({})", "{}.shape[{}]", "os.path.join({}, {})", "sum([{}, {}])",
]  # fmt: skip
# What YAML can say and JSON cannot.
CONSTRUCTS = [
    "!!int ''", "!!float '-'", "!!bool maybe", "!!set {a}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!binary a", "=",
    "2001-01-01",
    "{<<: {a: 1}}", "{<<: [*m, *m]}", "*m", "1" + ":1" * 2000, "0x" + "f" * 2000, "!!python/name:os.system ''",
    "{? [a] : 1}",
    "!!null [1]", "!!timestamp 3", "&m [*m]", "! 3", "!x 3", "'\\0'", "*nowhere", "{a: 1, a: 2}",
    "[" * 70 + "]" * 70, ".inf",
]  # fmt: skip
OPCODES = b"()}]0123NKJMXUcRbaesutqhrjQ\x80\x81\x85\x86\x87\x88\x89\x8a.\x00\x01\x02\xff"


def expression(rng: np.random.Generator, level: int = 0) -> str:
    if level > 4 or rng.random() < 0.3:
        return str(rng.choice(ATOMS))
    return str(rng.choice(FORMS)).format(f"({expression(rng, level + 1)})", f"({expression(rng, level + 1)})")


def hostile_value(rng: np.random.Generator) -> Json:
    kind = rng.random()
    if kind < 0.45:
        return copy.deepcopy(VALUES[int(rng.integers(len(VALUES)))])
    if kind < 0.55:
        return "$lambda x: " + expression(rng)
    if kind < 0.6:
        return "$" + "-" * int(rng.integers(2000)) + str(rng.choice(ATOMS))
    return "$" + expression(rng)


def places(value: Json) -> list[tuple[Json, Any]]:
    """(holder, key or index) of everything in a document."""
    found: list[tuple[Json, Any]] = []
    left = [value]
    while left:
        holder = left.pop()
        inside = list(holder) if isinstance(holder, dict) else range(len(holder))
        found += [(holder, at) for at in inside]
        left += [holder[at] for at in inside if isinstance(holder[at], dict | list)]
    return found


def hostile_text(rng: np.random.Generator) -> tuple[str, str]:
    """A configuration's file name and text."""
    bundle = sound_bundle(rng)
    if rng.random() < 0.3:
        ensembled(bundle)
    if rng.random() < 0.3:
        rewritten(bundle)
    document = bundle.document
    marks = {}
    is_yaml = rng.random() < 0.4
    for number in range(int(rng.integers(1, 4))):
        holder, at = (found := places(document))[int(rng.integers(len(found)))]
        how = rng.random()
        if is_yaml and how < 0.5:
            holder[at] = f"mark{number}"
            marks[f"mark{number}"] = str(rng.choice(CONSTRUCTS))
        elif how < 0.8 or not isinstance(holder, dict):
            holder[at] = hostile_value(rng)
        elif how < 0.9:
            holder[
                str(rng.choice(["_mode_", "_requires_", "_disabled_", "_desc_", "mode", "keys", "+inferer", "a#b"]))
            ] = hostile_value(rng)
        else:
            document[f"inferer#{rng.choice(['roi_size', 'mode', 'overlap', '-1', ''])}"] = hostile_value(rng)
    if not is_yaml:
        return "inference.json", json.dumps(document)
    style = None if rng.random() < 0.5 else False  # the innermost lists and objects in one line, or none
    text = "m: &m {k: 1}\n" + yaml.safe_dump(document, sort_keys=False, default_flow_style=style)
    for mark, construct in marks.items():
        text = text.replace(mark, construct)
    return "inference.yaml", text


def hostile_pickle(rng: np.random.Generator) -> bytes:
    """A state dict's pickle with some bytes that are others, or operations in any order."""
    if rng.random() < 0.5:
        return b"\x80\x02" + bytes(rng.choice(list(OPCODES), int(rng.integers(1, 300))).astype(np.uint8)) + b"."
    raw = bytearray(pickle.dumps({"a": [1, (2, 3)], "b": {"c": 2.5, 4: None}}, protocol=2))
    for _ in range(int(rng.integers(1, 6))):
        raw[int(rng.integers(len(raw)))] = int(rng.choice(list(OPCODES)))
    return bytes(raw)


class Folder:
    """A bundle's folder whose configuration and weights change."""

    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "configs").mkdir(parents=True)
        (path / "models").mkdir()
        torch.save({"a": torch.ones(2)}, path / "models" / "model.pt")
        self._weights = (path / "models" / "model.pt").read_bytes()
        torch.save(torch.tensor([1, 2]), path / "t.pt")
        names = {str(channel): f"channel {channel}" for channel in range(2)}
        about = {"version": "1", "network_data_format": {"outputs": {"pred": {"channel_def": names}}}}
        (path / "configs" / "metadata.json").write_text(json.dumps(about))

    def write(self, rng: np.random.Generator) -> None:
        for old in (self.path / "configs").glob("inference.*"):
            old.unlink()
        name, text = hostile_text(rng)
        (self.path / "configs" / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        for file, share in (("odd.pt", 1), ("model.pt", 0.2)):
            odd = _saved(hostile_pickle(rng), is_zip=bool(rng.random() < 0.5))
            (self.path / "models" / file).write_bytes(odd if rng.random() < share else self._weights)


def _saved(content: bytes, *, is_zip: bool) -> bytes:
    import io  # noqa: PLC0415
    import zipfile  # noqa: PLC0415

    if not is_zip:
        parts = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        return b"".join(pickle.dumps(part, protocol=2) for part in parts) + content + pickle.dumps([], protocol=2)
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
    return made.getvalue()


def verdict_of(folder: Path) -> str:
    """What became of a bundle: "runs", an error's reason, or what is wrong."""
    found = inspect_model(folder)
    json.dumps(found)
    reasons = [part["reason"] for part in found["parts"] if part["reason"]]
    if any(part["part"] == "network_def" and part["understood"] for part in found["parts"]):
        reasons.append(_reason_of_network(folder))
    return str(reasons[0]) if reasons else "runs"


def _reason_of_network(folder: Path) -> str:
    """Why the network does not fit weights that no network has, even where other parts are not understood."""
    network, _ = network_from_config(read_config(folder))
    spec = ModelSpec("x", "1", network, 1, 2, (), (16,) * 3, 0.25, "constant", 1, "softmax", None, (), "", False)
    try:
        check_fit(Model(spec, {"a": torch.ones(2)}, ""))
    except CtflowError as error:
        return error.reason
    raise AssertionError("it fits")


def fuzz(count: int, seed: int, path: Path) -> dict[str, Any]:
    """Try bundles: counts of verdicts, and (number, verdict) of each that is not fine."""
    folder = Folder(path / "hostile")
    verdicts: Counter[str] = Counter()
    bad: list[tuple[int, str]] = []
    slowest, memory = 0.0, 0
    for number in range(count):
        folder.write(np.random.default_rng([seed, number]))
        began = time.process_time()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                verdicts[verdict_of(folder.path)] += 1
        except Exception as error:
            bad.append((number, f"crash: {type(error).__name__}: {str(error)[:200]}"))
        took = time.process_time() - began
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        if number < 5:  # these import MONAI
            memory = used
            continue
        slowest = max(slowest, took)
        if took > LONGEST_S:
            bad.append((number, f"took {took:.0f} s"))
        if used - memory > MOST_MB:
            bad.append((number, f"took {used - memory} MB"))
            memory = used
    return {"bundles": count, "seed": seed, "reasons": dict(verdicts), "slowest_s": round(slowest, 2), "bad": bad}


def main(words: list[str]) -> int:
    count, seed = (int(word) for word in [*words, *("5000", "7")[len(words) :]][:2])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        result = fuzz(count, seed, Path(folder))
    for number, verdict in result["bad"]:
        sys.stdout.write(f"{number}: {verdict}\n")
    sys.stdout.write(json.dumps({key: value for key, value in result.items() if key != "bad"}) + "\n")
    return 1 if result["bad"] else 0


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main(sys.argv[1:]))
