"""Keep of a CUDA shared library only the machine code that one GPU architecture runs.

    python -m tools.slim_fatbin [--arch 90] LIBRARY ...

The libraries are changed in place. NVIDIA's compiler stores the code of all architectures in "fatbin" regions (sections
.nv_fatbin and __nv_relfatbin): a header, then entries, each with a header of its own. Here the entries that stay are
moved to the front of their region, whose size field shrinks, and the rest becomes zeros, which compress to nothing. No
section moves. nvprune does this for object files and static libraries only.

CUDA does not document the format: it was read from libraries of CUDA 13.
"""

import argparse
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MAGIC = 0xBA55ED50
_PTX, _CUBIN = 1, 2
_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
_REGION = struct.Struct("<IHHQ")  # magic, version, bytes of this header, bytes of the entries
_ENTRY = struct.Struct("<HHIQIIHHI")  # kind, version, bytes of this header, bytes of the code, ..., architecture


@dataclass(frozen=True)
class Entry:
    """Code of one architecture. offset: of its header in the file; header, code: bytes; arch: 90 for sm_90."""

    offset: int
    kind: int
    header: int
    code: int
    arch: int

    @property
    def end(self) -> int:
        return self.offset + self.header + self.code


@dataclass
class Slimmed:
    """What was done. found, kept: bytes by name, such as cubin90; lacking: regions without code for it."""

    found: Counter[str] = field(default_factory=Counter)
    kept: Counter[str] = field(default_factory=Counter)
    lacking: int = 0


def slim(library: bytearray, arch: int) -> Slimmed:
    """Remove code of other architectures from a library's bytes, whose number stays.

    Args:
        library: An ELF file of 64 bits; changed in place.
        arch: Of the GPU, such as 90.

    Raises:
        ValueError: It is not such a file.
    """
    done = Slimmed()
    found = [region for start, end in _sections(library) for region in _regions(library, start, end)]
    for region, entries in found:
        stay = _runs_on(entries, arch)
        done.lacking += not stay
        done.found.update(_bytes_by_name(entries))
        done.kept.update(_bytes_by_name(stay))
        _shorten(library, region, stay)
    return done


def _bytes_by_name(entries: list[Entry]) -> Counter[str]:
    counter: Counter[str] = Counter()
    for entry in entries:
        counter[f"{'ptx' if entry.kind == _PTX else 'cubin'}{entry.arch}"] += entry.header + entry.code
    return counter


def _sections(library: bytearray) -> Iterator[tuple[int, int]]:
    """Yield the first and last offset of each section that holds regions."""
    if library[:5] != b"\x7fELF\x02":
        raise ValueError("must be a shared library (an ELF file of 64 bits)")
    (table,) = struct.unpack_from("<Q", library, 0x28)
    size, number, names = struct.unpack_from("<HHH", library, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", library, table + i * size) for i in range(number)]
    for name_at, _, _, _, offset, length in headers:
        first = headers[names][4] + name_at
        name = bytes(library[first : library.index(b"\0", first)]).decode()
        if name in _SECTIONS:
            yield offset, offset + length


def _regions(library: bytearray, start: int, end: int) -> Iterator[tuple[int, list[Entry]]]:
    """Yield the offset of each region of a section, with its entries."""
    offset = start
    while offset + _REGION.size <= end:
        magic, _, header, length = _REGION.unpack_from(library, offset)
        if magic != _MAGIC:
            offset += 8
            continue
        region, offset = offset, offset + header
        stop, entries = offset + length, []
        while offset < stop:
            kind, _, entry_header, code, _, _, _, _, arch = _ENTRY.unpack_from(library, offset)
            if entry_header == 0:
                break
            entries.append(Entry(offset, kind, entry_header, code, arch))
            offset = entries[-1].end
        yield region, entries
        offset = (stop + 7) // 8 * 8


def _runs_on(entries: list[Entry], arch: int) -> list[Entry]:
    """Return the entries that a GPU chooses from: its own, else the nearest older of its generation, else PTX."""
    cubins = [entry for entry in entries if entry.kind == _CUBIN]
    own = [entry for entry in cubins if entry.arch == arch]
    older = [entry for entry in cubins if entry.arch // 10 == arch // 10 and entry.arch < arch]
    compiled_there = [entry for entry in entries if entry.kind == _PTX and entry.arch <= arch]
    nearest = own or older or compiled_there
    return [entry for entry in nearest if entry.arch == max(each.arch for each in nearest)]


def _shorten(library: bytearray, region: int, stay: list[Entry]) -> None:
    _, _, header, length = _REGION.unpack_from(library, region)
    code = b"".join(library[entry.offset : entry.end] for entry in stay)
    struct.pack_into("<Q", library, region + 8, len(code))
    library[region + header : region + header + length] = code + bytes(length - len(code))


def main() -> None:
    """Slim the libraries that the command line names; print one line for each that has code for GPUs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="+", type=Path, metavar="LIBRARY")
    parser.add_argument("--arch", type=int, default=90, help="compute capability without the point (90: H100, H200)")
    known = parser.parse_args()
    for path in known.libraries:
        library = bytearray(path.read_bytes())
        done = slim(library, known.arch)
        if not done.found:
            continue
        path.write_bytes(library)
        found, kept = (sum(counter.values()) / 2**20 for counter in (done.found, done.kept))
        kinds = ", ".join(sorted(done.kept)) or "nothing"
        print(f"{path.name}: {kept:.1f} of {found:.1f} MiB kept ({kinds}); {done.lacking} regions have none for it")


if __name__ == "__main__":
    main()
