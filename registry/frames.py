"""Frames as bytes, encoded once and joined afterwards.

A repeated field is encoded as its elements one after another, each with tag and length.  So a frame is
encoded when it is queued, its exact size is known from then on, and a batch is what was queued, joined.
(Copying frames into a Batch message encodes and decodes each of them.)
"""

from __future__ import annotations

from registry.v1 import messages_pb2 as pb


def encode(frame: pb.Frame) -> bytes:
    """Return the bytes of ``frame`` inside a batch: joined, such parts are the encoding of a Batch."""
    raw = frame.SerializeToString()
    size = len(raw)
    return (_HEADS[size] if size < len(_HEADS) else head(1, size)) + raw


def head(number: int, size: int) -> bytes:
    """Return what comes before ``size`` bytes of the field ``number`` (at most 15): tag and length."""
    out = bytearray((number << 3 | 2,))
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)


_HEADS = tuple(head(1, size) for size in range(1024))
