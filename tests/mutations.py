"""Folders and files of saelab's with one thing changed, as a shared disk, another program or an attacker would change it."""

import copy
import hashlib
import json
import os
import random
import shutil

import torch

VALUES = (
    None, True, False, -1, 0, 1, 2, 1.5, float("nan"), float("inf"), 10**8, 10**11, 10**30, -(10**30), "", "x", "/dev/zero",
    "../x", "nan", "\ud800", [], {}, [None], {"x": 1}, [[1]], "0" * 64, "torch.float32",
)  # fmt: skip


def nodes(value, path=()):
    """Every place of a JSON value but the whole."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from nodes(item, (*path, key))


def change_json(text, rng):
    """The JSON with a value replaced, removed, repeated, renamed or buried deep."""
    value = json.loads(text)
    places = list(nodes(value))
    if not places or rng.random() < 0.03:
        return json.dumps(rng.choice(VALUES)).encode()
    *above, last = rng.choice(places)
    table = value
    for key in above:
        table = table[key]
    how = rng.choice(("replace", "replace", "replace", "remove", "deep", "rename", "twice", "kind"))
    if how == "remove":
        del table[last]
    elif how == "rename" and isinstance(table, dict):
        table[rng.choice(("x", "", "../x", "/dev/zero", f"{last}2"))] = table.pop(last)
    elif how == "deep":
        table[last] = "deep"
        return json.dumps(value).replace('"deep"', "[" * 3000 + "]" * 3000).encode()
    elif how == "twice" and isinstance(table, dict):
        text = json.dumps(value)
        return text.replace(f"{json.dumps(last)}:", f"{json.dumps(last)}: 1, {json.dumps(last)}:", 1).encode()
    elif how == "kind" and isinstance(table[last], int | float | str):
        table[last] = str(table[last]) if not isinstance(table[last], str) else len(table[last])
    else:
        table[last] = copy.deepcopy(rng.choice(VALUES))
    return json.dumps(value).encode()


def change_bytes(data, rng):
    """The bytes cut short, longer, or with some of them others."""
    how, place = rng.choice(("cut", "extend", "flip", "zero", "empty", "head")), rng.randrange(len(data) or 1)
    if how == "cut":
        return data[:place]
    if how == "extend":
        return data + rng.randbytes(rng.choice((1, 8, 1000)))
    if how == "empty":
        return b""
    if how == "head":
        return rng.randbytes(8) + data[8:]
    changed = bytearray(data)
    for i in range(place, min(place + rng.choice((1, 1, 4, 64)), len(data))):
        changed[i] = 0 if how == "zero" else changed[i] ^ (1 << rng.randrange(8))
    return bytes(changed)


def change_header(data, rng):
    """A safetensors file whose header says something else."""
    size = int.from_bytes(data[:8], "little")
    header = change_json(data[8 : 8 + size].decode(), rng)
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def change_numbers(data, rng):
    """A safetensors file with a NaN, an infinity, a zero or a negative number in one of its tensors."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    kinds = {"F32": torch.float32, "F64": torch.float64, "I64": torch.int64, "F16": torch.float16, "I32": torch.int32}
    names = [
        n
        for n, entry in header.items()
        if entry.get("dtype") in kinds and entry["data_offsets"][0] < entry["data_offsets"][1]
    ]
    if not names:
        return change_bytes(data, rng)
    entry = header[rng.choice(names)]
    start, end = (8 + size + offset for offset in entry["data_offsets"])
    tensor = torch.frombuffer(bytearray(data[start:end]), dtype=kinds[entry["dtype"]])
    floating = tensor.is_floating_point()
    tensor[rng.randrange(len(tensor))] = rng.choice(
        (float("nan"), float("inf"), 0.0, -1.0) if floating else (-1, 0, 2**31 - 1)
    )
    return data[:start] + tensor.numpy().tobytes() + data[end:]


def replace_by_no_file(path, rng):
    path.unlink()
    how = rng.choice(("pipe", "folder", "device", "loop", "nothing", "dangling"))
    if how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()
    elif how != "nothing":
        path.symlink_to({"device": "/dev/zero", "loop": path, "dangling": path.with_name("nowhere")}[how])
    return how


def mutate(source, target, rng):
    """Copy a file or folder with one thing changed; what was changed, in words."""
    if source.is_dir():
        shutil.copytree(source, target)
        files = sorted(path for path in target.rglob("*") if path.is_file() and not path.name.startswith("."))
        path = rng.choice([*files, *(path for path in files if path.suffix == ".json")])
    else:
        shutil.copy(source, target)
        path = target
    if rng.random() < 0.07:
        return f"{path.name}: {replace_by_no_file(path, rng)}"
    data = path.read_bytes()
    ways = {
        ".json": [change_json] * 5 + [change_bytes],
        ".safetensors": [change_header, change_header, change_numbers, change_bytes],
    }
    way = rng.choice(ways.get(path.suffix, [change_bytes]))
    path.write_bytes(way(data if way is not change_json else data.decode(), rng))
    signed = target.is_dir() and path.suffix != ".js" and rng.random() < 0.6 and sign(target, path)
    return f"{path.name}: {way.__name__}{', signed' if signed else ''}"


def sign(folder, path):
    """Give the file the checksum that the manifests of its folder list for it: then only its content can tell."""
    data = path.read_bytes()
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    for manifest in folder.rglob("*.json"):
        if manifest == path or manifest.name not in ("cfg.json", "manifest.json"):
            continue
        content = json.loads(manifest.read_text())
        tables = [content.get("files"), content.get("metadata", {}).get("saelab", {}).get("files")]
        tables += [shard["files"] for shard in content.get("shards", ())]
        for table in tables:
            for name in table or {}:
                if name == path.name or path.name.startswith(f"{name}-") and entry["bytes"]:
                    table[name] = entry
                    manifest.write_text(json.dumps(content))
                    return True
    return False


def generator(*seed):
    return random.Random(repr(seed))
