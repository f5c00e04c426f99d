"""A stand-in for the hub's storage of large files: the part of the Xet protocol that is used.

A client splits files into chunks and sends them in bundles (xorbs), then shards that list the
chunks of each file. To fetch a file, it asks for that list and for the bytes of the bundles. The
formats are those of https://huggingface.co/docs/xet. Only hashes of whole files are checked.
"""

from __future__ import annotations

import hashlib
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow

ENTRY = 48  # bytes of each entry of a shard, and of its header
END = b"\xff" * 32
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30
LZ4, GROUPED_LZ4 = 1, 2  # how a chunk is compressed; 0 is not at all


@dataclass(frozen=True)
class Term:
    """Consecutive chunks of a bundle in a file, `end` excluded."""

    xorb: str
    begin: int
    end: int
    num_bytes: int


@dataclass
class Storage:
    """The bundles and file lists that were uploaded."""

    xorbs: dict[str, bytes] = field(default_factory=dict)
    files: dict[str, list[Term]] = field(default_factory=dict)  # by the file's Xet hash
    hashes: dict[str, str] = field(default_factory=dict)  # the file's Xet hash, by its SHA-256

    def add_shard(self, shard: bytes) -> dict[str, bytes]:
        """Keep a shard's file lists, and return those files by their SHA-256."""
        contents = {}
        entries = iter(shard[i : i + ENTRY] for i in range(ENTRY, len(shard), ENTRY))
        for head in entries:
            if head[:32] == END:
                break
            name, (flags, count) = text(head[:32]), struct.unpack_from("<II", head, 32)
            terms = []
            for _ in range(count):
                entry = next(entries)
                _, size, begin, end = struct.unpack_from("<IIII", entry, 32)
                terms.append(Term(text(entry[:32]), begin, end, size))
            for _ in range(count if flags & HAS_VERIFICATION else 0):
                next(entries)
            assert flags & HAS_SHA256
            sha256 = text(next(entries)[:32])
            content = b"".join(self.content(term) for term in terms)
            assert hashlib.sha256(content).hexdigest() == sha256
            self.files[name], self.hashes[sha256], contents[sha256] = terms, name, content
        return contents

    def content(self, term: Term) -> bytes:
        """Return the bytes of a file's part."""
        pieces = list(chunks(self.xorbs[term.xorb]))[term.begin : term.end]
        content = b"".join(piece for _, _, piece in pieces)
        assert len(content) == term.num_bytes
        return content

    def reconstruction(self, name: str, url: str) -> dict[str, Any]:
        """Return where the chunks of a file can be fetched."""
        fetched: dict[str, Any] = {}
        for term in self.files[name]:
            pieces = list(chunks(self.xorbs[term.xorb]))[term.begin : term.end]
            chosen = {"start": term.begin, "end": term.end}
            in_bytes = {"start": pieces[0][0], "end": pieces[-1][1] - 1}
            where = {"range": chosen, "url": f"{url}/xorb/{term.xorb}", "url_range": in_bytes}
            fetched.setdefault(term.xorb, []).append(where)
        terms = [
            {
                "hash": term.xorb,
                "unpacked_length": term.num_bytes,
                "range": {"start": term.begin, "end": term.end},
            }
            for term in self.files[name]
        ]
        return {"offset_into_first_range": 0, "terms": terms, "fetch_info": fetched}


def text(digest: bytes) -> str:
    """Return a hash as Xet writes it: four little-endian numbers of eight bytes."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def chunks(xorb: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Yield the begin, the end and the content of each chunk of a bundle."""
    place = 0
    while place < len(xorb) and xorb[place : place + 7] != b"XETBLOB":
        kind = xorb[place + 4]
        packed, whole = (
            int.from_bytes(xorb[place + at : place + at + 3], "little") for at in (1, 5)
        )
        end = place + 8 + packed
        content = xorb[place + 8 : end]
        if kind in {LZ4, GROUPED_LZ4}:
            content = pyarrow.decompress(content, whole, codec="lz4", asbytes=True)
        yield place, end, ungrouped(content) if kind == GROUPED_LZ4 else content
        place = end


def ungrouped(content: bytes) -> bytes:
    """Undo the grouping of 4-byte numbers: all first bytes, then all second bytes, and so on."""
    numbers, place = bytearray(len(content)), 0
    for byte in range(4):
        size = len(range(byte, len(content), 4))
        numbers[byte::4] = content[place : place + size]
        place += size
    return bytes(numbers)


def bytes_asked_for(header: str) -> slice:
    """Return the slice that a Range header asks for."""
    bounds = re.fullmatch(r"bytes=(\d+)-(\d+)", header)
    return slice(int(bounds[1]), int(bounds[2]) + 1) if bounds else slice(None)
