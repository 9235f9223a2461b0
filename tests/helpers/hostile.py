"""Builders of hostile files: each writes one at a path; a payload that runs creates a marker file.

`TORCH` and `SAFETENSORS` hold them by name. A pickle is put together from its instructions, so that
it can say what no pickler would ever write.
"""

import io
import json
import os
import pickle
import random
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

Case = Callable[[Path, Path], None]
"""Writes a hostile file at the first path; the second is the marker of a payload."""

GIB = 2**30
MEBI = 2**20


class Payload:
    """Creates a file when it is unpickled by something that runs code."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self._marker}",)


# --- pickles, instruction by instruction


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(16, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def global_(name: str) -> bytes:
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def sequence(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def call(name: str, *arguments: bytes) -> bytes:
    return global_(name) + sequence(*arguments) + b"R"


def storage(count: int, key: str = "0", kind: str = "torch.FloatStorage") -> bytes:
    reference = text("storage"), global_(kind), text(key), text("cpu"), number(count)
    return sequence(*reference) + b"Q"


def tensor(
    source: bytes, size: tuple[int, ...], stride: tuple[int, ...] = (1,), offset: int = 0
) -> bytes:
    shape, steps = (sequence(*map(number, numbers)) for numbers in (size, stride))
    rest = b"\x89", call("collections.OrderedDict")
    return call("torch._utils._rebuild_tensor_v2", source, number(offset), shape, steps, *rest)


def state(value: bytes) -> bytes:
    """Wrap a value as the state of `model`."""
    return b"\x80\x02}" + text("model") + value + b"s."


# --- zip files


def write_torch(
    path: Path,
    data: bytes,
    storages: Mapping[str, bytes] | None = None,
    extra: Mapping[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> None:
    """Write a file as torch.save does, around any pickle."""
    members = {"archive/data.pkl": data, "archive/byteorder": b"little"}
    members |= {f"archive/data/{key}": content for key, content in (storages or {}).items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in {**members, **(extra or {})}.items():
            archive.writestr(name, content)


def _torch(
    value: bytes | Callable[[], bytes],
    storages: Mapping[str, bytes] | None = None,
    extra: Mapping[str, bytes] | None = None,
) -> Case:
    def write(path: Path, _: Path) -> None:
        write_torch(path, state(value() if callable(value) else value), storages, extra)

    return write


def _payload_zip(path: Path, marker: Path) -> None:
    torch.save({"model": Payload(marker)}, path)


def _payload_legacy(path: Path, marker: Path) -> None:
    torch.save({"model": Payload(marker)}, path, _use_new_zipfile_serialization=False)


def _payload_bare(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"model": Payload(marker)}))


def _payload_bare_text(path: Path, marker: Path) -> None:
    path.write_bytes(pickle.dumps({"model": Payload(marker)}, protocol=0))


def _payload_tar(path: Path, marker: Path) -> None:
    with tarfile.open(path, "w") as archive:
        for name in ("storages", "tensors", "pickle"):
            data = pickle.dumps(Payload(marker))
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))


def _payload(build: Callable[[str], bytes]) -> Case:
    return lambda path, marker: write_torch(path, state(build(f"touch {marker}")))


def _torchscript(path: Path, _: Path) -> None:
    members = {"archive/constants.pkl": b"\x80\x02).", "archive/code/__torch__.py": b"pass\n"}
    write_torch(path, state(b"}"), extra=members)


def _deflated_bomb(path: Path, _: Path) -> None:
    # The same compressed 16 MiB of zeros again and again: quick to write.
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    block = deflate.compress(bytes(16 * MEBI)) + deflate.flush(zlib.Z_FULL_FLUSH)
    stream = block * 128 + b"\x03\x00"
    pickled = state(tensor(storage(GIB // 2), (GIB // 2,)))
    write_torch(path, pickled, {"0": stream})
    _rewrite_directory(path, "archive/data/0", {10: (8, "<H"), 24: (2 * GIB, "<L")})


def _rewrite_directory(path: Path, prefix: str, fields: Mapping[int, tuple[int, str]]) -> None:
    """Overwrite fields, given by their offsets, in the directory entries of some members."""
    data = bytearray(path.read_bytes())
    position = data.rindex(b"PK\x05\x06")
    position = struct.unpack_from("<L", data, position + 16)[0]
    while data[position : position + 4] == b"PK\x01\x02":
        name, extra, comment = struct.unpack_from("<3H", data, position + 28)
        if data[position + 46 :].startswith(prefix.encode()):
            for offset, (value, code) in fields.items():
                struct.pack_into(code, data, position + offset, value)
        position += 46 + name + extra + comment
    path.write_bytes(data)


def _overlapping_members(path: Path, _: Path) -> None:
    # Many members in the directory, and one content for all of them.
    count, content = 200, bytes(MEBI)
    tensors = b"".join(tensor(storage(len(content) // 4, str(i)), (1,)) for i in range(count))
    write_torch(path, state(_listed(tensors)), {str(i): content[:4] for i in range(count)})
    header = path.read_bytes().index(b"archive/data/0") - 30
    size = len(content)
    fields = {20: (size, "<L"), 24: (size, "<L"), 42: (header, "<L")}
    _rewrite_directory(path, "archive/data/", fields)


def _huge_directory(path: Path, _: Path) -> None:
    entry = struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *[0] * 9, 3, *[0] * 6) + b"a/b"
    count = 400_000
    end = struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0, 0, 0, 0, count, count, count * 49, 4)
    locator = struct.pack("<4sLQL", b"PK\x06\x07", 0, 4 + count * 49, 1)
    last = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    path.write_bytes(b"PK\x03\x04" + entry * count + end + locator + last)


def _empty(path: Path, _: Path) -> None:
    path.write_bytes(b"")


def _random_bytes(path: Path, _: Path) -> None:
    path.write_bytes(random.Random(0).randbytes(100_000))


def _cut(path: Path, _: Path) -> None:
    torch.save({"model": torch.ones(1000)}, path)
    path.write_bytes(path.read_bytes()[:-100])


def _listed(*items: bytes) -> bytes:
    return b"](" + b"".join(items) + b"e"


def _doubled(levels: int) -> bytes:
    """Lists of lists, each twice in the next: small as they are, endless for whoever walks them."""
    items = [b"]q\x00"]
    for level in range(levels):
        index = bytes([level])
        items.append(b"](h" + index + b"h" + index + b"eq" + bytes([level + 1]))
    return _listed(*items)


def _doubled_config(levels: int) -> bytes:
    items = [text("leaf") + b"q\x00"]
    for level in range(levels):
        index = bytes([level])
        content = b"}" + text("_content") + b"](h" + index + b"h" + index + b"esb"
        node = global_("omegaconf.listconfig.ListConfig") + b")\x81"
        items.append(node + content + b"q" + bytes([level + 1]))
    return _listed(*items)


def _nested_tuple_key() -> bytes:
    # Hashing it takes time exponential in its depth.
    items = [b")q\x00"]
    for level in range(60):
        index = bytes([level])
        items.append(b"h" + index + b"h" + index + b"\x86q" + bytes([level + 1]))
    return _listed(*items, b"}h\x3cNs")


def _repeated(name: str, arguments: bytes, count: int) -> bytes:
    """Call something again and again with the same arguments."""
    return _listed(global_(name), b"q\x00", arguments, b"q\x01", b"h\x00h\x01R" * count)


_ONE = {"0": bytes(16)}
_PARAMETERS = "torch._utils._rebuild_parameter"

TORCH: dict[str, Case] = {
    "pickle payload in the zip format": _payload_zip,
    "pickle payload in the legacy format": _payload_legacy,
    "bare pickle payload": _payload_bare,
    "bare pickle payload, protocol 0": _payload_bare_text,
    "pickle payload in the tar format": _payload_tar,
    "payload through builtins.eval": _payload(
        lambda command: call("builtins.eval", text(f"__import__('os').system({command!r})"))
    ),
    "payload through a name on the stack": _payload(
        lambda command: text("os") + text("system") + b"\x93" + sequence(text(command)) + b"R"
    ),
    "payload through getattr": _payload(
        lambda command: call("builtins.getattr", global_("os.path"), text("os"))
    ),
    "payload behind a name with dots": _payload(
        lambda command: b"ctorch\nserialization.os.system\n" + sequence(text(command)) + b"R"
    ),
    "payload as a class": _payload(
        lambda command: global_("subprocess.Popen") + sequence(text(command)) + b"\x81"
    ),
    "payload in the state of a parameter": _payload(
        lambda command: call(
            "torch._tensor._rebuild_from_type_v2",
            global_("os.system"),
            global_("torch.Tensor"),
            sequence(text(command)),
            b"}",
        )
    ),
    "payload in the factory of a defaultdict": _payload(
        lambda command: call("collections.defaultdict", call("os.system", text(command)))
    ),
    "payload in an OmegaConf enum": _payload(
        lambda command: call("__main__.Colour", number(1)) + global_("os.system") + b"b"
    ),
    "old instruction for an instance": _torch(b"(" + text("true") + b"ios\nsystem\n"),
    "name of code as a value": _torch(global_("os.system")),
    "TorchScript archive": _torchscript,
    "zip bomb": _deflated_bomb,
    "deflated pickle": lambda path, _: write_torch(
        path, state(bytes(1000)), compression=zipfile.ZIP_DEFLATED
    ),
    "overlapping members": _overlapping_members,
    "directory of 400,000 members": _huge_directory,
    "storage claims 64 GiB": _torch(tensor(storage(16 * GIB), (16 * GIB,)), _ONE),
    "storage claims 1 MiB": _torch(tensor(storage(MEBI // 4), (MEBI // 4,)), _ONE),
    "storage claims less than nothing": _torch(tensor(storage(-4), (1,)), _ONE),
    "storage of two sizes": _torch(_listed(storage(4), storage(2)), _ONE),
    "storage that is missing": _torch(tensor(storage(4, "7"), (4,)), _ONE),
    "storage with a path as key": _torch(tensor(storage(4, "../../etc/passwd"), (4,)), _ONE),
    "bare storage": _torch(storage(4), _ONE),
    "tensor beyond its storage": _torch(tensor(storage(4), (5,)), _ONE),
    "tensor beyond its storage by its offset": _torch(tensor(storage(4), (4,), (1,), 1), _ONE),
    "tensor beyond its storage by its stride": _torch(tensor(storage(4), (2, 2), (3, 1)), _ONE),
    "tensor with a negative stride": _torch(tensor(storage(4), (4,), (-1,), 3), _ONE),
    "tensor with a negative offset": _torch(tensor(storage(4), (4,), (1,), -1), _ONE),
    "tensor with a negative size": _torch(tensor(storage(4), (-1,)), _ONE),
    "tensor whose size overflows": _torch(tensor(storage(4), (2**62, 8), (0, 0)), _ONE),
    "empty tensor whose size overflows": _torch(
        tensor(storage(4), (0, 2**62, 2**62), (1, 1, 1)), _ONE
    ),
    "tensor of 1,000 dimensions": _torch(tensor(storage(4), (1,) * 1000, (1,) * 1000), _ONE),
    "tensor without enough strides": _torch(tensor(storage(4), (2, 2), (1,)), _ONE),
    "expanded tensor of 4 TiB": _torch(tensor(storage(4), (2**40,), (0,)), _ONE),
    "tensor of no storage": _torch(tensor(text("storage"), (1,)), _ONE),
    "parameter of no tensor": _torch(call(_PARAMETERS, text("data"), b"\x88", b"N")),
    "64 GiB bytearray": _torch(call("builtins.bytearray", number(64 * GIB))),
    "bytearray of a list": _torch(call("builtins.bytearray", _listed(b"K\x01" * 9))),
    "string longer than the file": _torch(b"X\xff\xff\xff\x7f"),
    "bytes of 2**63": _torch(b"\x8e" + struct.pack("<Q", 2**63)),
    "memo far out": _torch(b"Nr\xff\xff\xff\x7f"),
    "memo that was never set": _torch(b"h\x05"),
    "pickle without an end": lambda path, _: write_torch(path, b"\x80\x02}"),
    "pickle that takes from an empty stack": lambda path, _: write_torch(path, b"\x80\x02R."),
    "empty pickle": lambda path, _: write_torch(path, b""),
    "unknown instruction": _torch(b"\xff"),
    "lists nested 900,000 deep": _torch(lambda: b"]" * 900_000 + b"a" * 899_999),
    "marks nested 1,000,000 deep": _torch(lambda: b"(" * 1_000_000),
    "values without end": _torch(lambda: b"(" + b"N" * 8_000_000 + b"t"),
    "instructions without end": _torch(lambda: _listed((b"(" + b"N" * 98 + b"t") * 90_000)),
    "empty sets without end": _torch(lambda: _listed(b"\x8f" * 900_000)),
    "empty dicts without end": _torch(lambda: _listed(b"}" * 900_000)),
    "one dict without end": _torch(
        lambda: (
            b"}(" + b"".join(b"J%bN" % struct.pack("<i", i + 300) for i in range(700_000)) + b"u"
        )
    ),
    "dicts without end": _torch(lambda: _listed(b"}K\x01Ns" * 300_000)),
    "ordered dicts without end": _torch(
        lambda: _listed(global_("collections.OrderedDict"), b"q\x00", b"h\x00)RK\x01Ns" * 200_000)
    ),
    "tuples without end": _torch(lambda: _listed(b"N\x85" * 700_000)),
    "nodes without end": _torch(
        lambda: _listed(
            global_("omegaconf.dictconfig.DictConfig"), b"q\x00", b"h\x00)\x81}b" * 200_000
        )
    ),
    "names without end": _torch(lambda: _listed(b"ca\nb\n" * 400_000)),
    "numbers without end": _torch(lambda: _listed(b"M\xff\xff" * 1_400_000)),
    "tensors without end": _torch(
        lambda: _repeated(
            "torch._utils._rebuild_tensor_v2",
            sequence(storage(4), b"K\x00", sequence(b"K\x04"), sequence(b"K\x01"), b"\x89", b"N"),
            500_000,
        ),
        _ONE,
    ),
    "sets made of a long list": _torch(
        lambda: _repeated("builtins.set", sequence(_listed(*map(number, range(5000)))), 100_000)
    ),
    "paths made of many parts": _torch(
        lambda: _repeated("pathlib.PosixPath", sequence(*[text("")] * 5000), 100_000)
    ),
    "arrays of many dimensions": _torch(
        lambda: _repeated(
            "numpy._core.numeric._frombuffer",
            sequence(
                b"C\x00", call("numpy.dtype", text("f8")), sequence(*[b"K\x00"] * 9000), text("C")
            ),
            300_000,
        )
    ),
    "text in wide letters": _torch(lambda: _listed(text("a" * 16 * MEBI + "\U0001f600") * 4)),
    "list in itself": _torch(b"]q\x00h\x00a"),
    "lists that double 90 times": _torch(_doubled(90)),
    "configuration that doubles 40 times": _torch(_doubled_config(40)),
    "key that takes forever to hash": _torch(_nested_tuple_key()),
    "key that is a list": _torch(b"}]Ns"),
    "array of objects": _torch(
        call("numpy.core.multiarray._reconstruct", global_("numpy.ndarray"), sequence(number(0)))
        + sequence(
            number(1), sequence(number(1)), call("numpy.dtype", text("O8")), b"\x89", b"](Ne"
        )
        + b"b"
    ),
    "array that claims more than its bytes": _torch(
        call(
            "numpy._core.numeric._frombuffer",
            b"C\x04abcd",
            call("numpy.dtype", text("f8")),
            sequence(number(GIB)),
            text("C"),
        )
    ),
    "array whose shape is a list to multiply": _torch(
        call(
            "numpy._core.numeric._frombuffer",
            b"C\x00",
            call("numpy.dtype", text("f8")),
            sequence(_listed(b"N" * 1000), number(10**9)),
            text("C"),
        )
    ),
    "dtype that takes forever to print": _torch(
        _listed(_doubled(60) + b"q\x3d", global_("numpy.dtype") + b"h\x3d\x85R")
    ),
    "storage of a size that takes forever to print": _torch(
        _listed(
            _doubled(60) + b"q\x3d",
            sequence(
                text("storage"), global_("torch.FloatStorage"), text("0"), text("cpu"), b"h\x3d"
            )
            + b"Q",
        ),
        _ONE,
    ),
    "array without content": _torch(call("numpy.core.multiarray._reconstruct")),
    "big-endian numbers": lambda path, _: write_torch(
        path, state(b"}"), extra={"archive/byteorder": b"big"}
    ),
    "member names with ../": _torch(b"}", extra={"../../evil": b"x"}),
    "member names that begin with /": _torch(b"}", extra={"/tmp/evil": b"x"}),
    "members in two folders": _torch(b"}", extra={"other/data.pkl": state(b"}")}),
    "zip file of something else": lambda path, _: zipfile.ZipFile(path, "w").writestr("a/b", "c"),
    "not a dict": lambda path, _: write_torch(path, b"\x80\x02]."),
    "dict with numbers as names": lambda path, _: write_torch(path, b"\x80\x02}K\x01Ns."),
    "empty file": _empty,
    "random bytes": _random_bytes,
    "file cut short": _cut,
}


# --- safetensors


def header(text_: bytes, data: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(text_) if length is None else length) + text_ + data


def entry(begin: int, end: int, shape: list[int] | None = None, dtype: str = "F32") -> object:
    count = (end - begin) // 4
    return {"dtype": dtype, "shape": shape or [count], "data_offsets": [begin, end]}


def _safetensors(entries: Mapping[str, object], data: bytes = b"") -> Case:
    return lambda path, _: path.write_bytes(header(json.dumps(entries).encode(), data)) and None


def _raw(data: Callable[[], bytes]) -> Case:
    return lambda path, _: path.write_bytes(data()) and None


def _many_empty_tensors(count: int) -> bytes:
    return header(
        b"{"
        + b",".join(
            b'"%0*d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' % (48, i)
            for i in range(count)
        )
        + b"}"
    )


_VALID = json.dumps({"a": entry(0, 16)}).encode()

SAFETENSORS: dict[str, Case] = {
    "header of 2**63 bytes": _raw(lambda: header(_VALID, bytes(16), 2**63)),
    "header of 2**64 - 1 bytes": _raw(lambda: header(_VALID, bytes(16), 2**64 - 1)),
    "header longer than the file": _raw(lambda: header(_VALID, bytes(16), len(_VALID) + 17)),
    "header of 900,000 empty tensors": _raw(lambda: _many_empty_tensors(900_000)),
    "header just under the limit": _raw(lambda: _many_empty_tensors(150_000)),
    "header of brackets": _raw(lambda: header(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}")),
    "header of wide text": _raw(
        lambda: header(
            b'{"__metadata__":{"a":"' + b"x" * 15 * MEBI + "\U0001f600".encode() + b'"}}'
        )
    ),
    "offsets beyond the file": _safetensors({"a": entry(0, 32)}, bytes(16)),
    "negative offsets": _safetensors({"a": entry(-16, 0, [4])}, bytes(16)),
    "shape and offsets disagree": _safetensors({"a": entry(0, 16, [5])}, bytes(16)),
    "shape overflows 64 bits": _safetensors({"a": entry(0, 16, [2**62, 4])}, bytes(16)),
    "empty shape overflows 64 bits": _safetensors(
        {"a": {"dtype": "F32", "shape": [0, 2**62, 2**62], "data_offsets": [0, 0]}}
    ),
    "shape of booleans": _safetensors(
        {"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)
    ),
    "overlapping tensors": _safetensors({"a": entry(0, 16), "b": entry(8, 24)}, bytes(24)),
    "hole between tensors": _safetensors({"a": entry(0, 8), "b": entry(12, 16)}, bytes(16)),
    "bytes after the last tensor": _safetensors({"a": entry(0, 8)}, bytes(16)),
    "duplicate key": _raw(
        lambda: header(b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 16)).encode(),) * 2), bytes(16))
    ),
    "header nested 100,000 deep": _raw(
        lambda: header(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    ),
    "unknown dtype": _safetensors({"a": entry(0, 16, dtype="F128")}, bytes(16)),
    "entry that is a number": _safetensors({"a": 7}),
    "metadata that is a list": _safetensors({"__metadata__": [1]}),
    "number of 10,000 digits": _raw(lambda: header(b'{"a":' + b"1" * 10_000 + b"}")),
    "header that is not JSON": _raw(lambda: header(b"{'a': 1}")),
    "header that is not text": _raw(lambda: header(b"{\xff\xfe}")),
    "empty file": _empty,
    "random bytes": _random_bytes,
}
